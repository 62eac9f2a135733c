"""What may be wrong with an image of a request. Every message is fit for the client: an answer of status 400."""


class ImageError(ValueError):
    """The image cannot be used."""


class ImageUrlError(ImageError):
    """The URL is malformed, or of a kind or host that this server does not read."""


class ImageFetchError(ImageError):
    """The image's host did not give it."""


class ImageTooLarge(ImageError):
    """More bytes or pixels than this server reads."""


class ImageDecodeError(ImageError):
    """Not an image, of a kind that is not supported, or broken."""


SHOWN_CHARACTERS = 100
"""Of a URL, in an error message."""


def shown(url: str) -> str:
    """The URL as a message quotes it."""
    return repr(url if len(url) <= SHOWN_CHARACTERS else url[:SHOWN_CHARACTERS] + "…")
