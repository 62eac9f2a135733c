"""The block pool against a slow model of itself, and its order of eviction."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.blocks import BlockPool, OutOfBlocks, block_hash, root_hash


def chain(*blocks: tuple[int, ...], salt: bytes = b"") -> list[bytes]:
    hashes, parent = [], root_hash(salt)
    for tokens in blocks:
        parent = block_hash(parent, tokens)
        hashes.append(parent)
    return hashes


def test_hashes_tell_prefix_tokens_salt_and_extra_apart() -> None:
    root = root_hash()
    values = [
        block_hash(root, [1, 2]),
        block_hash(root, [2, 1]),
        block_hash(root, [1, 2], b"image"),
        block_hash(root_hash(b"x"), [1, 2]),
        block_hash(block_hash(root, [1, 2]), [1, 2]),
        block_hash(root, [258]),
    ]
    assert len(set(values)) == len(values)


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.release(held)
    assert pool.num_free == 3
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(held)


def test_blocks_without_content_go_first_then_the_longest_unused_and_ends_before_beginnings() -> None:
    pool = BlockPool(5)
    old, new = pool.allocate(2), pool.allocate(2)
    hashes = chain((1,), (2,)), chain((3,), (4,))
    for blocks, values in zip((old, new), hashes, strict=True):
        for block, value in zip(blocks, values, strict=True):
            pool.publish(block, value)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [4]
    assert pool.allocate(2) == [old[1], old[0]]
    assert pool.find(hashes[0]) == []
    assert pool.find(hashes[1]) == new


def test_a_found_block_is_kept_while_shared() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    hashes = chain((1,), (2,))
    pool.publish(blocks[0], hashes[0])
    pool.release(blocks)
    found = pool.find(hashes)
    assert found == blocks[:1]
    pool.share(found)
    pool.share(found)
    assert pool.num_references(blocks[0]) == 2
    assert pool.allocate(1) == blocks[1:]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_references_and_free_blocks_always_add_up(operations: list[tuple[str, int]]) -> None:
    pool, holders = BlockPool(8), []
    for number, (operation, size) in enumerate(operations):
        if operation == "allocate" and size <= pool.num_free:
            blocks = pool.allocate(size)
            for block, value in zip(blocks, chain(*[(number % 7, i) for i in range(size)]), strict=True):
                pool.publish(block, value)
            holders.append(blocks)
        elif operation == "share":
            found = pool.find(chain(*[(number % 7, i) for i in range(size)]))
            pool.share(found)
            holders.append(found)
        elif operation == "release" and holders:
            pool.release(holders.pop(size % len(holders)))
        counts = [sum(block in held for held in holders) for block in range(8)]
        assert [pool.num_references(block) for block in range(8)] == counts
        assert pool.num_free == counts.count(0)
    for held in holders:
        pool.release(held)
    assert pool.leaks() == []
    assert sorted(pool.allocate(8)) == list(range(8))
