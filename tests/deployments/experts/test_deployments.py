"""Directory, expert servers and engine as the classes that Serve runs, in one process, handles between them."""

import asyncio
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.experts.table import Report, ServerAddress
from deployments.config import ExpertsConfig, ModelConfig, read
from deployments.engine.deployment import Engine
from deployments.engine.request import EngineRequest, ExpertsGone, SamplingParams
from deployments.experts.deployment import ExpertReplica
from deployments.experts.directory import ExpertDirectory
from deployments.front.mailbox import Mailbox
from deployments.metrics import render
from tests.cluster.experts.small_model import write_model

PROMPT, OUTPUT_TOKENS = [5, 17, 80], 12


class Handle:
    """As much of a Serve handle as is used: calls run in the replica's own loop, as they do in Serve."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.replica = self._run(self._make(make)).result(30)

    async def _make(self, make: Callable[[], Any]) -> Any:
        return make()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.replica, name)

        class Call:
            @staticmethod
            def remote(*arguments: object) -> Any:
                return asyncio.wrap_future(self._run(method(*arguments)))

        return Call

    def close(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_model(tmp_path_factory.mktemp("moe"))
    model = {
        "id": "moe",
        "path": str(folder),
        "engine": {"kv_cache_memory": "16MiB", "num_threads": 1},
        "experts": {"ready_timeout_s": 30, "give_up_s": 1},
    }
    return read({"models": [model]}).models[0]


@pytest.fixture
def directory(config: ModelConfig) -> Iterator[Handle]:
    handle = Handle(lambda: ExpertDirectory(config))
    yield handle
    handle.close()


async def complete(engine: Engine, mailbox: Mailbox, request_id: str) -> list[int]:
    with mailbox.open(request_id) as deltas:
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0)
        request = EngineRequest(request_id, PROMPT, sampling, mailbox.address)
        generating = asyncio.ensure_future(engine.generate(request))
        await asyncio.wait_for(generating, 30)
        tokens: list[int] = []
        while len(tokens) < OUTPUT_TOKENS:
            tokens += (await asyncio.wait_for(deltas.get(), 10)).token_ids
    return tokens


def check_metrics(text: str, servers: list[str], num_rows: int) -> None:
    """Of one engine and these servers, of which the first has left and nobody noticed."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "moe"
            found[sample.name.removeprefix("moray:")].append(sample)

    def values(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        assert all(sample.labels.keys() >= set(labels) for sample in found[name])
        by_labels = {tuple(sample.labels[label] for label in labels): sample.value for sample in found[name]}
        assert len(by_labels) == len(found[name]), f"{labels} do not tell series of {name} apart"
        return by_labels

    units = {(layer, str(expert)) for layer in ("1", "3") for expert in range(8)}
    rows = values("expert_tokens_total", "server", "layer", "expert")
    assert {server for server, _, _ in rows} == set(servers)
    assert {(layer, expert) for _, layer, expert in rows} <= units
    assert sum(rows.values()) == num_rows
    calls = values("expert_calls_total", "server")
    trips = values("expert_round_trip_seconds_count", "engine", "rank", "server")
    assert {server: count for (_, _, server), count in trips.items()} == {server: calls[server,] for server in servers}
    assert all(value > 0 for value in values("expert_busy_seconds_total", "server").values())
    assert values("expert_refusals_total", "server") == {(server,): 0 for server in servers}
    assert values("expert_queue", "server").keys() == {(server,) for server in servers}
    copies = values("expert_copies", "layer", "expert")
    assert copies.keys() == units
    assert min(copies.values()) >= 2
    imbalance = values("expert_imbalance", "layer")
    assert imbalance.keys() == {("1",), ("3",)}
    assert min(imbalance.values()) >= 1
    named = values("experts_named", "server")
    assert named.keys() == {(server,) for server in servers[1:]}
    assert sum(named.values()) == sum(copies.values())
    assert list(values("expert_waits_total", "engine", "rank").values()) == [0]
    assert "expert_failovers_total" not in found


@pytest.mark.timeout(120)
async def test_an_engine_with_expert_servers_generates_what_one_without_does(
    config: ModelConfig, directory: Handle
) -> None:
    torch.set_num_threads(1)
    mailbox = Mailbox("127.0.0.1")
    alone = Engine(config.model_copy(update={"experts": None}))
    expected = await complete(alone, mailbox, "alone")
    alone.stop()
    replicas = [ExpertReplica(config, directory) for _ in range(3)]
    engine = await asyncio.to_thread(Engine, config, directory)
    rows = sum(replica._server.rows.total() for replica in replicas)  # of its first steps, which are for nobody
    assert await complete(engine, mailbox, "remote") == expected

    leaving = asyncio.create_task(asyncio.to_thread(replicas[0].__del__))
    number = 0
    while not leaving.done():
        assert await complete(engine, mailbox, f"leaving {number}") == expected
        number += 1
    assert number > 1

    status = directory.replica.status()
    assert [server.is_leaving for server in status.servers].count(False) == 2
    assert status.fewest_copies == min(count for _, _, count in status.copies) == 2
    assert 0 < (engine.status().expert_epoch or 0) <= (status.epoch or 0)
    snapshots = [each.metrics() for each in (engine, directory.replica, *replicas)]
    tokens = (number + 1) * (len(PROMPT) + OUTPUT_TOKENS - 1)  # the last of each is nobody's input
    rows += 2 * tokens  # layers, one expert in each
    check_metrics(render(snapshots).decode(), [replica.status().replica_id for replica in replicas], rows)
    for replica in replicas[1:]:
        assert 0 < replica.record_autoscaling_stats()["busy_share"] < 1
        assert replica.record_autoscaling_stats() == {"busy_share": 0.0}
        replica.check_health()
        replica._membership.stop()
        replica._server.stop()
        replica._has_left = True
    with pytest.raises(ExpertsGone, match=r"^experts .* of layer 1 did not answer for 1 s"):
        await complete(engine, mailbox, "without")
    engine.stop()
    mailbox.close()


async def test_a_table_with_a_smaller_epoch_is_taken_too(config: ModelConfig) -> None:
    """As after a restart of the directory on a host whose clock is behind."""
    directory = ExpertDirectory(config)
    await directory.report(Report(ServerAddress("a", "here", "unix:", "tcp:", b""), frozenset(), {}))
    table = await asyncio.wait_for(directory.next_table(0), 10)
    assert table is not None
    assert await asyncio.wait_for(directory.next_table(table.epoch + 1000), 1) == table
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(directory.next_table(table.epoch), 0.5)


def test_a_directory_needs_no_weights_on_its_host(config: ModelConfig, tmp_path: Path) -> None:
    shutil.copy(Path(config.path) / "params.json", tmp_path)
    ExpertDirectory(config.model_copy(update={"path": str(tmp_path)}))


async def test_a_model_without_experts_is_refused(tmp_path: Any) -> None:
    from model import LLM, ModelArgs

    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=16, ffn_hidden_dim=32)
    torch.save(LLM(args).state_dict(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(args.model_dump_json())
    config = ModelConfig(id="dense", path=str(tmp_path), experts=ExpertsConfig())
    for make in (lambda: ExpertDirectory(config), lambda: ExpertReplica(config, None)):
        with pytest.raises(ValueError, match="'dense' has no experts: remove `experts`"):
            make()
