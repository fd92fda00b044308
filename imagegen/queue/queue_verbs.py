"""The queue's verbs bound to one instance; the modules of `verbs` document each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from imagegen.queue.end_marks import EndMarks
from imagegen.queue.lines import ClientLines
from imagegen.queue.verbs import consume, group, read
from imagegen.queue.verbs.budget_counters import BudgetValues
from imagegen.queue.verbs.cancel import cancel
from imagegen.queue.verbs.compare_and_set import CompareAndSet
from imagegen.queue.verbs.complete import complete
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.count_entries import count_entries
from imagegen.queue.verbs.create_checkpoint import CreateCheckpoint
from imagegen.queue.verbs.dead_letter import dead_letter
from imagegen.queue.verbs.find_skipped import find_skipped
from imagegen.queue.verbs.finish import Finish
from imagegen.queue.verbs.join import join
from imagegen.queue.verbs.list_lines import list_lines, read_line_index
from imagegen.queue.verbs.list_waiting import list_waiting
from imagegen.queue.verbs.move_aside import move_aside, retry_after_move
from imagegen.queue.verbs.outbox_entry import restore_outbox
from imagegen.queue.verbs.raise_billed import raise_billed, record_call
from imagegen.queue.verbs.read import ReadTasks
from imagegen.queue.verbs.refill_lines import refill_lines
from imagegen.queue.verbs.release import release
from imagegen.queue.verbs.renew import renew
from imagegen.queue.verbs.replace_checkpoint import ReplaceCheckpoint
from imagegen.queue.verbs.requeue import check_requeue, requeue
from imagegen.queue.verbs.reserve_more import reserve_more
from imagegen.queue.verbs.restore_budgets import restore_budgets
from imagegen.queue.verbs.restore_claims import restore_claims
from imagegen.queue.verbs.restore_results import restore_results
from imagegen.queue.verbs.retire import retire
from imagegen.queue.verbs.start_fenced import start_fenced
from imagegen.queue.verbs.submit import DepthEstimate, Submit
from imagegen.queue.verbs.take_back import take_back
from imagegen.queue.verbs.take_found_job import TakeFoundJob
from imagegen.queue.verbs.take_given import take_given
from imagegen.redis_client.redis_errors import UnreadableReply
from imagegen.redis_client.replies import DECODE_ERRORS

_Params = ParamSpec("_Params")
_Reply = TypeVar("_Reply")


class QueueVerbs:
    """The verbs of one instance. Those of classes are batched: one script for the calls of a loop turn.

    All raise QueueUnavailable, and RedisError for an error that is not an outage.
    """

    def __init__(self, context: VerbContext, depth: DepthEstimate, lines: ClientLines, end_marks: EndMarks) -> None:
        self.lines = lines
        self.depth = depth
        self.end_marks = end_marks
        self.meter = context.connection.meter
        self.clock = context.connection.clock
        self.unreadable = context.unreadable
        self.owner_life_s = context.owner_life_s
        self.budgets: BudgetValues = context.budgets
        self.result_ttl_s = context.result_ttl_ms / 1000
        self.submit = Submit(context, depth, lines)
        self.create_checkpoint = CreateCheckpoint(context)
        self.compare_and_set = CompareAndSet(context)
        self.replace_checkpoint = ReplaceCheckpoint(context)
        self.finish = Finish(context, lines)
        self.read = ReadTasks(context)
        self.take_found_job = TakeFoundJob(context)
        self._bind_clients(context)
        self._bind_claims(context)
        self._bind_takeover(context)
        self._bind_recovery(context)

    def _bind_clients(self, context: VerbContext) -> None:
        self.complete = _bound(complete, context)
        self.read_budgets = _bound(read.read_budgets, context)
        self.read_entry = _bound(read.read_entry, context)
        self.read_in_line = _bound(read.read_in_line, context)
        self.cancel = partial(_bound(cancel, context), self.lines)
        self.join = _bound(join, context)
        self.take_back = _bound(take_back, context)
        self.list_waiting = _bound(list_waiting, context)
        self.list_lines = _bound(list_lines, context)
        self.count_entries = _bound(count_entries, context)
        self.refill_lines = _bound(refill_lines, context)
        self.read_line_index = _bound(read_line_index, context)

    def _bind_claims(self, context: VerbContext) -> None:
        self.create_group = _bound(group.create_group, context)
        self.read_waiting = _bound(consume.read_waiting, context)
        self.read_entries = _bound(consume.read_entries, context)
        self.delete_entries = _bound(consume.delete_entries, context)
        self.last_delivered = _bound(group.last_delivered, context)
        self.dead_letter = _bound(dead_letter, context)
        self.with_key_repair = partial(retry_after_move, context)
        self.reserve_more = _bound(reserve_more, context)
        self.start_fenced = _bound(start_fenced, context)
        self.renew = _bound(renew, context)
        self.release = _bound(release, context)
        self.transfer_entry = _bound(group.transfer_entry, context)

    def _bind_takeover(self, context: VerbContext) -> None:
        self.pending_entries = _bound(group.pending_entries, context)
        self.consumers = _bound(group.consumers, context)
        self.retire = _bound(retire, context)
        self.probe_claim = _bound(group.probe_claim, context)
        self.mark_begun = _bound(group.mark_begun, context)
        self.claim_expired = _bound(consume.claim_expired, context)
        self.find_skipped = _bound(find_skipped, context)
        self.length = _bound(group.length, context)
        self.take_given = _bound(take_given, context)
        self.read_checkpoints = _bound(read.read_checkpoints, context)

    def _bind_recovery(self, context: VerbContext) -> None:
        self.restore_budgets = _bound(restore_budgets, context)
        self.restore_claims = _bound(restore_claims, context)
        self.restore_results = _bound(restore_results, context)
        self.requeue = _bound(requeue, context)
        self.check_requeue = _bound(check_requeue, context)
        self.raise_billed = _bound(raise_billed, context)
        self.record_call = _bound(record_call, context)
        self.restore_outbox = _bound(restore_outbox, context)
        self.move_aside = _bound(move_aside, context)


def _bound(
    verb: Callable[Concatenate[VerbContext, _Params], Awaitable[_Reply]], context: VerbContext
) -> Callable[_Params, Coroutine[Any, Any, _Reply]]:
    """Return a verb of the instance; it raises QueueUnavailable for a reply that can't be decoded."""

    @wraps(verb)
    async def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Reply:
        try:
            return await verb(context, *args, **kwargs)
        except (UnreadableReply, *DECODE_ERRORS) as error:  # not `decoding`: a context costs more than most verbs
            raise context.connection.unreadable(error) from error

    return call
