"""One attempt of a task: named steps to an outcome value."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import ImageRejected, QueueUnavailable, StoreUnavailable, UpstreamError
from imagegen.providers.protocol import InputImage, Reply
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.call_plan import PlannedCall, plan_calls, plan_missing_calls, variant_seed
from imagegen.tasks.provider_job import AcceptedJob
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import (
    ClaimLost,
    Failed,
    NotStarted,
    Outcome,
    Retry,
    Succeeded,
    is_useless_response,
    may_be_paid,
)
from imagegen.tasks.task import TaskError, WaitReason, missing_images_warning
from imagegen.worker.attempt_limits import AttemptLimits, ImageCounts, SeedSupport
from imagegen.worker.call_form import CallForm, add_warnings, alternatives
from imagegen.worker.call_routes import Routes
from imagegen.worker.call_search import CallSearch
from imagegen.worker.cancel_scope import ClaimScope, ClaimWasLost
from imagegen.worker.dead_models import DeadModels
from imagegen.worker.failover import without_refusing, without_tried
from imagegen.worker.found_images import FoundImages, with_saved_images
from imagegen.worker.image_places import ImagePlaces
from imagegen.worker.input_fetches import SlowInputs
from imagegen.worker.inputs import UNAVAILABLE_RETRY_S, AttemptInputs, InputOpener
from imagegen.worker.job_wait import JobWait
from imagegen.worker.judge import Judge
from imagegen.worker.payments import PaymentRules, Payments
from imagegen.worker.permit_waiting import PermitWaiting, Stopping, UpstreamResting
from imagegen.worker.permits import ANY, Choice, Permit, PermitLine
from imagegen.worker.reply_images import ReplyImages
from imagegen.worker.saving import AttemptEnded, ClaimImageSaver, DeadlinePassed, ImageSaver, LinksDied, ReceivedImage

MAX_CALLS_WITHOUT_IMAGE = 2
"""Calls without a usable image after which the rest of a task's calls are not made, while it has none at all."""


@dataclass(frozen=True, slots=True)
class AttemptRunner:
    """Runner of the attempts of all claims. clock: Unix time. began_at: when this instance was started.

    dead: models that get no images here, of which other instances get the claims.
    """

    claims: WorkerQueue
    routes: Routes
    image_saver: ImageSaver
    rules: AttemptLimits
    permits: PermitLine
    payments: PaymentRules
    inputs: InputOpener
    clock: Callable[[], float] = field(default=time.time, kw_only=True)
    counts: ImageCounts = field(default_factory=ImageCounts, kw_only=True)
    seeds: SeedSupport = field(default_factory=SeedSupport, kw_only=True)
    began_at: float = field(default=0.0, kw_only=True)
    dead: DeadModels = field(kw_only=True)

    async def run(self, claim: Claim) -> Outcome:
        """Run one attempt, from the wait for its permit to the outcome.

        It writes its start, checkpoints, progress and waits to the queue, never the outcome.
        """
        while True:
            try:
                with ClaimScope(claim):
                    waiting = self._waiting(claim)
                    search = FoundImages(waiting, self.rules, self.began_at)
                    if search.may_have_some(claim) and (found := await search.outcome(claim)):
                        return found
                    spent = self.rules.exhausted(claim.task, claim.checkpoint, self.clock())
                    return with_saved_images(claim, spent or await Attempt(self, claim, waiting).run())
            except ClaimWasLost:
                return ClaimLost()
            except _Inherited:
                continue

    def _waiting(self, claim: Claim) -> PermitWaiting:
        ends_at = partial(self.rules.deadline, claim.task)  # it moves with jumps of the server's clock
        saver, clock = self.image_saver, self.clock
        return PermitWaiting(self.claims, claim, self.permits, saver, ends_at, clock, give=self.dead.give)


class _FewerImages(Exception):
    """The model takes fewer images a call, so the calls are planned again."""


class _Inherited(Exception):
    """Another instance had begun the task: its work is in the claim now, so the attempt is planned again."""


