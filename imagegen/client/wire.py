"""Requests and responses of httpx for both clients: addresses, headers, and which lost requests may have arrived."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import httpx

from imagegen import __version__
from imagegen.client.exceptions import ConnectionFailed
from imagegen.client.exchange import HttpRequest, HttpResponse, NoResponse

CONNECT_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 60.0

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


class Wire:
    """Base address of the service, and the headers of each request to it.

    The key goes to the origin of the base address only: an image link may lead to another host.

    Args:
        language: of messages, `en` or `zh`.
    """

    def __init__(self, base_url: str, api_key: str | None, language: str) -> None:
        try:
            base = httpx.URL(base_url.strip().rstrip("/"))
        except (httpx.InvalidURL, ValueError) as error:
            raise ValueError(f"base_url is no address: {error}") from error
        if base.scheme not in {"http", "https"} or not base.host or base.query or base.fragment:
            raise ValueError(f"base_url must be http:// or https:// and a host, without a query: {base_url!r}")
        self._base = str(base).rstrip("/")
        self._origin = _origin(base)
        self._general = {"User-Agent": f"imagegen-client/{__version__}"}
        self._own = {"Accept": "application/json", "Accept-Language": language}
        api_key = (api_key or "").strip()  # a line break at its end, as of a file
        if not re.fullmatch(r"[!-~]*", api_key):
            raise ValueError("api_key must be visible ASCII characters without spaces")
        if api_key:
            self._own["Authorization"] = f"Bearer {api_key}"

    def build(self, client: httpx.Client | httpx.AsyncClient, request: HttpRequest) -> httpx.Request:
        """Return the request of httpx. Raises ConnectionFailed if its address is none."""
        try:
            url = httpx.URL(request.path if "://" in request.path else self._base + request.path)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConnectionFailed(f"{request.path} is no address: {error}", maybe_sent=False) from error
        own = self._own if _origin(url) == self._origin else {}
        timeout = httpx.Timeout(
            request.timeout_s, connect=min(CONNECT_TIMEOUT_S, request.timeout_s), write=WRITE_TIMEOUT_S
        )
        headers = {**self._general, **own, **request.headers}
        return client.build_request(request.method, url, headers=headers, content=request.body, timeout=timeout)


def may_redirect(request: HttpRequest) -> bool:
    """Return whether redirects are followed: those of links to images, which the provider may hold."""
    return request.method == "GET"


def response_of(response: httpx.Response) -> HttpResponse:
    """Return a response that was read, with its names of headers in lower case."""
    return HttpResponse(response.status_code, headers_of(response), response.content)


def headers_of(response: httpx.Response) -> Mapping[str, str]:
    """Return the headers, with names in lower case."""
    return {name.lower(): value for name, value in response.headers.items()}


def loss_of(error: httpx.HTTPError) -> NoResponse:
    """Return the loss of an error of httpx."""
    text = str(error) or type(error).__name__
    return NoResponse(f"no response of the service: {text}", maybe_sent=not isinstance(error, _NOT_SENT))


def write_file(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file in one step, so that no reader finds a part of it; return its path. Raises OSError."""
    target = Path(path)
    number, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        part.chmod(0o666 & ~_umask())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return target


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, url.port or default
