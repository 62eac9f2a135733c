"""The images of one model's requests: read within limits, then put in their places in the prompt."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deployments.engine.request import PromptImage
from deployments.front.images.fetch import ImageFetcher
from deployments.front.images.prepare import prepare_image
from deployments.front.images.settings import ImageSettings
from deployments.front.images.tiles import PreparedImage
from deployments.front.images.tokens import ImageTokens, place_images


@dataclass(frozen=True)
class ImageReader:
    """max_images: most in one request. tokens: as the model's tokenizer names them."""

    settings: ImageSettings
    tokens: ImageTokens
    fetcher: ImageFetcher
    max_images: int

    async def read(self, urls: Sequence[str], whole: Sequence[bool]) -> list[PreparedImage]:
        """The images at `urls`, each cut into tiles, or in one tile where `whole` says so.

        Raises ImageError, about the first that cannot be used, when all have been tried.
        """
        in_one_tile = replace(self.settings, max_tiles=1)
        reading = (
            prepare_image(url, in_one_tile if is_whole else self.settings, self.fetcher)
            for url, is_whole in zip(urls, whole, strict=True)
        )
        images = await asyncio.gather(*reading, return_exceptions=True)
        for image in images:
            if isinstance(image, BaseException):
                raise image
        return [image for image in images if not isinstance(image, BaseException)]

    def place(
        self, prompt: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[list[int], tuple[PromptImage, ...]]:
        """The prompt with the images' tokens, and the images as an engine takes them. Raises ImageError."""
        ids, places = place_images(prompt, images, self.tokens, self.settings.tokens_per_tile)
        return ids, tuple(
            PromptImage(place.image.tiles, np.array(place.patches, np.int64), place.image.digest) for place in places
        )
