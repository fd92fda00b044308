"""Calls of `/v1` clients that wait for a task here or were answered here, as other instances ask for them.

An unfinished task whose submitter waits nowhere, and was answered nowhere, is that of a call which was lost with its
instance: the client's next equal call is a repeat of it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from imagegen.queue.notifier import Message, Notifier

QUESTION, ANSWER = "call?", "call"

MAX_ANSWERED = 10_000

ANSWERS_S = 1.0
"""Longest wait for the answers of all instances. One of an earlier version does not answer."""


@dataclass(slots=True)
class _Question:
    """A question to the peers. denials: how many do not know the call. missing: answers in all, None if unknown."""

    denials: int = 0
    missing: int | None = None
    known: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self) -> None:
        """End the wait once each peer has answered with a no."""
        if self.missing is not None and self.denials >= self.missing and not self.known.done():
            self.known.set_result(False)


class OpenCalls:
    """Ids of tasks that calls wait for here, and of those that were the answer to a call."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._open: Counter[str] = Counter()
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._questions: dict[str, _Question] = {}
        notifier.handlers[QUESTION] = self._on_question
        notifier.handlers[ANSWER] = self._on_answer

    def begin(self, task_id: str) -> None:
        """Record a call that waits for a task."""
        self._open[task_id] += 1

    def end(self, task_id: str, *, is_answered: bool) -> None:
        """Record the end of a call. is_answered: the client has its answer, which may be that the task runs."""
        self._open[task_id] -= 1
        if self._open[task_id] <= 0:
            del self._open[task_id]
        if is_answered:
            self._answered[task_id] = None
            self._answered.move_to_end(task_id)
            while len(self._answered) > MAX_ANSWERED:
                self._answered.popitem(last=False)

    async def may_be_elsewhere(self, task_id: str) -> bool:
        """Return whether another instance knows a call for a task, or has not denied that in time.

        An instance that was killed receives nothing, so that it is not waited for.
        """
        token, question = secrets.token_hex(8), _Question()
        self._questions[token] = question
        try:
            async with asyncio.timeout(ANSWERS_S):
                question.missing = await self._notifier.request(QUESTION, id=task_id, token=token)
                if question.missing is None:
                    return True
                question.settle()
                return await question.known
        except TimeoutError:
            return True
        finally:
            del self._questions[token]

    def _on_question(self, message: Message) -> None:
        task_id = message.get("id")
        known = task_id in self._open or task_id in self._answered
        self._notifier.publish(ANSWER, token=message.get("token"), known=known)

    def _on_answer(self, message: Message) -> None:
        question = self._questions.get(str(message.get("token")))
        if question is None or question.known.done():
            return
        if message.get("known") is not False:
            question.known.set_result(True)
            return
        question.denials += 1
        question.settle()
