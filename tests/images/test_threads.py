"""Tests of threads for blocking calls: one while calls are quick, more while they are slow."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from imagegen.errors import StoreUnavailable
from imagegen.images import store
from imagegen.images.store import OpenedImage
from imagegen.images.threads import MAX_QUEUED_S, WorkThreads
from imagegen.turn_queue import PER_TURN
from tests.support import Turns, eventually


def name_of_thread() -> str:
    return threading.current_thread().name


@pytest.fixture
def no_call_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no call wait for so long that another thread is started, also where the system is slow to run the first."""
    monkeypatch.setattr("imagegen.images.threads.MAX_QUEUED_S", 600.0)


async def test_quick_calls_run_in_one_thread_and_return_their_results(no_call_is_slow: None) -> None:
    threads = WorkThreads(8, "quick")
    names = await asyncio.gather(*(threads.run(name_of_thread) for _ in range(100)))
    assert set(names) == {"quick"}
    assert await threads.run(divmod, 7, 2) == (3, 1)
    assert await threads.run(int, "11", base=2) == 3


async def test_callers_whose_calls_ended_while_the_loop_was_busy_resume_in_several_turns() -> None:
    threads, returned, ended = WorkThreads(1, "quick"), list[str](), threading.Event()

    async def call() -> None:
        returned.append(await threads.run(name_of_thread))

    callers = [asyncio.create_task(call()) for _ in range(5 * PER_TURN)]
    await asyncio.sleep(0)  # all calls are in the queue now
    threads.put(ended.set)
    ended.wait()
    turns = Turns(lambda: len(returned))
    await asyncio.gather(*callers)
    assert turns.most() <= PER_TURN


async def test_an_error_is_raised_in_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await WorkThreads(1, "failing").run(divmod, 1, 0)


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
async def test_what_a_failed_call_held_is_freed_without_a_garbage_collection(patience_s: float) -> None:
    threads, held = WorkThreads(1, "failing", patience_s=patience_s), []

    def fails(pieces: set[bytes]) -> None:
        raise ValueError

    gc.disable()
    try:
        for _ in range(3):
            pieces = {b"of a large image"}
            held.append(weakref.ref(pieces))
            with suppress(ValueError):
                await threads.run(fails, pieces)
            del pieces
        await eventually(lambda: not any(reference() for reference in held[:-1]))
    finally:
        gc.enable()


async def test_hanging_calls_do_not_block_others_up_to_the_thread_limit() -> None:
    threads, hang, running = WorkThreads(3, "hanging"), threading.Event(), []

    def hangs() -> None:
        running.append(name_of_thread())
        hang.wait(60)

    stuck = [asyncio.create_task(threads.run(hangs)) for _ in range(2)]
    await eventually(lambda: len(running) == 2)
    assert await asyncio.wait_for(threads.run(name_of_thread), 20) == "hanging-extra"
    stuck += [asyncio.create_task(threads.run(hangs)) for _ in range(2)]
    await eventually(lambda: len(running) == 3)
    waiting = asyncio.create_task(threads.run(name_of_thread))
    _, late = await asyncio.wait({waiting}, timeout=0.1)
    assert (late, len(running)) == ({waiting}, 3)
    hang.set()
    await asyncio.gather(*stuck)
    assert await waiting


@contextmanager
def no_thread_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


async def test_calls_are_run_also_while_the_system_has_no_thread_left(
    monkeypatch: pytest.MonkeyPatch, no_call_is_slow: None
) -> None:
    threads = WorkThreads(2, "late")
    with no_thread_left(monkeypatch):
        assert await threads.run(name_of_thread) == "MainThread"
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 1, 0)
    assert await threads.run(name_of_thread) == "late"


async def test_a_further_thread_that_could_not_start_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hang, looked = WorkThreads(2, "late"), threading.Event(), asyncio.Event()
    stuck = asyncio.create_task(threads.run(hang.wait, 60))
    waiting = asyncio.create_task(threads.run(name_of_thread))
    await asyncio.sleep(0)
    with no_thread_left(monkeypatch):
        asyncio.get_running_loop().call_later(3 * MAX_QUEUED_S, looked.set)
        await looked.wait()
    assert await asyncio.wait_for(waiting, 20) == "late-extra"
    hang.set()
    await stuck


class PausingQueue(SimpleQueue[Any]):
    """Queue whose thread waits for `go_on` between taking a call and anything else."""

    def __init__(self) -> None:
        self.go_on, self.taken = threading.Event(), threading.Event()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        call = super().get(block, timeout)
        self.taken.set()
        self.go_on.wait(60)
        return call


@pytest.mark.parametrize("patience_s", [0.0, 0.001])
@pytest.mark.parametrize("resting_s", [0.0, 600.0])
async def test_a_call_gets_another_thread_if_the_first_has_just_taken_a_call_that_hangs(
    monkeypatch: pytest.MonkeyPatch, patience_s: float, resting_s: float
) -> None:
    queue = PausingQueue()
    monkeypatch.setattr("imagegen.images.threads.SimpleQueue", lambda: queue)
    monkeypatch.setattr("imagegen.images.threads.RESTING_S", resting_s)
    threads = WorkThreads(2, "taking", patience_s=patience_s)
    first = asyncio.create_task(threads.run(name_of_thread))
    await asyncio.sleep(0)
    assert queue.taken.wait(60)  # without the loop, which would start another thread if this one is slow to take it
    try:
        assert await asyncio.wait_for(threads.run(name_of_thread), 20) == "taking-extra"
    finally:
        queue.go_on.set()
    assert await first == "taking"


