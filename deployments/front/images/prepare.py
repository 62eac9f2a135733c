"""The entry: one `image_url` of a request to tiles."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from deployments.front.images.data_url import SCHEME, read_data_url
from deployments.front.images.decode import decode
from deployments.front.images.fetch import ImageFetcher
from deployments.front.images.settings import ImageSettings
from deployments.front.images.tiles import PreparedImage, cut

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="image")
"""Few, because each may hold an image of `max_pixels`."""


async def prepare_image(url: str, settings: ImageSettings, fetcher: ImageFetcher) -> PreparedImage:
    """Reads the image at a `data:`, `http:` or `https:` URL and cuts it into tiles.

    Decoding and cutting happen in a thread, so that streams go on meanwhile.
    Raises ImageError, whose message is fit for the client.
    """
    run = asyncio.get_running_loop().run_in_executor
    if url[: len(SCHEME)].lower() == SCHEME:
        data = await run(_threads, read_data_url, url, settings.max_bytes)
    else:
        data = await fetcher.fetch(url, settings.max_bytes)
    return await run(_threads, prepare_bytes, data, settings)


def prepare_bytes(data: bytes, settings: ImageSettings) -> PreparedImage:
    """An encoded image to tiles. Raises ImageError."""
    return cut(decode(data, settings), settings)
