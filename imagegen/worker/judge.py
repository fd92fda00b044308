"""Decision on a task after a failed call: another try now or later, or its end."""

from __future__ import annotations

import random
from collections.abc import Callable

from loguru import logger
from msgspec import Struct, field
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.formats import mask_quotes
from imagegen.queue.claim import Claim
from imagegen.tasks.retry import Failed, FailureContext, Retry
from imagegen.tasks.task import WaitReason
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.call_search import SEARCH_RETRY_S
from imagegen.worker.failover import error_for_client, is_refusal_of_channel
from imagegen.worker.key_health import KEY_REFUSALS, LIMITED
from imagegen.worker.permit_waiting import resting_error
from imagegen.worker.permits import Choice, Permit, PermitLine


class Judge(Struct, frozen=True):
    """Judge of one claim. clock: Unix time. lists_jobs: returns whether jobs of a channel's lost calls can be found.

    refusals: of keys and channels of the present model, after which another one was called. prompts: are not logged,
    though services quote them in their errors.
    """

    claim: Claim
    rules: AttemptLimits
    permits: PermitLine
    clock: Callable[[], float]
    lists_jobs: Callable[[str], bool] = lambda _channel: False
    refusals: list[UpstreamError] = field(default_factory=list)
    prompts: tuple[str | None, ...] = ()

    def outcome(
        self, error: UpstreamError, *, upstream_dead: bool = False, paid_without_result: bool
    ) -> Retry | Failed:
        """Return the outcome that follows from an error; lost responses and repeated jobs are counted.

        paid_without_result: whether a response of this attempt had fewer images than requested.
        """
        claim = self.claim
        if error.ambiguous:
            ambiguous_calls = claim.checkpoint.ambiguous_calls + 1
            claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=ambiguous_calls)
        context = FailureContext(
            attempts=claim.checkpoint.attempts,
            ambiguous=claim.checkpoint.ambiguous_calls,
            left_s=self.rules.deadline(claim.task) - self.clock(),
            circuit_open=upstream_dead,
            paid_without_result=paid_without_result,
            own_limits=self.permits.limited_tasks.own_limits(claim.task.id),
        )
        outcome = self.rules.policy.decide(error, context, random.random)
        checkpoint = claim.checkpoint
        can_be_found = error.ambiguous and checkpoint.sent is not None and self.lists_jobs(checkpoint.channel)
        if isinstance(outcome, Failed) and can_be_found and context.left_s > SEARCH_RETRY_S:
            outcome = Retry(SEARCH_RETRY_S, WaitReason.RETRYING)  # its image may be paid for
        if isinstance(outcome, Retry) and error.refund_unsure:
            claim.checkpoint = replace(claim.checkpoint, repeated=claim.checkpoint.repeated + 1)
        follows = f"retry in {outcome.delay_s:.1f} s" if isinstance(outcome, Retry) else "no retry"
        log = logger.bind(taskId=claim.task.id, attempt=claim.checkpoint.attempts)
        detail = mask_quotes(error.upstream_detail, self.prompts)
        log.info("The attempt failed: {} ({}); {}", error.code, detail, follows)
        return outcome

    def cause(self, permit: Permit, error: UpstreamError, rest: Choice | None = None) -> UpstreamError:
        """Return why the task has no image: while another key, or channel of the model, only rests, that it rests.

        A call that may have been paid is itself the cause, so that it is counted, and so is a job that failed by a rate
        limit, since only a few of them are made. rest: the other keys and channels that are not too dear, also those
        that this call has tried; None if the call must not go to them.
        """
        if error.ambiguous:
            self.allow_other_key(permit.route.channel.name, permit.route.account, permit.model, error)
            return error
        if error.code == LIMITED and error.refund_unsure:
            return error
        is_of_key = error.code == LIMITED or error.code in KEY_REFUSALS
        others = rest or (Choice(keys=frozenset({permit.route.account})) if is_of_key else None)
        is_elsewhere = is_of_key or is_refusal_of_channel(error)
        if not is_elsewhere or others is None or not self.permits.recovers(permit.model, others):
            return error_for_client(self.refusals, error)
        blocked = self.permits.blocked(permit.model, others)
        wait_s = max(blocked.retry_at - self.clock(), 0.0) if blocked else 0.0
        return resting_error(WaitReason.UPSTREAM_RATE_LIMITED, wait_s)

    def allow_other_key(self, channel: str, account: str, model: str, error: UpstreamError) -> None:
        """Let another key make a job again that its own key, or its channel, is refused for.

        A key of another channel may do so only if the job has ended. A job that may still run counts as lost.
        """
        keys = frozenset({account})
        if error.ambiguous:
            is_allowed = error.code in KEY_REFUSALS and self.permits.recovers(model, Choice(channel, keys=keys))
        elif error.code in KEY_REFUSALS:
            is_allowed = self.permits.recovers(model, Choice(keys=keys))
        else:
            elsewhere = Choice(channels=frozenset({channel}))
            is_allowed = is_refusal_of_channel(error) and self.permits.recovers(model, elsewhere)
        error.retryable = error.retryable or is_allowed

    def excuses(self, permit: Permit, error: UpstreamError) -> bool:
        """Return whether a failure of an upstream that is taken for dead is no attempt of this task.

        The first failure counts all the same, and so does each of a task that failed while others succeeded: else
        tasks that always fail would be called for without end.
        """
        attempts, most = self.claim.checkpoint.attempts, self.rules.policy.max_attempts
        if not self.permits.excuses(permit, error) or self.permits.is_suspect(self.claim.task.id):
            return False
        return attempts > 1 or attempts >= most
