"""Processes that a benchmark starts: Redis servers, services, upstreams."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import redis

from imagegen.redis_client.keys import Keys
from imagegen.redis_client.server_binary import find_binary

ROOT = Path(__file__).resolve().parent.parent

NOT_COUNTED = frozenset({"auth", "hello", "client", "info", "ping", "config", "memory", "select", "command", "dbsize"})
"""Free at Upstash, or ours and not the service's."""

ADMIN_TOKEN = "the-admin-token-of-benchmarks"
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
"""Headers of a request of the operator to a `Service`."""

START_WITHIN_S = 90.0
"""A start takes about a second of processor time; several are started side by side, also on a busy machine."""


class RedisServer:
    """Redis server on a free loopback port, without persistence."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="imagegen-bench-")
        self.port = free_port()
        self.client = redis.Redis(port=self.port, protocol=2)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start it and wait until it answers; after `kill` it is empty."""
        binary = find_binary()
        self.name = str(binary)
        self._child = subprocess.Popen(
            [binary.path, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            cwd=self._folder.name,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers, 5.0)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def hang(self) -> None:
        """Freeze it: it accepts connections and answers nothing, until `go_on`."""
        self._child.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._child.send_signal(signal.SIGCONT)

    @property
    def cpu_s(self) -> float:
        """Return its processor time so far, in seconds."""
        return sum(cpu_times_s(self._child.pid))

    def unfinished(self, prefix: str = "imagegen") -> int:
        """Return the number of unfinished tasks and webhooks of a service with this REDIS_PREFIX."""
        keys = Keys(prefix)
        return int(self.client.xlen(keys.stream)) + int(self.client.zcard(keys.outbox))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def empty(self) -> None:
        self.client.flushall()

    def calls(self) -> dict[str, int]:
        """Return how often each command ran, also inside scripts."""
        counts: dict[str, int] = {}
        for name, stats in self.client.info("commandstats").items():
            kind = name.removeprefix("cmdstat_").split("|")[0]
            if kind not in NOT_COUNTED:
                counts[kind] = counts.get(kind, 0) + int(stats["calls"])
        return counts

    def used_bytes(self) -> int:
        return int(self.client.info("memory")["used_memory"])

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


class Child:
    """Child process; `env` is added to an environment without imagegen's settings."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, *, log: IO[str] | None = None
    ) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=kept | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as pipes:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None and not pipe.closed:
                    pipes.enter_context(pipe)
            self.process.terminate()
            try:
                self.process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def line(self) -> str:
        """Return the next line of its output. Raises RuntimeError if it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with code {self.process.wait(10.0)}")
        return line.strip()

    @property
    def cpu_s(self) -> float:
        """Return its processor time so far, in seconds."""
        return sum(self.cpu_times_s)

    @property
    def cpu_times_s(self) -> tuple[float, float]:
        """Return its processor time so far, in seconds: its own, and the system's for it."""
        return cpu_times_s(self.process.pid)

    @property
    def rss_bytes(self) -> int:
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return int(shown.stdout) * 1024


class Service(Child):
    """Service as `python run.py` starts it, on a free port and with its own data folder."""

    def __init__(self, redis_url: str | None = None, **settings: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="imagegen-bench-")
        self.port = free_port()
        env = {"PORT": str(self.port), "DATA_DIR": self._folder.name, "LOG_LEVEL": "WARNING", "DRAIN_SECONDS": "0"}
        env |= {
            "ADMIN_TOKEN": ADMIN_TOKEN,
            "RATE_LIMIT_MAX": "0",
            "IMAGE_RATE_LIMIT_MAX": "0",
            "MAX_QUEUE": "10000000",
        }
        if redis_url:
            env["REDIS_URL"] = redis_url
        self.began_at = time.monotonic()
        super().__init__([sys.executable, "run.py"], env | settings)

    def __enter__(self) -> Self:
        try:
            until(self._answers, START_WITHIN_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_s = time.monotonic() - self.began_at
        return self

    @property
    def data(self) -> Path:
        """Its DATA_DIR."""
        return Path(self._folder.name)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the service ended with code {self.process.returncode} at its start")
        return answers(self.port, "/healthz")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()


def emulator() -> Child:
    """Start the upstream with faults and a ledger; `url_of` returns its address."""
    return Child([sys.executable, "-m", "imagegen.emulator", "--port", "0", "--no-image"])


def job_emulator(provider: str, *arguments: str) -> Child:
    """Start the emulator of a provider with jobs; `url_of` returns its address."""
    module = "imagegen.emulator.job_command"
    return Child([sys.executable, "-m", module, provider, "--port", "0", "--image", "tiny", *arguments])


def quick_upstream() -> Child:
    """Start the upstream and receiver of webhooks that costs little; `url_of` returns its address."""
    return Child([sys.executable, "-m", "bench.upstream"])


def url_of(running: Child) -> str:
    return running.line().rpartition(" ")[2]


def calling(url: str) -> dict[str, str]:
    """Return the settings of a service that calls this upstream and fetches no image."""
    return {"TOGETHER_API_KEY": "k", "TOGETHER_API_URL": url, "IMAGE_STORE": "upstream"}


def ask(
    port: int,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> tuple[int, bytes]:
    """Return status and body of one request on a new connection. Raises OSError if no answer comes."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    sent = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, sent, {"Content-Type": "application/json"} | dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def asked(port: int, method: str, path: str, body: object = None, **headers: str) -> dict[str, Any]:
    """Return the JSON of an answer. Raises RuntimeError unless it is a success. headers: `_` becomes `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, answer = ask(port, method, path, body, headers=named)
    if not 200 <= status < 300:
        raise RuntimeError(f"{method} {path}: {status} {answer!r}")
    return dict(json.loads(answer))


def submit(port: int, prompt: str, query: str = "", *, webhook: str | None = None, **headers: str) -> str:
    """Submit a task and return its id."""
    body = {"prompt": prompt} | ({"webhook": {"url": webhook}} if webhook else {})
    return str(asked(port, "POST", f"/api/images/generate{query}", body, **headers)["taskId"])


def difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return the difference by kind, the most frequent first."""
    counts = {kind: count - before.get(kind, 0) for kind, count in after.items()}
    return dict(sorted(((k, c) for k, c in counts.items() if c), key=lambda pair: -pair[1]))


def by_kind(kinds: Mapping[str, int], count: int) -> str:
    """Return the commands of each task as text, with their kinds."""
    shown = ", ".join(f"{kind} {calls / count:.2f}" for kind, calls in kinds.items() if calls / count >= 0.005)
    return f"{sum(kinds.values()) / count:.2f}: {shown}"


def answers(port: int, path: str) -> bool:
    """Return whether this request is answered by 200 now."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def cpu_times_s(pid: int) -> tuple[float, float]:
    """Return a process's processor time in seconds, its own and the system's; 0 if the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks_per_s, int(fields[12]) / ticks_per_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(holds: Callable[[], bool], within_s: float, every_s: float = 0.002) -> None:
    """Raises TimeoutError where it does not hold in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("what the benchmark waited for did not come")
        time.sleep(every_s)
