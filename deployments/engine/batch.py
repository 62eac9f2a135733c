"""Scheduled sequences as the arrays that a shard takes.

Block tables live in one array from step to step, a row for each running sequence's slot, and
only new blocks are written; a decode step is built with a fixed number of array operations.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deployments.engine.images import parts_within
from deployments.engine.scheduler import Limits, Plan
from deployments.engine.sequence import Sequence
from model.datatypes import PagedBatch
from model.penalties import Adjustment
from model.sampling import RandomRows, SamplingBatch

NO_IMAGES: Mapping[str, Tensor] = {}

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, as in vLLM."""


class StepBatch:
    """A step as the shard takes it, and which sequence each of its logit rows is for.

    sampled: sequences of the first rows, each of which gets a token. targets: sequence and position of
    the rows after them, whose prompt tokens' log probabilities are wanted.
    """

    __slots__ = ("paged", "sampled", "sampling", "targets")

    def __init__(
        self, paged: PagedBatch, sampling: SamplingBatch, sampled: list[Sequence], targets: list[tuple[Sequence, int]]
    ) -> None:
        self.paged, self.sampling, self.sampled, self.targets = paged, sampling, sampled, targets


class BatchBuilder:
    """Builds batches of one engine. The tensors of a batch are valid until the next is built."""

    def __init__(self, limits: Limits) -> None:
        slots = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        width = -(-limits.max_model_len // limits.block_size)
        self._block_size = limits.block_size
        self._tables = np.zeros((len(limits.kv_chunks), slots, width), np.int32)
        self._tokens = torch.zeros(limits.max_num_batched_tokens, dtype=torch.int64)
        self._positions = torch.zeros(limits.max_num_batched_tokens, dtype=torch.int64)
        self._tokens_np, self._positions_np = self._tokens.numpy(), self._positions.numpy()
        self._decode_views: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._rows = torch.arange(slots)
        self._starts = torch.arange(slots + 1, dtype=torch.int32)

    def build(self, plan: Plan, images: Mapping[str, Tensor] = NO_IMAGES) -> StepBatch:
        """The step of `plan`: single tokens first, then longer chunks.

        images: embeddings [patches, dim] by digest, of every image that the plan's tokens stand for.
        """
        sequences = list(plan)
        if all(sequence.num_pending == 1 and not sequence.wants_prompt_logprobs for sequence in sequences):
            return self._decodes(sequences)
        sequences.sort(key=lambda sequence: plan[sequence] > 1)
        starts = [0]
        for sequence in sequences:
            starts.append(self._put(sequence, starts[-1], plan[sequence]))
        return self._chunks(plan, sequences, starts, images)

    def _decodes(self, sequences: list[Sequence]) -> StepBatch:
        """One token and one logit row each: a fixed number of array operations."""
        count = len(sequences)
        positions = self._positions_np[:count]
        positions[:] = [sequence.num_computed for sequence in sequences]
        self._tokens_np[:count] = [sequence.tokens[-1] for sequence in sequences]
        tokens, places, starts, rows = self._views(count)
        paged = PagedBatch(
            tokens=tokens,
            positions=places,
            query_starts=starts,
            context_lens=torch.from_numpy((positions + 1).astype(np.int32)),
            block_tables=self._block_tables(sequences),
            logit_rows=rows,
            num_decodes=count,
        )
        return StepBatch(paged, _sampling(sequences, []), sequences, [])

    def _views(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions, query starts and logit rows of `count` decodes; slicing anew would cost 10 us a step."""
        if count not in self._decode_views:
            self._decode_views[count] = (
                self._tokens[:count], self._positions[:count], self._starts[: count + 1], self._rows[:count],
            )  # fmt: skip
        return self._decode_views[count]

    def _put(self, sequence: Sequence, start: int, count: int) -> int:
        first, end = sequence.num_computed, start + count
        self._tokens_np[start:end] = sequence.tokens[first : first + count]
        self._positions_np[start:end] = np.arange(first, first + count)
        return end

    def _chunks(
        self, plan: Plan, sequences: list[Sequence], starts: list[int], images: Mapping[str, Tensor]
    ) -> StepBatch:
        rows, sampled = [], []
        target_rows: list[int] = []
        targets: list[tuple[Sequence, int]] = []
        for sequence, start, end in zip(sequences, starts, starts[1:], strict=False):
            if plan[sequence] == sequence.num_pending:
                rows.append(end - 1)
                sampled.append(sequence)
            if sequence.wants_prompt_logprobs:
                wanted = _prompt_targets(sequence, plan[sequence])
                target_rows += [start + position - 1 - sequence.num_computed for position in wanted]
                targets += [(sequence, position) for position in wanted]
        image_rows, image_embeddings = _image_rows(plan, sequences, starts, images) if images else (None, None)
        paged = PagedBatch(
            tokens=self._tokens[: starts[-1]],
            positions=self._positions[: starts[-1]],
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([s.num_computed + plan[s] for s in sequences], dtype=torch.int32),
            block_tables=self._block_tables(sequences),
            logit_rows=torch.tensor(rows + target_rows, dtype=torch.int64),
            num_decodes=sum(plan[sequence] == 1 for sequence in sequences),
            image_rows=image_rows,
            image_embeddings=image_embeddings,
        )
        return StepBatch(paged, _sampling(sampled, targets), sampled, targets)

    def _block_tables(self, sequences: list[Sequence]) -> Tensor:
        width = 1
        for sequence in sequences:
            if len(sequence.blocks[-1]) != sequence.num_tabled:  # no group grows without the last, or before it
                self._enter(sequence)
            width = max(width, len(sequence.blocks[0]))
        return torch.from_numpy(self._tables[:, [sequence.slot for sequence in sequences], :width])

    def _enter(self, sequence: Sequence) -> None:
        new = sequence.num_tabled
        for table, blocks in zip(self._tables, sequence.blocks, strict=True):
            table[sequence.slot, new : len(blocks)] = blocks[new:]
        sequence.num_tabled = len(sequence.blocks[-1])


def _image_rows(
    plan: Plan, sequences: list[Sequence], starts: list[int], images: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Which rows of the step are of images, and their embeddings; a chunk may hold a part of an image."""
    rows, embeddings = [], []
    for sequence, start in zip(sequences, starts, strict=False):
        for image, part in parts_within(sequence, plan[sequence]):
            rows.append(image.patches[part] - sequence.num_computed + start)
            embeddings.append(images[image.digest][part])
    return torch.from_numpy(np.concatenate(rows)), torch.cat(embeddings)


def _prompt_targets(sequence: Sequence, count: int) -> range:
    """Prompt positions whose token is predicted by this chunk and not yet reported."""
    end = min(sequence.num_computed + count + 1, sequence.num_prompt)
    return range(max(sequence.num_computed + 1, len(sequence.prompt_logprobs)), end)


def _sampling(sampled: list[Sequence], targets: list[tuple[Sequence, int]]) -> SamplingBatch:
    num_top = None
    if any(sequence.sampling.logprobs is not None for sequence in sampled):
        num_top = tuple(-1 if s.sampling.logprobs is None else s.sampling.logprobs for s in sampled)
    return SamplingBatch(
        num_samples=len(sampled),
        random=_random_rows(sampled),
        adjustments=tuple(_adjustment(row, sequence) for row, sequence in enumerate(sampled) if _is_adjusted(sequence)),
        num_top=num_top,
        targets=tuple(sequence.tokens[position] for sequence, position in targets),
        targets_top=tuple(sequence.sampling.prompt_logprobs or 0 for sequence, _ in targets),
    )


def _random_rows(sampled: list[Sequence]) -> RandomRows | None:
    random = [(row, s, s.sampling) for row, s in enumerate(sampled) if s.sampling.temperature >= GREEDY_BELOW]
    if not random:
        return None
    return RandomRows(
        rows=np.array([row for row, _, _ in random]),
        temperature=np.array([params.temperature for _, _, params in random], np.float32),
        top_k=np.array([params.top_k for _, _, params in random]),
        top_p=np.array([params.top_p for _, _, params in random]),
        min_p=np.array([params.min_p for _, _, params in random]),
        seed=np.array([params.seed & 0xFFFFFFFFFFFFFFFF for _, _, params in random], np.uint64),
        choice=np.array([sequence.index for _, sequence, _ in random], np.uint64),
        position=np.array([sequence.num_outputs for _, sequence, _ in random], np.uint64),
    )


def _is_adjusted(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sequence.seen is not None or sampling.logit_bias or sequence.num_outputs < sampling.min_tokens)


def _adjustment(row: int, sequence: Sequence) -> Adjustment:
    sampling = sequence.sampling
    return Adjustment(
        row=row,
        banned=sampling.stop_token_ids if sequence.num_outputs < sampling.min_tokens else (),
        bias=sampling.logit_bias or None,
        seen=sequence.seen,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        repetition=sampling.repetition_penalty,
    )
