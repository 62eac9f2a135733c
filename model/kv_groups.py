"""Which layers share a block table, and how many KV blocks a sequence then holds. Pure arithmetic on `ModelArgs`.

Layers that see everything need every key of a sequence; layers of chunked local attention need those of
the chunk that the next token is in, and give the blocks before it back. So they have tables of their own.

All groups have the same number of layers, so a block (`block_size` tokens of one group's layers) is of the same
size whosever it is, and one pool serves all groups: what chunked layers do not need holds longer contexts,
however long or short the sequences happen to be. With a pool for each kind of layer, their proportion
would be right for one length of sequence and waste memory at every other. (vLLM's hybrid KV cache does the same.)
The number of layers is the greatest that divides both kinds: 12 of Llama 4's 48, one full group and three
chunked. A model with one kind of layer is one group of all its layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.args import ModelArgs
from model.stage import Stage


@dataclass(frozen=True)
class KVGroup:
    """Layers with one block table. chunk: positions in a chunk, of which a query sees its own; None is global."""

    layers: tuple[int, ...]
    chunk: int | None = None


def kv_groups(args: ModelArgs) -> tuple[KVGroup, ...]:
    """The groups of a model: first those that see everything, then the chunked ones.

    Chunks no shorter than the context never end, so their layers are as any other. Neighbouring layers
    go to different groups, so that each pipeline stage has of every group about as many.
    """
    layers, chunk = range(args.n_layers), args.attention_chunk_size
    if chunk is None or chunk >= args.max_seq_len:
        return (KVGroup(tuple(layers)),)
    full = [layer for layer in layers if args.is_nope_layer(layer)]
    chunked = [layer for layer in layers if not args.is_nope_layer(layer)]
    size = math.gcd(len(full), len(chunked))
    return (*_dealt(full, size, None), *_dealt(chunked, size, chunk))


def _dealt(layers: list[int], size: int, chunk: int | None) -> list[KVGroup]:
    count = len(layers) // size
    return [KVGroup(tuple(layers[first::count]), chunk) for first in range(count)]


def layers_per_block(groups: Sequence[KVGroup], layers: range) -> int:
    """Layers that a block holds keys and values of on the pipeline stage with `layers`: of the largest group there.

    Where a stage has fewer layers of another group, what is left of that group's blocks is unused.
    """
    return max(sum(layer in layers for layer in group.layers) for group in groups)


def layers_of_all_stages(args: ModelArgs, num_stages: int) -> int:
    """The sum of `layers_per_block` over the stages of a pipeline."""
    groups = kv_groups(args)
    stages = [Stage(index, num_stages).layers(args.n_layers) for index in range(num_stages)]
    return sum(layers_per_block(groups, layers) for layers in stages)


def num_unseen(position: int, chunk: int | None, block_size: int) -> int:
    """Blocks at the beginning of a sequence that no query at `position` or after it sees."""
    return 0 if chunk is None else position // chunk * chunk // block_size


@dataclass(frozen=True)
class BlockNeeds:
    """How many blocks sequences hold. chunks: of each group, as `kv_groups` gives them.

    step: most tokens of a sequence that are computed at once; all of them have keys for a while.
    """

    chunks: tuple[int | None, ...]
    block_size: int
    step: int

    def held(self, num_tokens: int) -> int:
        """Most blocks, over all groups, that a sequence holds at once while its first `num_tokens` get keys."""
        whole = -(-num_tokens // self.block_size)
        return sum(min(whole, self._most(chunk)) if chunk else whole for chunk in self.chunks)

    def fitting(self, num_blocks: int) -> int:
        """Tokens that `num_blocks` hold in any case: those of sequences that all groups hold whole."""
        return num_blocks // len(self.chunks) * self.block_size

    def longest(self, num_blocks: int) -> int | None:
        """Tokens of the longest sequence that holds no more than `num_blocks`, whole blocks; None when any does."""
        chunked = sum(self._most(chunk) for chunk in self.chunks if chunk)
        full = self.chunks.count(None)
        if num_blocks * (len(self.chunks) - full) < chunked * len(self.chunks) or not chunked:
            return self.fitting(num_blocks)
        return (num_blocks - chunked) // full * self.block_size if full else None

    def _most(self, chunk: int) -> int:
        """Blocks of a chunked group: from where a chunk begins to the end of a step that begins at its last token."""
        blocks = -(-(chunk - 1 + self.step) // self.block_size)
        return blocks if chunk % self.block_size == 0 else blocks + 1
