"""HTTP client of a provider: JSON or a form out, a bounded response in, and every loss as one `UpstreamError`.

The session is the app's. It needs a `DummyCookieJar` (the vendors' proxies set cookies), no `trust_env`, and an
`UpstreamConnector`, with a short `keepalive_timeout` for paid calls: a request on an idle connection that the upstream
closes at that moment counts as sent.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import orjson
from aiohttp.http import HttpProcessingError
from msgspec import Struct
from yarl import URL

from imagegen import __version__
from imagegen.errors import UpstreamError
from imagegen.formats import certificate_fault
from imagegen.providers.chat_responses import is_chat, parse_chat
from imagegen.providers.input_bodies import FORM_TYPE, JSON_TYPE, Body, form_body, json_body
from imagegen.providers.job_poller import JobPoller
from imagegen.providers.large_body import load_json
from imagegen.providers.post import NotSent, PaidPost, PartlySent, RawResponse, connect_timeout
from imagegen.providers.protocol import CallObserver, InputImage, Reply, forgotten_job
from imagegen.providers.response_body import read_body
from imagegen.providers.response_parser import error_from_response, parse_reply
from imagegen.providers.wrong_address import probed_address, scheme_refused, wrong_scheme
from imagegen.proxies import ProxyConnector
from imagegen.tasks.provider_job import JobHandle

USER_AGENT = f"imagegen/{__version__}"

MAX_PATHS = 64
"""Paths of paid calls that are kept prepared."""

_LOOK_UP_S = 15.0

_POLL_HEADERS = {"X-ModelScope-Task-Type": "image_generation"}
"""Without it ModelScope does not find the job: https://modelscope.cn/docs/model-service/API-Inference/intro"""

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientProxyConnectionError, "no connection to its proxy"),
    (aiohttp.ClientHttpProxyError, "its proxy refused to connect"),
    (aiohttp.ClientConnectorDNSError, "its name was not found"),
    (aiohttp.ClientSSLError, "TLS failed"),
    (aiohttp.ServerFingerprintMismatch, "TLS failed"),
    (aiohttp.InvalidURL, "its address is not usable"),
    (aiohttp.NonHttpUrlClientError, "its address is not usable"),
    (TimeoutError, "no connection in time"),
)
"""Why nothing was sent; for all else there was no connection."""

_PROXY_LOGIN = 407
"""Only a proxy answers so: https://www.rfc-editor.org/rfc/rfc9110.html#name-407-proxy-authentication-re"""

_NEVER_SENT = (
    aiohttp.ClientHttpProxyError,
    aiohttp.ClientConnectorError,
    aiohttp.ServerFingerprintMismatch,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
)
"""What `ClientSession` raises where nothing was sent."""

_HUNG_UP = (
    HttpProcessingError,
    aiohttp.ClientResponseError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    ConnectionError,
)
"""What a request raises that a server does not take for one, as TLS is for a server without it."""


class Account(Struct, frozen=True):
    """Credentials and headers of each request to a provider.

    authorization: the header's value; secret: the part of it that no text may show; headers: further ones.
    """

    authorization: str | None = None
    secret: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return "Account()"


