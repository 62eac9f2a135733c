"""Broken, hostile and unusual files: a right answer or a clear message."""

import contextlib
import random
import struct
import zlib

import pytest
from PIL import Image

from deployments.front.images import ImageDecodeError, ImageError, ImageSettings, ImageTooLarge
from deployments.front.images.decode import FORMATS, decode
from tests.deployments.front.images.pictures import encoded, picture

SETTINGS = ImageSettings(tile_size=28, tokens_per_tile=4, max_bytes=100_000, max_pixels=250_000)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is so large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [501, 10_000, 20_000, 60_000])
def test_a_bomb_is_refused_before_it_is_unpacked(width):
    """Larger ones meet Pillow's own limits, of 89 (a warning) and 179 million pixels."""
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(png(width, width, zlib.compress(bytes(1000))), SETTINGS)


def test_the_pixel_limit_is_inclusive():
    assert decode(encoded(Image.new("RGB", (500, 500))), SETTINGS).size == (500, 500)
    with pytest.raises(ImageTooLarge, match="501 x 500 = 250500 pixels, this server reads at most 250000"):
        decode(encoded(Image.new("RGB", (501, 500))), SETTINGS)


def test_too_many_bytes():
    with pytest.raises(ImageTooLarge, match="100001 bytes, this server reads at most 100000"):
        decode(bytes(100_001), SETTINGS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file(kind):
    data = encoded(picture("RGB", 90, 70), kind)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(ImageDecodeError, match=r"broken or truncated|no image we know"):
            decode(data[: int(len(data) * part)], SETTINGS)


SVG = b'<?xml version="1.0"?>\n<!-- a drawing -->\n<SVG xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize("data", [SVG, b"\xef\xbb\xbf" + SVG.lower(), b"<svg/>"])
def test_an_svg(data):
    with pytest.raises(ImageDecodeError, match="SVG images are not supported; send PNG, JPEG"):
        decode(data, SETTINGS)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), b"%PDF-1.4", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_no_image_at_all(data):
    with pytest.raises(ImageDecodeError):
        decode(data, SETTINGS)


def test_formats_that_start_other_programs_are_not_tried():
    for kind in ("EPS", "PPM", "ICO"):
        assert kind not in FORMATS
        with pytest.raises(ImageDecodeError, match="no image we know"):
            decode(encoded(Image.new("RGB", (16, 16)), kind), SETTINGS)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(size):
    assert decode(encoded(Image.new("L", size)), SETTINGS).size == size


def test_a_compressed_text_in_a_png_does_not_fill_the_memory():
    text = zlib.compress(bytes(50_000_000), 9)
    body = b"comment\0\0" + text
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = encoded(Image.new("RGB", (8, 8)))
    with pytest.raises(ImageDecodeError):
        decode(plain[:33] + bomb + plain[33:], SETTINGS)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of oddities; only the outcome matters here
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_bytes_give_an_image_or_an_image_error(kind):
    data = encoded(picture("RGB", 60, 40), kind)
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(ImageError):  # and nothing else
            assert decode(bytes(damaged), SETTINGS).mode == "RGB"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # of Pillow
@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"?"])
def test_broken_exif_does_not_spoil_the_image(exif):
    data = encoded(picture("RGB", 90, 70), "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(data, SETTINGS).size == (90, 70)


def test_transparency_shows_white():
    assert decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), SETTINGS).getpixel((0, 0)) == (255, 255, 255)
