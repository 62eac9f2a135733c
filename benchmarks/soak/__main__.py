"""Disturbs expert servers under load, and counts what clients notice.

One host serves configs/smollm2-moe.yaml; four, in network namespaces, serve configs/smollm2-moe-hosts.yaml. The soak
measures what the machine can do, and sends 70% of that: first undisturbed, then with a server killed or frozen, or the
link of its host cut or slowed, every so often. Every answer must be complete and token for token what it was before.

    make soak-experts ARGS="--hosts 4 --kind cut"
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.soak.disturbances import KILL, STOP, Disturbances, Kind, cut, slow
from benchmarks.soak.run import soak
from benchmarks.soak.stacks import MODEL, on_hosts, on_this_host
from benchmarks.soak.target import Target

CALM_SECONDS = 30.0


@contextmanager
def served(num_hosts: int) -> Iterator[tuple[Target, dict[str, Kind]]]:
    """An application, and all that can be done to its servers."""
    if num_hosts == 1:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder, on_this_host(Path(folder)) as stack:
            yield Target(stack.url, MODEL), {"kill": KILL, "stop": STOP}
    else:
        with on_hosts(num_hosts) as hosts:
            links = hosts.cluster.hosts, hosts.cluster.head
            yield Target(hosts.url, MODEL), {"kill": KILL, "stop": STOP, "cut": cut(*links), "slow": slow(*links)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1, help="more than one: in network namespaces, as root")
    parser.add_argument("--kind", choices=["kill", "stop", "cut", "slow", "all"], default="kill")
    parser.add_argument("--every", type=float, default=20, help="seconds between two disturbances")
    parser.add_argument("--number", type=int, default=9, help="of disturbances")
    options = parser.parse_args()
    if options.kind in ("cut", "slow") and options.hosts == 1:
        parser.error(f"one host has no link to {options.kind}: give --hosts 4")
    with served(options.hosts) as (target, kinds):
        chosen = list(kinds.values()) if options.kind == "all" else [kinds[options.kind]]
        disturbances = Disturbances(chosen, options.number, options.every)
        print(json.dumps(asyncio.run(soak(target, disturbances, CALM_SECONDS)), indent=1))


if __name__ == "__main__":
    main()
