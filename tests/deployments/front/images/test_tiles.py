"""Tiles of images of many sizes and modes against Meta's ChatFormat, bit for bit."""

import base64
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from deployments.front.images import ImageSettings
from deployments.front.images.prepare import prepare_bytes
from model.vision.pixels import normalize_pixels
from tests.deployments.front.images.pictures import encoded, picture

TILE, PATCH = 56, 14
SETTINGS = ImageSettings(tile_size=TILE, tokens_per_tile=4)

SIZES = [
    (1, 1), (1, 10_000), (10_000, 1), (2, 3), (55, 55), (56, 56), (57, 56), (56, 57), (112, 56), (56, 112), (113, 57),
    (100, 30), (30, 100), (168, 112), (200, 200), (224, 224), (225, 223), (640, 480), (480, 640), (1000, 100),
    (100, 1000), (333, 777), (900, 50), (897, 56), (3, 300), (400, 400), (112, 112), (111, 169), (700, 20), (64, 48),
]  # fmt: skip


def kinds() -> dict[str, bytes]:
    """Name -> encoded image, in every mode and format."""
    palette = picture("RGB", 90, 70).quantize(64)
    return {
        "rgb": encoded(picture("RGB", 90, 70)),
        "rgba": encoded(picture("RGBA", 90, 70)),
        "grey": encoded(picture("L", 90, 70)),
        "grey-alpha": encoded(picture("LA", 90, 70)),
        "palette": encoded(palette),
        "palette-one-transparent": encoded(palette, transparency=3),
        "palette-transparencies": encoded(palette, transparency=bytes(range(64))),
        "rgb-one-transparent": encoded(picture("RGB", 90, 70), transparency=(1, 2, 3)),
        "black-and-white": encoded(picture("1", 90, 70)),
        "grey-16-bit": encoded(picture("I;16", 90, 70)),
        "grey-16-bit-tiff": encoded(picture("I;16", 90, 70), "TIFF"),
        "grey-float-tiff": encoded(picture("F", 90, 70), "TIFF"),
        "cmyk-jpeg": encoded(picture("CMYK", 90, 70), "JPEG"),
        "cmyk-tiff": encoded(picture("CMYK", 90, 70), "TIFF"),
        "ycbcr-jpeg": encoded(picture("YCbCr", 90, 70), "JPEG"),
        "lab-tiff": encoded(picture("RGB", 90, 70).convert("YCbCr"), "TIFF"),
        "progressive-jpeg": encoded(picture("RGB", 90, 70), "JPEG", progressive=True),
        "webp": encoded(picture("RGBA", 90, 70), "WEBP"),
        "gif": encoded(palette, "GIF"),
        "animation": encoded(palette, "GIF", save_all=True, append_images=[picture("RGB", 90, 70, 1).quantize(8)]),
        "bmp": encoded(picture("RGB", 90, 70), "BMP"),
    }


KINDS = kinds()


@pytest.fixture(scope="module")
def theirs(chat_format: ModuleType, llama4_tokenizer):
    from llama_models.llama4.args import Size, VisionArgs
    from llama_models.llama4.tokenizer import Tokenizer

    vision = VisionArgs(
        image_size=Size(height=TILE, width=TILE), patch_size=Size(height=PATCH, width=PATCH), dim=8, n_layers=1,
        n_heads=1, mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    return chat_format.ChatFormat(Tokenizer(llama4_tokenizer), vision)


def assert_equal_to_metas(data: bytes, theirs, seen: bytes | None = None) -> None:
    """seen: what Meta's code gets, if not the same file."""
    from llama_models.datatypes import RawMediaItem

    _, (expected,) = theirs._encode_content([RawMediaItem(data=seen or data)])
    got = prepare_bytes(data, SETTINGS)
    assert (got.rows, got.columns) == expected.aspect_ratio
    torch.testing.assert_close(normalize_pixels(torch.from_numpy(got.tiles)), expected.image_tiles, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_equals_metas(size, theirs):
    assert_equal_to_metas(encoded(picture("RGB", *size)), theirs)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # in Meta's own conversion
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_equals_metas(kind, theirs):
    assert_equal_to_metas(KINDS[kind], theirs)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_by_exif_equals_metas_of_the_upright_image(orientation, kind, theirs):
    """Meta's code ignores EXIF, so it gets what `transformers` makes of the file: both references at once."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture("RGB", 130, 60), kind, exif=exif)
    upright = load_image("data:image/any;base64," + base64.b64encode(data).decode())
    assert upright.size == ((130, 60) if orientation < 5 else (60, 130))
    assert_equal_to_metas(data, theirs, seen=encoded(upright))


def test_real_photographs_equal_metas(theirs, llama4_tokenizer):
    photographs = sorted((llama4_tokenizer.parents[1] / "resources").glob("*.jp*g"))
    assert photographs
    for path in photographs:
        assert_equal_to_metas(path.read_bytes(), theirs)


def test_a_tile_is_where_it_was_in_the_image():
    colours = np.zeros((2 * TILE, 3 * TILE, 3), np.uint8)
    for row in range(2):
        for column in range(3):
            colours[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = row * 100 + column * 10
    got = prepare_bytes(encoded(Image.fromarray(colours)), SETTINGS)
    assert (got.rows, got.columns, got.tiles.shape) == (2, 3, (7, 3, TILE, TILE))
    assert [tile.mean() for tile in got.tiles[:6]] == [0, 10, 20, 100, 110, 120]


def test_the_digest_is_of_what_the_model_sees():
    image = picture("RGB", 90, 70)
    digest = prepare_bytes(encoded(image), SETTINGS).digest
    assert prepare_bytes(encoded(image, "BMP"), SETTINGS).digest == digest
    changed = image.copy()
    changed.putpixel((40, 40), (0, 0, 0))
    assert prepare_bytes(encoded(changed), SETTINGS).digest != digest
