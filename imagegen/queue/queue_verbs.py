"""Facade of the queue's verbs: one typed method for each; the modules of `verbs` document them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar, TypeVarTuple

from imagegen.queue.claim import Claim
from imagegen.queue.end_marks import EndMarks
from imagegen.queue.lines import ClientLines
from imagegen.queue.verbs import consume, group, read
from imagegen.queue.verbs.budget_counters import BudgetValues
from imagegen.queue.verbs.cancel import FOR_ALL, CancelBy, CancelledTask, KnownProgress, cancel
from imagegen.queue.verbs.compare_and_set import CompareAndSet
from imagegen.queue.verbs.complete import complete
from imagegen.queue.verbs.consume import Entry
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.create_checkpoint import CreateCheckpoint
from imagegen.queue.verbs.dead_letter import dead_letter
from imagegen.queue.verbs.find_skipped import find_skipped
from imagegen.queue.verbs.finish import Finish
from imagegen.queue.verbs.join import join
from imagegen.queue.verbs.list_waiting import WaitingEntryIds, list_waiting
from imagegen.queue.verbs.move_aside import retry_after_move
from imagegen.queue.verbs.outbox_entry import restore_outbox
from imagegen.queue.verbs.raise_billed import raise_billed
from imagegen.queue.verbs.read import ReadTasks
from imagegen.queue.verbs.refill_lines import ListedLine, read_line_index, refill_lines
from imagegen.queue.verbs.release import ReleaseItem, release
from imagegen.queue.verbs.renew import Renewal, renew
from imagegen.queue.verbs.replace_checkpoint import ReplaceCheckpoint
from imagegen.queue.verbs.requeue import RequeueResult, check_requeue, requeue
from imagegen.queue.verbs.reserve_more import Extension, ExtensionReply, reserve_more
from imagegen.queue.verbs.restore_budgets import restore_budgets
from imagegen.queue.verbs.restore_claims import RestoredClaim, restore_claims
from imagegen.queue.verbs.restore_results import RestoredResult, restore_results
from imagegen.queue.verbs.retire import retire
from imagegen.queue.verbs.start_fenced import FencedStart, start_fenced
from imagegen.queue.verbs.submit import DepthEstimate, Submit, SubmitReply
from imagegen.queue.verbs.take_back import take_back
from imagegen.queue.verbs.take_found_job import TakeFoundJob
from imagegen.queue.verbs.take_given import take_given
from imagegen.tasks.task import Task

_Reply = TypeVar("_Reply")
_Args = TypeVarTuple("_Args")


class QueueVerbs:
    """The verbs of one instance. Those that are attributes are batched: one script for the calls of a loop turn.

    All raise QueueUnavailable, and RedisError for an error that is not an outage.
    """

    def __init__(self, context: VerbContext, depth: DepthEstimate, lines: ClientLines, end_marks: EndMarks) -> None:
        self._context = context
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

    # Clients

    async def complete(self, final: Task, replaced_epoch: int | None) -> SubmitReply:
        return await complete(self._context, final, replaced_epoch)

    async def read_budgets(self, day: int) -> None:
        await read.read_budgets(self._context, day)

    async def read_entry(self, entry_id: str) -> dict[bytes, bytes] | None:
        return await read.read_entry(self._context, entry_id)

    async def read_in_line(self, task: Task) -> dict[bytes, bytes] | None:
        return await read.read_in_line(self._context, task)

    async def cancel(
        self, final: Task, entry_id: str, progress: KnownProgress | None = None, *, by: CancelBy = FOR_ALL
    ) -> CancelledTask | None:
        return await cancel(self._context, self.lines, final, entry_id, progress, by=by)

    async def join(self, task: Task, names: Iterable[str]) -> bool:
        return await join(self._context, task, names)

    async def take_back(self, final: Task, amount: int) -> bool:
        return await take_back(self._context, final, amount)

    async def list_waiting(self) -> WaitingEntryIds:
        return await list_waiting(self._context)

    async def refill_lines(self, clients: Sequence[str], window: int) -> list[ListedLine]:
        return await refill_lines(self._context, clients, window)

    async def read_line_index(self) -> list[str]:
        return await read_line_index(self._context)

    # The consumer group

    async def create_group(self) -> bool:
        return await group.create_group(self._context)

    async def read_waiting(self, consumer: str, count: int) -> list[Entry]:
        return await consume.read_waiting(self._context, consumer, count)

    async def read_entries(self, consumer: str, count: int, block_s: float) -> list[Entry]:
        return await consume.read_entries(self._context, consumer, count, block_s)

    async def delete_entries(self, entry_ids: Sequence[str]) -> None:
        await consume.delete_entries(self._context, entry_ids)

    async def last_delivered(self) -> str:
        return await group.last_delivered(self._context)

    async def dead_letter(self, entry_id: str, content: str) -> None:
        await dead_letter(self._context, entry_id, content)

    async def with_key_repair(self, call: Callable[[*_Args], Awaitable[_Reply]], *args: *_Args) -> _Reply:
        return await retry_after_move(self._context, call, *args)

    # Claims

    async def reserve_more(self, item: Extension) -> ExtensionReply:
        return await reserve_more(self._context, item)

    async def start_fenced(self, consumer: str, item: FencedStart) -> bytes | None:
        return await start_fenced(self._context, consumer, item)

    async def renew(self, consumer: str, claims: Sequence[tuple[str, str]]) -> Renewal:
        return await renew(self._context, consumer, claims)

    async def release(self, consumer: str, items: Sequence[ReleaseItem], *, leaving: bool = False) -> int:
        return await release(self._context, consumer, items, leaving=leaving)

    async def transfer_entry(self, consumer: str, entry_id: str) -> None:
        await group.transfer_entry(self._context, consumer, entry_id)

    # Takeover

    async def pending_entries(self) -> list[group.PendingEntry]:
        return await group.pending_entries(self._context)

    async def consumers(self) -> list[group.Consumer]:
        return await group.consumers(self._context)

    async def retire(self, consumers: Sequence[str]) -> int:
        return await retire(self._context, consumers)

    async def probe_claim(self, consumer: str, entry_id: str) -> None:
        await group.probe_claim(self._context, consumer, entry_id)

    async def mark_begun(self, consumer: str, entry_id: str) -> None:
        await group.mark_begun(self._context, consumer, entry_id)

    async def claim_expired(
        self, consumer: str, entry_ids: Sequence[str], min_idle_s: float, *, force: bool = False
    ) -> list[Entry]:
        return await consume.claim_expired(self._context, consumer, entry_ids, min_idle_s, force=force)

    async def find_skipped(self) -> list[str]:
        return await find_skipped(self._context)

    async def length(self) -> int:
        return await group.length(self._context)

    async def take_given(self, giver: str, taker: str, entry_ids: Sequence[str]) -> list[Entry]:
        return await take_given(self._context, giver, taker, entry_ids)

    async def read_checkpoints(self, task_ids: Sequence[str]) -> list[bytes | None]:
        return await read.read_checkpoints(self._context, task_ids)

    # Recovery of lost data

    async def restore_budgets(self) -> int:
        return await restore_budgets(self._context)

    async def restore_claims(self, consumer: str, claims: Sequence[Claim]) -> list[RestoredClaim]:
        return await restore_claims(self._context, consumer, claims)

    async def restore_results(self, tasks: Sequence[Task], now: float) -> list[RestoredResult]:
        return await restore_results(self._context, tasks, now)

    async def requeue(self, tasks: Sequence[Task]) -> list[RequeueResult]:
        return await requeue(self._context, tasks)

    async def check_requeue(self, tasks: Sequence[Task]) -> list[RequeueResult]:
        return await check_requeue(self._context, tasks)

    async def raise_billed(self, task_id: str, epoch: int, count: int) -> bool:
        return await raise_billed(self._context, task_id, epoch, count)

    async def restore_outbox(self, names: Sequence[str]) -> None:
        await restore_outbox(self._context, names)
