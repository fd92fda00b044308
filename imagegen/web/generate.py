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

from imagegen.addresses import check_host
from imagegen.errors import Draining, FieldFault, InvalidRequest
from imagegen.queue.queue import Cached, Submission, Submitted
from imagegen.tasks import fields
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State
from imagegen.tasks.webhook import Webhook
from imagegen.web.body import parse_object, read_body
from imagegen.web.client import bases, owner_name
from imagegen.web.context import CONTEXT, Context, Identity
from imagegen.web.edge import json_bytes, json_response, language
from imagegen.web.shapes import EndedView, SubmittedView
from imagegen.web.tasks import describe, retry_after_s
from imagegen.web.told import Asked
from imagegen.web.views import submitted_view
from imagegen.web.waiting import applied, wait_until_final, wanted_wait_s
from imagegen.web.wish import Wish, digest_of, wish_of


class Answer(Struct, frozen=True):
    """What the client is told of its submit."""

    status: int
    view: SubmittedView | EndedView
    headers: dict[str, str]


async def generate(request: web.Request) -> web.Response:
    """Queues a task, joins the one that runs, or points at the finished one; waits for its end where that is wanted."""
    context, wait_s, wish = request.app[CONTEXT], wanted_wait_s(request), wish_of(request)
    submitted = await order(context, await read_body(request), wish)
    if wait_s:
        submitted = replace(submitted, task=await wait_until_final(context, submitted.task, wait_s, request))
    elif submitted.cached is Cached.HIT:
        return await _hit(request, context, submitted)
    answer = await answer_of(request, context, submitted, waited=bool(wait_s))
    return json_response(answer.view, status=answer.status, headers=answer.headers | applied(wait_s))


async def _hit(request: web.Request, context: Context, submitted: Submitted) -> web.Response:
    """As `answer_of`; what is told of a finished task is kept."""
    task = submitted.task
    asked = Asked("hit", task.id, context.base_url(request), language(request))
    body = context.told.get(asked, task)
    if body is not None:
        return json_bytes(body, headers=_found(request, context, submitted))
    answer = await answer_of(request, context, submitted)
    body = msgspec.json.encode(answer.view)
    if task.state.final:
        context.told.put(asked, task, body)
    return json_bytes(body, status=answer.status, headers=answer.headers)


def _found(request: web.Request, context: Context, submitted: Submitted) -> dict[str, str]:
    location = context.local_url(request, f"/api/images/{submitted.task.id}")
    return {"Location": location, "X-Cache": submitted.cached}


async def answer_of(request: web.Request, context: Context, submitted: Submitted, *, waited: bool = False) -> Answer:
    """The answer for a request that was taken. One who waited for the end is told the end."""
    task, hit = submitted.task, submitted.cached is Cached.HIT
    headers = _found(request, context, submitted)
    if waited and task.state.final:
        ended, more = await describe(request, task)
        return Answer(200, {**ended, "cached": hit}, headers | more)
    place = await context.queue.place(task)
    if not task.state.final:
        headers["Retry-After"] = str(retry_after_s(place))
    view = submitted_view(submitted, place, context.base_url(request), language(request))
    return Answer(200 if hit else 202, view, headers)


def order(context: Context, raw: bytes, wish: Wish) -> Awaitable[Submitted]:
    """Parses one body and puts it in the queue. Bytes that came before mean what they meant."""
    if wish.key is not None:
        return order_parsed(context, parse_object(raw), wish)
    submission = context.seen.get(raw)
    if submission is None:
        submission = _submission(context, parse_object(raw), wish)
        if not submission.webhooks:
            context.seen.put(raw, submission)
    return submit(context, submission, fresh=wish.fresh)


async def order_parsed(context: Context, body: Mapping[str, Any], wish: Wish) -> Submitted:
    """Puts one body in the queue, once only where the client gave it a key."""
    submission = _submission(context, body, wish)
    if wish.key is None:
        return await submit(context, submission, fresh=wish.fresh)
    refuse_while_draining(context)
    keys = context.queue.idempotency
    async with keys.use(wish.client, wish.key, submission.task_id, digest_of(body)) as first_id:
        if first_id is None:
            return await submit(context, submission, fresh=wish.fresh)
        task = await context.queue.get(first_id) or await context.queue.newest(first_id)
        if task is None:
            return await submit(context, submission)
        return Submitted(task, Cached.HIT if task.state is State.COMPLETED else Cached.COALESCED)


def _submission(context: Context, body: Mapping[str, Any], wish: Wish) -> Submission:
    wanted, webhooks = _parsed(context, body, wish)
    return context.identity.submission(wanted, None, webhooks)


def _parsed(context: Context, body: Mapping[str, Any], wish: Wish) -> tuple[GenerationRequest, tuple[Webhook, ...]]:
    """The request, and whom to tell. Raises InvalidRequest with the faults of both."""
    identity = context.identity
    if "webhook" not in body:
        return _fields(identity, body, wish.max_faults), ()
    webhooks: tuple[Webhook, ...] = ()
    faults: tuple[FieldFault, ...] = ()
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


def _fields(identity: Identity, body: Mapping[str, Any], max_faults: int) -> GenerationRequest:
    return fields.parse(body, default_model=identity.default_model, aliases=identity.aliases, max_faults=max_faults)


def _webhooks(context: Context, sent: object, wish: Wish) -> tuple[Webhook, ...]:
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


async def submit(context: Context, submission: Submission, *, fresh: bool = False) -> Submitted:
    """Submits. A finished task is queued afresh where one of its pictures is gone, or where the client wants it so.

    fresh: with pictures of before this moment it is not content; they stay until the new ones are there.
    """
    refuse_while_draining(context)
    began = time.time()
    submitted = await context.queue.submit(submission)
    while submitted.cached is Cached.HIT:
        task = submitted.task
        whole = await context.store.contains_all(task.id, task.images)
        if whole and not (fresh and task.created_at < began):
            break
        submitted = await context.queue.replace(submission, task, keep=whole)
    return await context.queue.join(submission, submitted) if submission.webhooks else submitted


def refuse_while_draining(context: Context) -> None:
    """Raises Draining."""
    if context.readiness.draining:
        raise Draining(headers={"Retry-After": "5"})
