"""`data:` URLs (RFC 2397): an image written into the request itself."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from deployments.front.images.errors import ImageTooLarge, ImageUrlError, shown

SCHEME = "data:"


def read_data_url(url: str, max_bytes: int) -> bytes:
    """What `url` holds; its media type is not looked at. Raises ImageUrlError, ImageTooLarge."""
    head, comma, data = url[len(SCHEME) :].partition(",")
    if not comma:
        raise ImageUrlError(f"{shown(url)} is not a data URL: it has no comma before its data")
    if not head.rstrip().lower().endswith(";base64"):
        return _within(unquote_to_bytes(data), max_bytes)
    if len(data) > 2 * max_bytes:  # base64 needs 4/3, some lines breaks and escapes
        raise ImageTooLarge(f"the image has more than {max_bytes} bytes, the most that this server reads")
    try:
        return _within(base64.b64decode(b"".join(unquote_to_bytes(data).split()), validate=True), max_bytes)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ImageUrlError(f"the data of {shown(url)} is not base64: {error}") from error


def _within(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the image has {len(data)} bytes, this server reads at most {max_bytes}")
    return data
