"""Tells what a Serve YAML needs in memory, and what does not fit. Needs no cluster and no weights.

Exit code 0 if all that is known fits, 1 if something does not, 2 for a faulty YAML.
"""

import argparse
import json
import sys
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from deployments.config import ConfigError
from deployments.plan.plan import Given, plan
from deployments.plan.table import as_json, show


def main() -> None:
    arguments = _parser().parse_args()
    given = Given(
        gpu_memory=arguments.gpu_memory,
        host_memory=arguments.memory,
        headroom=arguments.headroom,
        architectures=dict(arguments.architecture),
    )
    try:
        plans = plan(arguments.config, given)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps({"models": [as_json(model) for model in plans]}, indent=2))
    else:
        console = Console(width=max(100, Console().width), soft_wrap=True)
        for model in plans:
            show(model, console)
    sys.exit(1 if any(model.faults for model in plans) else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moray-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="a Serve YAML")
    parser.add_argument("--json", action="store_true", help="for machines: everything in bytes")
    parser.add_argument("--gpu-memory", type=_size, help="of one GPU (80GB), where no accelerator_type tells")
    parser.add_argument("--memory", type=_size, help="of a process without a GPU, where ray_actor_options do not say")
    parser.add_argument(
        "--headroom", type=_share, default=0.1, help="share of memory left to activations and the runtime (0.1)"
    )
    parser.add_argument(
        "--architecture", type=_architecture, action="append", default=[], metavar="ID=PATH",
        help="a model YAML, or a folder with config.json, for the model ID",
    )  # fmt: skip
    return parser


def _size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GB or 24GiB") from None


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def _architecture(text: str) -> tuple[str, Path]:
    model, equals, path = text.partition("=")
    if not (model and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=PATH")
    return model, Path(path)


if __name__ == "__main__":
    main()
