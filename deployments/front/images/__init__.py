"""Images of a request: from a URL to tiles, and to their place among the prompt's tokens.

Three steps: `prepare_image` fetches, decodes and cuts one image; the chat template writes one
`<|image|>` for each; `place_images` puts the images' token sequences there. An `ImageReader` does
the first and the last for the requests of one model.
"""

from deployments.front.images.errors import (
    ImageDecodeError,
    ImageError,
    ImageFetchError,
    ImageTooLarge,
    ImageUrlError,
)
from deployments.front.images.fetch import FetchPolicy, ImageFetcher
from deployments.front.images.prepare import prepare_image
from deployments.front.images.reader import ImageReader
from deployments.front.images.settings import ImageSettings
from deployments.front.images.tiles import PreparedImage
from deployments.front.images.tokens import ImagePlace, ImageTokens, place_images

__all__ = [
    "FetchPolicy",
    "ImageDecodeError",
    "ImageError",
    "ImageFetchError",
    "ImageFetcher",
    "ImagePlace",
    "ImageReader",
    "ImageSettings",
    "ImageTokens",
    "ImageTooLarge",
    "ImageUrlError",
    "PreparedImage",
    "place_images",
    "prepare_image",
]
