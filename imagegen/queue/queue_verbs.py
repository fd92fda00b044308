"""The queue's verbs bound to one instance; the modules of `verbs` document each."""

from __future__ import annotations

from functools import partial

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
from imagegen.queue.verbs.move_aside import retry_after_move
from imagegen.queue.verbs.outbox_entry import restore_outbox
from imagegen.queue.verbs.raise_billed import raise_billed
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
        self.complete = partial(complete, context)
        self.read_budgets = partial(read.read_budgets, context)
        self.read_entry = partial(read.read_entry, context)
        self.read_in_line = partial(read.read_in_line, context)
        self.cancel = partial(cancel, context, self.lines)
        self.join = partial(join, context)
        self.take_back = partial(take_back, context)
        self.list_waiting = partial(list_waiting, context)
        self.list_lines = partial(list_lines, context)
        self.count_entries = partial(count_entries, context)
        self.refill_lines = partial(refill_lines, context)
        self.read_line_index = partial(read_line_index, context)

    def _bind_claims(self, context: VerbContext) -> None:
        self.create_group = partial(group.create_group, context)
        self.read_waiting = partial(consume.read_waiting, context)
        self.read_entries = partial(consume.read_entries, context)
        self.delete_entries = partial(consume.delete_entries, context)
        self.last_delivered = partial(group.last_delivered, context)
        self.dead_letter = partial(dead_letter, context)
        self.with_key_repair = partial(retry_after_move, context)
        self.reserve_more = partial(reserve_more, context)
        self.start_fenced = partial(start_fenced, context)
        self.renew = partial(renew, context)
        self.release = partial(release, context)
        self.transfer_entry = partial(group.transfer_entry, context)

    def _bind_takeover(self, context: VerbContext) -> None:
        self.pending_entries = partial(group.pending_entries, context)
        self.consumers = partial(group.consumers, context)
        self.retire = partial(retire, context)
        self.probe_claim = partial(group.probe_claim, context)
        self.mark_begun = partial(group.mark_begun, context)
        self.claim_expired = partial(consume.claim_expired, context)
        self.find_skipped = partial(find_skipped, context)
        self.length = partial(group.length, context)
        self.take_given = partial(take_given, context)
        self.read_checkpoints = partial(read.read_checkpoints, context)

    def _bind_recovery(self, context: VerbContext) -> None:
        self.restore_budgets = partial(restore_budgets, context)
        self.restore_claims = partial(restore_claims, context)
        self.restore_results = partial(restore_results, context)
        self.requeue = partial(requeue, context)
        self.check_requeue = partial(check_requeue, context)
        self.raise_billed = partial(raise_billed, context)
        self.restore_outbox = partial(restore_outbox, context)
