"""What end-to-end tests need of a stack, in terms of one engine's settings.

`start_stack(args) -> base_url` (tests/conftest.py) runs an application from a Serve YAML's `args`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

GGUF = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
KV_VALUES_PER_TOKEN = 30 * 2 * 3 * 64
"""SmolLM2-135M: layers, keys and values, KV heads, width of a head."""
BYTES = {"float32": 4, "bfloat16": 2}


def application(num_kv_tokens: int = 32_000, dtype: str = "float32", **engine: object) -> dict[str, Any]:
    """`args` of a Serve YAML with one SmolLM2 engine that has room for `num_kv_tokens` keys and values."""
    settings = {
        "dtype": dtype,
        "max_model_len": 2048,
        "kv_cache_memory": num_kv_tokens * KV_VALUES_PER_TOKEN * BYTES[dtype],
    }
    return {"models": [{"id": "smollm2", "path": str(GGUF), "engine": settings | engine}]}


@pytest.fixture(scope="session")
def start_engine(start_stack: Callable[[dict[str, Any]], str]) -> Callable[..., str]:
    """Starts a stack whose engine has the given settings, and gives its base URL."""
    return lambda **engine: start_stack(application(**engine))


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> str:
    """A stack with default settings; `MORAY_TEST_BASE_URL` names one that already runs (any vLLM-like server)."""
    return os.environ.get("MORAY_TEST_BASE_URL") or request.getfixturevalue("start_engine")()


def metric(base_url: str, name: str, model: str | None = None) -> float:
    """The sum of a metric's samples over all labels, or over those of one model."""
    families = text_string_to_metric_families(httpx.get(f"{base_url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if model in (None, sample.labels["model_name"]))


async def model_id(client: httpx.AsyncClient) -> str:
    return str((await client.get("/v1/models")).json()["data"][0]["id"])
