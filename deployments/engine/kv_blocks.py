"""The blocks of sequences in every KV group of a model (model/kv_groups.py): growing, sharing, giving back.

Groups that see everything hold all blocks of a sequence. Chunked groups hold those of the chunk that its next
token is in: `computed` gives the ones before it back, after the step that computed the chunk's last token
and before another is built, so that no step reads what somebody else may write. Freed blocks keep
their content for other prompts until they are needed, like those of sequences that have ended.

`sequence.blocks[group][i]` holds the sequence's tokens from `i * block_size` on; of chunked groups entries
before `sequence.num_unseen` are not the sequence's any more, or never were.
"""

from collections.abc import Iterable

from deployments.engine.blocks import BlockPool
from deployments.engine.sequence import Sequence
from model.kv_groups import BlockNeeds, num_unseen


class KVBlocks:
    """What sequences hold of `pool`. chunks: as in `BlockNeeds`."""

    def __init__(self, pool: BlockPool, needs: BlockNeeds) -> None:
        self.pool, self.needs, self._size = pool, needs, needs.block_size
        self._chunks = needs.chunks
        self._chunk = next((chunk for chunk in needs.chunks if chunk), None)

    def num_blocks(self, num_tokens: int) -> int:
        """In one group."""
        return -(-num_tokens // self._size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `grow` would take."""
        wanted = self.num_blocks(num_tokens)
        if wanted <= len(sequence.blocks[-1]):  # no group has fewer
            return 0
        return sum(max(0, wanted - len(blocks)) for blocks in sequence.blocks)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives `sequence` blocks for its first `num_tokens`. Raises OutOfBlocks."""
        wanted = self.num_blocks(num_tokens)
        for blocks in sequence.blocks:
            if wanted > len(blocks):
                blocks.extend(self.pool.allocate(wanted - len(blocks)))

    def start(self, sequence: Sequence, reserve: int, is_known: bool) -> bool:
        """Gives `sequence` what is known of its beginning, and the full groups room for the rest of it.

        Chunked groups grow from step to step; there is room for that now. False, and nothing changed, when there
        is not, with `reserve` blocks left over. is_known: whether to look for its beginning at all.
        """
        known = self._longest_known(sequence) if is_known else 0
        first = num_unseen(known * self._size, self._chunk, self._size)
        found = [self._found(sequence, group, first if chunk else 0, known) for group, chunk in enumerate(self._chunks)]
        flat = [block for blocks in found for block in blocks]
        free = self.pool.num_free - self.pool.num_unreferenced(flat)
        if self.needs.held(len(sequence.tokens)) - len(flat) > free - reserve:
            return False
        self.pool.share(flat)
        total = self.num_blocks(len(sequence.tokens))
        sequence.blocks = [
            [0] * first + blocks if chunk else blocks + self.pool.allocate(total - known)
            for chunk, blocks in zip(self._chunks, found, strict=True)
        ]
        sequence.num_computed, sequence.num_published, sequence.num_unseen = known * self._size, known, first
        return True

    def computed(self, sequence: Sequence) -> None:
        """Publishes the blocks that are full now, gives back those that nothing will see again."""
        full = sequence.num_computed // self._size
        if full > sequence.num_published:
            self._publish(sequence, full)
        if self._chunk is not None:
            self._release_unseen(sequence)

    def _publish(self, sequence: Sequence, full: int) -> None:
        hashes = sequence.hashes(full, self._size)
        for group, blocks in enumerate(sequence.blocks):
            for index in range(sequence.num_published, full):
                self.pool.publish(blocks[index], _name(hashes[index], group))
        sequence.num_published = full

    def _release_unseen(self, sequence: Sequence) -> None:
        unseen = num_unseen(sequence.num_computed, self._chunk, self._size)
        if unseen == sequence.num_unseen:
            return
        for chunk, blocks in zip(self._chunks, sequence.blocks, strict=True):
            if chunk:
                self.pool.release(blocks[sequence.num_unseen : unseen])
        sequence.num_unseen = unseen

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks of `sequence`."""
        for blocks in self.held(sequence):
            self.pool.release(blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = sequence.num_unseen = sequence.num_tabled = 0

    def held(self, sequence: Sequence) -> Iterable[list[int]]:
        """Of each group, the blocks that `sequence` has a reference to."""
        for chunk, blocks in zip(self._chunks, sequence.blocks, strict=False):
            yield blocks[sequence.num_unseen :] if chunk else blocks

    def reserve(self, running: list[Sequence]) -> int:
        """Blocks that running sequences may need before long: one more in each group, or the rest of a prompt."""
        if self._chunk is None:
            return len(running)
        return sum(max(len(self._chunks), self._promised(sequence)) for sequence in running)

    def _promised(self, sequence: Sequence) -> int:
        return self.needs.held(len(sequence.tokens)) - sum(map(len, self.held(sequence)))

    def _longest_known(self, sequence: Sequence) -> int:
        """Blocks of the longest beginning from which the rest can be computed.

        Full groups must have all of it; chunked groups what the token after it sees. The last token is
        computed in any case: its logits are what is wanted.
        """
        hashes = sequence.hashes((len(sequence.tokens) - 1) // self._size, self._size)
        known = len(hashes)
        for group, chunk in enumerate(self._chunks):
            if chunk is None:
                known = len(self.pool.find(_name(value, group) for value in hashes[:known]))
        chunked = [group for group, chunk in enumerate(self._chunks) if chunk]
        while chunked and known:
            first = num_unseen(known * self._size, self._chunk, self._size)
            missing = (
                index
                for index in reversed(range(first, known))
                if any(self.pool.named(_name(hashes[index], group)) is None for group in chunked)
            )
            absent = next(missing, None)
            if absent is None:
                break
            known = absent
        return known

    def _found(self, sequence: Sequence, group: int, first: int, known: int) -> list[int]:
        hashes = sequence.hashes(known, self._size)
        return self.pool.find(_name(value, group) for value in hashes[first:])


def _name(value: bytes, group: int) -> bytes:
    """Of a block of one group, among those of all."""
    return value + group.to_bytes(2, "big") if group else value
