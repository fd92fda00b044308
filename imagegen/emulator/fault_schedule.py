"""Schedule of faults: a queue of steps, markers in prompts, and a default for all calls."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

UNREAD: Final = "reset_before_read"

_MARKER: Final = re.compile(r"\{\{fault:([^{}]*)\}\}")


class UnknownFault(Exception):
    """An unknown fault, or an option that makes no sense; the text names it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault by name, with its options."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def number(self, name: str, default: float) -> float:
        value = self.options.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnknownFault(f"{self.name}: {name} must be a number")
        return value

    def text(self, name: str, default: str) -> str:
        return str(self.options.get(name, default))

    def optional_number(self, name: str) -> float | None:
        return self.number(name, 0) if name in self.options else None


class Trigger:
    """Decision for each call with a fault whether the fault applies to it."""

    def __init__(self, fault: Fault, now: float, *, default_times: int | None) -> None:
        for_s = fault.optional_number("for_s")
        self._until = None if for_s is None else now + for_s
        self._every = max(1, int(fault.number("every", 1)))
        open_ended = self._until is not None or self._every > 1
        times = int(fault.number("times", 0 if open_ended else default_times or 0))
        self._left = times or None
        self._calls = 0

    def take(self, now: float) -> bool:
        if self.spent(now):
            return False
        self._calls += 1
        if (self._calls - 1) % self._every:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def spent(self, now: float) -> bool:
        return self._left == 0 or (self._until is not None and now >= self._until)


@dataclass(frozen=True, slots=True)
class _Step:
    fault: Fault
    match: str
    turn: Trigger


def parse_text(text: str) -> Fault:
    """Parse `429 retry_after=2 body="some text"`: a name, then options. Raises UnknownFault."""
    try:
        name, *pairs = shlex.split(text)
        options = dict(pair.split("=", 1) for pair in pairs)
    except ValueError as failure:
        raise UnknownFault(f"write it as NAME key=value …, not {text!r}") from failure
    return _expanded(name, {key: _number_or_text(value) for key, value in options.items()})


def parse_step(sent: object) -> Fault:
    """Parse a step of the queue: `{"fault": NAME, option: value, …}`, or the text form. Raises UnknownFault."""
    if isinstance(sent, str):
        return parse_text(sent)
    if not isinstance(sent, Mapping):
        raise UnknownFault('a step is an object with "fault", or a text')
    options = {str(key): value for key, value in sent.items() if key != "fault"}
    return _expanded(str(sent.get("fault", "ok")), options)


class FaultSchedule:
    """The queue goes first, then the prompt's marker, then the default. Times are monotonic seconds."""

    def __init__(self, check: Callable[[Fault], None], rng: random.Random) -> None:
        self._check = check
        self._rng = rng
        self._steps: list[_Step] = []
        self._marked: dict[str, Trigger] = {}
        self._default: tuple[Fault, Trigger, float] | None = None

    def add(self, steps: Sequence[object], now: float) -> None:
        """Queue all steps, or none. Raises UnknownFault."""
        faults = [parse_step(step) for step in steps]
        for fault in faults:
            self._check(fault)
        self._steps += [_Step(fault, fault.text("match", ""), Trigger(fault, now, default_times=1)) for fault in faults]

    def set_default(self, text: str | None, share: float, now: float) -> None:
        """Set the fault of calls without one from the queue or their prompt. share: part of these calls, 0 to 1."""
        if text is None:
            self._default = None
            return
        fault = parse_text(text)
        self._check(fault)
        self._default = (fault, Trigger(fault, now, default_times=None), share)

    def clear(self) -> None:
        """Drop the queue, and the counts of each prompt's marker; the default stays."""
        self._steps.clear()
        self._marked.clear()

    def pending(self, now: float) -> list[dict[str, object]]:
        return [{"fault": step.fault.name, **step.fault.options} for step in self._live(now)]

    def take_unread(self, now: float) -> Fault | None:
        """Return the fault for a call before it is read: only a queued fault without need of a prompt."""
        step = next(iter(self._live(now)), None)
        if step is None or step.match or step.fault.name != UNREAD:
            return None
        return step.fault if step.turn.take(now) else None

    def take(self, prompt: str, now: float) -> Fault | None:
        for step in self._live(now):
            if step.match in prompt and step.turn.take(now):
                return step.fault
        marker = _MARKER.search(prompt) if "{{fault:" in prompt else None
        if marker is not None:
            return self._take_marked(marker[1], prompt, now)
        if self._default is None:
            return None
        fault, turn, share = self._default
        return fault if self._rng.random() < share and turn.take(now) else None

    def _take_marked(self, text: str, prompt: str, now: float) -> Fault | None:
        fault = parse_text(text)
        self._check(fault)
        turn = self._marked.get(prompt)
        if turn is None:
            turn = self._marked[prompt] = Trigger(fault, now, default_times=None)
        return fault if turn.take(now) else None

    def _live(self, now: float) -> list[_Step]:
        if self._steps:
            self._steps = [step for step in self._steps if not step.turn.spent(now)]
        return self._steps


def _expanded(name: str, options: Mapping[str, object]) -> Fault:
    if name == "flapping":
        return Fault("500", {"every": 2, **options})
    if name == "storm":
        return Fault("429", {"for_s": 60, **options})
    return Fault(name, options)


def _number_or_text(value: str) -> object:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