class Attempt:
    """One attempt."""

    def __init__(self, runner: AttemptRunner, claim: Claim, waiting: PermitWaiting) -> None:
        self._runner, self._claim, self._waiting = runner, claim, waiting
        self._request = GenerationRequest.from_json(claim.task.request_json)
        others = alternatives(claim, self._request, runner.rules, runner.routes)
        self._form = CallForm(claim, self._request, runner.counts, runner.seeds, others)
        self._inputs = AttemptInputs(runner.inputs, self._request, claim)
        self._payments = Payments(runner.payments, runner.claims, runner.routes, claim, self._request)
        self._places = ImagePlaces(claim, self._request.n)
        ends_at, job_wait_s = waiting.ends_at, runner.rules.job_wait_s
        self._job_wait = JobWait(runner.claims, claim, self._request.n, job_wait_s, ends_at, runner.clock)
        self._spent = self._spent_but_for_paid()
        saver = ClaimImageSaver(
            runner.claims,
            runner.image_saver,
            claim,
            self._request.n,
            ends_at,
            runner.permits,
            self._rejected,
            self._form.describe,
            lambda: self._form.model,
            runner.clock,
        )
        self._images = ReplyImages(claim, self._places, saver, runner.clock)

    async def run(self) -> Outcome:
        try:
            if self._claim.checkpoint.links or self._claim.checkpoint.sent:
                await self._finish_earlier_calls()
            while True:
                try:
                    if job := self._claim.checkpoint.job:
                        await self._collect(job)
                        self._end_if_spent()
                    await self._make_calls()
                    break
                except (_FewerImages, LinksDied):
                    continue
        except AttemptEnded as ended:
            return ended.outcome
        except Stopping:
            pause = Retry(0.0, WaitReason.DRAINING, counts_as_attempt=self._places.paid_without_result)
            return pause if self._waiting.begun else NotStarted()
        except UpstreamResting as resting:
            return self._judge(resting.error, upstream_dead=True)
        except DeadlinePassed:
            return self._runner.rules.deadline_failure(self._claim.task)
        except UpstreamError as error:
            return self._judge(error)
        finally:
            self._inputs.close()
        return self._success()

    def _success(self) -> Succeeded:
        if missing := self._places.missing:
            add_warnings(self._claim, missing_images_warning(self._request.n - missing, self._request.n))
        checkpoint = self._claim.checkpoint
        return Succeeded(checkpoint.images, checkpoint.warnings, checkpoint.details)

    @cached_property
    def _judging(self) -> Judge:
        runner, prompts = self._runner, (self._request.prompt, self._request.negative_prompt)
        return Judge(self._claim, runner.rules, runner.permits, runner.clock, runner.routes.lists_jobs, prompts=prompts)

    async def _finish_earlier_calls(self) -> None:
        """Save images that were paid for before, and search for the job of a call of which the response was lost."""
        if self._claim.checkpoint.links:
            with suppress(LinksDied):
                await self._fetch_paid()
        if self._claim.checkpoint.sent:
            runner, claim = self._runner, self._claim
            search = CallSearch(runner.claims, claim, runner.routes, self._form, runner.rules, runner.clock)
            await search.run(begun=self._waiting.begun)

    def _spent_but_for_paid(self) -> Failed | None:
        """Return the failure of a task for which only images are fetched that an earlier attempt has paid for."""
        checkpoint = self._claim.checkpoint
        if not (checkpoint.links or (checkpoint.job and checkpoint.job.renewals)):
            return None
        without_paid = replace(checkpoint, links=(), job=None, sent=None)
        return self._runner.rules.exhausted(self._claim.task, without_paid, self._runner.clock())

    def _end_if_spent(self) -> None:
        """Request no image any more of a task that must not be called for again; without one it ends."""
        if self._spent and self._places.missing and not self._claim.checkpoint.has_new_images:
            raise AttemptEnded(self._spent)
        if self._spent:
            self._places.give_up(range(self._request.n))

    async def _fetch_paid(self) -> None:
        """Save the images that an earlier attempt paid for; no call is made before that, so it needs no slot."""
        self._runner.claims.go_away(self._claim)
        await self._waiting.store_writable()
        await self._write()
        await self._images.save_linked()
        self._end_if_spent()
        job = self._claim.checkpoint.job
        if job and self._places.requested.issuperset(job.indexes):
            self._change(job=None)

    async def _collect(self, job: AcceptedJob) -> None:
        """Collect the images of a job that an earlier attempt paid for; no call is made before that."""
        stored = self._claim.stored_checkpoint
        if job.renewals and not self._runner.routes.has_key_of(job.handle) and not (stored and stored.job):
            raise AttemptEnded(Retry(0.0, WaitReason.RETRYING, counts_as_attempt=False))  # for an instance with its key
        await self._waiting.store_writable()
        await self._write()
        if job.model:
            self._form.use(job.model)
        share = PlannedCall(job.indexes, job.seed)
        again = self._claim.checkpoint.missing_requested
        route = None
        try:
            route = self._runner.routes.of_job(job.handle)
            resume = partial(route.resume, job.handle)
            reply = await self._job_wait.reply(share, self._form.model, resume, job=job)
        except UpstreamError as error:
            self._change(job=None)
            if job.renewals:
                self._places.link_died(share.indexes)
                return
            self._payments.failed(route, self._form.model, error)
            if is_useless_response(error):
                self._got_no_image(share.indexes, error, again=again)
            elif not (self._form.lower_count(error, len(share.indexes)) or self._form.change(error, error)):
                self._judging.allow_other_key(job.handle.channel, job.handle.account, self._form.model, error)
                raise
        else:
            if self._claim.cost.calling:  # else it was answered before, and its images could not be saved
                self._payments.answered(route, self._form.model, len(share.indexes), reply)
            self._form.warn(reply.warnings)
            await self._images.save(share, reply, again=again)

    async def _make_calls(self) -> None:
        """Make the calls that are still needed; request missing images once more, and never again."""
        n, seed, pixels = self._request.n, self._first_seed(), self._request.width * self._request.height
        per_call = self._runner.routes.most_images(self._form.model, pixels)
        per_call = self._runner.counts.most(self._form.model, per_call)
        last: UpstreamError | None = self._places.fault
        calls = 0
        if not self._claim.checkpoint.missing_requested:
            for share in plan_calls(n, self._places.requested, per_call, seed):
                last = await self._make_call(share) or last
                calls += 1
                if not self._claim.checkpoint.has_new_images and calls >= MAX_CALLS_WITHOUT_IMAGE:
                    if last and last.lasting:
                        raise last
                    break
        if self._places.missing and len(settled := self._places.settled) < n:
            self._change(missing_requested=True)
            sent = {image.seed for image in self._claim.checkpoint.images}
            for share in plan_missing_calls(n, settled, per_call, seed, sent):
                image_count = len(self._claim.checkpoint.images)
                last = await self._make_call(share, again=True) or last
                if len(self._claim.checkpoint.images) == image_count:
                    break
        if not self._claim.checkpoint.has_new_images:
            raise last or UpstreamError("upstream_bad_response", "the upstream answered without an image")

    def _first_seed(self) -> int | None:
        """Return the seed of the first image; the calls after it send it plus the images before theirs."""
        request, routes = self._request, self._runner.routes
        if request.seed is not None or not request.variant:
            return request.seed
        return variant_seed(routes.sent_request(request), routes.identity(request.model))

    async def _make_call(self, share: PlannedCall, *, again: bool = False) -> UpstreamError | None:
        """Make one call and save its images. Return a bad response as an error, since it does not end the attempt.

        again: whether its images were requested before, so that they are not requested a third time.
        """
        try:
            reply = await self._call(share, share.indexes if again else ())
        except UpstreamError as error:
            self._got_no_image(share.indexes, error, again=again)
            return error
        await self._images.save(self._form.as_sent(share), reply, again=again)
        return self._places.fault

    def _got_no_image(self, places: Sequence[int], error: UpstreamError, *, again: bool) -> None:
        if error.lasting and self._is_of_channel():
            error.lasting = False
        self._places.got_no_image(places, again=again or error.lasting)
        self._images.saver.record_useless()

    def _rejected(self, image: ReceivedImage, error: ImageRejected) -> None:
        if error.lasting and self._is_of_channel():
            error.lasting = False
        self._payments.rejected()
        self._places.rejected(image, error)

    def _is_of_channel(self) -> bool:
        """Return whether an image that can't be used is blamed on its channel, and another one takes a call for it."""
        permits, model, channel = self._runner.permits, self._form.model, self._claim.checkpoint.channel
        return permits.doubts_images(channel, model) and self._elsewhere() is not None

    def _elsewhere(self) -> Choice | None:
        """Return the channels but for the one that was called last, None if none of them takes a call."""
        model = self._form.model
        others = self._payments.affordable(model, Choice(channels=frozenset({self._claim.checkpoint.channel})))
        return others if self._runner.permits.has_other(model, others) else None

    async def _call(self, share: PlannedCall, again: Sequence[int]) -> Reply:
        """Make a paid call, repeated at once if the model refuses a parameter or is not available.

        again: its places that are requested again. Raises UpstreamError for a bad response, else AttemptEnded.
        """
        choice, count = self._first_choice(again), len(share.indexes)
        while True:
            inputs = await self._open_inputs() if self._request.image_sources else {}
            with await self._permit(choice) as permit:
                route, model = permit.route, self._form.model
                if not await self._payments.reserve(route, model, count, self._form.first_refusal):
                    choice = self._first_choice(again)
                    continue
                sent = self._form.sent(share, self._runner.clock())
                self._change(sent=sent, channel=route.channel.name, account=route.account)
                self._places.count_repeat(again)
                await self._write()
                generate = partial(route.generate, self._form.call(share, inputs))
                try:
                    as_sent, wait = self._form.as_sent(share), self._job_wait
                    reply = await wait.reply(as_sent, model, generate, on_accepted=permit.accepted)
                except UpstreamError as error:
                    self._payments.failed(route, model, error)
                    if not may_be_paid(error):
                        self._places.count_repeat(again, -1)
                    choice = self._failed(permit, error, count, choice)
                else:
                    self._payments.answered(route, model, count, reply)
                    self._runner.permits.record_success(permit, reply.limits)
                    self._form.warn(reply.warnings)
                    return reply

    async def _permit(self, choice: Choice) -> Permit:
        """Return the permit for the next call, of a fallback model if no channel here serves the requested one."""
        while True:
            try:
                return await self._waiting.permit(self._form.model, self._payments.affordable(self._form.model, choice))
            except UpstreamError as error:
                if not self._form.change(error, error):
                    outcome = self._judge(error)
                    kept = replace(outcome, keeps_images=True) if isinstance(outcome, Failed) else outcome
                    raise AttemptEnded(kept) from error

    def _first_choice(self, again: Sequence[int] = ()) -> Choice:
        """Return the channels for a call: after a lost response only the channel that may have been paid.

        again: its places that are requested again; if the task has no image, of another channel that takes the call.
        """
        checkpoint = self._claim.checkpoint
        if checkpoint.ambiguous_calls:
            return Choice(checkpoint.channel, repeats_hung=self._claim.cost.fault == "upstream_timeout")
        return (self._elsewhere() if again and not checkpoint.has_new_images else None) or ANY

    async def _write(self) -> None:
        """Write the start, which counts the attempt, before the first paid call, then a checkpoint before each."""
        claim, claims = self._claim, self._runner.claims
        if not self._waiting.begun:
            start = await claims.start(claim)
            if start is StartResult.INHERITED:
                raise _Inherited
            self._waiting.begun = start is StartResult.STARTED
        elif claim.checkpoint is not claim.stored_checkpoint:
            self._waiting.begun = await claims.checkpoint(claim, claim.checkpoint)
        if not self._waiting.begun:
            raise AttemptEnded(ClaimLost())

    async def _open_inputs(self) -> Mapping[str, InputImage]:
        """Return the input images to send as bytes. Without them no call is made: the task fails, and costs nothing.

        They are in the store, or are held where it writes: while it can't be written, or one can't be read for a
        passing cause, an edit waits.
        """
        await self._waiting.store_writable()
        try:
            return await self._inputs.open(self._runner.routes.edits(self._form.model))
        except (QueueUnavailable, StoreUnavailable, SlowInputs) as error:
            # an attempt that has not begun is not counted yet
            counts = self._places.paid_without_result or not self._waiting.begun
            is_slow, delay_s = isinstance(error, SlowInputs), getattr(error, "delay_s", UNAVAILABLE_RETRY_S)
            reason = WaitReason.RETRYING if is_slow else WaitReason.STORE_UNAVAILABLE
            raise AttemptEnded(Retry(delay_s, reason, counts_as_attempt=counts)) from error
        except UpstreamError as error:
            logger.bind(taskId=self._claim.task.id).info("An input image can't be used: {}", error.detail)
            raise AttemptEnded(Failed(TaskError(error.code, error.detail, error.retryable))) from error

    def _failed(self, permit: Permit, error: UpstreamError, count: int, choice: Choice) -> Choice:
        """Return the channels for the call if it is to be repeated at once; raise otherwise."""
        rest = without_tried(choice, permit, error, has_job=self._job_wait.has_job)
        others = self._payments.affordable(self._form.model, rest) if rest else None
        if rest and others and self._runner.permits.has_other(self._form.model, others):
            self._runner.permits.failed(permit, error, unfinished=self._claim.task.id)
            self._judging.refusals.append(error)
            return rest
        if self._form.lower_count(error, count):
            self._runner.permits.failed(permit, error, unfinished=None)
            raise _FewerImages
        is_useless = is_useless_response(error)
        elsewhere = self._payments.affordable(self._form.model, without_refusing(choice, permit, error))
        cause = self._judging.cause(permit, error, elsewhere if rest else None)
        is_changed = self._form.change(error, error if cause.retryable else cause)
        if is_changed:
            self._judging.refusals.clear()
        excused = self._judging.excuses(permit, error)
        cause = cause if cause.retryable else self._form.first_refusal or cause
        outcome = None if is_useless or is_changed else self._judge(cause, upstream_dead=excused)
        unfinished = self._claim.task.id if isinstance(outcome, Retry) else None
        self._runner.permits.failed(permit, error, unfinished=unfinished)
        if outcome:
            raise AttemptEnded(outcome) from error
        if is_useless:
            raise error
        return self._first_choice()

    def _change(self, **changes: object) -> None:
        """Change the checkpoint, which is written before the next paid call."""
        self._claim.checkpoint = replace(self._claim.checkpoint, **changes)

    def _judge(self, error: UpstreamError, *, upstream_dead: bool = False) -> Retry | Failed:
        is_paid = self._places.paid_without_result
        return self._judging.outcome(error, upstream_dead=upstream_dead, paid_without_result=is_paid)
