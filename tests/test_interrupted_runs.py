"""Tests that no process of a test run outlives it, however it ends, and that runs at once take different ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.service.running import eventually

ROOT = Path(__file__).resolve().parents[1]
PORTS = """
import sys
from tests.ports import free_port
print(*(free_port() for _ in range(50)), flush=True)
sys.stdin.read()
"""

Process = tuple[int, int]
"""Pid and time of the start."""

Start = Callable[..., "Run"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and a kernel that ends children")


class Run:
    """Run of tests of tests/hanging by two processes, in a process group of its own."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder, self._names = folder, names
        arguments = [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:schemathesis",
            "-v",
            "--forks",
            "2",
            f"--basetemp={folder / 'tests'}",
        ]
        arguments += [f"tests/hanging/{name}.py" for name in names]
        with (folder / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *arguments],
                cwd=ROOT,
                env={**os.environ, "HANGS": str(folder)},
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self.seen: set[Process] = set()

    @property
    def output(self) -> str:
        return (self._folder / "output.txt").read_text()

    def ended(self, name: str) -> bool:
        """Return whether a test has ended its programs itself."""
        return (self._folder / f"{name} ended").exists()

    def worker(self, name: str) -> int:
        """Return the process that runs a test."""
        return int((self._folder / name).read_text())

    def wait_until_it_hangs(self) -> None:
        """Wait until all tests have started their programs."""
        eventually(lambda: all((self._folder / name).exists() for name in self._names) or self.process.poll(), 100)
        assert self.process.poll() is None, self.output
        self.seen = self.processes(self.process.pid)

    def processes(self, pid: int) -> set[Process]:
        """Return a process and all below it."""
        parents = dict(_running())
        found = {each for each in parents if each[0] == pid}
        while more := {each for each, parent in parents.items() if parent in {pid for pid, _ in found}} - found:
            found |= more
        return found

    def left(self) -> str:
        """Return the command lines of the processes seen before that still run, and of those with its environment."""
        marked = {each for each, _ in _running() if f"HANGS={self._folder}\0" in _read(each[0], "environ")}
        running = (self.seen & dict(_running()).keys()) | marked
        return "\n".join(f"{pid} {_read(pid, 'cmdline')}" for pid, _ in running)


def _running() -> Iterator[tuple[Process, int]]:
    """Return each process, without zombies, with the pid of its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (status := _read(int(entry.name), "stat")):
            state, parent, *rest = status.rpartition(")")[2].split()
            if state not in "ZX":
                yield (int(entry.name), int(rest[17])), int(parent)


def _read(pid: int, name: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    return ""


@pytest.fixture
def start(tmp_path: Path, interruptible: None) -> Iterator[Start]:
    runs = []

    def start(*names: str) -> Run:
        runs.append(Run(tmp_path, *names))
        runs[0].wait_until_it_hangs()
        return runs[0]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        for line in run.left().splitlines():
            os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.mark.timeout(300)
def test_processes_that_a_killed_run_has_started_die(start: Start) -> None:
    run = start("services", "browsers")
    worker = run.worker("services")
    assert "valkey-server" in run.left()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: "valkey-server" not in run.left(), 60)  # neither that of a service nor one of its own
    eventually(lambda: "test_services_run FAILED" in run.output, 60)
    assert run.process.poll() is None
    run.process.kill()
    run.process.wait()
    eventually(lambda: not run.left(), 60)


@pytest.mark.timeout(300)
def test_an_interrupted_run_ends_its_fixtures_and_leaves_no_process(start: Start) -> None:
    run = start("services")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.process.wait(100) == pytest.ExitCode.INTERRUPTED
    assert run.ended("services")
    eventually(lambda: not run.left(), 60)


def test_a_test_that_outlives_its_time_limit_fails(tmp_path: Path) -> None:
    arguments = ["-p", "no:cacheprovider", "-p", "no:schemathesis", "--forks", "2", "--timeout", "0.5"]
    path = "tests/hanging/swallowed_limits.py"
    command = [sys.executable, "-m", "pytest", *arguments, f"--basetemp={tmp_path / 'tests'}", path]
    run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "the process that ran it ended with -9" in run.stdout


def test_runs_at_once_take_different_ports() -> None:
    command = [sys.executable, "-c", PORTS]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    taken = [set(run.stdout.readline().split()) for run in runs if run.stdout]
    for run in runs:
        run.communicate()
    assert [len(ports) for ports in taken] == [50, 50]
    assert not taken[0] & taken[1]
