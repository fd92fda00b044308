"""Outermost layer around every request: its route is found, errors become responses, it is counted and logged."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import UrlMappingMatchInfo
from loguru import logger
from msgspec import Struct, field
from multidict import istr
from yarl import URL

from imagegen import log
from imagegen.did_you_mean import nearest
from imagegen.errors import ApiError, Forbidden, InternalError, QueueUnavailable, RouteNotFound
from imagegen.line_limit import LineLimit
from imagegen.metrics import Histogram, Meter
from imagegen.redis_client.redis_errors import RedisError, shown
from imagegen.turn_queue import TurnLimit
from imagegen.web.http.cross_origin import SEC_FETCH_SITE, CrossOriginPolicy
from imagegen.web.http.error_responses import error_response, from_http_exception
from imagegen.web.http.responses import (
    Language,
    language,
    on_response_prepare,
    refuse_route,
    request_id_of,
    route_of,
)
from imagegen.web.mcp import error_responses as mcp_errors
from imagegen.web.openai import error_responses as openai_errors

_UNPRINTABLE = re.compile(r"[^!-~]")
_SLASHES = re.compile("/+")
_MAX_LOGGED_CHARS = 200
_MAX_CAUSES = 20

MAX_PATHS, MAX_PATH_CHARS = 2_000, 200
_WEBHOOK_ID = istr("webhook-id")
_CLIENT_GONE = 499

UNMATCHED = "unmatched"
"""Label of requests without a route; the client's own path and method are never labels."""


Handle = Callable[[Any], Awaitable[web.StreamResponse]]
"""Takes a web.Request, though aiohttp calls it any BaseRequest."""