class ProviderClient:
    """A provider's base URL, and what goes with each request to it and to no other host.

    generations: the path of its paid call. timeout_s: over everything, from the wait for a connection to the last byte
    of the body. jobs_of: the provider's name, if a call may begin a job instead of returning images.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base: URL,
        generations: str,
        timeout_s: float,
        account: Account = Account(),  # noqa: B008 - immutable
        *,
        jobs_of: str | None = None,
    ) -> None:
        self._session = session
        self._base = base
        self._timeout_s = timeout_s
        self._secret = account.secret
        self._headers = _headers(account)
        self._generations = generations
        self._posts: dict[tuple[str, str], PaidPost] = {}
        self._has_answered = False
        submit = URL(f"{base}/{generations}")
        self._jobs = JobPoller(jobs_of, base, submit, account.secret, self._poll) if jobs_of else None

    @property
    def base_url(self) -> URL:
        """The base URL with a slash at its end, so that relative links lead below it."""
        return URL(f"{self._base}/")

    @property
    def own_hosts(self) -> frozenset[str]:
        return frozenset({self._base.host_port_subcomponent or ""})

    def generate(
        self, fields: Mapping[str, object], observer: CallObserver, path: str | None = None
    ) -> Coroutine[Any, Any, Reply]:
        """POST one paid call as JSON. Raises UpstreamError."""
        return self._pay(path or self._generations, JSON_TYPE, json_body(fields), observer)

    async def send_form(
        self, path: str, fields: Mapping[str, object], files: Sequence[tuple[str, InputImage]], observer: CallObserver
    ) -> Reply:
        """POST one paid call as a multipart form. Raises UpstreamError."""
        return await self._pay(path, FORM_TYPE, form_body(fields, files), observer)

    async def submit(
        self, path: str, fields: Mapping[str, object], observer: CallObserver, headers: tuple[tuple[str, str], ...] = ()
    ) -> RawResponse:
        """POST one paid call as JSON and return its response, of any status. Raises UpstreamError.

        headers: besides those of the account; the same for each call to a path.
        """
        return await self._send(path, JSON_TYPE, json_body(fields), observer, headers)

    async def request(self, method: str, url: URL, timeout_s: float) -> RawResponse:
        """Make a request that costs nothing and return its response, of any status. Raises UpstreamError.

        The key goes with it: url must be an address of the provider.
        """
        return await self._request(method, url, min(timeout_s, self._timeout_s))

    async def _pay(self, path: str, content_type: str, body: Body, observer: CallObserver) -> Reply:
        answer = await self._send(path, content_type, body, observer)
        if self._jobs and (reply := await self._jobs.collect(answer, observer)):
            return reply
        now_s = time.time()
        try:
            return parse_reply(answer.status, answer.headers, answer.body, secret=self._secret, now_s=now_s)
        except UpstreamError as error:
            if error.code != "upstream_bad_response" or not is_chat(answer):
                raise
        return parse_chat(answer, secret=self._secret, now_s=now_s)

    async def _send(
        self,
        path: str,
        content_type: str,
        body: Body,
        observer: CallObserver,
        more_headers: tuple[tuple[str, str], ...] = (),
    ) -> RawResponse:
        post = self._posts.get((path, content_type))
        if post is None:
            if len(self._posts) >= MAX_PATHS:  # a path may have the name of a model, which clients choose
                self._posts.clear()
            headers = self._headers | {"Content-Type": content_type} | dict(more_headers)
            post = PaidPost(self._session, URL(f"{self._base}/{path}"), headers, self._timeout_s)
            self._posts[path, content_type] = post
        try:
            answer = await post.send(body, observer.sent, observer.sending)
        except NotSent as error:
            raise await self._cause(error.__cause__, _not_reached(error.__cause__)) from error
        except PartlySent as error:
            raise await self._cause(error.__cause__, _partly_sent(error.__cause__, self._timeout_s)) from error
        except HttpProcessingError as error:
            raise await self._cause(error, _not_http()) from error
        except (aiohttp.ClientError, OSError) as error:
            raise await self._cause(error, _lost_response(error, self._timeout_s)) from error
        self._check_gateway(answer)
        self._has_answered = True
        return answer

    async def _cause(self, error: BaseException | None, otherwise: UpstreamError) -> UpstreamError:
        """Return that the scheme of the base URL is wrong, if that is why a request failed; the other error if not."""
        connector = self._session.connector
        is_proxied = isinstance(connector, ProxyConnector) and connector.proxies.of(self._base)
        if self._has_answered or is_proxied or not _may_be_wrong_address(error, self._base.scheme):
            return otherwise
        return await probed_address(self._base) or otherwise

    def _check_gateway(self, answer: RawResponse) -> None:
        """Raise UpstreamError for a response of a proxy, or of a port with TLS, that has read nothing."""
        if answer.status == _PROXY_LOGIN:
            raise _no_login()
        if scheme_refused(self._base, answer.status, answer.headers, answer.body):
            raise wrong_scheme(self._base)

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll the job of an earlier call until it ends. Raises UpstreamError."""
        if self._jobs is None:
            raise forgotten_job()
        return await self._jobs.resume(handle, observer)

    async def _poll(self, url: URL, timeout_s: float) -> RawResponse:
        return await self._request("GET", url, min(timeout_s, self._timeout_s), _POLL_HEADERS)

    async def get_json(self, path: str) -> object:
        """GET some JSON that costs nothing. Raises UpstreamError."""
        try:
            answer = await self._request("GET", URL(f"{self._base}/{path}"), min(_LOOK_UP_S, self._timeout_s))
        except UpstreamError as error:
            raise await self._cause(error.__cause__, error) from error.__cause__
        if 200 <= answer.status < 300:
            with suppress(orjson.JSONDecodeError):
                return load_json(answer.body)
        self._check_gateway(answer)
        raise error_from_response(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())

    async def _request(
        self, method: str, url: URL, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> RawResponse:
        try:
            async with (
                asyncio.timeout(timeout_s) as limit,
                self._session.request(
                    method,
                    url,
                    headers={**self._headers, **(headers or {})},
                    allow_redirects=False,
                    auto_decompress=False,
                    timeout=connect_timeout(timeout_s),
                ) as response,
            ):
                ends_at = limit.when()
                limit.reschedule(None)  # the body has the limit now
                body = await read_body(response.status, response.headers, response.content, ends_at)
                return RawResponse(response.status, response.headers, body)
        except _NEVER_SENT as error:
            raise _not_reached(error) from error
        except aiohttp.ClientResponseError as error:
            raise _not_http() from error
        except (aiohttp.ClientError, OSError) as error:
            raise _lost_response(error, timeout_s) from error


def _headers(account: Account) -> dict[str, str]:
    """Return the headers of each request. A blank User-Agent gets a 403 from the proxies in front of Together."""
    headers = {"Accept": "application/json", "Content-Type": JSON_TYPE, "User-Agent": USER_AGENT}
    return headers | dict(account.headers) | ({"Authorization": account.authorization} if account.authorization else {})


def basic_authorization(url: URL) -> str | None:
    """Return the header's value for the user and password of an address, None if it has no user."""
    if url.user is None:
        return None
    return "Basic " + base64.b64encode(f"{url.user}:{url.password or ''}".encode()).decode()


def _not_reached(cause: BaseException | None) -> UpstreamError:
    """Return the error of a request that can't have reached the upstream, so that nothing can have been paid."""
    if isinstance(cause, aiohttp.ClientHttpProxyError) and cause.status == _PROXY_LOGIN:
        return _no_login()
    reason = next((reason for kind, reason in _REASONS if isinstance(cause, kind)), "no connection")
    if cause and (fault := certificate_fault(cause)):
        reason = f"its TLS certificate is refused ({fault})"
    return UpstreamError("upstream_error", f"The provider can't be reached: {reason}", retryable=True)


def _may_be_wrong_address(error: BaseException | None, scheme: str) -> bool:
    """Return whether a request may have failed since one side speaks TLS and the other does not.

    Once a connection of `https` is made, the server speaks TLS, and may have read the request.
    """
    if scheme == "https" and not isinstance(error, aiohttp.ClientConnectorError):
        return False
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        return isinstance(error.os_error, ConnectionError) and not isinstance(error.os_error, ConnectionRefusedError)
    return isinstance(error, _HUNG_UP) and not isinstance(error, TimeoutError)


def _partly_sent(cause: BaseException | None, timeout_s: float) -> UpstreamError:
    if isinstance(cause, TimeoutError):
        detail = f"The provider did not take the whole request within {timeout_s:g} s"
        return UpstreamError("upstream_timeout", detail, retryable=True, partly_sent=True)
    detail = "The connection to the provider was lost before the whole request was sent"
    return UpstreamError("upstream_error", detail, retryable=True, partly_sent=True)


def _no_login() -> UpstreamError:
    detail = "The provider can't be reached: its proxy refuses the login"
    return UpstreamError("upstream_error", detail, retryable=True, unreached=True)


def _not_http() -> UpstreamError:
    return UpstreamError("upstream_bad_response", "The provider's answer is not HTTP", lasting=True)


def _lost_response(error: aiohttp.ClientError | OSError, timeout_s: float) -> UpstreamError:
    """Return the error of a request that was sent and got no whole response."""
    if isinstance(error, TimeoutError):
        detail = f"The provider did not answer within {timeout_s:g} s"
        return UpstreamError("upstream_timeout", detail, retryable=True, ambiguous=True)
    detail = "The connection to the provider was lost before its answer was complete"
    return UpstreamError("upstream_error", detail, retryable=True, ambiguous=True)
