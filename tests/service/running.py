"""Owns how tests run the real service: `python run.py` as a process with its own folder, asked over HTTP alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import Any, Self, TypeVar

from emulator_fixtures import EmulatorProcess

from imagegen.redis_client.server_binary import find_binary

RUN = Path(__file__).resolve().parents[2] / "run.py"
KEY = "tgp_v1_a-key-that-nobody-may-see"
START_S = 20.0
END_S = 15.0

FAST = {
    "PORT": "0",
    "LEASE_SECONDS": "1",
    "RETRY_BASE_SECONDS": "0.05",
    "RATE_LIMIT_MAX": "0",
    "IMAGE_RATE_LIMIT_MAX": "0",
    "SANDBOX_DELAY": "0.05",
}
"""What every service of these tests is set to, unless its test says otherwise."""

_LISTENS = re.compile(r"listens on (http://\S+)")
_FAULTS = ("Traceback", "never retrieved", "never awaited", "Unforeseen", "unforeseen", "ERROR", "CRITICAL", KEY)

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def error(self) -> tuple[int, str]:
        """Status and code of an error of docs/api.md, whose shape is checked on the way."""
        seen = self.json
        assert set(seen) == {"success", "statusCode", "code", "message", "retryable", "requestId", "details"}
        assert (seen["success"], seen["statusCode"]) == (False, self.status)
        assert seen["requestId"] == self.headers["X-Request-Id"]
        assert isinstance(seen["retryable"], bool)
        return self.status, seen["code"]


def eventually(look: Callable[[], _Found], within_s: float = 10.0) -> _Found:
    """What `look` finds as soon as it is true; fails when that takes too long."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"it did not come true within {within_s:g} s"
        time.sleep(0.01)
    return found


def at_once(calls: Sequence[Callable[[], _Found]]) -> list[_Found]:
    """Makes all the calls at the same moment."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def environment(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Nothing of this machine's but what a process needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return kept | {"DATA_DIR": str(folder / "data")} | FAST | settings


def run_to_its_end(folder: Path, within_s: float = 60.0, **settings: str) -> subprocess.CompletedProcess[str]:
    """A start that is to fail."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(RUN)]
    environ = environment(folder, settings)
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=within_s, check=False
    )


@dataclass
class Service:
    """One instance. `folder` is where it runs and keeps its data; settings are its whole environment."""

    folder: Path
    settings: dict[str, str]
    allowed: tuple[str, ...] = ()
    program: Path = RUN
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    url: str = field(default="", init=False)
    first_answer_s: float = field(default=0.0, init=False)

    def start(self, *, ready: bool = True) -> Self:
        """Returns when it answers; `ready`: and when Redis does, too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            environ = environment(self.folder, self.settings)
            self.process = subprocess.Popen(
                [sys.executable, str(self.program)], cwd=self.folder, env=environ, stdout=log, stderr=log
            )
        self.url = eventually(self._address, START_S)
        eventually(lambda: self.answers("/healthz"), START_S)
        self.first_answer_s = time.monotonic() - began
        if ready:
            eventually(lambda: self.get("/readyz").status == 200, START_S)
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

    def _address(self) -> str:
        assert self.process is not None
        said = self.log_path.read_bytes()[self._log_start :].decode()
        assert self.process.poll() is None, f"it ended with {self.process.returncode}: {said}"
        found = _LISTENS.search(said)
        return found[1] if found else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, within_s: float = END_S) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(within_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def end(self) -> None:
        """Ends it as an operator does, and looks whether its log is clean."""
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            code = self.wait(30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        assert code == 0, self.log
        self.check_log()

    def check_log(self) -> None:
        lines = [line for line in self.log.splitlines() if not any(text in line for text in self.allowed)]
        faults = [line for line in lines if any(fault in line for fault in _FAULTS)]
        assert faults == []

    def children(self) -> list[int]:
        """The process ids of the servers that it runs."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == self.pid]

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 15.0,
    ) -> Answer:
        """One request on a connection of its own; what is not bytes is sent as JSON."""
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
        """`path` may be a whole link of this service."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("GET", path.removeprefix(self.url), headers=named)

    def submit(self, **fields: object) -> Answer:
        return self.ask("POST", "/api/images/generate", fields)

    def accepted(self, **fields: object) -> str:
        """The id of a task that was taken."""
        answer = self.submit(**fields)
        assert answer.status in (200, 202), answer.body
        return str(answer.json["taskId"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.get(f"/api/images/{task_id}")
        assert answer.status == 200, answer.body
        return answer.json

    def until(self, task_id: str, *states: str, within_s: float = 20.0) -> dict[str, Any]:
        """The task once it is in one of the states."""
        return eventually(lambda: seen if (seen := self.task(task_id))["status"] in states else {}, within_s)

    def finished(self, task_id: str, within_s: float = 20.0) -> dict[str, Any]:
        return self.until(task_id, "completed", "failed", "cancelled", within_s=within_s)

    def completed(self, task_id: str, within_s: float = 20.0) -> dict[str, Any]:
        task = self.finished(task_id, within_s)
        assert task["status"] == "completed", task
        return task

    def made(self, **fields: object) -> dict[str, Any]:
        """A task that was submitted and is completed."""
        return self.completed(self.accepted(**fields))


def calls_about(upstream: EmulatorProcess, text: str) -> list[dict[str, Any]]:
    """The calls in the emulator's ledger whose prompt holds the text."""
    return [call for call in upstream.ledger()["calls"] if text in call["prompt"]]


@contextmanager
def redis_server(folder: Path, port: int, *arguments: str) -> Iterator[None]:
    """A Redis of somebody else's, over TCP."""
    command = [find_binary().path, "--port", str(port), "--dir", str(folder), "--save", "", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(port))
        yield
    finally:
        server.terminate()
        server.wait(10)


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
