"""Builds `PagedBatch`es for tests: each sequence owns shuffled blocks."""

import torch

from model.datatypes import PagedBatch


class Pages:
    """Block tables for `sequences` sequences of at most `length` tokens, blocks in random order."""

    def __init__(self, sequences: int, length: int, block_size: int, seed: int = 0) -> None:
        blocks = -(-length // block_size)
        self.num_blocks = sequences * blocks
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
        self.tables = order.view(sequences, blocks).int()

    def batch(self, pieces: list[tuple[int, int, torch.Tensor]]) -> PagedBatch:
        """pieces: (sequence, position of its first token, tokens). Logits are asked for every token."""
        lengths = torch.tensor([len(tokens) for _, _, tokens in pieces])
        starts = torch.tensor([start for _, start, _ in pieces])
        return PagedBatch(
            tokens=torch.cat([tokens for _, _, tokens in pieces]),
            positions=torch.cat([torch.arange(start, start + len(t)) for _, start, t in pieces]),
            query_starts=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            context_lens=(starts + lengths).int(),
            block_tables=self.tables[[sequence for sequence, _, _ in pieces]].contiguous(),
            logit_rows=torch.arange(int(lengths.sum())),
            num_decodes=int((lengths == 1).sum()),
        )
