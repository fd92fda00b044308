"""Run of the tests in several processes that are forked after the collection: `pytest --forks 4`.

Modules are imported and tests are collected once for all processes, which pytest-xdist does in each. A process runs
whole files, in the order of the collection, and takes the next file when it has finished one. Most processes begin with
files that start programs and wait for them, `COMPUTING` of them with the others, so that no processor waits meanwhile.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from tests import forked, orphans
from tests.tiers import first_of, waits

File = list[pytest.Item]

COMPUTING = 2
"""Processes that run files without programs first."""

TIME_LIMITS = 5
"""A worker whose test runs for this many time limits is killed: a callback may catch the exception of the limit."""

END_S = 20.0
"""For the fixtures of interrupted workers."""

_NUMBER = struct.Struct("<I")


def run(session: pytest.Session, processes: int) -> None:
    """Run the collected tests in forked processes. Returns in each of them and, when all have ended, in this one."""
    tests = session.config.rootpath / "tests"

    def file_of(item: pytest.Item) -> str:
        return first_of(item.path.relative_to(tests).as_posix())

    files = [list(items) for _, items in itertools.groupby(session.items, key=file_of)]
    count = min(processes, len(files))
    waiting = [number for number, (item, *_) in enumerate(files) if waits(file_of(item))]
    queues = [_queue(waiting), _queue(sorted(set(range(len(files))).difference(waiting)))]
    parents: list[socket.socket] = []
    forking: subprocess.Popen[bytes] | None = None
    if any(not item.get_closest_marker("unit") for item in session.items):
        parents, forking = forked.start_parents(count)
    # Made once: a given folder is emptied first.
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    workers: list[_Worker] = []
    sys.stdout.flush()
    sys.stderr.flush()
    for number in range(count):
        results, sending = Pipe(duplex=False)
        if pid := orphans.fork():
            sending.close()
            workers.append(_Worker(pid, results))
            continue
        unused: list[Connection | socket.socket] = [results, *(worker.results for worker in workers)]
        for channel in [*unused, *parents[:number], *parents[number + 1 :]]:
            channel.close()
        if forking:
            forked.use_parent(parents[number])
            forking.returncode = 0  # the first process waits for its end
        first, second = reversed(queues) if number < COMPUTING else queues
        _work(session, files, itertools.chain(_taken(first), _taken(second)), sending, number)
        return
    for channel in parents:
        channel.close()
    try:
        _collect_results(session, {worker.results: worker for worker in workers})
    finally:
        _end([worker for worker in workers if not worker.ended])
        for queue in queues:
            os.close(queue)
        if forking:
            forking.wait()


def _queue(numbers: Sequence[int]) -> int:
    """Return the end of a pipe from which the numbers are read, each by one process."""
    reading, writing = os.pipe()
    os.write(writing, b"".join(map(_NUMBER.pack, numbers)))
    os.close(writing)
    return reading


def _work(
    session: pytest.Session, files: Sequence[File], taken: Iterator[int], results: Connection, number: int
) -> None:
    """Run the files whose numbers are taken. The end of the session follows in this process, as in any."""
    os.setpgid(0, 0)  # the terminal interrupts the first process, and that one its workers
    manager = session.config.pluginmanager
    # With it, plugins leave reports and caches to the first process.
    session.config.workerinput = {"workerid": str(number)}  # type: ignore[attr-defined]  # as pytest-xdist sets it
    manager.unregister(name="terminalreporter")
    silent = pytest.TerminalReporter(session.config, Path(os.devnull).open("w"))  # noqa: SIM115 - open until the end
    silent.pytest_sessionstart(session)
    manager.register(silent, "terminalreporter")
    if session.config.option.capture == "fd":
        _capture_apart(manager.getplugin("capturemanager"))
    manager.register(_Sender(session.config, results))
    for index in taken:
        # With the session as the next node, the last test ends the fixtures of its file, but not those of the session.
        for item, next_node in itertools.pairwise([*files[index], session]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_node)
            if session.shouldfail or session.shouldstop:
                return


def _capture_apart(capture: Any) -> None:
    """Capture the output in files of this process, behind the streams that modules may hold from their import."""
    capture.resume_global_capture()
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with TemporaryFile(buffering=0) as file:
            for shared in (number, stream.fileno()):
                os.dup2(file.fileno(), shared)
    capture.suspend_global_capture()


def _taken(queue: int) -> Iterator[int]:
    """Take numbers of files from a queue, which all processes read, until it is empty."""
    while number := os.read(queue, _NUMBER.size):
        yield _NUMBER.unpack(number)[0]


class _Sender:
    """Plugin of a worker that sends the name of each test when it starts, and its reports."""

    def __init__(self, config: pytest.Config, results: Connection) -> None:
        self._config, self._results = config, results

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._results.send(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._results.send(hook.pytest_report_to_serializable(config=self._config, report=report))


@dataclass
class _Worker:
    """Worker as the first process sees it: its pid, its pipe, the test that it runs and whether it has ended.

    started_at: of the test, by time.monotonic().
    """

    pid: int
    results: Connection
    running: str = ""
    started_at: float = math.inf
    ended: bool = False

    def ends_before(self, deadline: float) -> bool:
        """Read and drop the rest of the results. Return whether their pipe is closed before the monotonic time."""
        with suppress(EOFError):
            while self.results.poll(max(deadline - time.monotonic(), 0.0)):
                self.results.recv()
            return False
        return True

    def wait(self) -> int:
        """Wait for the end. Return the exit code, negative for a signal."""
        self.ended = True
        self.results.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _end(workers: Sequence[_Worker]) -> None:
    """Interrupt workers, so that they end their fixtures; kill those that take too long."""
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    deadline = time.monotonic() + END_S
    for worker in workers:
        if not worker.ends_before(deadline):
            os.kill(worker.pid, signal.SIGKILL)
        worker.wait()


def _collect_results(session: pytest.Session, workers: dict[Connection, _Worker]) -> None:
    """Report the results of the workers until all have ended, or until the session is to stop."""
    hook = session.config.hook
    longest_s = TIME_LIMITS * (session.config.getoption("timeout") or float(session.config.getini("timeout")))
    while workers:
        for worker in workers.values():
            if time.monotonic() - worker.started_at > longest_s:
                os.kill(worker.pid, signal.SIGKILL)
        for results in wait(list(workers), longest_s / 10):
            assert isinstance(results, Connection)
            worker = workers[results]
            try:
                message: Any = results.recv()
            except EOFError:
                del workers[results]
                if (code := worker.wait()) not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                    hook.pytest_runtest_logreport(report=_report_of_death(worker.running, code))
                continue
            if isinstance(message, str):
                worker.running, worker.started_at = message, time.monotonic()
                continue
            report = hook.pytest_report_from_serializable(config=session.config, data=message)
            hook.pytest_runtest_logreport(report=report)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)


def _report_of_death(nodeid: str, code: int) -> pytest.TestReport:
    reason = f"the process that ran it ended with {code}"
    return pytest.TestReport(nodeid, (nodeid.partition("::")[0], None, nodeid), {}, "failed", reason, "call")
