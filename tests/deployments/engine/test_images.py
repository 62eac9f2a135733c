"""Images on their way through the engine: in prefix hashes, encoded once, in chunks and after preemption."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.request import PromptImage
from tests.deployments.engine.conftest import PATCHES, completion, make_request, seen

PATCH = 5
"""The token that stands for a patch."""


def image(seed: int, tiles: int, first: int, gap: int = 0) -> PromptImage:
    """Tiles drawn from `seed`; the first patch token is at `first`, with `gap` other tokens between tiles."""
    drawn = np.random.default_rng(seed).integers(0, 256, (tiles, 3, 4, 4), np.uint8)
    places = [first + tile * (PATCHES + gap) + patch for tile in range(tiles) for patch in range(PATCHES)]
    return PromptImage(drawn, np.array(places), f"digest-{seed}-{tiles}")


def prompt(length: int, *images: PromptImage) -> list[int]:
    """A prompt with the images' tokens in their places."""
    tokens = list(range(20, 20 + length))
    for each in images:
        for place in each.patches:
            tokens[place] = PATCH
    return tokens


def answer(tokens: list[int], images: tuple[PromptImage, ...], count: int) -> list[int]:
    """What the fake model says after a prompt whose images it sees."""
    context = list(tokens)
    for each in images:
        for place, value in zip(each.patches, seen(each.tiles), strict=True):
            context[place] = value
    return completion(context, count)


@pytest.fixture
def ask(start: Callable) -> Callable:
    """Sends one request to `front` and gives its output."""

    async def _ask(front, name: str, tokens: list[int], *images: PromptImage, count: int = 20) -> list[int]:
        request = make_request(name, tokens, count, to=front.inbox.address, images=images)
        async with asyncio.timeout(20):
            await front.engine.generate(request)
        await front.until(lambda: (name, 0) in front.last and front.last[name, 0].finish_reason is not None)
        return front.outputs[name, 0]

    return _ask


def metric(front, name: str) -> float:
    families = text_string_to_metric_families(front.engine.metrics())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.mark.parametrize("budget", [1024, 23, 7, 1])
async def test_several_images_in_chunks(start, ask, budget):
    front = start(max_num_batched_tokens=budget)
    images = (image(1, 3, 2, gap=1), image(2, 9, 30), image(3, 1, 70))
    tokens = prompt(90, *images)
    assert await ask(front, "r", tokens, *images) == answer(tokens, images, 20)
    assert front.executor.num_encoded == 3
    assert front.executor.max_tokens <= budget
    assert metric(front, "moray:images_total") == metric(front, "moray:image_encode_seconds_count") == 3
    assert metric(front, "moray:image_cache_hits_total") == 0


async def test_the_same_text_with_another_image_shares_only_what_is_before_it(start, ask):
    front = start()
    for name, seed in (("a", 1), ("b", 2), ("none", None)):
        images = () if seed is None else (image(seed, 2, 40),)
        tokens = prompt(100, image(1, 2, 40))
        assert await ask(front, name, tokens, *images) == answer(tokens, images, 20)
    assert front.cached == {("a", 0): 0, ("b", 0): 32, ("none", 0): 32}


async def test_an_image_that_moved_is_not_taken_for_the_one_before(start, ask):
    """Same tokens, same images within the block; only which patch is where differs."""
    front = start()
    tokens = prompt(40, image(1, 4, 2), image(1, 4, 3))  # one more patch token than the image has
    for name, first in (("a", 2), ("b", 3)):
        images = (image(1, 4, first),)
        assert await ask(front, name, tokens, *images) == answer(tokens, images, 20)
    assert front.cached == {("a", 0): 0, ("b", 0): 0}


async def test_a_conversation_encodes_an_image_once(start, ask):
    front = start(enable_prefix_caching=False)
    first = image(1, 2, 4)
    tokens = prompt(30, first)
    said = await ask(front, "1", tokens, first)
    second, again = image(2, 1, 52), image(1, 2, 60)
    longer = [*tokens, *said, *range(300, 320)]
    for each in (second, again):
        for place in each.patches:
            longer[place] = PATCH
    assert await ask(front, "2", longer, first, second, again) == answer(longer, (first, second, again), 20)
    assert front.executor.num_encoded == 2
    assert metric(front, "moray:images_total") == 4
    assert metric(front, "moray:image_cache_hits_total") == 2


