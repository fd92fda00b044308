"""Owns the submit: POST /api/images/generate."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import Draining, FieldError, InvalidRequest
from imagegen.queue.client_queue import CacheResult, Submission, SubmitResult
from imagegen.ssrf import check_host
from imagegen.tasks import validation as fields
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State
from imagegen.tasks.webhook import Webhook
from imagegen.web.api.long_poll import parse_wait_s, preference_applied, wait_until_final
from imagegen.web.api.response_cache import ResponseKey
from imagegen.web.api.schemas import FinishedView, SubmittedView
from imagegen.web.api.serializers import submitted_view
from imagegen.web.api.submit_options import SubmitOptions, body_digest, wish_of
from imagegen.web.api.tasks import render_task, retry_after_s
from imagegen.web.context import SERVICES, Services, TaskIdentity
from imagegen.web.http.body import parse_object, read_body
from imagegen.web.http.forwarded import bases, owner_name
from imagegen.web.http.middleware import json_bytes, json_response, language


class SubmitResponse(Struct, frozen=True):
    """What the client is told of its submit."""

    status: int
    view: SubmittedView | FinishedView
    headers: dict[str, str]


async def generate(request: web.Request) -> web.Response:
    """Queues a task, joins the one that runs, or points at the finished one; waits for its end where that is wanted."""
    context, wait_s, wish = request.app[SERVICES], parse_wait_s(request), wish_of(request)
    submitted = await submit_body(context, await read_body(request), wish)
    if wait_s:
        submitted = replace(submitted, task=await wait_until_final(context, submitted.task, wait_s, request))
    elif submitted.cached is CacheResult.HIT:
        return await _cached_hit(request, context, submitted)
    answer = await build_response(request, context, submitted, waited=bool(wait_s))
    return json_response(answer.view, status=answer.status, headers=answer.headers | preference_applied(wait_s))


async def _cached_hit(request: web.Request, context: Services, submitted: SubmitResult) -> web.Response:
    """As `answer_of`; what is told of a finished task is kept."""
    task = submitted.task
    asked = ResponseKey("hit", task.id, context.base_url(request), language(request))
    body = context.response_cache.get(asked, task)
    if body is not None:
        return json_bytes(body, headers=_task_headers(request, context, submitted))
    answer = await build_response(request, context, submitted)
    body = msgspec.json.encode(answer.view)
    if task.state.is_final:
        context.response_cache.put(asked, task, body)
    return json_bytes(body, status=answer.status, headers=answer.headers)


def _task_headers(request: web.Request, context: Services, submitted: SubmitResult) -> dict[str, str]:
    location = context.local_url(request, f"/api/images/{submitted.task.id}")
    return {"Location": location, "X-Cache": submitted.cached}


async def build_response(
    request: web.Request, context: Services, submitted: SubmitResult, *, waited: bool = False
) -> SubmitResponse:
    """The answer for a request that was taken. One who waited for the end is told the end."""
    task, hit = submitted.task, submitted.cached is CacheResult.HIT
    headers = _task_headers(request, context, submitted)
    if waited and task.state.is_final:
        ended, more = await render_task(request, task)
        return SubmitResponse(200, {**ended, "cached": hit}, headers | more)
    place = await context.queue.position(task)
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    view = submitted_view(submitted, place, context.base_url(request), language(request))
    return SubmitResponse(200 if hit else 202, view, headers)


def submit_body(context: Services, raw: bytes, wish: SubmitOptions) -> Awaitable[SubmitResult]:
    """Parses one body and puts it in the queue. Bytes that came before mean what they meant."""
    if wish.key is not None:
        return submit_parsed(context, parse_object(raw), wish)
    submission = context.submission_cache.get(raw)
    if submission is None:
        submission = _submission(context, parse_object(raw), wish)
        if not submission.webhooks:
            context.submission_cache.put(raw, submission)
    return submit(context, submission, fresh=wish.fresh)


async def submit_parsed(context: Services, body: Mapping[str, Any], wish: SubmitOptions) -> SubmitResult:
    """Puts one body in the queue, once only where the client gave it a key."""
    submission = _submission(context, body, wish)
    if wish.key is None:
        return await submit(context, submission, fresh=wish.fresh)
    refuse_while_draining(context)
    keys = context.queue.idempotency
    async with keys.first_use_or_existing(wish.client, wish.key, submission.task_id, body_digest(body)) as first_id:
        if first_id is None:
            return await submit(context, submission, fresh=wish.fresh)
        task = await context.queue.get(first_id) or await context.queue.newest(first_id)
        if task is None:
            return await submit(context, submission)
        return SubmitResult(task, CacheResult.HIT if task.state is State.COMPLETED else CacheResult.COALESCED)


def _submission(context: Services, body: Mapping[str, Any], wish: SubmitOptions) -> Submission:
    wanted, webhooks = _parse(context, body, wish)
    return context.identity.submission(wanted, None, webhooks)


def _parse(
    context: Services, body: Mapping[str, Any], wish: SubmitOptions
) -> tuple[GenerationRequest, tuple[Webhook, ...]]:
    """The request, and whom to tell. Raises InvalidRequest with the faults of both."""
    identity = context.identity
    if "webhook" not in body:
        return _fields(identity, body, wish.max_faults), ()
    webhooks: tuple[Webhook, ...] = ()
    faults: tuple[FieldError, ...] = ()
    drawn = {name: value for name, value in body.items() if name != "webhook"}
    try:
        webhooks = _webhooks(context, body["webhook"], wish)
    except InvalidRequest as error:
        faults = error.details
    try:
        wanted = _fields(identity, drawn, wish.max_faults)
    except InvalidRequest as error:
        raise InvalidRequest(details=(*error.details, *faults)[: wish.max_faults]) from error
    if faults:
        raise InvalidRequest(details=faults)
    return wanted, webhooks


def _fields(identity: TaskIdentity, body: Mapping[str, Any], max_faults: int) -> GenerationRequest:
    return fields.parse(body, default_model=identity.default_model, aliases=identity.aliases, max_faults=max_faults)


def _webhooks(context: Services, sent: object, wish: SubmitOptions) -> tuple[Webhook, ...]:
    if sent is None or sent == "":
        return ()
    webhook = Webhook.parse(
        sent,
        wish.base,
        None if context.private_webhooks else check_host,
        check_own=partial(context.own.check, urls=bases(wish.request, wish.base)),
        owner=owner_name(wish.client),
    )
    return (webhook,)


async def submit(context: Services, submission: Submission, *, fresh: bool = False) -> SubmitResult:
    """Submits. A finished task is queued afresh where one of its pictures is gone, or where the client wants it so.

    fresh: with pictures of before this moment it is not content; they stay until the new ones are there.
    """
    refuse_while_draining(context)
    began = time.time()
    submitted = await context.queue.submit(submission)
    while submitted.cached is CacheResult.HIT:
        task = submitted.task
        whole = await context.store.contains_all(task.id, task.images)
        if whole and not (fresh and task.created_at < began):
            break
        submitted = await context.queue.replace(submission, task, keep=whole)
    return await context.queue.add_webhooks(submission, submitted) if submission.webhooks else submitted


def refuse_while_draining(context: Services) -> None:
    """Raises Draining."""
    if context.readiness.draining:
        raise Draining(headers={"Retry-After": "5"})
