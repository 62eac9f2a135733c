"""A model whose experts are elsewhere computes what it computes with all its weights in one process."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cluster.experts.client import ExpertClient
from cluster.experts.membership import Membership
from cluster.experts.server import ExpertServer
from cluster.experts.weights import HeldExperts
from cluster.shard import Shard
from model import LLM, TransformerInput
from model.checkpoint import open_checkpoint
from model.kernels import cpu
from tests.cluster.experts.processes import HOST, ManagedDirectory
from tests.model.checkpoint.ranks import on_ranks
from tests.model.paging import Pages

TOKENS = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(0))


def greedy(model: LLM, num_tokens: int = 24) -> list[list[int]]:
    tokens = TOKENS[:, :10]
    for _ in range(num_tokens):
        tokens = torch.cat([tokens, model(TransformerInput(tokens)).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens.tolist()


@pytest.mark.parametrize("num_servers", [1, 3, 8])
@torch.no_grad()
def test_float32_speaks_the_same(start_cluster, moe_folder, num_servers):
    checkpoint = open_checkpoint(moe_folder)
    local = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(local)
    remote = LLM(checkpoint.args, initialize=False, experts=start_cluster(num_servers, dtype="float32").client().layer)
    assert not any(".experts." in name for name, _ in remote.named_parameters())
    checkpoint.load_into(remote, experts=False)
    torch.testing.assert_close(
        remote(TransformerInput(TOKENS)).logits, local(TransformerInput(TOKENS)).logits, rtol=1e-5, atol=1e-5
    )
    assert greedy(remote) == greedy(local)


@pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")
def test_a_shard_in_bfloat16_computes_the_same_bits(start_cluster, moe_folder):
    client = start_cluster(4).client()
    settings = dict(path=str(moe_folder), dtype="bfloat16", block_size=16, max_num_seqs=3, num_threads=1)
    local, remote = Shard(**settings), Shard(**settings, experts=lambda: client.layer)
    pages = Pages(local.args, sequences=3, length=40, block_size=16)
    for start, stop in ((0, 30), (30, 31), (31, 32), (32, 40)):
        batch = pages.batch([(row, start, tokens[start:stop]) for row, tokens in enumerate(TOKENS)])
        assert torch.equal(remote.logits(batch), local.logits(batch))


def logits_of_rank(rank, world_size, folder, socket):
    client = ExpertClient(ManagedDirectory(socket), HOST, deadline=30.0)  # no row is sent again for being late
    client.start()
    client.wait_until_ready(60)
    checkpoint = open_checkpoint(folder)
    model = LLM(checkpoint.args, initialize=False, experts=client.layer)
    checkpoint.load_into(model, rank, world_size, experts=False)
    with torch.no_grad():
        # One token alone: one of two ranks has nothing to send.
        logits = [model(TransformerInput(tokens)).logits.flatten() for tokens in (TOKENS, TOKENS[:1, :1])]
    client.close()
    return torch.cat(logits)


@contextmanager
def serving(names: Iterable[str], folder: Path, socket: str) -> Iterator[list[ExpertServer]]:
    """Expert servers in this process, whose counts can be read."""
    servers = [ExpertServer(HeldExperts(open_checkpoint(folder), torch.float32), HOST, name) for name in names]
    memberships = [Membership(server, server._experts, ManagedDirectory(socket)) for server in servers]
    for part in (*servers, *memberships):
        part.start()
    yield servers
    for part in (*memberships, *servers):
        part.stop()


def test_two_ranks_send_each_token_once(start_cluster, moe_folder, tmp_path):
    cluster = start_cluster(0)
    checkpoint = open_checkpoint(moe_folder)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    with torch.no_grad():
        alone = torch.cat([model(TransformerInput(t)).logits.flatten() for t in (TOKENS, TOKENS[:1, :1])])
    with serving(("s0", "s1"), moe_folder, cluster.socket) as servers:
        cluster.wait_for_copies(2, 30, {"s0", "s1"})
        for got in on_ranks(tmp_path / "ranks", 2, logits_of_rank, moe_folder, cluster.socket):
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        rows = sum((server.rows for server in servers), Counter())
    sent = {layer: sum(rows[unit] for unit in rows if unit[0] == layer) for layer in (1, 3)}
    assert sent == dict.fromkeys((1, 3), (TOKENS.numel() + 1) * checkpoint.args.moe_args.top_k)
    assert sum(sent.values()) == rows.total()
