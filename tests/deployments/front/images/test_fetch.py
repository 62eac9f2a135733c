"""Fetching from a real server on this machine, which stands in for the public ones.

A resolver that says what a test wants takes the place of DNS, and where a test does fetch, a rule
that lets the loopback address through takes the place of `is_public`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from yarl import URL

from deployments.front.images import (
    FetchPolicy,
    ImageError,
    ImageFetcher,
    ImageFetchError,
    ImageSettings,
    ImageTooLarge,
    ImageUrlError,
    prepare_image,
)
from tests.deployments.front.images.pictures import encoded, picture

LOOPBACK = "127.0.0.1"
PNG = encoded(picture("RGB", 30, 20))


@dataclass
class Names(AbstractResolver):
    """A resolver: name -> address, each answer in turn, the last one for ever."""

    addresses: dict[str, list[str]]
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host, port=0, family=0):
        answers = self.addresses.get(host)
        if answers is None:
            raise OSError(f"{host}: no such name")
        address = answers[min(self.asked.count(host), len(answers) - 1)]
        self.asked.append(host)
        return [{"hostname": host, "host": address, "port": port, "family": 2, "proto": 0, "flags": 0}]

    async def close(self):
        pass


@dataclass
class Site:
    """A small web server; `requests` are the paths it was asked for, with their hosts."""

    port: int = 0
    requests: list[str] = field(default_factory=list)
    names: Names = field(default_factory=lambda: Names({"images.test": [LOOPBACK], "other.test": [LOOPBACK]}))

    def url(self, path: str, host: str = "images.test") -> str:
        return f"http://{host}:{self.port}{path}"

    def fetcher(self, *hosts: str, is_allowed: Callable[[str], bool] = LOOPBACK.__eq__, **policy) -> ImageFetcher:
        allowed = frozenset(f"{host}:{self.port}" for host in hosts or ("images.test",))
        return ImageFetcher(FetchPolicy(allowed, **policy), resolver=lambda: self.names, is_allowed=is_allowed)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.host} {request.path}")
        match request.path.split("/")[1:]:
            case ["image"]:
                assert "cookie" not in request.headers
                return web.Response(body=PNG, headers={"Set-Cookie": "a=b"})
            case ["to", *rest]:
                return web.Response(status=302, headers={"Location": "/".join(rest) or "/image"})
            case ["round"]:
                return web.Response(status=302, headers={"Location": "/round"})
            case ["nowhere"]:
                return web.Response(status=302)
            case ["endless", "slow"]:
                return await self.stream(request, b"x", 0.05)
            case ["endless", _]:
                return await self.stream(request, bytes(10_000), 0)
            case ["large"]:
                return web.Response(body=bytes(5000))
        raise web.HTTPNotFound

    async def stream(self, request: web.Request, piece: bytes, pause: float) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(piece)
                await asyncio.sleep(pause)
        except ConnectionError:
            return response


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    server = web.TCPSite(runner, LOOPBACK, 0)
    await server.start()
    site.port = runner.addresses[0][1]
    yield site
    await runner.cleanup()


async def test_an_image(site):
    assert await site.fetcher().fetch(site.url("/image"), 10_000) == PNG
    assert site.requests == [f"images.test:{site.port} /image"]


async def test_an_image_prepared(site):
    prepared = await prepare_image(site.url("/image"), ImageSettings(28, 4), site.fetcher())
    assert prepared.tiles.shape == (3, 3, 28, 28)


async def test_a_redirect(site):
    assert await site.fetcher().fetch(site.url("/to/"), 10_000) == PNG
    assert len(site.requests) == 2


async def test_a_redirect_to_another_allowed_host(site):
    url = site.url("/to/" + site.url("/image", "other.test"))
    assert await site.fetcher("images.test", "other.test").fetch(url, 10_000) == PNG


async def test_a_redirect_to_a_host_that_is_not_allowed(site):
    with pytest.raises(ImageUrlError, match=r"'other.test' are not allowed"):
        await site.fetcher().fetch(site.url("/to/" + site.url("/image", "other.test")), 10_000)
    assert len(site.requests) == 1


async def test_a_redirect_to_a_private_address(site):
    site.names.addresses["other.test"] = ["10.0.0.1"]
    with pytest.raises(ImageUrlError, match=r"'other.test' is not at a public address"):
        await site.fetcher("images.test", "other.test").fetch(site.url("/to/" + site.url("/", "other.test")), 10_000)


async def test_a_redirect_to_a_file(site):
    with pytest.raises(ImageUrlError, match="data, http and https URLs only"):
        await site.fetcher().fetch(site.url("/to/file:///etc/passwd"), 10_000)


async def test_redirects_without_end(site):
    with pytest.raises(ImageFetchError, match="more than 3 redirects"):
        await site.fetcher().fetch(site.url("/round"), 10_000)
    assert len(site.requests) == 4


async def test_a_redirect_to_nowhere(site):
    with pytest.raises(ImageFetchError, match="redirects to nowhere"):
        await site.fetcher().fetch(site.url("/nowhere"), 10_000)


async def test_private_addresses_are_never_connected_to(site):
    """The name is allowed, what it resolves to is not: as it comes, no test's rule."""
    fetcher = ImageFetcher(FetchPolicy(frozenset({f"images.test:{site.port}"})), resolver=lambda: site.names)
    with pytest.raises(ImageUrlError, match=r"'images.test' is not at a public address"):
        await fetcher.fetch(site.url("/image"), 10_000)
    assert site.requests == []