async def test_an_image_whose_keys_are_cached_is_not_asked_for(start, ask):
    front = start(image_cache_memory=1)  # holds the last image only
    first, other = image(1, 2, 4), image(2, 2, 4)
    for name, each in (("a", first), ("b", other), ("c", first)):
        tokens = prompt(40, each)
        assert await ask(front, name, tokens, each) == answer(tokens, (each,), 20)
    assert front.cached["c", 0] == 32
    assert front.executor.num_encoded == 2


async def test_the_cache_of_images_is_bounded(start, ask):
    front = start(image_cache_memory=100, enable_prefix_caching=False)  # an image here is 32 bytes
    for number in range(8):
        each = image(number % 4, 2, 4)
        tokens = prompt(40, each)
        assert await ask(front, str(number), tokens, each) == answer(tokens, (each,), 20)
        assert front.engine._loop._images.num_bytes <= 100
    assert front.executor.num_encoded == 8  # each was forgotten before it came again


async def test_preempted_requests_compute_their_images_again(start, ask):
    front = start(20, max_num_batched_tokens=48, image_cache_memory=100)
    cases = {str(i): (image(i % 5, 3, 3 + i % 7, gap=i % 2), image(100 + i, 1, 30)) for i in range(8)}
    said = await asyncio.gather(
        *(ask(front, name, prompt(40 + int(name), *images), *images, count=90) for name, images in cases.items())
    )
    for (name, images), got in zip(cases.items(), said, strict=True):
        assert got == answer(prompt(40 + int(name), *images), images, 90), name
    assert front.engine._loop._scheduler.counts.preemptions > 0
    assert front.pool.leaks() == []


async def test_choices_share_the_images(start):
    front = start()
    each = image(1, 4, 4)
    tokens = prompt(60, each)
    await front.engine.generate(make_request("r", tokens, 10, n=3, to=front.inbox.address, images=(each,)))
    await front.until(lambda: sum(map(len, front.outputs.values())) == 30)
    assert all(front.outputs["r", index] == answer(tokens, (each,), 10) for index in range(3))
    assert front.executor.num_encoded == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda i: PromptImage(i.tiles[:, :2], i.patches, i.digest),
            r"tiles must be uint8 \[tiles, 3, 4, 4\], not uint8",
        ),
        (lambda i: PromptImage(i.tiles.astype(np.float32), i.patches, i.digest), "not float32"),
        (lambda i: PromptImage(i.tiles, i.patches[:-1], i.digest), "2 tiles are 4 patches, not 3"),
        (lambda i: PromptImage(i.tiles, i.patches[::-1], i.digest), "must ascend"),
        (lambda i: PromptImage(i.tiles, i.patches - 5, i.digest), "must ascend"),
        (lambda i: PromptImage(i.tiles, i.patches + 12, i.digest), "before the prompt's last token"),
    ],
)
async def test_images_that_do_not_fit_their_prompt_are_refused(start, wrong, message):
    front = start()
    each = image(1, 2, 4)
    with pytest.raises(ValueError, match=message):
        await front.engine.generate(make_request("r", prompt(20, each), to=front.inbox.address, images=(wrong(each),)))


async def test_a_model_without_eyes_refuses_images(start):
    front = start()
    front.engine._loop._vision = None
    each = image(1, 2, 4)
    with pytest.raises(ValueError, match="sees no images"):
        await front.engine.generate(make_request("r", prompt(20, each), to=front.inbox.address, images=(each,)))


@pytest.mark.parametrize("known", [0, 9])
async def test_a_request_that_another_engine_began_sees_its_images(start, known):
    front = start(max_num_batched_tokens=23)
    images = (image(1, 3, 2, gap=1), image(2, 9, 30))
    tokens = prompt(60, *images)
    expected = answer(tokens, images, 20)
    front.outputs["r", 0] = expected[:known]
    request = make_request("r", tokens, 20, to=front.inbox.address, images=images)
    async with asyncio.timeout(20):
        await front.engine.generate(replace(request, outputs=(tuple(expected[:known]),)))
    await front.until(lambda: len(front.outputs["r", 0]) == 20)
    assert front.outputs["r", 0] == expected
