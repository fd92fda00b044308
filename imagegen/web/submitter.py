"""Use case of submitting: a client's body becomes a task, once.

Handlers give the body and the options; what a client is shown of the result is theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
from aiohttp import hdrs, web
from msgspec import Struct
from msgspec.structs import replace
from multidict import istr

from imagegen.accounts.api_keys import ApiKey, check_allowed
from imagegen.errors import Draining, FieldError, InvalidRequest, QueueUnavailable, StoreUnavailable
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.task_lookup import check_digest
from imagegen.ratelimit.limits import OWN_LIMITS, RATE_LIMITS
from imagegen.ssrf import check_host
from imagegen.tasks import validation
from imagegen.tasks.clients import owner_name, submitter_name
from imagegen.tasks.family import ReuseImages
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.submission import FormerIdentity, Submission, TaskIdentity
from imagegen.tasks.task import State, Task
from imagegen.tasks.webhook import Webhook
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.body import ReceivedBody, parse_object
from imagegen.web.http.forwarded import bases
from imagegen.web.max_cost import MAX_COST_FIELDS, find_free_task, parse_max_cost

IDEMPOTENCY_KEY = "Idempotency-Key"

MAX_TRIES = 3
"""Submits of one request, each after the task that it joined was cancelled at the same moment."""

MAX_REPLACEMENTS = 5
"""More of them, one after the other, show that the store does not find what was stored just now."""

_IDEMPOTENCY_KEY = istr(IDEMPOTENCY_KEY)
_OPTIONS = frozenset({"webhook", *MAX_COST_FIELDS})
"""Fields of a body that change neither its images nor its task."""

_OPERATORS_FAULTS = frozenset({"upstream_auth", "upstream_billing", "model_not_available"})
"""Codes of failed tasks that the request does not cause."""

_VISIBLE = re.compile(r"[!-~]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_ESCAPED = re.compile(r"\\(.)")


MAX_SUBMISSIONS, MAX_CACHED_BODY_BYTES = 1_000, 1_000
"""Limits of `SubmissionCache`."""

Owner = tuple[str, str, str | None]
"""Of a submission: the client, the name of its API key, and the scope of its task."""


class SubmissionCache:
    """Cache of submissions by their owner and the client's body, each with the units of its request.

    Without the owner, a client's body would lead to the task of another client that has its own.
    """

    def __init__(self) -> None:
        self._submissions: OrderedDict[tuple[Owner, bytes], tuple[Submission, int]] = OrderedDict()

    def get(self, owner: Owner, raw: bytes) -> tuple[Submission, int] | None:
        return self._submissions.get((owner, raw))

    def put(self, owner: Owner, raw: bytes, submission: Submission, units: int) -> None:
        if len(raw) <= MAX_CACHED_BODY_BYTES:
            self._submissions[owner, raw] = submission, units
            if len(self._submissions) > MAX_SUBMISSIONS:
                self._submissions.popitem(last=False)


SUBMISSIONS = web.AppKey("submissions", SubmissionCache)


class ParsedBody(Struct, frozen=True):
    """A body of a submit. max_micro_usd: the most that its images may cost, None without a limit."""

    request: GenerationRequest
    webhooks: tuple[Webhook, ...] = ()
    max_micro_usd: int | None = None

    def submission(self, identity: TaskIdentity, options: SubmitOptions) -> Submission:
        """Return the submission. Its request has uploads in place of all images."""
        submission = identity.submission(self.request, options.scope, self.webhooks, options.key_name)
        most = self.max_micro_usd
        if most is None:
            return replace(submission, submitter=submitter_name(options.client))
        cost = identity.estimate(self.request, most)
        return replace(submission, max_micro_usd=most, cost=cost, submitter=submitter_name(options.client))


class SubmitOptions(Struct, frozen=True):
    """Options of one submit, from the headers of its request.

    client: name by which its limits and idempotency keys are kept.
    fresh: no image from before is reused (`Cache-Control: no-cache`).
    key: the `Idempotency-Key`, unique for each `client`.
    scope: name of the API key that owns the tasks; None if all clients share them. Where they are shared, the fresh
        ones of a client are its own.
    key_name: name of the API key, empty without one. api_key: the key itself.
    max_errors: the most field errors that are named.
    keeps_failures: a failure that is an answer, see `is_final_answer`, is returned and not tried again.
    """

    request: web.Request
    client: str
    fresh: bool = False
    key: str | None = None
    scope: str | None = None
    key_name: str = ""
    max_errors: int = validation.MAX_FIELD_ERRORS
    keeps_failures: bool = False
    api_key: ApiKey | None = None

    @classmethod
    def from_request(cls, request: web.Request) -> SubmitOptions:
        """Read the headers. Raises InvalidRequest for a bad key."""
        headers, fresh = request.headers, False
        if hdrs.CACHE_CONTROL in headers:
            directives = ",".join(headers.getall(hdrs.CACHE_CONTROL)).lower()
            fresh = "no-cache" in map(str.strip, directives.split(","))
        key = _parse_key(headers.getall(_IDEMPOTENCY_KEY)) if _IDEMPOTENCY_KEY in headers else None
        client = client_of(request)
        scope = client.scope
        if fresh and request.app[SERVICES].shares_tasks:
            scope = client.own_scope  # images that other clients have links to stay as they are
        return cls(request, client.id, fresh, key, scope, client.name, api_key=client.key)

    @classmethod
    def without_headers(cls, request: web.Request) -> SubmitOptions:
        """Return the options of an agent: it has no separate headers for a submit, and may repeat it blindly."""
        client = client_of(request)
        return cls(
            request, client.id, scope=client.scope, key_name=client.name, keeps_failures=True, api_key=client.key
        )

    @property
    def owner(self) -> Owner:
        """What the submission of equal bodies depends on."""
        return self.client, self.key_name, self.scope

    @property
    def base(self) -> str:
        """Base of the links in webhooks."""
        return self.request.app[SERVICES].link_base.url(self.request)

    def for_batch_entry(self, index: int) -> SubmitOptions:
        """Return the options of one entry. A client's own key has no space in it, so the entry's is unique."""
        return self if self.key is None else replace(self, key=f"{self.key} {index}")


async def submit_body(services: Services, body: ReceivedBody, options: SubmitOptions) -> SubmitResult:
    """Parse a body and submit it. Equal bytes of the same scope are parsed once, if no input image is in them."""
    if options.key is not None:
        return await submit_parsed(services, parse_object(body.raw), body, options)
    api_key, submissions = options.api_key, options.request.app[SUBMISSIONS]
    is_restricted = api_key is not None and api_key.is_restricted  # others' submissions may not be allowed for it
    cached = None if is_restricted else submissions.get(options.owner, body.raw)
    if cached is None:
        fields = parse_object(body.raw)
        parsed = parse_fields(services, fields, options)
        if parsed.request.image_sources or body.images or body.refusals:
            return await submit_parsed(services, fields, body, options)
        units = parsed.request.units
        cached = parsed.submission(services.identity, options), units
        is_served = services.channels.serves_every_model or services.serves_here(parsed.request.model)
        if not parsed.webhooks and not is_restricted and is_served:
            submissions.put(options.owner, body.raw, *cached)
    submission, units = cached
    await spend_units(options.request, units)
    return await submit(services, submission, fresh=options.fresh)


async def submit_parsed(
    services: Services, fields: Mapping[str, Any], body: ReceivedBody, options: SubmitOptions
) -> SubmitResult:
    """Submit parsed fields of a body, once only if the client gave a key."""
    parsed = parse_fields(services, fields, options)
    await spend_units(options.request, parsed.request.units)
    resolved = await _store_images(services, parsed.request, fields, body, options)
    submission = replace(parsed, request=resolved).submission(services.identity, options)
    if options.keeps_failures and (failed := await _final_answer(services, submission)) is not None:
        return SubmitResult(failed, CacheResult.HIT)
    if options.key is None:
        return await submit(services, submission, fresh=options.fresh)
    refuse_while_draining(services)
    keys, digest = services.queue.idempotency, body_digest(fields)
    async with keys.first_use_or_existing(options.client, options.key, submission.task_id, digest) as first_id:
        if first_id is None:
            return await submit(services, submission, fresh=options.fresh)
        task = await services.queue.get(first_id) or await services.queue.fresh(first_id)
        if task is None:
            return await submit(services, submission)
        if not task.state.is_final:
            await services.queue.join(task, submission.submitter, has_webhook=bool(submission.webhooks))
        return SubmitResult(task, CacheResult.HIT if task.state is State.COMPLETED else CacheResult.COALESCED)


async def spend_units(request: web.Request, units: int) -> None:
    """Count the units of one generation before anything of it is stored. Raises RateLimited."""
    limits = request.app[RATE_LIMITS]
    if limits.limits_units or (client_of(request).key is not None and OWN_LIMITS in request):
        await limits.spend_units(request, units)


async def _store_images(
    services: Services,
    request: GenerationRequest,
    fields: Mapping[str, Any],
    body: ReceivedBody,
    options: SubmitOptions,
) -> GenerationRequest:
    """Return a request with uploads in place of its `data:` URIs, kept for its task. See `InputImages.store_images`."""

    async def is_known(resolved: GenerationRequest) -> bool:
        """Return whether the task of this request exists, and neither failed nor was cancelled."""
        task = await services.queue.get(services.identity.submission(resolved, options.scope).task_id)
        return task is not None and task.state not in (State.FAILED, State.CANCELLED)

    uploads_of = client_of(options.request).scope
    return await services.inputs.store_images(request, fields, body, scope=uploads_of, is_known=is_known)


async def submit(services: Services, submission: Submission, *, fresh: bool = False) -> SubmitResult:
    """Submit. A finished task is queued again if one of its images is gone, or if the client requests fresh ones.

    fresh: images from before this moment are not returned; they stay until the new ones are stored.
    Raises also MaxCostExceeded, and PriceUnknown.
    """
    refuse_while_draining(services)
    if submission.former is not None:
        submission = await _of_former_version(services, submission, submission.former)
    submitted, tries = await _submit_or_replace(services, submission, fresh=fresh), 1
    while submitted.cached is CacheResult.COALESCED and not submitted.task.state.is_final:
        has_webhook = bool(submission.webhooks)
        joined = await services.queue.join(submitted.task, submission.submitter, has_webhook=has_webhook)
        if joined or tries == MAX_TRIES:
            break
        submitted, tries = await _submit_or_replace(services, submission, fresh=fresh), tries + 1
    if submission.webhooks:
        submitted = await services.queue.add_webhooks(submission, submitted)
    services.ledger.on_submitted(submission, submitted)
    return submitted


async def _of_former_version(services: Services, submission: Submission, former: FormerIdentity) -> Submission:
    """Return the submission for the task that a former version made of the request, if there is one to join."""
    task = await services.queue.get(former.task_id)
    is_usable = task is not None and task.state not in (State.FAILED, State.CANCELLED)
    return submission.as_former() if is_usable else submission


async def _submit_or_replace(services: Services, submission: Submission, *, fresh: bool) -> SubmitResult:
    """Submit; replace a finished task if one of its images is gone, or if it is too old for `fresh`.

    If the calls may cost more than the client's limit, a task without further cost is returned, if one serves it.
    """
    if submission.max_micro_usd is not None and submission.may_cost_too_much:
        free = await find_free_task(services, submission, fresh=fresh)
        if free is not None:
            return free
    began = services.queue.clock() if fresh else 0.0
    reuse = None if fresh else services.reuse_images
    submitted = None
    if (cancelled := services.queue.cancelled_refresh(submission.task_id)) is not None:
        submitted = await _resubmit_refresh(services, submission, cancelled, reuse)
    submitted = submitted or await services.queue.submit(submission, reuse)
    for _ in range(MAX_REPLACEMENTS):
        task = submitted.task
        if submitted.cached is not CacheResult.HIT:
            return submitted
        whole = await services.store.contains_all(task.id, task.images)
        if whole and not (fresh and task.created_at < began):
            return submitted
        submitted = await services.queue.replace(submission, task, reuse, keep=whole)
    if submitted.cached is CacheResult.HIT:
        raise StoreUnavailable
    return submitted


async def _resubmit_refresh(
    services: Services, submission: Submission, cancelled: Task, reuse: ReuseImages | None
) -> SubmitResult | None:
    """Queue a task again after its fresh generation was cancelled, without losing the images from before it.

    Return None if its images are gone.
    """
    if not await services.store.contains_all(cancelled.id, cancelled.images):
        return None
    check_digest(cancelled, submission.digest)
    return await services.queue.replace(submission, cancelled, reuse, keep=True)


async def _final_answer(services: Services, submission: Submission) -> Task | None:
    """Return the failed task that is the answer to a submission; None also while records can't be read."""
    with suppress(QueueUnavailable):  # the submit is not refused while lost records are written back
        task = await services.queue.get(submission.task_id)
        if task is not None and task.digest == submission.digest and is_final_answer(task):
            return task
    return None