async def test_real_names_of_this_machine_are_refused(site):
    """Through the system's own resolver."""
    fetcher = ImageFetcher(FetchPolicy(frozenset({f"localhost:{site.port}"})))
    with pytest.raises(ImageUrlError, match="not at a public address"):
        await fetcher.fetch(site.url("/image", "localhost"), 10_000)
    assert site.requests == []


@pytest.mark.parametrize("host", [LOOPBACK, "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.", "169.254.169.254"])
async def test_private_addresses_written_out_are_refused(site, host):
    """Without a resolver's help, even where the operator allows the host by a mistake."""
    url = site.url("/image", host)
    fetcher = ImageFetcher(
        FetchPolicy(frozenset({f"{URL(url).host.rstrip('.')}:{site.port}"})), resolver=lambda: site.names
    )
    with pytest.raises(ImageUrlError, match="is not a public address"):
        await fetcher.fetch(url, 10_000)
    assert site.requests == []


async def test_a_name_that_changes_its_mind_is_resolved_once(site):
    """First a good address, then a private one: the good one is what is connected to."""
    site.names.addresses["images.test"] = [LOOPBACK, "10.0.0.1"]
    assert await site.fetcher().fetch(site.url("/image"), 10_000) == PNG
    assert site.names.asked == ["images.test"]


async def test_too_large_by_its_own_word(site):
    with pytest.raises(ImageTooLarge, match="more than 4999 bytes"):
        await site.fetcher().fetch(site.url("/large"), 4999)
    assert len(await site.fetcher().fetch(site.url("/large"), 5000)) == 5000


async def test_too_large_without_a_word(site):
    with pytest.raises(ImageTooLarge, match="more than 100000 bytes"):
        await site.fetcher().fetch(site.url("/endless/fast"), 100_000)


async def test_a_drip_ends_at_the_deadline(site):
    begin = time.monotonic()
    with pytest.raises(ImageFetchError, match=r"took longer than 0.3 s"):
        await site.fetcher(timeout=0.3).fetch(site.url("/endless/slow"), 100_000)
    assert time.monotonic() - begin < 2


async def test_failures_of_the_host(site):
    with pytest.raises(ImageFetchError, match="status 404"):
        await site.fetcher().fetch(site.url("/absent"), 10_000)
    with pytest.raises(ImageFetchError, match="could not be fetched"):
        await site.fetcher("gone.test").fetch(site.url("/", "gone.test"), 10_000)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "data, http and https URLs only"),
        ("ftp://images.test/", "data, http and https URLs only"),
        ("http://", "data, http and https URLs only|not a URL"),
        ("images/cat.png", "data, http and https URLs only"),
        ("", "data, http and https URLs only"),
        ("http://[::1", "not a URL"),
        ("http://user:word@images.test/", "user name or password"),
        ("http://images.test/", "not allowed on this server; send a data URL"),
    ],
)
async def test_urls_that_are_not_read(url, message):
    fetcher = ImageFetcher(FetchPolicy())
    with pytest.raises(ImageError, match=message):
        await prepare_image(url, ImageSettings(28, 4), fetcher)


@pytest.mark.parametrize(
    ("host", "url", "allowed"),
    [
        ("images.test", "http://images.test/a", True),
        ("images.test", "https://IMAGES.test:443/a", True),
        ("images.test", "https://images.test./a", True),
        ("images.test", "https://images.test:8443/a", False),
        ("images.test:8443", "https://images.test:8443/a", True),
        ("images.test:8443", "https://images.test/a", False),
        ("images.test", "http://images.test.evil.example/a", False),
        ("images.test", "http://evilimages.test/a", False),
        ("images.test", "http://a.images.test/a", False),
        ("*.images.test", "http://a.b.images.test/a", True),
        ("*.images.test", "http://images.test/a", False),
        ("*.images.test", "http://evilimages.test/a", False),
        ("*", "https://any.example/a", True),
        ("*", "https://any.example:22/a", False),
    ],
)
def test_hosts(host, url, allowed):
    assert FetchPolicy(frozenset({host})).allows(URL(url)) is allowed
