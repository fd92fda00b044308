"""The real service for tests: `python run.py` as a process with its own folder, used over HTTP alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import Any, Self, TypeVar

from imagegen.redis_client.server_binary import find_binary
from tests import forked
from tests.certificates import FILE_SETTINGS
from tests.emulator_fixtures import EmulatorProcess
from tests.forked import ForkedProcess

RUN = Path(__file__).resolve().parents[2] / "run.py"
STREAMLESS = Path(__file__).with_name("streamless.py")
KEY = "tgp_v1_a-key-that-nobody-may-see"
START_S = 60.0
END_S = 40.0

FAST = {
    "PORT": "0",
    "LEASE_SECONDS": "1",
    "RETRY_BASE_SECONDS": "0.05",
    "RATE_LIMIT_MAX": "0",
    "IMAGE_RATE_LIMIT_MAX": "0",
    "SANDBOX_DELAY": "0.05",
}
"""Settings of every service in these tests; a test may override them."""

FINAL = frozenset({"completed", "failed", "cancelled"})

_LISTENS = re.compile(r"listens on (http://\S+)")
_FAULTS = ("Traceback", "never retrieved", "never awaited", "Unforeseen", "unforeseen", "ERROR", "CRITICAL", KEY)

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Answer:
    """HTTP response of the service."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def error(self) -> tuple[int, str]:
        """Return status and code of an error; check its shape against docs/api.md."""
        seen = self.json
        assert set(seen) - {"resetsAt"} == {
            "success",
            "statusCode",
            "code",
            "message",
            "retryable",
            "requestId",
            "details",
        }
        assert (seen["success"], seen["statusCode"]) == (False, self.status)
        assert seen["requestId"] == self.headers["X-Request-Id"]
        assert isinstance(seen["retryable"], bool)
        return self.status, seen["code"]


def eventually(look: Callable[[], _Found | None], within_s: float = 30.0) -> _Found:
    """Return the result of `look` once it is true; fail after `within_s` seconds."""
    deadline, pause_s = time.monotonic() + within_s, 0.005
    while not (match := look()):
        assert time.monotonic() < deadline, f"it did not come true within {within_s:g} s"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.1)  # a request costs the service and this process more than a pause
    return match


def at_once(calls: Sequence[Callable[[], _Found]]) -> list[_Found]:
    """Make all calls at the same moment; return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def environment(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the settings and only what a process needs from this machine."""
    names = ("PATH", "HOME", "TMPDIR", "LANG", *FILE_SETTINGS)
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    return {**inherited, "DATA_DIR": str(folder / "data"), **FAST, **settings}


