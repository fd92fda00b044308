"""Routes for the operator, and of the pages, with their documentation."""

from __future__ import annotations

from imagegen.errors import RouteNotFound
from imagegen.web.api.schemas import AliveView, HealthView, ReadyView, StatsView
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi import samples
from imagegen.web.openapi.document import Operation, ResponseDoc, Route
from imagegen.web.ops import channels, docs, health, pages, prometheus, stats, usage

OPERATE, PAGES = "Operate", "Pages"

_TEXT = {"type": "string"}
_PAGE_HEADERS = ("ETag", "Cache-Control")
_ASSET_TYPES = ("text/css", "text/javascript", "image/svg+xml", "text/plain")
_UNCHANGED = ResponseDoc(304, "The client has this version.", headers=_PAGE_HEADERS)
_READY = {"ready": {"status": "ready"}}
_NOT_READY = {"not ready": {"status": "not ready", "causes": ["images can't be saved: ENOSPC No space left on device"]}}

API_HEALTH = Operation(
    "get",
    "/api/health",
    "getHealth",
    OPERATE,
    "Check that the service responds",
    "It uses neither Redis nor the provider.",
    (
        ResponseDoc(
            200,
            "Yes.",
            HealthView,
            {
                "healthy": {
                    "success": True,
                    "message": "Service is healthy",
                    "timestamp": "2026-01-01T00:00:00.000Z",
                }
            },
        ),
    ),
    needs="none",
)

ALIVE = Operation(
    "get",
    "/healthz",
    "getAlive",
    OPERATE,
    "Check that the process is alive",
    "For the platform: it stays 200 while Redis or the provider is away, which a restart would not repair.",
    (ResponseDoc(200, "Yes.", AliveView, {"alive": {"status": "ok"}}),),
    needs="none",
)

READY = Operation(
    "get",
    "/readyz",
    "getReady",
    OPERATE,
    "Check whether the service is ready",
    "Redis and, after a start, the other instances answer, the loops live, images can be saved, and the service is not "
    "about to stop. `causes` names what fails.",
    (
        ResponseDoc(200, "Ready.", ReadyView, _READY),
        ResponseDoc(503, "Not ready.", ReadyView, _NOT_READY),
    ),
    needs="none",
)

STATS = Operation(
    "get",
    "/api/stats",
    "getStats",
    OPERATE,
    "Read the counters",
    "Counts by state, queue depth, oldest age, rates, the provider's limits, Redis commands. The queue is shared; "
    "all else is of the responding instance, since its start.",
    (ResponseDoc(200, "The counters.", StatsView, {"busy": samples.STATS}),),
    (named.LANGUAGE,),
    limit="general",
    needs="admin",
)

METRICS = Operation(
    "get",
    "/metrics",
    "getMetrics",
    OPERATE,
    "Read the metrics",
    "For Prometheus; as OpenMetrics if `Accept` prefers it.",
    (
        ResponseDoc(
            200,
            "The metrics of this instance.",
            _TEXT,
            {"a part": "imagegen_queue_depth 0.0\n"},
            media=("text/plain", "application/openmetrics-text"),
        ),
    ),
    (named.LANGUAGE,),
    needs="admin",
)

DOCUMENT = Operation(
    "get",
    "/openapi.json",
    "getDocument",
    PAGES,
    "Read this document",
    "",
    (ResponseDoc(200, "OpenAPI 3.1.", {"type": "object"}, headers=_PAGE_HEADERS), _UNCHANGED),
    (named.IF_NONE_MATCH,),
    needs="none",
)

PAGE = Operation(
    "get",
    "/docs",
    "getPage",
    PAGES,
    "See this document as a page",
    "It sends no request to another host.",
    (ResponseDoc(200, "The page.", _TEXT, headers=_PAGE_HEADERS, media=("text/html",)), _UNCHANGED),
    (named.IF_NONE_MATCH,),
    needs="none",
)

FILE = Operation(
    "get",
    "/docs/{file}",
    "getPageFile",
    PAGES,
    "Get a file of the page",
    "",
    (
        ResponseDoc(200, "The file.", _TEXT, headers=_PAGE_HEADERS, media=("text/css", "text/javascript", "text/html")),
        _UNCHANGED,
    ),
    (named.FILE, named.IF_NONE_MATCH, named.LANGUAGE),
    errors=(RouteNotFound,),
    needs="none",
)

STUDIO = Operation(
    "get",
    "/",
    "getStudio",
    PAGES,
    "Open the studio",
    "A page to make, follow and keep images. It sends no request to another host.",
    (
        ResponseDoc(200, "The page.", _TEXT, headers=_PAGE_HEADERS, media=("text/html",)),
        ResponseDoc(302, "The path of `PUBLIC_URL` needs a slash at its end.", headers=("Location",)),
        _UNCHANGED,
    ),
    (named.IF_NONE_MATCH,),
    needs="none",
)

BOARD = Operation(
    "get",
    "/board",
    "getBoardPage",
    PAGES,
    "Open the board",
    "A page that shows the operator the queue, the bill and the health. The page needs no token, its data does. It "
    "sends no request to another host.",
    (ResponseDoc(200, "The page.", _TEXT, headers=_PAGE_HEADERS, media=("text/html",)), _UNCHANGED),
    (named.IF_NONE_MATCH,),
    needs="none",
)

ASSET = Operation(
    "get",
    "/assets/{version}/{file}",
    "getAsset",
    PAGES,
    "Get a file of the pages",
    "Browsers keep it: another content has another version in its address.",
    (
        ResponseDoc(
            200,
            "The file.",
            _TEXT,
            headers=_PAGE_HEADERS,
            media=_ASSET_TYPES,
        ),
        _UNCHANGED,
    ),
    (named.ASSETS_VERSION, named.FILE, named.IF_NONE_MATCH, named.LANGUAGE),
    errors=(RouteNotFound,),
    needs="none",
)

ROUTES: tuple[Route, ...] = (
    (API_HEALTH, health.api_health),
    (ALIVE, health.healthz),
    (READY, health.readyz),
    (STATS, stats.get_stats),
    (METRICS, prometheus.get_metrics),
    usage.ROUTE,
    channels.ROUTE,
    (DOCUMENT, docs.get_document),
    (PAGE, docs.get_page),
    (FILE, docs.get_file),
    (STUDIO, pages.get_studio),
    (BOARD, pages.get_board_page),
    (ASSET, pages.get_asset),
)
