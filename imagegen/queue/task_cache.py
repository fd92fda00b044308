"""Cache of tasks in this process, so that most reads cost no command."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

from msgspec.structs import replace

from imagegen.tasks.task import Task, pending_deliveries
from imagegen.tasks.webhook import merge_deliveries

FINISHED_BYTES = 32 * 2**20
REMOTE_MAX_AGE_S = 1.0
UNKNOWN_AGE_S = 10.0
OTHERS_COUNT = 5_000
DROPPED_COUNT = 10_000


class TaskCache:
    """Tasks by id: unfinished ones of this instance, finished ones bounded by bytes, and recent reads of others.

    Attributes:
        live: unfinished tasks that were submitted or run here.
        finished_tasks: by id, with their sizes in bytes; `finished` returns those that have not expired.
        audiences: ids of tasks that clients or peers wait for, in groups that their owners keep up to date.
        on_change: called with a task of this instance after it changed, if it is in one of them.
        on_finished_here: called with each task that this instance finished.
    """

    def __init__(self, *, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self.live: dict[str, Task] = {}
        self.finished_tasks: OrderedDict[str, tuple[Task, int]] = OrderedDict()
        self._finished_bytes = 0
        self._dropped: OrderedDict[str, float] = OrderedDict()
        self._others: OrderedDict[str, tuple[Task | None, float]] = OrderedDict()
        self.audiences: tuple[Container[str], ...] = ()
        self.on_change: Callable[[Task], None] = lambda _task: None
        self.on_finished_here: Callable[[Task], None] = lambda _task: None

    def put(self, task: Task) -> bool:
        """Store the state of a task of this instance, or of a finished one. Return False if a newer one is cached."""
        task_id, finished = task.id, None
        if (cached := self.live.get(task_id)) is None:
            cached = finished = self.finished(task_id)
        if cached is not None and cached.sequence > task.sequence:
            return False
        if task.state.is_final:
            self.live.pop(task_id, None)
            self._keep(task)
        else:
            if finished is not None:
                self._drop(task_id)
            self.live[task_id] = task if cached is None else _with_added_webhooks(task, cached)
        if self._others:
            self._others.pop(task_id, None)
        for audience in self.audiences:
            if task_id in audience:
                self.on_change(task)
                break
        return True

    def store_from_redis(self, task_id: str, task: Task | None) -> None:
        """Store a task that was read from Redis; it may have been submitted here during the read."""
        if task is None and (task_id in self.live or task_id in self.finished_tasks):
            return
        if task is not None and task.state.is_final:
            self.live.pop(task_id, None)
            self._keep(task)
            if not pending_deliveries(task):
                return
        self._others[task_id] = (task, self._monotonic())
        self._others.move_to_end(task_id)
        while len(self._others) > OTHERS_COUNT:
            self._others.popitem(last=False)

    def store_from_peer(self, task: Task) -> None:
        """Store a task that its owner published, maybe out of order."""
        for cached in (self.finished_tasks.get(task.id, (None,))[0], self.recent_remote(task.id)[1]):
            if cached is not None and cached.sequence >= task.sequence:
                return
        if task.state.is_final:
            self.live.pop(task.id, None)
        self._others[task.id] = (task, self._monotonic())

    def merge_webhooks(self, task: Task) -> None:
        """Merge the deliveries of a task into its cached state; nothing else of it changes."""
        if (live := self.live.get(task.id)) and live.epoch == task.epoch:
            self.live[task.id] = _with_added_webhooks(live, task)
        if (finished := self.finished(task.id)) and finished.epoch == task.epoch:
            self._keep(_with_added_webhooks(finished, task))
        self._others.pop(task.id, None)

    def raise_billed(self, task_id: str, epoch: int, count: int) -> None:
        """Raise the count of calls that may have been paid twice in a finished task."""
        done = self.finished(task_id)
        if done is not None and done.epoch == epoch and done.possibly_billed_twice < count:
            self._keep(replace(done, possibly_billed_twice=count))
        self._others.pop(task_id, None)

    def move_to_end(self, task_id: str) -> None:
        """Move an unfinished task behind the others, so that these are checked first."""
        if (task := self.live.pop(task_id, None)) is not None:
            self.live[task_id] = task

    def forget(self, task_id: str) -> None:
        self.live.pop(task_id, None)
        self._others.pop(task_id, None)
        self._drop(task_id)

    def finished(self, task_id: str) -> Task | None:
        """Return a finished task that has not expired."""
        entry = self.finished_tasks.get(task_id)
        if entry is None:
            return None
        task = entry[0]
        if task.expires_at is not None and task.expires_at <= self._clock():
            self._drop(task_id)
            return None
        self.finished_tasks.move_to_end(task_id)
        return task

    def vanished(self, task_id: str) -> bool:
        """Return whether a finished task dropped for its bytes lost its record too early; true once a task."""
        return self._dropped.pop(task_id, 0.0) > self._clock()

    def results(self) -> list[Task]:
        """Return finished tasks that have not expired, the latest first."""
        now = self._clock()
        tasks = [task for task, _ in self.finished_tasks.values() if task.expires_at is None or task.expires_at > now]
        return sorted(tasks, key=lambda task: task.finished_at or 0.0, reverse=True)

    def recent_remote(
        self, task_id: str, alone_since: Callable[[float], bool] = lambda _unix_s: True
    ) -> tuple[bool, Task | None]:
        """Return whether the last read of a task is recent enough, and its result.

        A task is valid for one second. Its absence is valid for ten, and only if no peer can have submitted it.

        alone_since: returns whether there was no other instance since a time (Unix seconds).
        """
        entry = self._others.get(task_id)
        if entry is None:
            return False, None
        task, age_s = entry[0], self._monotonic() - entry[1]
        counts = age_s <= REMOTE_MAX_AGE_S if task else age_s <= UNKNOWN_AGE_S and alone_since(self._clock() - age_s)
        return counts, task if counts else None

    def _keep(self, task: Task) -> None:
        self._drop(task.id)
        size = 1_000 + len(task.request_json) + 500 * (len(task.images) + len(task.deliveries))
        self.finished_tasks[task.id] = (task, size)
        self._finished_bytes += size
        now = self._clock()
        while self.finished_tasks and (self._finished_bytes > FINISHED_BYTES or self._oldest_expired(now)):
            task_id, (dropped, size_bytes) = self.finished_tasks.popitem(last=False)
            self._finished_bytes -= size_bytes
            if dropped.expires_at is not None and dropped.expires_at > now:
                self._dropped[task_id] = dropped.expires_at
                if len(self._dropped) > DROPPED_COUNT:
                    self._dropped.popitem(last=False)

    def _oldest_expired(self, now: float) -> bool:
        oldest, _ = next(iter(self.finished_tasks.values()))
        return oldest.expires_at is not None and oldest.expires_at <= now

    def _drop(self, task_id: str) -> None:
        entry = self.finished_tasks.pop(task_id, None)
        if entry is not None:
            self._finished_bytes -= entry[1]


def _with_added_webhooks(task: Task, cached: Task) -> Task:
    """Return the task with webhooks that were added to its epoch, which its entry lacks."""
    if not cached.deliveries or cached.epoch != task.epoch:
        return task
    return replace(task, deliveries=merge_deliveries(task.deliveries, cached.deliveries))
