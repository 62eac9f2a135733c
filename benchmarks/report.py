"""Turns the figures of alternated rounds into a table for people and one JSON line for machines."""

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.cells import CELLS, Figures
from benchmarks.servers import Memory

LATENCIES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


@dataclass
class Results:
    """Everything one run measured. `rounds[server][cell]` has one entry a round, in the same order for each server."""

    versions: dict[str, str]
    startup: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)

    def values(self, server: str, cell: str, name: str) -> list[float]:
        return [getattr(figures, name) for figures in self.rounds[server][cell]]

    def ratio(self, cell: str, name: str) -> float | None:
        """Median over rounds of ours / theirs, each pair measured back to back."""
        if len(self.rounds) < 2:
            return None
        theirs, ours = (self.values(server, cell, name) for server in self.rounds)
        return median(our / their for our, their in zip(ours, theirs, strict=True))


def throughput_name(cell: str) -> str:
    return "prompt_throughput" if cell == "prompts" else "output_throughput"


def print_report(results: Results) -> None:
    console = Console(width=130)
    console.print(_load_table(results))
    console.print(_footprint_table(results))
    console.print(_note(results), highlight=False)
    print(json.dumps(as_json(results)))


def _load_table(results: Results) -> Table:
    title = "Median of rounds, least - most in brackets; ratio is the median of paired rounds"
    table = Table(title=title, title_justify="left")
    for heading in ("load", "server", "tok/s", "ratio", "TTFT p50 ms", "p99", "ratio p50", "ITL p50 ms", "p99"):
        table.add_column(heading, justify="left" if heading in ("load", "server") else "right")
    for cell in CELLS:
        for server in results.rounds:
            last = server == list(results.rounds)[-1]
            table.add_row(*_row(results, cell.name, server, last), end_section=last)
    return table


def _row(results: Results, cell: str, server: str, is_ours: bool) -> list[str]:
    rates = results.values(server, cell, throughput_name(cell))
    middle = {name: f"{median(results.values(server, cell, name)):.0f}" for name in ("ttft_p50", "ttft_p99")}
    middle |= {name: f"{median(results.values(server, cell, name)):.1f}" for name in ("itl_p50", "itl_p99")}

    def ratio(name: str) -> str:
        value = results.ratio(cell, name) if is_ours else None
        return "" if value is None else f"{value:.2f}"

    return [
        f"{cell}: 8 x 800 in" if cell == "prompts" else f"concurrency {cell}",
        server,
        f"{median(rates):.0f} [{min(rates):.0f} - {max(rates):.0f}]".replace("[", r"\["),
        ratio(throughput_name(cell)),
        middle["ttft_p50"],
        middle["ttft_p99"],
        ratio("ttft_p50"),
        middle["itl_p50"],
        middle["itl_p99"],
    ]


def _footprint_table(results: Results) -> Table:
    table = Table(title="Footprint", title_justify="left")
    for heading in ("server", "first answer after s", "RSS MB", "PSS MB", "processes", "CPUs while idle"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for server, memory in results.memory.items():
        idle = _over_cells(results, "idle_peer_cpu", set(results.rounds) - {server})
        table.add_row(
            server,
            f"{results.startup[server]:.1f}",
            f"{memory.rss / 1e6:.0f}",
            f"{memory.pss / 1e6:.0f}",
            str(memory.num_processes),
            "" if idle is None else f"{idle:.3f}",
        )
    return table


def _over_cells(results: Results, name: str, servers: set[str]) -> float | None:
    """Median of a figure over all cells and rounds in which one of `servers` was under load."""
    values = [
        getattr(figures, name)
        for server, cells in results.rounds.items()
        if server in servers
        for rounds in cells.values()
        for figures in rounds
    ]
    return median(values) if values else None


def _note(results: Results) -> str:
    client = _over_cells(results, "client_cpu", set(results.rounds))
    others = [figures.other_cpu for cells in results.rounds.values() for rounds in cells.values() for figures in rounds]
    return (
        f"The client used {client:.3f} CPUs; everything else on the machine {median(others):.2f} "
        f"(most {max(others):.2f}): well above 0, something disturbed the run."
    )


def as_json(results: Results) -> dict[str, object]:
    return {
        "benchmark": "peers",
        "hardware": hardware(),
        "versions": results.versions,
        "startup_seconds": {server: round(seconds, 2) for server, seconds in results.startup.items()},
        "memory_bytes": {server: {"rss": m.rss, "pss": m.pss} for server, m in results.memory.items()},
        "ratios": {
            cell.name: {name: results.ratio(cell.name, name) for name in (throughput_name(cell.name), *LATENCIES)}
            for cell in CELLS
        },
        "rounds": {
            server: {cell: [figures.as_dict() for figures in rounds] for cell, rounds in cells.items()}
            for server, cells in results.rounds.items()
        },
    }


def hardware() -> dict[str, object]:
    """CPU model, CPUs this process may use, memory in bytes, kernel."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
    }
