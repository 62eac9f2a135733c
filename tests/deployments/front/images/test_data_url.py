"""`data:` URLs as clients write them."""

import base64

import pytest

from deployments.front.images import ImageTooLarge, ImageUrlError
from deployments.front.images.data_url import read_data_url

DATA = bytes(range(256))
ENCODED = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{ENCODED}",
        f"DATA:image/png;charset=utf-8;BASE64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"data:image/png;base64,{ENCODED[:100]}\r\n {ENCODED[100:]}",
        f"data:image/png;base64,{ENCODED.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
    ],
    ids=["plain", "upper", "no-type", "broken-lines", "escaped", "percent"],
)
def test_what_it_holds(url):
    assert read_data_url(url, 256) == DATA


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,iVBO*", "not base64"),
        ("data:image/png;base64,iVB", "not base64"),
        ("data:image/png;base64,é" + "A" * 1000, "not base64"),
    ],
)
def test_malformed(url, message):
    with pytest.raises(ImageUrlError, match=message) as error:
        read_data_url(url, 10_000)
    assert len(str(error.value)) < 250


def test_too_large():
    with pytest.raises(ImageTooLarge, match="256 bytes, this server reads at most 255"):
        read_data_url(f"data:;base64,{ENCODED}", 255)
    with pytest.raises(ImageTooLarge, match="more than 10 bytes"):
        read_data_url("data:;base64," + "A" * 10**6, 10)
    with pytest.raises(ImageTooLarge, match="256 bytes"):
        read_data_url("data:," + "%00" * 256, 255)
