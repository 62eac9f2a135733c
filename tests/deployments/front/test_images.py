"""Images in chats: what the engine is given, and what is refused."""

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import numpy as np
import pytest
from aiohttp import web

from deployments.config import FrontConfig
from deployments.front.api import build_api
from deployments.front.chat_template import ChatTemplate
from deployments.front.images import FetchPolicy, ImageFetcher, ImageReader, ImageSettings, ImageTokens
from deployments.front.images.prepare import prepare_bytes
from deployments.front.metrics import FrontMetrics
from deployments.front.served_model import ServedModel
from deployments.front.tokenizer import Tokenizer, Vocabulary
from deployments.status import ClusterStatus
from tests.deployments.front.conftest import EOS
from tests.deployments.front.images.pictures import encoded, picture

NAMES = ["<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
START, END, IMAGE, PATCH, TILE_X, TILE_Y = range(257, 263)
TILE, TOKENS_PER_TILE = 8, 2
SETTINGS = ImageSettings(TILE, TOKENS_PER_TILE, max_tiles=4, max_bytes=40_000, max_pixels=10_000)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = encoded(picture("RGB", 8, 8))
WIDE = encoded(picture("RGB", 16, 8, seed=1))
ONE_TILE = [START, IMAGE, PATCH, PATCH, END]
TWO_TILES = [START, PATCH, PATCH, TILE_X, PATCH, PATCH, TILE_Y, IMAGE, PATCH, PATCH, END]


class SeeingTokenizer(Tokenizer):
    """A token is a byte, or one of the special tokens of images."""

    def __init__(self) -> None:
        pieces = [bytes([i]) for i in range(256)] + [b"<eos>", *(name.encode() for name in NAMES)]
        super().__init__(Vocabulary(pieces, frozenset(range(256, 263)), None, (EOS,)))

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, NAMES)) + ")", text):
            ids += [257 + NAMES.index(part)] if part in NAMES else part.encode()
        return ids


def reader(*hosts: str, is_allowed=None) -> ImageReader:
    policy = FetchPolicy(frozenset(hosts), timeout=5)
    fetcher = ImageFetcher(policy) if is_allowed is None else ImageFetcher(policy, is_allowed=is_allowed)
    return ImageReader(SETTINGS, ImageTokens.of(SeeingTokenizer()), fetcher, max_images=3)


@pytest.fixture
def images() -> ImageReader | None:
    return reader()


@pytest.fixture
def served(engine, images) -> ServedModel:
    template = ChatTemplate(TEMPLATE, {})
    return ServedModel("tiny", SeeingTokenizer(), engine, 200, 263, chat_template=template, images=images)


@pytest.fixture
def make_client():
    """A client of a front that serves one model."""

    def make(served: ServedModel) -> httpx.AsyncClient:
        async def render_metrics() -> bytes:
            return b""

        async def cluster() -> ClusterStatus:
            return ClusterStatus()

        metrics = FrontMetrics("front-0", 200)
        app = build_api({"tiny": served}, FrontConfig(), metrics, render_metrics, cluster, "0.0.1")
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://front")

    return make


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str | bytes, **fields: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(url) if isinstance(url, bytes) else url, **fields}}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


async def chat(client, *contents, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return await client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})


async def refused(client, *contents) -> dict[str, object]:
    response = await chat(client, *contents)
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def test_the_engine_gets_tiles_and_their_places(client, engine):
    response = await chat(client, [text("a"), part(SMALL), text("b"), part(WIDE)], "No.", [part(SMALL), text("c")])
    assert response.status_code == 200
    _, tokens, _, _ = engine.requests[0]
    assert tokens == [
        *b"<user>a", *ONE_TILE, *b"b", *TWO_TILES, *b"</><assistant>No.</><user>", *ONE_TILE, *b"c</><assistant>",
    ]  # fmt: skip
    given = engine.images[0]
    assert [len(image.tiles) for image in given] == [1, 3, 1]
    for image, source in zip(given, (SMALL, WIDE, SMALL), strict=True):
        expected = prepare_bytes(source, SETTINGS)
        assert np.array_equal(image.tiles, expected.tiles)
        assert image.digest == expected.digest
    places = [place for image in given for place in image.patches]
    assert places == [place for place, token in enumerate(tokens) if token == PATCH]
    assert response.json()["usage"]["prompt_tokens"] == len(tokens)


