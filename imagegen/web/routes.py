"""Table of all routes: the application's routes and the OpenAPI document are both made from it."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from imagegen.errors import RateLimited
from imagegen.ratelimit.limits import LimitedHandler, RateLimits
from imagegen.web.api import events
from imagegen.web.api import operations as api
from imagegen.web.api.webhook_operations import WEBHOOKS
from imagegen.web.guard import Guard, client_of
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body_admission import BODY_ADMISSION, BodyAdmission
from imagegen.web.http.cross_origin import ADMIN_ROUTES
from imagegen.web.http.read_slots import READ_SLOTS, ReadSlots
from imagegen.web.lookup import is_cached
from imagegen.web.mcp import operations as mcp
from imagegen.web.model_list import MODEL_LIST, ModelListCache
from imagegen.web.openai import operations as openai
from imagegen.web.openai.sdk_retries import mark_of
from imagegen.web.openapi.builder import build
from imagegen.web.openapi.document import Json, Operation
from imagegen.web.ops import board_operations, key_operations
from imagegen.web.ops import operations as ops
from imagegen.web.ops.docs import DOCUMENT_FILE, DocumentFile
from imagegen.web.submitter import SUBMISSIONS, SubmissionCache

ROUTES = (
    *api.ROUTES,
    *openai.ROUTES,
    *mcp.ROUTES,
    *ops.ROUTES,
    *key_operations.ROUTES,
    *board_operations.ROUTES,
)

_PATH_PARAMETERS = {
    "{taskId}": "{task_id:(?!generate$|batch$)[^/]+}",
    "{index}": "{index:[0-9]+}",
    "{modelId}": r"{model_id:[\s\S]+}",
}
"""Patterns of the parameters of a path; any other parameter is one segment."""


def add_routes(app: web.Application, rates: RateLimits, guard: Guard) -> None:
    """Register every route, each with what its callers must show and the limit that it counts against."""
    admin_routes = app[ADMIN_ROUTES] = set()
    for operation, handler in ROUTES:
        path = operation.path
        for parameter, pattern in _PATH_PARAMETERS.items():
            path = path.replace(parameter, pattern)
        guarded, expect = guard.protect(operation, _limited(operation, handler, rates)), guard.expect(operation)
        methods = [operation.method.upper()]
        if operation.method == "get" and not any(response.events for response in operation.answers):
            methods.insert(0, hdrs.METH_HEAD)
        routes = [app.router.add_route(method, path, guarded, expect_handler=expect) for method in methods]
        if operation.needs == "admin":
            admin_routes.update(routes)
    app[MODEL_LIST], app[SUBMISSIONS] = ModelListCache(), SubmissionCache()
    app[BODY_ADMISSION] = BodyAdmission()
    app[READ_SLOTS] = ReadSlots()
    app[DOCUMENT_FILE] = DocumentFile(build_document)
    app.on_shutdown.append(events.end_streams)


def build_document(server: str = "/") -> Json:
    """Return the OpenAPI document. server: the base of all paths in it."""
    return build([operation for operation, _ in ROUTES], WEBHOOKS, server)


def _limited(operation: Operation, handler: Handler, rates: RateLimits) -> LimitedHandler:
    match operation.limit:
        case "none":
            return LimitedHandler(handler, handler)
        case "general" | "entries":
            return rates.general(handler)
        case "generation":
            limited = rates.generation(handler)
            return limited if operation.envelope != "openai" else LimitedHandler(*map(_remember_refusals, limited))
        case "misses":
            return rates.misses(handler, is_cached)


def _remember_refusals(handler: Handler) -> Handler:
    """Wrap a generation of `/v1`: an SDK repeats a call over the limit, and its repeat is a new call."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except RateLimited:
            services = request.app[SERVICES]
            services.calls.refuse(client_of(request).id, mark_of(request.headers))
            raise

    return handle