class RouteCache:
    """Cache of the routes that aiohttp's router found; its table is frozen, so a path always has the same route.

    Saves 12 of 67 us of processor time of a status read: the router walks up the path and tries an expression for each
    route there. Requests with the same path share the result, which nothing changes after the look-up.
    The query is not part of the key. A request with `Expect`, or for an application with middlewares, takes
    aiohttp's way.

    tidy: maps a raw path, without its query, to the path that is looked up.
    """

    def __init__(self, app: web.Application, tidy: Callable[[str], str]) -> None:
        self._app, self._tidy = app, tidy
        self._routes: dict[tuple[str, str], tuple[UrlMappingMatchInfo, Handler]] = {}

    def handle(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Run the handler of a request."""
        cached = self._routes.get((request.method, request.raw_path.partition("?")[0]))
        if cached is None or hdrs.EXPECT in request.headers:
            return self._handle_unknown(request)
        request._match_info, handler = cached  # noqa: SLF001 - aiohttp has no public way to set a request's route
        return handler(request)

    async def _handle_unknown(self, request: web.Request) -> web.StreamResponse:
        url = request._rel_url  # noqa: SLF001 - the public property keeps the URL that it returned first
        if (path := self._tidy(url.raw_path)) != url.raw_path:
            request._rel_url = URL.build(path=path, query_string=url.raw_query_string, encoded=True)  # noqa: SLF001
        response = await self._app._handle(request)  # noqa: SLF001 - what aiohttp's own server calls
        self._remember(request)
        return response

    def _remember(self, request: web.Request) -> None:
        key, match = (request.method, request.raw_path.partition("?")[0]), request.match_info
        if match.http_exception or self._app.middlewares or len(match.apps) > 1 or len(key[1]) > MAX_PATH_CHARS:
            return
        if len(self._routes) >= MAX_PATHS:
            self._routes.pop(next(iter(self._routes)))
        self._routes[key] = match, match.handler


class RequestPipeline(Struct, frozen=True):
    """Outermost layer around an application, installed by `server.ImagegenRunner`.

    It is no aiohttp middleware, since one costs each request as much time as this whole layer.

    meter: counts every request. access_log: whether INFO is logged; if not, no time is spent on the line.
    prefix: path of PUBLIC_URL, which a proxy in front may have removed. origins: which web pages may use the service.
    refused: limit of the lines about commands that Redis refused, by route.
    """

    meter: Meter
    access_log: bool
    prefix: str = ""
    origins: CrossOriginPolicy = field(default_factory=CrossOriginPolicy)
    refused: LineLimit = field(default_factory=lambda: LineLimit(_log_more_refused))

    def tidy_path(self, raw_path: str) -> str:
        """Return the path that is routed: without the prefix, and on `/v1` and `/mcp` without empty segments."""
        prefix = self.prefix
        if prefix and raw_path.startswith(prefix) and raw_path[len(prefix) : len(prefix) + 1] in ("", "/"):
            raw_path = raw_path[len(prefix) :] or "/"
        if "//" in raw_path or (raw_path.endswith("/") and raw_path != "/"):
            path = _SLASHES.sub("/", raw_path).rstrip("/")
            if openai_errors.is_openai_path(path) or path == mcp_errors.PATH:
                return path
        return raw_path

    def wrap(self, handle: Handle, app: web.Application) -> Handle:
        """Wrap a handler: assign the request id, turn errors into responses, count the request and log one line.

        Of hundreds of requests that come at once some begin in each turn of the event loop, so that no turn is long.
        """
        meter, access_log, turns = self.meter, self.access_log, TurnLimit()
        admit, preflight = self._admission(), self._preflight if self.origins.allowed else None
        counted: dict[tuple[web.AbstractRoute, int], Histogram] = {}

        async def pipeline(request: web.Request) -> web.StreamResponse:
            began_at, status = monotonic(), _CLIENT_GONE
            meter.open_requests += 1
            try:
                turns.begun += 1
                if turns.begun >= turns.noticed and turns.is_reached():
                    await turns.wait()
                try:
                    admit(request)
                    if preflight is None or request.method != hdrs.METH_OPTIONS:
                        response = await handle(request)
                    else:
                        response = await preflight(request, app) or await handle(request)
                except Exception as error:  # noqa: BLE001 - every error becomes a response here
                    refuse_route(request, app)
                    try:
                        response = error_to_response(request, error, self.tidy_path)
                    finally:
                        _forget_frames(error)
                status = response.status
                return response
            finally:
                took_s = monotonic() - began_at
                meter.open_requests -= 1
                route = route_of(request)
                histogram = counted.get((route, status)) if route else None
                if histogram is None:
                    histogram = meter.requests[*_names(route), status]
                    if route and route.resource:
                        counted[route, status] = histogram
                histogram.observe(took_s)
                if access_log:
                    _log_access(request, status, took_s)

        return pipeline

    def _admission(self) -> Callable[[web.Request], None]:
        """Return the check of a request's headers before anything else; without browser's headers it takes 0.3 us."""
        origins, is_known_host = self.origins, self.origins.is_known_host

        def admit(request: web.Request) -> None:
            headers = request.headers
            host = headers.get(hdrs.HOST)
            if host is not None and not is_known_host(host):
                origins.check_host(request, host)
            if hdrs.ORIGIN in headers or SEC_FETCH_SITE in headers:
                origins.check_site(request)
            if _WEBHOOK_ID in headers and _is_own_webhook(request):
                raise Forbidden

        return admit

    async def _preflight(self, request: web.Request, app: web.Application) -> web.Response | None:
        return await self.origins.preflight(request, app, self.tidy_path(request.rel_url.raw_path))


PIPELINE = web.AppKey("pipeline", RequestPipeline)


def install_pipeline(app: web.Application, pipeline: RequestPipeline) -> None:
    """Install the pipeline in an application."""
    app[PIPELINE] = pipeline
    app.on_response_prepare.append(on_response_prepare)
    if pipeline.origins.allowed:
        app.on_response_prepare.append(pipeline.origins.add_headers)


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error and of its causes, which was logged if it is to be.

    The stream of a body keeps the error that ended it, and the frames keep the stream: a megabyte that came of the
    body would live until the garbage collector comes.
    """
    for _ in range(_MAX_CAUSES):
        if error is None:
            break
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _is_own_webhook(request: web.Request) -> bool:
    """Return whether a service like this one sent it: a webhook to this service could start paid calls without end."""
    return request.headers.get(hdrs.USER_AGENT, "").startswith("imagegen/")


def _names(route: web.AbstractRoute | None) -> tuple[str, str]:
    """Return method and template of a route: labels from bounded sets."""
    if route is None:
        return hdrs.METH_ANY, UNMATCHED
    return route.method, UNMATCHED if route.resource is None else route.resource.canonical


def error_to_response(request: web.Request, error: Exception, tidy: Callable[[str], str]) -> web.StreamResponse:
    """Return the response for an error of a handler; raise it again if a response was already started.

    tidy: maps the path of a request without a route to the path that would be looked up.
    """
    if request.writer.output_size > 0:
        if not isinstance(error, ConnectionError):
            _log_unforeseen(request, error)
        raise error
    if isinstance(error, ConnectionError) and request.transport is None:
        return web.Response(status=_CLIENT_GONE)
    if isinstance(error, web.HTTPException) and error.status < 400:
        return _redirect(error)
    path = _routed_path(request, tidy)
    return response_on(path, _as_api_error(request, error, path), request_id_of(request), language(request))


def response_on(path: str, error: ApiError, request_id: str, used: Language) -> web.Response:
    """Return the response for an error, in the form that the clients of a path expect."""
    if path == mcp_errors.PATH:
        return mcp_errors.api_error_response(error)
    build_response = openai_errors.error_response if openai_errors.is_openai_path(path) else error_response
    return build_response(error, request_id, used)


def _routed_path(request: web.Request, tidy: Callable[[str], str]) -> str:
    route = route_of(request)
    return tidy(request.path) if route is None or route.resource is None else route.resource.canonical


def _as_api_error(request: web.Request, error: Exception, path: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, web.HTTPNotFound):
        return RouteNotFound(near=_nearest_route(request, path))
    if isinstance(error, web.HTTPException) and error.status < 500:
        return from_http_exception(error)
    if isinstance(error, RedisError):
        _log_refused(request, error)
        return QueueUnavailable(headers={hdrs.RETRY_AFTER: "2"})
    _log_unforeseen(request, error)
    return InternalError()


def _nearest_route(request: web.Request, path: str) -> str | None:
    """Return the path without parameters that `path` most likely misspells."""
    paths = (resource.canonical for resource in request.app.router.resources())
    return nearest(path, (template for template in paths if "{" not in template))


def _redirect(redirect: web.HTTPException) -> web.Response:
    """Return the same redirect as a response, since aiohttp deprecates returning an exception."""
    headers = redirect.headers.copy()
    headers.popall(hdrs.CONTENT_TYPE, None)
    headers.popall(hdrs.CONTENT_LENGTH, None)
    return web.Response(status=redirect.status, headers=headers)


def _log_access(request: web.Request, status: int, took_s: float) -> None:
    log.log_access(
        _printable(request.method), _printable(request.rel_url.raw_path), status, took_s, request_id_of(request)
    )


def _log_unforeseen(request: web.Request, error: Exception) -> None:
    logger.opt(exception=error).error(
        "Unforeseen {error} in {method} {path}, request {requestId}",
        error=type(error).__name__,
        method=_printable(request.method),
        path=_printable(request.rel_url.raw_path),
        requestId=request_id_of(request),
    )


def _log_refused(request: web.Request, error: RedisError) -> None:
    """Log a command that Redis refused, such as one for a key of which another program changed the type."""
    if not request.app[PIPELINE].refused.admits(_names(route_of(request))[1]):
        return
    where, request_id = _printable(request.rel_url.raw_path), request_id_of(request)
    logger.error("Redis refused a command of {}, request {}: {}", where, request_id, shown(error))


def _log_more_refused(route: str, count: int) -> None:
    logger.error("Redis refused {} more commands of {}", count, route)


def _printable(text: str) -> str:
    if len(text) <= _MAX_LOGGED_CHARS and text.isascii() and text.isprintable() and " " not in text:
        return text
    return _UNPRINTABLE.sub("?", text[:_MAX_LOGGED_CHARS])
