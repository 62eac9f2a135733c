"""Images of prompts, encoded when a step needs them and kept by their content.

An image of a conversation is encoded once, however often it is sent, as long as its embeddings
are among the last used. Knows neither blocks nor how an image is encoded.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deployments.engine.metrics import EngineMetrics
from deployments.engine.request import EngineRequest, PromptImage, VisionDescription
from deployments.engine.scheduler import Plan
from deployments.engine.sequence import Sequence

Encode = Callable[[NDArray[np.uint8]], Tensor]
"""Tiles of one image, uint8 [num_tiles, 3, height, width], to embeddings [patches, dim]."""


def check_images(request: EngineRequest, vision: VisionDescription | None) -> None:
    """Raises ValueError unless the model can see the request's images where they are said to be."""
    if request.images and vision is None:
        raise ValueError("this model sees no images")
    last = -1
    for image in request.images:
        assert vision is not None
        shape, places = image.tiles.shape, image.patches
        if image.tiles.dtype != np.uint8 or shape[1:] != (3, vision.tile_size, vision.tile_size):
            raise ValueError(
                f"tiles must be uint8 [tiles, 3, {vision.tile_size}, {vision.tile_size}], "
                f"not {image.tiles.dtype} {list(shape)}"
            )
        if not shape[0] or len(places) != shape[0] * vision.tokens_per_tile:
            raise ValueError(f"{shape[0]} tiles are {shape[0] * vision.tokens_per_tile} patches, not {len(places)}")
        # The last token of a prompt is computed like an answer's, so it cannot be of an image.
        if places[0] <= last or (np.diff(places) < 1).any() or places[-1] >= len(request.prompt) - 1:
            raise ValueError("places of images must ascend, and end before the prompt's last token")
        last = places[-1]


def parts_within(sequence: Sequence, count: int) -> Iterator[tuple[PromptImage, slice]]:
    """The images among the next `count` tokens, and which of their patches are."""
    first = sequence.num_computed
    for image in sequence.request.images:
        begin, end = np.searchsorted(image.patches, (first, first + count))
        if begin < end:
            yield image, slice(int(begin), int(end))


class EncodedImages:
    """Embeddings by digest, of `max_bytes` at most: the longest unused are forgotten, the last used never."""

    def __init__(self, encode: Encode, max_bytes: int, metrics: EngineMetrics) -> None:
        self._encode, self._max_bytes, self._metrics = encode, max_bytes, metrics
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self.num_bytes = 0

    def needed(self, plan: Plan) -> dict[str, Tensor]:
        """Embeddings of every image that the plan's tokens stand for; what is not known is encoded."""
        found: dict[str, Tensor] = {}
        for sequence, count in plan.items():
            if sequence.num_computed > sequence.last_patch:
                continue
            for image, part in parts_within(sequence, count):
                is_later_chunk = part.start > 0 and sequence.num_computed != sequence.num_cached
                if image.digest in self._known and not is_later_chunk:
                    self._metrics.image_cache_hits.inc()
                found[image.digest] = self._embeddings(image)
        return found

    def _embeddings(self, image: PromptImage) -> Tensor:
        known = self._known.get(image.digest)
        if known is not None:
            self._known.move_to_end(image.digest)
            return known
        begun = time.perf_counter()
        made = self._known[image.digest] = self._encode(image.tiles)
        self._metrics.image_encode.observe(time.perf_counter() - begun)
        self.num_bytes += made.nbytes
        while self.num_bytes > self._max_bytes and len(self._known) > 1:
            self.num_bytes -= self._known.popitem(last=False)[1].nbytes
        return made