async def test_low_detail_is_one_tile(client, engine):
    for detail, tiles in (("low", 1), ("high", 3), ("auto", 3)):
        assert (await chat(client, [part(WIDE, detail=detail)])).status_code == 200
        assert len(engine.images[-1][0].tiles) == tiles


async def test_tokenize_shows_the_whole_prompt(client, engine):
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part(WIDE)]}]}
    response = await client.post("/tokenize", json=body)
    assert response.json()["tokens"] == [*b"<user>", *TWO_TILES, *b"</><assistant>"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no image we know"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG images are not supported"),
        (encoded(picture("RGB", 60, 60))[:-2000], "broken or truncated"),
        (encoded(picture("RGB", 101, 100)), "101 x 100 = 10100 pixels, this server reads at most 10000"),
        (bytes(40_001), "has 40001 bytes, this server reads at most 40000"),
    ],
)
async def test_an_image_that_cannot_be_used_is_the_clients_fault(client, engine, data, message):
    error = await refused(client, [part(SMALL), part(data)])
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "messages", "invalid_image")
    assert not engine.requests


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "'example.com' are not allowed on this server; send a data URL"),
        ("file:///etc/passwd", "images are read from data, http and https URLs only"),
        ("data:image/png;base64,!", "is not base64"),
        ("", "images are read from"),
    ],
)
async def test_a_url_that_is_not_read(client, url, message):
    assert message in (await refused(client, [part(url)]))["message"]


async def test_limits_and_places(client):
    error = await refused(client, [part(SMALL)] * 4)
    assert (error["message"], error["code"]) == ("'messages' hold 4 images, this server takes 3", "too_many_images")
    for contents in ([text("<|image|>")], [part(SMALL), text("<|image|>")]):
        assert "places for" in (await refused(client, contents))["message"]
    error = await refused(client, [part(WIDE)] * 3, "x" * 160)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("images", [None])
async def test_a_model_without_eyes_says_so(client, engine):
    error = await refused(client, [text("What is this?"), part(SMALL)])
    assert error["message"] == "The model 'tiny' sees no images"
    assert error["code"] == "images_not_supported"
    assert (await chat(client, [text("Well, then not.")])).status_code == 200
    assert not engine.images[0]


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """A web server with one image, at the address that is given."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=WIDE)

    app = web.Application()
    app.router.add_get("/wide.png", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("is_private", [True, False])
async def test_a_host_that_is_allowed_is_asked_unless_it_is_private(engine, served, make_client, site, is_private):
    images = reader(site, is_allowed=None if is_private else "127.0.0.1".__eq__)
    async with make_client(replace(served, images=images)) as client:
        response = await chat(client, [part(f"http://{site}/wide.png")])
    if is_private:
        assert "'127.0.0.1' is not a public address" in response.json()["error"]["message"]
        assert not engine.requests
    else:
        assert response.status_code == 200
        assert np.array_equal(engine.images[0][0].tiles, prepare_bytes(WIDE, SETTINGS).tiles)


async def test_streams_go_on_while_images_are_prepared(client, monkeypatch):
    def slow(data, settings):
        time.sleep(0.3)
        return prepare_bytes(data, settings)

    monkeypatch.setattr("deployments.front.images.prepare.prepare_bytes", slow)
    answering = asyncio.ensure_future(chat(client, [part(SMALL)]))
    turns = 0
    while not answering.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5
    assert answering.result().status_code == 200