def run_to_its_end(folder: Path, within_s: float = 100.0, /, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a start that is expected to fail, until its exit."""
    folder.mkdir(parents=True, exist_ok=True)
    return forked.run([str(RUN)], cwd=folder, env=environment(folder, settings), within_s=within_s)


@dataclass
class Service:
    """One instance, a forked process. `folder`: its working and data folder; `settings`: its whole environment."""

    folder: Path
    settings: dict[str, str]
    allowed: tuple[str, ...] = ()
    program: Path = RUN
    process: subprocess.Popen[bytes] | ForkedProcess | None = field(default=None, init=False)
    url: str = field(default="", init=False)
    first_answer_s: float = field(default=0.0, init=False)

    def start(self, *, ready: bool = True) -> Self:
        """Start the service and wait until it answers; with `ready`, until Redis does too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            environ = environment(self.folder, self.settings)
            command = [str(self.program)]
            self.process = ForkedProcess(command, cwd=self.folder, env=environ, stdout=log, stderr=log)
        self.url = eventually(self._address, START_S)
        eventually(lambda: self.answers("/readyz" if ready else "/healthz"), START_S)
        self.first_answer_s = time.monotonic() - began
        return self

    @property
    def log_path(self) -> Path:
        return self.folder / "service.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _address(self) -> str:
        assert self.process is not None
        output = self.log_path.read_bytes()[self._log_start :].decode()
        assert self.process.poll() is None, f"it ended with {self.process.returncode}: {output}"
        match = _LISTENS.search(output)
        return match[1] if match else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, within_s: float = END_S) -> int:
        """Wait for the exit; return its code."""
        assert self.process is not None
        return self.process.wait(within_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def end(self) -> None:
        """End the service as an operator does, and check that its log is clean."""
        if self.process is None or not self.is_running:
            return
        self.signal(signal.SIGTERM)
        try:
            code = self.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        assert code == 0, self.log
        self.check_log()

    def check_log(self) -> None:
        allowed = (*self.allowed, "The board is at http")  # on loopback with the token, for the operator
        lines = [line for line in self.log.splitlines() if not any(text in line for text in allowed)]
        unwanted = (*_FAULTS, *filter(None, [self.admin_token]))
        faults = [line for line in lines if any(fault in line for fault in unwanted)]
        assert faults == []

    def check_outages(self) -> None:
        """Check that Redis was away, and that the log has one line at the beginning and at most one at the end of each.

        A machine that pauses Redis for seconds adds an outage.
        """
        lines = re.findall(r"Redis (can't be used|is back)", self.log)
        assert lines == (["can't be used", "is back"] * len(lines))[: len(lines)]
        assert lines

    def memory(self, name: str) -> int:
        """Return a value of Linux's /proc/PID/status in bytes: `VmRSS` is the memory now, `VmHWM` its peak."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    def loop_s(self) -> float:
        """Return the CPU time of the main thread in seconds, by Linux's /proc."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    @contextmanager
    def events(self, task_id: str) -> Iterator[HTTPResponse]:
        """Open the event stream of a task; it begins with the state at this moment."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=45)
        try:
            connection.request("GET", f"/api/images/{task_id}/events")
            yield connection.getresponse()
        finally:
            connection.close()

    def forget_peak(self) -> None:
        """Let the peak of the memory begin at its present size."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def children(self) -> list[int]:
        """Return the process ids of the servers that the service runs."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == self.pid]

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 45.0,
    ) -> Answer:
        """Send one request on a new connection; encode any body but bytes as JSON."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = HTTPConnection(host, int(port), timeout=timeout_s)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        types = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, sent, types | dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def answers(self, path: str) -> bool:
        try:
            return self.get(path).status == 200
        except OSError:
            return False

    def get(self, path: str, **headers: str) -> Answer:
        """Get a path or an absolute link of this service."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("GET", path.removeprefix(self.url), headers=named)

    @property
    def admin_token(self) -> str:
        """Return the admin token of the settings or of the data folder, empty if there is none."""
        file = Path(environment(self.folder, self.settings)["DATA_DIR"], "admin.token")
        return self.settings.get("ADMIN_TOKEN") or (file.read_text().strip() if file.is_file() else "")

    def get_as_admin(self, path: str) -> Answer:
        """Get a path with the admin token, from the settings or the data folder."""
        return self.get(path, Authorization=f"Bearer {self.admin_token}")

    def submit(self, **fields: object) -> Answer:
        return self.request("POST", "/api/images/generate", fields)

    def accepted(self, **fields: object) -> str:
        """Submit a task; return its id."""
        answer = self.submit(**fields)
        assert answer.status in (200, 202), answer.body
        return str(answer.json["taskId"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.get(f"/api/images/{task_id}")
        assert answer.status == 200, answer.body
        return answer.json

    def until(self, task_id: str, *states: str, within_s: float = 40.0) -> dict[str, Any]:
        """Return the task once it is in one of the states."""
        return eventually(lambda: seen if (seen := self.task(task_id))["status"] in states else {}, within_s)

    def finished(self, task_id: str, within_s: float = 40.0) -> dict[str, Any]:
        """Return the task once it is final, by long polls."""
        wait_s = max(1, min(20, int(within_s)))

        def look() -> dict[str, Any]:
            task = self.task(f"{task_id}?wait={wait_s}")
            return task if task["status"] in FINAL else {}

        return eventually(look, within_s)

    def completed(self, task_id: str, within_s: float = 40.0) -> dict[str, Any]:
        task = self.finished(task_id, within_s)
        assert task["status"] == "completed", task
        return task

    def made(self, **fields: object) -> dict[str, Any]:
        """Submit a task; return it once it is completed."""
        return self.completed(self.accepted(**fields))


def calls_about(upstream: EmulatorProcess, text: str) -> list[dict[str, Any]]:
    """Return the calls in the emulator's ledger with the text in their prompt."""
    begin = text[:200]  # more than the line of a request takes may be in a prompt
    return [call for call in upstream.ledger(begin)["calls"] if text in call["prompt"]]


def in_flight(upstream: EmulatorProcess, text: str) -> bool:
    """Return whether a call with the text in its prompt has no response yet."""
    return any(call["answered_at"] is None for call in calls_about(upstream, text))


def release(upstream: EmulatorProcess, text: str) -> None:
    """Wait for a call with the text in its prompt, and let the calls of `held=1` be answered."""
    eventually(lambda: in_flight(upstream, text))
    upstream.release()


@contextmanager
def redis_server(folder: Path, port: int, *arguments: str) -> Iterator[None]:
    """Run an external Redis server over TCP."""
    command = [find_binary().path, "--port", str(port), "--dir", str(folder), "--save", "", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: listens(port))
        yield
    finally:
        server.terminate()
        server.wait(10)


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def run(folder: Path, *arguments: str, start: Sequence[str] = (), **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command: forked, or by a new Python with the words of `start`."""
    folder.mkdir(exist_ok=True)
    if not start:
        return forked.run([str(RUN), *arguments], cwd=folder, env=environment(folder, settings))
    environ = environment(folder, settings) | {"PYTHONPATH": str(RUN.parent)}
    command = [*start, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=90, check=False)
