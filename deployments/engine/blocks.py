"""The KV blocks of an engine: who holds which, and which hold a prefix that another request can use.

Knows block numbers and hashes, no tensors and no sequences. Every operation on a block is O(1).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


def root_hash(salt: bytes = b"") -> bytes:
    """The parent of a prompt's first block. Prompts with different salts never share."""
    return hashlib.sha256(b"moray" + salt).digest()


def block_hash(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> bytes:
    """Names a full block by all that its keys and values depend on.

    parent: hash of the block before, so that equal hashes mean equal prefixes. extra: whatever
    else decides the content (an image behind placeholder tokens). SHA-256, since a collision
    would answer one user with another's context.
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes() + extra).digest()


class BlockPool:
    """`num_blocks` blocks with reference counts; free ones keep their content until they are needed.

    A block is free when nobody refers to it. Free blocks without a known content are handed out
    first, then those whose content has been unused for longest.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks ({num_blocks}) must be positive")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody refers to."""
        return 1 - len(self._free) / self.num_blocks

    def num_references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, one reference each; all or none (OutOfBlocks)."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        block, _ = self._free.popitem(last=False)
        known = self._hashes[block]
        if known is not None:
            del self._by_hash[known]
            self._hashes[block] = None
        self._references[block] = 1
        return block

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `hashes`."""
        found = []
        for value in hashes:
            block = self.named(value)
            if block is None:
                break
            found.append(block)
        return found

    def named(self, value: bytes) -> int | None:
        """The block that was published as `value`, if it still is."""
        return self._by_hash.get(value)

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free now: what `share` would take out of the free ones."""
        return sum(not self._references[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of `blocks`, which `find` returned."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def publish(self, block: int, value: bytes) -> None:
        """Says that the content of `block` is computed and what it is. The first of two equal blocks stays known."""
        if self._hashes[block] is None and value not in self._by_hash:
            self._hashes[block] = value
            self._by_hash[value] = block

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each of a sequence's `blocks`, given in order: its end is forgotten first."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            if self._hashes[block] is None:
                self._free.move_to_end(block, last=False)

    def leaks(self) -> list[int]:
        """Blocks that are referred to; must be empty when nothing runs."""
        return [block for block, count in enumerate(self._references) if count]
