"""The dashboard and the scrape config name what there is."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, generate_latest

from deployments.broadcast import ANSWER_SECONDS
from deployments.engine.blocks import BlockPool
from deployments.engine.metrics import EngineMetrics
from deployments.engine.scheduler import Limits, Scheduler
from deployments.front.metrics import FrontMetrics

CONFIGS = Path(__file__).parents[2] / "configs"
LIMITS = Limits(
    max_num_seqs=1, max_num_batched_tokens=16, max_model_len=16, block_size=16, enable_prefix_caching=True
)  # fmt: skip


def exposed() -> dict[str, set[str]]:
    """Sample names of every metric with the names of their labels."""
    front = FrontMetrics("front", 1024)
    front.of_model("m")
    engine = EngineMetrics("m", "engine", Scheduler(BlockPool(1), LIMITS))
    found: dict[str, set[str]] = {}
    for registry in (front.registry, engine.registry):
        for name, labels in samples(registry):
            found.setdefault(name, set()).update(labels)
    return found


def samples(registry: CollectorRegistry) -> list[tuple[str, list[str]]]:
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return [(re.split(r"[{ ]", line)[0], re.findall(r"(\w+)=\"", line)) for line in lines]


def dashboard() -> Any:
    return json.loads((CONFIGS / "grafana-dashboard.json").read_text())


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    there = exposed()
    targets = [target for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(targets) > 15
    for target in targets:
        names = re.findall(r"\b(?:vllm|moray):\w+", target["expr"])
        assert names
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for names_of_labels in re.findall(r"by \(([^)]*)\)", target["expr"]):
            labels |= set(names_of_labels.split(", "))
        for name in names:
            assert name in there, f"{name} is not exposed"
            assert labels <= there[name], f"{name} has no label {labels - there[name]}"


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_prometheus_scrapes_the_quickstart_and_waits_for_slow_replicas() -> None:
    [job] = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["scrape_configs"]
    options = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["http_options"]
    assert job["static_configs"] == [{"targets": [f"{options['host']}:{options['port']}"]}]
    assert ANSWER_SECONDS < int(job["scrape_timeout"].removesuffix("s")) < int(job["scrape_interval"].removesuffix("s"))