async def test_a_call_of_a_cancelled_caller_finishes_before_the_next() -> None:
    threads, began, go_on, done = WorkThreads(1, "cancelled"), threading.Event(), threading.Event(), []

    def work() -> None:
        began.set()
        go_on.wait(60)
        done.append(True)

    call = asyncio.create_task(threads.run(work))
    await eventually(began.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    assert await threads.run(len, "abc") == 3
    assert done == [True]


def test_threads_serve_one_loop_after_another() -> None:
    threads = WorkThreads(1, "loops")
    assert [asyncio.run(threads.run(len, "ab")) for _ in range(3)] == [2, 2, 2]


def test_a_result_for_a_loop_that_is_closed_is_dropped() -> None:
    threads, began, go_on = WorkThreads(1, "closed"), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(60)

    async def leave() -> None:
        call = asyncio.create_task(threads.run(work))
        await eventually(began.is_set)
        call.cancel()

    asyncio.run(leave())
    go_on.set()
    assert asyncio.run(threads.run(len, "ab")) == 2


async def test_the_loop_sleeps_for_a_quick_call_and_runs_nothing_else() -> None:
    threads, others = WorkThreads(2, "sleeping", patience_s=60.0), list[str]()
    asyncio.get_running_loop().call_soon(others.append, "ran")
    assert await threads.run(name_of_thread) == "sleeping"
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
    assert others == []


async def test_the_loop_goes_on_while_a_call_hangs_and_sleeps_for_no_other_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imagegen.images.threads.RESTING_S", 600.0)
    threads, hang, others = WorkThreads(2, "patient", patience_s=0.001), threading.Event(), list[str]()
    stuck = asyncio.create_task(threads.run(hang.wait, 60))
    await asyncio.sleep(0)
    assert not stuck.done()
    hang.set()
    assert await stuck
    asyncio.get_running_loop().call_soon(others.append, "ran")
    assert await threads.run(len, "abc") == 3
    assert others == ["ran"]


async def test_an_error_of_a_call_that_hung_is_raised_in_the_caller() -> None:
    threads, hang = WorkThreads(1, "late", patience_s=0.001), threading.Event()

    def fails() -> None:
        hang.wait(60)
        raise KeyError("late")

    stuck = asyncio.create_task(threads.run(fails))
    await asyncio.sleep(0)
    hang.set()
    with pytest.raises(KeyError, match="late"):
        await stuck


async def test_only_a_call_that_has_waited_starts_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hangs, checks = WorkThreads(3, "one"), [threading.Event(), threading.Event()], list[Callable[[], None]]()

    def call_later(delay_s: float, check: Callable[..., None], *args: object) -> asyncio.TimerHandle:
        if delay_s == MAX_QUEUED_S:
            checks.append(partial(check, *args))
            return asyncio.TimerHandle(float("inf"), check, args, loop)
        return loop.call_at(loop.time() + delay_s, check, *args)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", call_later)
    first = asyncio.create_task(threads.run(hangs[0].wait, 60))
    await asyncio.sleep(0)
    second_began = threading.Event()

    def begin_second() -> None:
        second_began.set()
        hangs[1].wait(60)

    second = asyncio.create_task(threads.run(begin_second))
    await asyncio.sleep(0)
    hangs[0].set()
    await first
    await eventually(second_began.is_set)
    third = asyncio.create_task(threads.run(name_of_thread))
    await asyncio.sleep(0)
    checks.pop()()  # the second has begun, and the third came only now
    hangs[1].set()
    await second
    assert await third == "one"


def test_a_hanging_call_of_an_ended_loop_blocks_no_call_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hang = WorkThreads(2, "shared"), threading.Event()

    async def ends_before_it_looks_again() -> None:
        monkeypatch.setattr("imagegen.images.threads.MAX_QUEUED_S", 600.0)
        call = asyncio.create_task(threads.run(hang.wait, 60))
        await asyncio.sleep(0)
        call.cancel()

    async def runs_another() -> str:
        monkeypatch.undo()
        return await asyncio.wait_for(threads.run(name_of_thread), 20)

    asyncio.run(ends_before_it_looks_again())
    assert asyncio.run(runs_another()) == "shared-extra"
    hang.set()


async def test_a_call_that_hangs_is_left_after_its_limit_and_another_thread_takes_its_place() -> None:
    threads, hang = WorkThreads(1, "limited"), threading.Event()
    with pytest.raises(TimeoutError):
        await threads.run_within(0.05, hang.wait, 60)
    assert await asyncio.wait_for(threads.run_within(20, name_of_thread), 20) == "limited-extra"
    hang.set()


async def test_a_limited_call_in_time_returns_its_result_or_raises_its_error() -> None:
    threads = WorkThreads(2, "limited", patience_s=1.0)
    assert await threads.run_within(20, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run_within(20, divmod, 1, 0)


async def test_an_error_of_a_call_that_is_not_waited_for_is_dropped() -> None:
    threads, done = WorkThreads(1, "unwaited"), threading.Event()
    threads.put(divmod, 1, 0)
    threads.put(done.set)
    await eventually(done.is_set)
    assert await threads.run(name_of_thread) == "unwaited"


async def test_an_image_file_that_the_disk_does_not_return_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    (tmp_path / "image").write_bytes(b"x")
    opened = OpenedImage(1, file=FileIO(tmp_path / "image"))
    monkeypatch.setattr(store, "READ_S", 0.05)
    monkeypatch.setattr(os, "pread", lambda *_: hang.wait(60))
    with pytest.raises(StoreUnavailable):
        await opened.read_all()
    hang.set()
    opened.close()
