"""Where keys and values live, and which of them a query sees.

A layer hands its queries, keys and values to a `KeyValues` and gets back what its queries
attend to. Three kinds: `NoCache` (training, causal over what was given), `ContiguousCache`
(one row of memory a sequence, in buffers), `PagedCache` (blocks, for serving).
"""

from collections import defaultdict
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs
from model.datatypes import PagedBatch
from model.kv_groups import kv_groups, layers_per_block


class KeyValues(Protocol):
    """Keys and values of one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        """Stores k and v, returns attention of q over all that it sees.

        q: [..., heads, head_dim]; k, v: [..., kv_heads, head_dim] -> like q.
        chunk: local attention, a query sees its own chunk of this many positions only; None is global.
        """


def visible(queries: Tensor, keys: Tensor, chunk: int | None) -> Tensor:
    """Which keys each query sees: those not after it, of the same chunk.

    queries: positions [..., q]; keys: positions [k] or [..., k] -> bool [..., q, k].
    """
    queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
    seen = keys <= queries
    return seen if chunk is None else seen & (keys // chunk == queries // chunk)


def create_chunked_attention_mask(seq_len: int, attention_chunk_size: int, device: torch.device) -> Tensor:
    """bool [seq_len, seq_len], True where a query sees a key: causal, within chunks (iRoPE)."""
    positions = torch.arange(seq_len, device=device)
    return visible(positions, positions, attention_chunk_size)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention without copying keys for the queries that share them.

    q: [batch, queries, heads, head_dim]; k, v: [batch, keys, kv_heads, head_dim];
    mask: bool, True where seen, [batch or 1, queries, keys].
    Returns [batch, queries, heads, head_dim].
    """
    queries, group = q.shape[1], q.shape[2] // k.shape[2]
    # Heads that share a KV head become further queries of it: [batch, kv_heads, queries * group, head_dim].
    folded = q.unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    mask = mask.repeat_interleave(group, dim=1).unsqueeze(1)
    out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.unflatten(2, (queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)


class NoCache:
    """Every sequence is whole: [batch, length, ...]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        return attention(q, k, v, visible(positions, positions, chunk)[None])


class ContiguousCache(nn.Module):
    """Buffers [max_batch_size, max_seq_len, kv_heads, head_dim] for each layer, outside the state dict."""

    keys: Tensor
    values: Tensor

    def __init__(self, args: ModelArgs, kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shape = (args.n_layers, args.max_batch_size, args.max_seq_len, kv_heads, args.width_of_head)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("values", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def at(self, positions: Tensor) -> "ContiguousStep":
        """The cache as one forward pass sees it. positions: int64 [batch, length]."""
        batch, _, length = *positions.shape, int(positions.max()) + 1
        _, max_batch, max_len, *_ = self.keys.shape
        if batch > max_batch or length > max_len:
            raise ValueError(
                f"the cache holds {max_batch} sequences of {max_len} tokens (max_batch_size, max_seq_len); "
                f"asked for {batch} of {length}"
            )
        return ContiguousStep(self.keys, self.values, positions)


class ContiguousStep:
    """One forward pass over a `ContiguousCache`."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self._keys, self._values, self._positions = keys, values, positions
        self._rows = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
        self._end = int(positions.max()) + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        self._keys[layer].index_put_((self._rows, self._positions), k)
        self._values[layer].index_put_((self._rows, self._positions), v)
        seen = (layer, slice(q.shape[0]), slice(self._end))
        mask = visible(self._positions, torch.arange(self._end, device=q.device), chunk)
        return attention(q, self._keys[seen], self._values[seen], mask)


class PagedCache:
    """Blocks of `block_size` tokens for many sequences; which block is whose is the scheduler's business.

    A block is of one KV group (model/kv_groups.py) at a time: `places` tells of each layer its group, whose
    block table leads to its keys, and which of a block's layers it is. This is the plain torch form, any
    dtype; `model.packed.PackedCache` is the fast one.
    """

    def __init__(
        self,
        args: ModelArgs,
        kv_heads: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        layers: range | None = None,
    ) -> None:
        """layers: those of a pipeline stage; None is all."""
        self.num_blocks, self.block_size, self.groups = num_blocks, block_size, kv_groups(args)
        layers = range(args.n_layers) if layers is None else layers
        depth = layers_per_block(self.groups, layers)
        shape = (depth, num_blocks * block_size, kv_heads, args.width_of_head)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.places = {
            layer: Place(number, self.keys[index], self.values[index])
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(layer for layer in group.layers if layer in layers)
        }

    @staticmethod
    def bytes_per_block(args: ModelArgs, kv_heads: int, block_size: int, dtype: torch.dtype, layers: int) -> int:
        """Memory of one block, keys and values. layers: as `layers_per_block` counts them."""
        return 2 * layers * block_size * kv_heads * args.width_of_head * dtype.itemsize

    def at(self, batch: PagedBatch) -> KeyValues:
        """The cache as one step sees it."""
        return PagedStep(self, batch)


class Place(NamedTuple):
    """Of one layer: its group, and its part of all blocks, [num_blocks * block_size, kv_heads, head_dim]."""

    group: int
    keys: Tensor
    values: Tensor


class _Alike(NamedTuple):
    """Sequences of a step that are attended to together: as many queries each, padded to as many keys."""

    rows: Tensor  # int64 [sequences * queries], their tokens in the step
    queries: Tensor  # int64 [sequences, queries], positions
    keys: Tensor  # int64 [sequences, keys], positions from the first that is seen; padding is beyond every query
    slots: Tensor  # int64 [sequences, keys], where in the cache they are


class _View(NamedTuple):
    """A step as the layers of one KV group see it. written: int64 [num_tokens], slots of the step's own tokens."""

    alike: list[_Alike]
    written: Tensor


class PagedStep:
    """One step over a `PagedCache`. Decodes of similar length are computed together, prefill chunks one by one."""

    def __init__(self, cache: PagedCache, batch: PagedBatch) -> None:
        self._cache, self._batch = cache, batch
        self._views = [
            self._view(table, group.chunk) for table, group in zip(batch.block_tables, cache.groups, strict=True)
        ]

    def _view(self, table: Tensor, chunk: int | None) -> _View:
        ends, starts = self._batch.context_lens.tolist(), self._batch.query_starts.tolist()
        alike: dict[object, list[int]] = defaultdict(list)
        for sequence, end in enumerate(ends):
            alike[end.bit_length() if sequence < self._batch.num_decodes else (sequence,)].append(sequence)
        found = [
            self._alike(table[sequences], sequences, [starts[s] for s in sequences], chunk)
            for sequences in alike.values()
        ]
        written = torch.empty(starts[-1], dtype=torch.int64)
        for rows, queries, keys, slots in found:
            written[rows] = slots.gather(1, queries - keys[:, :1]).flatten()
        return _View(found, written)

    def _alike(self, table: Tensor, sequences: list[int], starts: list[int], chunk: int | None) -> _Alike:
        size, ends = self._cache.block_size, self._batch.context_lens[sequences].long().unsqueeze(1)
        stops = self._batch.query_starts[1:][sequences].tolist()
        rows = torch.cat([torch.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
        queries = self._batch.positions[rows].view(len(sequences), -1)
        first = torch.zeros_like(ends) if chunk is None else queries[:, :1] // chunk * chunk
        keys = first + torch.arange(int((ends - first).max()))
        # Padding is never seen, but is multiplied with nought: let it be of the sequence itself, and so finite.
        there = keys.minimum(ends - 1)
        slots = table.long().gather(1, there // size) * size + there % size
        return _Alike(rows, queries, keys, slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        group, keys, values = self._cache.places[layer]
        view = self._views[group]
        keys[view.written] = k
        values[view.written] = v
        out = torch.empty_like(q)
        for rows, queries, positions, slots in view.alike:
            mask = visible(queries, positions, chunk)
            found = attention(q[rows].unflatten(0, queries.shape), keys[slots], values[slots], mask)
            out[rows] = found.flatten(0, 1)
        return out
