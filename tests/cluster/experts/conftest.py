"""A small mixture of experts on disk, and clusters of expert servers that hold its experts."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.experts.processes import Cluster
from tests.cluster.experts.small_model import write_model


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe"))


@pytest.fixture
def start_cluster(tmp_path: Path, moe_folder: Path) -> Iterator[Callable[..., Cluster]]:
    clusters: list[Cluster] = []

    def start(num_servers: int, dtype: str = "bfloat16", **options: int) -> Cluster:
        folder = tmp_path / str(len(clusters))
        folder.mkdir()
        clusters.append(Cluster(folder, moe_folder, dtype, **options))
        clusters[-1].start(num_servers)
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.stop()
