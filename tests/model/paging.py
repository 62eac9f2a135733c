"""Builds `PagedBatch`es for tests: each sequence owns shuffled blocks."""

import torch

from model.args import ModelArgs
from model.datatypes import PagedBatch
from model.kv_groups import kv_groups


class Pages:
    """Block tables for `sequences` sequences of at most `length` tokens, blocks in random order."""

    def __init__(self, args: ModelArgs, sequences: int, length: int, block_size: int, seed: int = 0) -> None:
        groups, blocks = len(kv_groups(args)), -(-length // block_size)
        self.num_blocks = groups * sequences * blocks
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
        self.tables = order.view(groups, sequences, blocks).int()

    def batch(self, pieces: list[tuple[int, int, torch.Tensor]]) -> PagedBatch:
        """pieces: (sequence, position of its first token, tokens). Logits are asked for every token."""
        lengths = torch.tensor([len(tokens) for _, _, tokens in pieces])
        starts = torch.tensor([start for _, start, _ in pieces])
        return PagedBatch(
            tokens=torch.cat([tokens for _, _, tokens in pieces]),
            positions=torch.cat([torch.arange(start, start + len(t)) for _, start, t in pieces]),
            query_starts=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            context_lens=(starts + lengths).int(),
            block_tables=self.tables[:, [sequence for sequence, _, _ in pieces]],
            logit_rows=torch.arange(int(lengths.sum())),
            num_decodes=int((lengths == 1).sum()),
        )
