"""Experts that compute their own tokens only, against the form in which every expert computes every token.

    python -m benchmarks.moe --experts 16 --tokens 256

The dense form is the slow oracle: one line of mathematics with nothing to get wrong. Rounds are
alternated, so that both forms meet the same machine. Ends in one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.report import hardware
from model.args import ModelArgs, MoEArgs
from model.kernels import cpu
from model.moe import MoE
from model.packed import PackedMoE
from model.parallel import ensure_model_parallel

Form = Callable[[Tensor], Tensor]


def all_experts(layer: MoE, x_aD: Tensor) -> Tensor:
    """The output of `layer`, [a, D], through every expert for every token: the weight of most is zero."""
    scores_aE = x_aD @ layer.router_DE
    top, chosen = scores_aE.topk(layer.args.top_k)
    kept_aE = torch.full_like(scores_aE, -torch.inf).scatter(1, chosen, top)
    is_sigmoid = layer.args.router == "sigmoid"
    weights_Ea1 = (kept_aE.sigmoid() if is_sigmoid else kept_aE.softmax(-1)).T.unsqueeze(-1)
    in_EaD = x_aD * weights_Ea1 if is_sigmoid else x_aD.expand(layer.args.num_experts, -1, -1)
    experts = layer.experts
    out_EaD = (F.silu(in_EaD @ experts.w1) * (in_EaD @ experts.w3)) @ experts.w2
    routed = (out_EaD if is_sigmoid else out_EaD * weights_Ea1).sum(0)
    return routed if layer.shared_expert is None else routed + layer.shared_expert(x_aD)


def random_layer(dim: int, moe: MoEArgs, dtype: torch.dtype = torch.float32) -> MoE:
    """A layer whose output is of order one."""
    ensure_model_parallel()
    layer = MoE(ModelArgs(dim=dim, n_layers=1, n_heads=1, vocab_size=1, moe_args=moe))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            width = parameter.shape[-2] if parameter.dim() == 3 or "router" in name else parameter.shape[-1]
            parameter.normal_(std=width**-0.5)
    return layer.to(dtype)


def seconds(form: Form, x: Tensor) -> float:
    start = time.perf_counter()
    form(x)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(forms: dict[str, Form], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each form, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in track(range(rounds + 1), "Rounds"):
        for name, form in forms.items():
            taken = seconds(form, x)
            if number:
                times[name].append(taken)
    return times


def forms_of(layer: MoE) -> dict[str, Form]:
    """Every way to compute `layer`; packed is how a bfloat16 model is served."""
    forms: dict[str, Form] = {"dense": lambda x: all_experts(layer, x), "grouped": layer}
    if layer.router_DE.dtype is torch.bfloat16 and cpu.available():
        forms["packed"] = PackedMoE(layer)
    return forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 16), ("top-k", 1), ("tokens", 256), ("dim", 1024), ("hidden", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    moe = MoEArgs(num_experts=options.experts, top_k=options.top_k, hidden_dim=options.hidden)
    layer = random_layer(options.dim, moe, getattr(torch, options.dtype))
    x = torch.randn(options.tokens, options.dim).to(layer.router_DE.dtype)
    times = measure(forms_of(layer), x, options.rounds)
    ratios = {
        name: median(slow / fast for slow, fast in zip(times["dense"], times[name], strict=True)) for name in times
    }
    table = Table(title=f"One MoE layer, {options.tokens} tokens, {options.experts} experts", title_justify="left")
    for heading in ("form", "ms, median", "least", "most", "times as fast as dense"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for name, taken in times.items():
        milliseconds = (f"{1e3 * value:.1f}" for value in (median(taken), min(taken), max(taken)))
        table.add_row(name, *milliseconds, f"{ratios[name]:.1f}")
    Console().print(table)
    print(json.dumps({"moe": vars(options), "ratios": ratios, "seconds": times, **hardware()}))


if __name__ == "__main__":
    main()
