"""Images from `http(s)` URLs: only from hosts that the operator names, never from private addresses.

A host name is resolved once; its addresses are checked, and those very addresses are connected
to, so that a name cannot change its mind in between. Redirects are followed by hand, each
checked like the first URL.
"""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from deployments.front.images.addresses import is_public
from deployments.front.images.errors import ImageFetchError, ImageTooLarge, ImageUrlError, shown

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class FetchPolicy:
    """hosts: names that images may come from: "example.com", "*.example.com" for every name below it, "*" for
      any; with ":8080" at that port, otherwise at the scheme's own.
    timeout: seconds for one image, redirects included.
    """

    hosts: frozenset[str] = frozenset()
    timeout: float = 10.0
    max_redirects: int = 3

    def allows(self, url: URL) -> bool:
        """Whether the host and port of `url` are among `hosts`."""
        host = (url.host or "").lower().rstrip(".")
        port = "" if url.is_default_port() else f":{url.port}"
        return any(_matches(host + port, pattern.lower(), port) for pattern in self.hosts)


def _matches(host: str, pattern: str, port: str) -> bool:
    if pattern == "*":
        return not port
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


class ImageFetcher:
    """Fetches under a policy. `resolver` and `is_allowed` (of an address) are for tests."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolver: Callable[[], AbstractResolver] = ThreadedResolver,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._policy, self._resolver, self._is_allowed = policy, resolver, is_allowed

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """The body at `url`. Raises ImageUrlError, ImageFetchError, ImageTooLarge."""
        try:
            target = URL(url)
        except ValueError as error:
            raise ImageUrlError(f"{shown(url)} is not a URL: {error}") from error
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._follow(target, max_bytes)
        except TimeoutError as error:
            raise ImageFetchError(f"fetching {shown(url)} took longer than {self._policy.timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise ImageFetchError(f"{shown(url)} could not be fetched: {type(error).__name__}") from error

    async def _follow(self, url: URL, max_bytes: int) -> bytes:
        resolver = _CheckedResolver(self._resolver(), self._is_allowed)
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # images are compressed already; a bomb may be packed twice
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "moray"},
        ) as session:
            for _ in range(self._policy.max_redirects + 1):
                self._check(url)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await _body(response, max_bytes)
                    url = _redirected(url, response)
        raise ImageFetchError(f"{shown(str(url))}: more than {self._policy.max_redirects} redirects")

    def _check(self, url: URL) -> None:
        if url.scheme not in ("http", "https") or not url.host:
            raise ImageUrlError(f"{shown(str(url))}: images are read from data, http and https URLs only")
        if url.user is not None or url.password is not None:
            raise ImageUrlError("an image's URL must not hold a user name or password")
        if not self._policy.allows(url):
            raise ImageUrlError(f"images from {url.host!r} are not allowed on this server; send a data URL")
        if _is_address(url.host) and not self._is_allowed(url.host):
            raise ImageUrlError(f"{url.host!r} is not a public address")


class _CheckedResolver(AbstractResolver):
    """Resolves names to addresses that are all allowed."""

    def __init__(self, resolver: AbstractResolver, is_allowed: Callable[[str], bool]) -> None:
        self._resolver, self._is_allowed = resolver, is_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        if not all(self._is_allowed(result["host"]) for result in results):
            raise ImageUrlError(f"{host!r} is not at a public address")
        return results

    async def close(self) -> None:
        await self._resolver.close()


def _is_address(host: str) -> bool:
    """Whether aiohttp would connect to `host` without resolving it."""
    return ":" in host or host.replace(".", "").isdigit()


def _redirected(url: URL, response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise ImageFetchError(f"{shown(str(url))} redirects to nowhere")
    try:
        return url.join(URL(location))
    except ValueError as error:
        raise ImageFetchError(f"{shown(str(url))} redirects to {shown(location)}, which is not a URL") from error


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ImageFetchError(f"{shown(str(response.url))} answered with status {response.status}")
    body = bytearray()
    if (response.content_length or 0) <= max_bytes:
        async for chunk in response.content.iter_chunked(_CHUNK):
            body += chunk
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise ImageTooLarge(f"{shown(str(response.url))} has more than {max_bytes} bytes, the most that this server reads")
