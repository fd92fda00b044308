"""Use case of a call on `/v1`: a repeat joins the task of the first call; another call is another variant.

Several instances: each remembers the calls that it served. A new call tries the variants that its instance does not
remember, and skips those that have a task. A repeat finds a call that ended on another instance by `queue.lost_calls`,
else by the tasks that exist.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress

from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.preview import over_limit
from imagegen.tasks.clients import submitter_name
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import State, Task
from imagegen.tasks.validation import MAX_VARIANT
from imagegen.web.handler_services import Services
from imagegen.web.openai.client_calls import REPEAT_S, UNSURE_REPEAT_S, Ending, Mark, Marking, TrackedCall
from imagegen.web.openai.error_responses import is_retryable
from imagegen.web.openai.fields import OpenAIRequest
from imagegen.web.submitter import SubmitOptions, refuse_while_draining, submit

KEYED_VARIANTS = 2**52
"""Variants of calls with an idempotency key. They lie above those that a client can name."""

MAX_PROBES = 64
"""Variants that are looked up for a repeat if no instance remembers its first call."""


class ClientCall:
    """One call of a client from its POST to its end: it gets a task, and remembers whether its answer was delivered.

    options: of its request. A call with an idempotency key needs no memory: its key leads to its task.
    """

    def __init__(self, services: Services, parsed: OpenAIRequest, options: SubmitOptions, mark: Mark) -> None:
        self._services, self._options, self._mark = services, options, mark
        self._request = request = parsed.request
        self._max_micro_usd = parsed.max_micro_usd
        is_same = services.openai.reuse == "always" or request.seed is not None or request.variant > 0
        self._fixed = request.variant if is_same else None
        self._request_id = self._submission(request.variant).task_id
        self._call: TrackedCall | None = None
        self._has_task = False
        self._held = ""
        self._has_queried = False
        self._storing: asyncio.Future[None] | None = None

    async def task(self) -> Task:
        """Return the call's task: a new one, or that of an earlier call, which may have failed.

        Raises what `submit` raises, and IdempotencyMismatch.
        """
        if self._options.key is not None:
            return await self._keyed_task(self._options.key)
        calls, client = self._services.calls, self._options.client
        self._call = call = calls.begin(client, self._request_id, self._mark, self._fixed)
        if self._fixed is None:
            await self._join_lost_call(call)
        variant = self._fixed if call.variant is None else call.variant
        if call.is_repeat and variant is not None:
            task = await self._joined_task(variant)
        elif self._fixed is None:
            task = await self._new_task(call)
        else:
            submission = self._submission(self._fixed)
            task = (await submit(self._services, submission, fresh=self._options.fresh)).task
        self._has_task = True
        return task

    def suspect(self) -> None:
        """Note that the client may have left, so that an equal call is its repeat, also on another instance."""
        if self._call is not None and self._storing is None:
            self._call.suspect()
            self._storing = asyncio.ensure_future(self._store_lost(self._call.variant))

    async def end(self, ending: Ending) -> None:
        """Remember how the call ended; other instances learn only of lost ones. Call it once."""
        try:
            if self._call is not None:
                self._call.end(ending)
                if ending is Ending.LOST and self._storing is None:
                    await self._store_lost(self._call.variant)
        finally:
            if self._held:
                self._services.open_calls.end(self._held, is_answered=ending is not Ending.LOST)

    async def _store_lost(self, variant: int | None) -> None:
        """Store a lost call for the other instances, and for those after this one, which may take it once."""
        if variant is None or not self._has_task or self._fixed is not None:
            return
        if self._services.queue.has_peers or self._services.readiness.draining:
            with suppress(QueueUnavailable):
                await self._services.lost_calls.add(self._options.client, self._request_id, variant)

    async def _joined_task(self, variant: int) -> Task:
        submission = self._submission(variant)
        self._hold(submission.task_id)
        task = await self._services.queue.get(submission.task_id)
        if task is not None and task.state in (State.FAILED, State.CANCELLED) and self._is_answer(task):
            return task
        return (await submit(self._services, submission)).task

    def _is_answer(self, failed: Task) -> bool:
        """Return whether a failure is recent enough to be the answer to a repeat.

        A repeat of Together's 1.x looks like a new call, so a retryable failure is returned to it for a shorter time.
        """
        unsure = self._mark.marking is Marking.UNSURE and is_retryable(failed)
        age_s = self._services.queue.clock() - (failed.finished_at or 0.0)
        return age_s < (UNSURE_REPEAT_S if unsure else REPEAT_S)

    async def _new_task(self, call: TrackedCall) -> Task:
        """Submit the first variant without a task, unless a task that exists is of a lost call."""
        refuse_while_draining(self._services)
        queue, looked_up = self._services.queue, False
        while True:
            variant = call.variant or 0
            submission = self._submission(variant)
            self._hold(submission.task_id)
            submitted = await self._submit_new(submission)
            if submitted.cached is CacheResult.MISS:
                self._services.ledger.on_submitted(submission, submitted)
                return submitted.task
            lost = variant if queue.was_interrupted(submitted.task) else None
            if lost is None and not looked_up:
                looked_up, lost = True, await self._take_lost()
            if lost is None and (
                await self._is_abandoned(submitted.task) or await self._is_undelivered(submitted.task)
            ):
                lost = variant
            if lost is not None:
                call.join(lost)
                return await self._joined_task(lost)
            call.skip()

    def _hold(self, task_id: str) -> None:
        """Show the other instances that this call waits for a task, before they can see the task."""
        calls = self._services.open_calls
        if self._held:
            calls.end(self._held, is_answered=False)
        self._held = task_id
        calls.begin(task_id)

    async def _is_abandoned(self, task: Task) -> bool:
        """Return whether the client's call for a task was lost with its instance, as by `kill -9`.

        The other instances are queried about one unfinished task alone: many equal calls at once have many.
        """
        is_own = task.submitter == submitter_name(self._options.client)
        if task.state.is_final or not is_own or self._has_queried or not self._services.queue.has_peers:
            return False
        self._has_queried = True
        return await self._services.open_calls.living_without(task.id) is not None

    async def _is_undelivered(self, task: Task) -> bool:
        """Return whether an instance died right after a task of the client, so that its answer may be lost."""
        calls, age_s = self._services.open_calls, self._services.queue.clock() - (task.finished_at or 0.0)
        is_own = task.submitter == submitter_name(self._options.client)
        if task.state is not State.COMPLETED or not is_own or age_s > UNSURE_REPEAT_S:
            return False
        has_peers = self._services.queue.has_peers
        if calls.is_answered_here(task.id) or (has_peers and self._has_queried):
            return False
        self._has_queried = True
        living = await calls.living_without(task.id) if has_peers else ()
        return living is not None and await calls.died_without_delivery(task.finished_at or 0.0, living)

    async def _submit_new(self, submission: Submission) -> SubmitResult:
        """Submit a new image; if it may cost too much, only if its task exists, so that lost calls are found.

        Raises MaxCostExceeded, MaxCostPriceUnknown, and what `ClientQueue.submit` raises.
        """
        if not submission.may_cost_too_much:
            reuse = None if self._options.fresh else self._services.reuse_images  # of this task, when it failed
            return await self._services.queue.submit(submission, reuse)
        task = await self._services.queue.get(submission.task_id)
        if task is None or task.state in (State.FAILED, State.CANCELLED):
            raise over_limit(submission, submission.cost.estimated if submission.cost else None)
        return SubmitResult(task, CacheResult.HIT if task.state.is_final else CacheResult.COALESCED)

    async def _join_lost_call(self, call: TrackedCall) -> None:
        """Make a repeat join the call that it repeats, if it was served elsewhere or before a restart."""
        has_peers = self._services.queue.has_peers
        if call.is_repeat and call.variant is not None:
            if has_peers:
                with suppress(QueueUnavailable):
                    await self._services.lost_calls.remove(self._options.client, self._request_id, call.variant)
        elif self._mark.marking is Marking.REPEAT and (has_peers or call.variant is None):
            variant = await self._take_lost()
            if variant is not None:
                call.join(variant)
            elif call.variant is None:
                await self._place(call)

    async def _place(self, call: TrackedCall) -> None:
        """Look the variants up that exist without a gap. Raises QueueUnavailable."""
        queue, existing, lost = self._services.queue, [], []
        for variant in range(MAX_PROBES):
            task = await queue.get(self._submission(variant).task_id)
            if task is None:
                break
            existing.append(variant)
            if queue.was_interrupted(task):
                lost.append(variant)
        call.place(existing, lost)

    async def _take_lost(self) -> int | None:
        with suppress(QueueUnavailable):
            return await self._services.lost_calls.take(self._options.client, self._request_id)
        return None

    async def _keyed_task(self, key: str) -> Task:
        """Return the task that the key was first used for, or a new one of a variant that only this key has."""
        services, options = self._services, self._options
        refuse_while_draining(services)
        seed = hashlib.sha256(f"{options.client}\n{key}".encode()).digest()
        own_variant = MAX_VARIANT + 1 + int.from_bytes(seed[:8]) % KEYED_VARIANTS
        variant = own_variant if self._fixed is None else self._fixed
        submission = self._submission(variant)
        keys, digest = services.queue.idempotency, self._submission(self._request.variant).digest
        async with keys.first_use_or_existing(options.client, key, submission.task_id, digest) as first_id:
            if first_id is not None:
                task = await services.queue.get(first_id) or await services.queue.fresh(first_id)
                if task is not None:
                    return task
            return (await submit(services, submission, fresh=first_id is None and options.fresh)).task

    def _submission(self, variant: int) -> Submission:
        """Return the submission of a variant. If each call is another image, it uses no images of other tasks."""
        request = self._request if variant == self._request.variant else replace(self._request, variant=variant)
        options = self._options
        submission = self._services.identity.submission(request, options.scope, client=options.key_name)
        by, most = submitter_name(options.client), self._max_micro_usd
        return replace(submission, has_siblings=self._fixed is not None, submitter=by, max_micro_usd=most)