def is_final_answer(task: Task) -> bool:
    """Return whether a task has failed in a way that the same request would again, and may pay for again.

    A fault that only the operator can repair costs nothing, and is tried again.
    """
    error = task.error
    return task.state is State.FAILED and error is not None and not (error.retryable or error.code in _OPERATORS_FAULTS)


def refuse_while_draining(services: Services) -> None:
    """Raise Draining if the service is about to stop."""
    if services.readiness.draining:
        raise Draining(headers={"Retry-After": "5"})


def body_digest(body: Mapping[str, Any]) -> str:
    """Return 32 hex digits that name a body, independent of spaces and of the order of its fields."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def parse_fields(services: Services, body: Mapping[str, Any], options: SubmitOptions) -> ParsedBody:
    """Return the request, webhooks and limits of a body. Raises InvalidRequest with all errors, and NotAllowed."""
    if _OPTIONS.isdisjoint(body):
        return ParsedBody(_parse_request(services.identity, body, options))
    errors: list[FieldError] = []
    webhooks: tuple[Webhook, ...] = ()
    max_micro_usd = None
    try:
        webhooks = _parse_webhooks(services, body.get("webhook"), options)
    except InvalidRequest as error:
        errors += error.details
    try:
        max_micro_usd = parse_max_cost(body)
    except InvalidRequest as error:
        errors += error.details
    try:
        fields = {name: value for name, value in body.items() if name not in _OPTIONS}
        request = _parse_request(services.identity, fields, options)
    except InvalidRequest as error:
        raise InvalidRequest(details=(*error.details, *errors)[: options.max_errors]) from error
    if errors:
        raise InvalidRequest(details=errors)
    return ParsedBody(request, webhooks, max_micro_usd)


def _parse_request(identity: TaskIdentity, body: Mapping[str, Any], options: SubmitOptions) -> GenerationRequest:
    """Return the request. Raises InvalidRequest, and NotAllowed if the client's key does not allow it."""
    request = validation.parse(
        body,
        default_model=identity.default_model,
        aliases=identity.aliases,
        max_faults=options.max_errors,
        adjust=identity.adjust,
    )
    if options.api_key is not None:
        check_allowed(options.api_key, request)
    return request


def _parse_webhooks(services: Services, sent: object, options: SubmitOptions) -> tuple[Webhook, ...]:
    if sent is None or sent == "":
        return ()
    webhook = Webhook.parse(
        sent,
        options.base,
        None if services.private_webhooks else check_host,
        check_own=partial(services.own.check, urls=bases(options.request, options.base)),
        owner=owner_name(options.client),
    )
    services.signing.check(webhook)
    return (webhook,)


def _parse_key(values: list[str]) -> str:
    """Return the key, bare or as a structured field's string: https://datatracker.ietf.org/doc/html/rfc9651#name-strings."""
    text = values[0].strip()
    quoted = _QUOTED.fullmatch(text)
    key = _ESCAPED.sub(r"\1", quoted[1]) if quoted else text
    if len(values) > 1 or not _VISIBLE.fullmatch(key):
        rule = "must be one key of 1 to 255 visible ASCII characters"
        raise InvalidRequest(details=[FieldError(IDEMPOTENCY_KEY, rule)])
    return key
