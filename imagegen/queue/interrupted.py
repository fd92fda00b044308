"""End of tasks that no instance can run any more: the entry, and with it the request, is gone and so is the time."""

from __future__ import annotations

from loguru import logger

from imagegen.queue.codec import broadcast_record
from imagegen.queue.notifier import Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_cache import TaskCache
from imagegen.tasks import transitions
from imagegen.tasks.task import IN_LINE, Task, TaskError

GRACE_S = 5.0
"""Seconds after the deadline in which the owner of a task may still end it."""

ERROR = TaskError("interrupted", "Redis lost the task before it could be finished", retryable=True)


class Interrupted:
    """Check of tasks that may have no instance any more.

    deadline_s: seconds from the submit to a task's end.
    """

    def __init__(
        self,
        verbs: QueueVerbs,
        task_cache: TaskCache,
        notifier: Notifier,
        *,
        deadline_s: float,
        result_ttl_s: float,
    ) -> None:
        self._verbs = verbs
        self._task_cache = task_cache
        self._notifier = notifier
        self._deadline_s = deadline_s
        self._result_ttl_s = result_ttl_s
        self._clock = verbs.clock
        self._overdue = TaskError(
            "upstream_timeout", f"the task could not be finished within {deadline_s:g} s", retryable=True
        )

    async def ended(self, task: Task) -> Task:
        """Fail a stored task if its deadline is over and it has no entry, or waits in a line; else return it unchanged.

        A living owner writes the entry back. Costs nothing before the deadline. Raises QueueUnavailable.
        """
        now, is_in_line = self._clock(), task.entry_id == IN_LINE
        ends_at = self._clock.after_jumps(task.created_at) + self._deadline_s + (0.0 if is_in_line else GRACE_S)
        if task.sequence != task.epoch:
            ends_at += self._verbs.owner_life_s
        if task.state.is_final or now < ends_at:
            return task
        if task.entry_id and not is_in_line and await self._verbs.read_entry(task.entry_id) is not None:
            return task
        final = transitions.failed(task, self._overdue if is_in_line else ERROR, now=now, ttl_s=self._result_ttl_s)
        with self._verbs.end_marks.marked(final) as marked:
            return await self._end(task, marked)

    async def _end(self, task: Task, final: Task) -> Task:
        """Write the final task; return the stored task."""
        ended = await self._verbs.cancel(final, task.entry_id)
        if ended is None:
            return task
        if task.entry_id != IN_LINE:
            logger.bind(taskId=task.id).warning("The task's entry is lost and its deadline is over: it failed")
        final = ended.task
        self._verbs.meter.finished(final.state.value, final.error.code if final.error else "", final.model)
        self._task_cache.put(final)
        self._task_cache.on_finished_here(final)
        self._notifier.publish("change", record=broadcast_record(final).decode())
        return final
