"""Encoded images to RGB pixels, with Pillow. What comes in is not to be trusted."""

import contextlib
import io

from PIL import Image, ImageOps

from deployments.front.images.errors import ImageDecodeError, ImageTooLarge
from deployments.front.images.settings import ImageSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The only ones tried. Pillow knows more, some of which start other programs or are rarely tested."""

_NAMES = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_SVG_WITHIN = 1024
"""Bytes from the start in which an SVG shows its name."""


def decode(data: bytes, settings: ImageSettings) -> Image.Image:
    """The image in RGB; of an animation the first frame.

    Colours are converted as Meta's `convert_image_to_rgb` does: transparency shows white in RGBA
    and is ignored elsewhere, 16-bit greys are cut off at 255. An EXIF orientation is applied, as by
    viewers, `transformers` and vLLM (Meta's code ignores it): a phone's photograph stands upright.

    Raises ImageTooLarge, before anything is unpacked, and ImageDecodeError.
    """
    if len(data) > settings.max_bytes:
        raise ImageTooLarge(f"the image has {len(data)} bytes, this server reads at most {settings.max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the image has more pixels than this server reads ({settings.max_pixels})") from error
    except Exception as error:  # whatever a decoder stumbles over is the image's fault
        what = (
            "SVG images are not supported" if b"<svg" in data[:_SVG_WITHIN].lower() else "the data is no image we know"
        )
        raise ImageDecodeError(f"{what}; send {_NAMES}") from error
    with image:
        _check_pixels(image, settings.max_pixels)
        try:
            return _to_rgb(image)
        except Exception as error:  # as above
            raise ImageDecodeError(f"the {image.format} image is broken or truncated: {error}") from error


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height} pixels, this server reads at most {max_pixels}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    image.info.pop("transparency", None)  # has no part in RGB, but Pillow warns of it
    return image.convert("RGB")
