"""Helpers for tests of several packages."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import sysconfig
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from itertools import pairwise
from typing import Any, Self, TypeVar

import pytest
from loguru import logger

from imagegen.tasks.family import RequestFamily
from imagegen.tasks.request import GenerationRequest, fingerprint, request_digest
from imagegen.tasks.submission import Submission

Test = Callable[..., Any]
Row = TypeVar("Row")
ParameterSet = type(pytest.param())


async def eventually(condition: Callable[[], Awaitable[object] | object], within_s: float = 40.0) -> None:
    """Wait until the condition holds; fail after `within_s` seconds."""
    deadline, pause_s = time.monotonic() + within_s, 0.002
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, "the condition did not hold in time"
        await asyncio.sleep(pause_s)
        pause_s = min(1.3 * pause_s, 0.02)


class Turns:
    """Turns of the event loop until `most` is called. total: returns how often something happened so far."""

    def __init__(self, total: Callable[[], int]) -> None:
        self._total = total
        self._totals = [total()]
        self._next = asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._totals.append(self._total())
        self._next = asyncio.get_running_loop().call_soon(self._begin)

    def most(self) -> int:
        """Return how often it happened in the turn with the most of it."""
        self._next.cancel()
        return max(after - before for before, after in pairwise([*self._totals, self._total()]))


def counts(counter: Mapping[str, int], name: str, number: int) -> bool:
    """Return whether a counter is at a number."""
    return counter[name] == number


@contextmanager
def logged(level: str = "DEBUG", form: str = "{level} {message}") -> Iterator[list[str]]:
    """Collect the records of the log from a level on, in a form of Loguru, each with its line end."""
    lines: list[str] = []
    sink = logger.add(lines.append, level=level, format=form, diagnose=False)
    try:
        yield lines
    finally:
        logger.remove(sink)


class RowFailures:
    """Failures of the rows of a table, each with its row."""

    def __init__(self) -> None:
        self._failures: list[tuple[object, BaseException]] = []

    @contextmanager
    def of(self, row: object) -> Iterator[None]:
        """Keep the failure of a row, so that the others are checked too."""
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised with the others
            self._failures.append((row, error))

    def raise_all(self) -> None:
        """Raise an AssertionError with all failures, from the first of them, if there are any."""
        if self._failures:
            text = "\n".join(f"{_name(row):.300}: {error!r}" for row, error in self._failures)
            raise AssertionError(f"{len(self._failures)} rows fail\n{text}") from self._failures[0][1]


def _name(row: object) -> str:
    return str(row.id if isinstance(row, ParameterSet) and row.id else row)


async def check_rows(rows: Iterable[Row], check: Callable[[Row], Awaitable[object]]) -> None:
    """Check each row of a table. Raises an AssertionError with the failures of all rows, from the first of them."""
    failures = RowFailures()
    for row in rows:
        with failures.of(row):
            await check(row)
    failures.raise_all()


def over_rows(names: str | tuple[str, ...], rows: Iterable[object]) -> Callable[[Test], Test]:
    """Call a test with each row and the same fixtures, in one test, which fails with all failing rows.

    It takes what `pytest.mark.parametrize` takes, which collects each row as a test, with fixtures of its own: some
    3 ms of CPU.
    """
    parameters, table = (names,) if isinstance(names, str) else names, list(rows)

    def decorate(test: Test) -> Test:
        def given(row: Any) -> dict[str, object]:
            values = row.values if isinstance(row, ParameterSet) else (row,) if isinstance(names, str) else row
            return dict(zip(parameters, values, strict=True))

        async def asynchronous(**fixtures: object) -> None:
            await check_rows(table, lambda row: test(**fixtures, **given(row)))

        def synchronous(**fixtures: object) -> None:
            failures = RowFailures()
            for row in table:
                with failures.of(row):
                    test(**fixtures, **given(row))
            failures.raise_all()

        test_rows = wraps(test)(asynchronous if inspect.iscoroutinefunction(test) else synchronous)
        taken = inspect.signature(test)
        others = [parameter for name, parameter in taken.parameters.items() if name not in parameters]
        test_rows.__signature__ = taken.replace(parameters=others)  # type: ignore[attr-defined]
        return test_rows

    return decorate


def cache_library_paths() -> None:
    """Read the paths of Python's libraries once in this process. Loguru reads them for each sink, in 7 ms."""
    sysconfig.get_path = cache(sysconfig.get_path)  # type: ignore[assignment]  # it shows no parameters


ADMIN_TOKEN = "the-admin-token-of-tests"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
"""Headers of a request of the operator to a service with this token."""


def examples(count: int) -> int:
    """Return how many examples Hypothesis tries; `make faults` tries more."""
    return count * int(os.environ.get("TEST_EXAMPLES", "1"))


def slowness() -> float:
    """Return how many times slower this machine is at present than an idle reference, at least 1."""
    began = time.monotonic()
    sum(number * number for number in range(1_000_000))
    return max(1.0, (time.monotonic() - began) / 0.08)


def wait_for_one_day(within_s: float) -> None:
    """Wait for the next UTC day if it begins within so many seconds: budgets and reports count by day."""
    left_s = 86_400.0 - time.time() % 86_400.0
    if left_s < within_s:
        time.sleep(left_s + 1.0)


class Stopwatch:
    """Time in seconds without the pauses that the machine made in this process; an async context manager.

    A step of the event loop that computes counts, by its CPU time.
    """

    _STEP_S, _LATE_S = 0.05, 0.2

    async def __aenter__(self) -> Self:
        self._began, self._stood_still_s = time.monotonic(), 0.0
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began - self._stood_still_s

    async def _watch(self) -> None:
        while True:
            began, ran_s = time.monotonic(), time.process_time()
            await asyncio.sleep(self._STEP_S)
            late_s = time.monotonic() - began - self._STEP_S - (time.process_time() - ran_s)
            if late_s > self._LATE_S:
                self._stood_still_s += late_s


class Clock:
    """Clock that a test moves by hand."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class LoopTime:
    """Time of the running event loop that a test moves on, so that it waits for no timer and races with none."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop, self._real, self._ahead_s = loop, loop.time, 0.0
        loop.time = self.now  # type: ignore[method-assign]

    def now(self) -> float:
        return self._real() + self._ahead_s

    async def move(self, seconds: float) -> None:
        """Let seconds pass at once: return when all timers that end in them have run, in their order."""
        self._ahead_s += seconds
        passed = self._loop.create_future()
        self._loop.call_at(self.now(), passed.set_result, None)
        await passed


def submission(name: object) -> Submission:
    """Return a submission that depends on the name alone."""
    task_id = hashlib.md5(str(name).encode()).hexdigest()
    return Submission(
        task_id, hashlib.sha256(str(name).encode()).hexdigest()[:32], "m", b'{"prompt":"%d"}' % hash(name)
    )


def family_submission(prompt: str, n: int) -> Submission:
    """Return the submission of a request, with its family."""
    request = GenerationRequest(prompt=prompt, model="m", width=512, height=512, n=n)
    canonical = request.canonical("together", None)
    family = RequestFamily(request, "together", None, None)
    task_id = fingerprint(canonical, None)
    return Submission(task_id, request_digest(canonical), "m", request.to_json(), family=family)
