"""Processes that are forked from one that has already imported the service, in a tenth of the CPU time of a new Python.

    process = ForkedProcess([str(ROOT / "run.py")], cwd=folder, env=environ, stdout=log, stderr=log)
    process = ForkedProcess(["-m", "imagegen.emulator", "--port", "0"], cwd=folder, env=environ, stdout=pipe)
    process = subprocess.Popen(command("-m", "imagegen", "mcp"), cwd=folder, env=environ, stdin=…, stdout=…)

Each is a real process: it can be killed, frozen, and has its own folder, environment and streams. Tests of the start of
Python itself, of imports, and of the memory of a process use `subprocess` with a new Python instead. The sandbox draws
quickly here, but in `service/drawing.py`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NoReturn, Self

from tests import orphans

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(__file__).with_name("forked_command.py")
MODULES = (
    "imagegen.app",
    "imagegen.cli",
    "imagegen.doctor",
    "imagegen.emulator",
    "imagegen.generate_command",
    "imagegen.key_command",
    "imagegen.local_service",
    "imagegen.mcp_command",
    "imagegen.process",
    "imagegen.usage_command",
    "encodings.idna",
)
_MAX_REQUEST_BYTES = 2**18
_LISTEN = b"\0\0\0\0"
"""Message with a listening socket, instead of the size of a request."""

_MAX_FDS = 1024


class ForkedProcess:
    """Process with the interface of `subprocess.Popen` that these tests use.

    arguments: what follows `python` on a command line.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[Any] | int,
        stderr: IO[Any] | int = 2,
        stdin: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        streams = [each if isinstance(each, int) else each.fileno() for each in (stdout, stderr)]
        streams += [] if stdin is None else [stdin]
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}).encode()
        self._channel = _parent().request(request, streams)
        self.pid = int(self._channel.makefile("rb", buffering=0).readline())  # the exit code may follow

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        return self._code_within(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        code = self._code_within(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _code_within(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._channel, selectors.EVENT_READ)
                if not selector.select(timeout_s):
                    return None
            self.returncode = int(self._channel.recv(64))
            self._channel.close()
        return self.returncode


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], within_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does, with files for its output."""
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        process = ForkedProcess(arguments, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(within_s)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def command(*arguments: str) -> list[str]:
    """Return the command line that does the same as `python ARGUMENTS…`, in a forked process.

    For other libraries that start a program. A signal to it reaches the forked process, but SIGKILL does not.
    """
    return [sys.executable, "-I", "-S", str(COMMAND), _parent().address, *arguments]


class PipedProcess(ForkedProcess):
    """Process with pipes of text as its standard input and output, as `subprocess.Popen` makes them."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stderr: IO[Any] | int) -> None:
        self.args = arguments
        theirs, ours = os.pipe()
        reading, writing = os.pipe()
        try:
            super().__init__(arguments, cwd=cwd, env=env, stdin=theirs, stdout=writing, stderr=stderr)
        finally:
            os.close(theirs)
            os.close(writing)
        self.stdin, self.stdout = os.fdopen(ours, "w"), os.fdopen(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()


class _Parent:
    """Process that forks, with this process at the other end of its channel."""

    def __init__(self, channel: socket.socket, wait: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._channel, self._wait = channel, wait
        self._folder: TemporaryDirectory[str] | None = None
        atexit.register(self.close)

    @property
    def address(self) -> str:
        """Path of a socket that takes requests of any process. They have the form of those in the channel."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="forks")
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(f"{self._folder.name}/socket")
                listening.listen(128)
                socket.send_fds(self._channel, [_LISTEN], [listening.fileno()])
        return f"{self._folder.name}/socket"

    def request(self, request: bytes, streams: Sequence[int]) -> socket.socket:
        """Return the channel of the process that is forked."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            message = len(request).to_bytes(4, "big") + request
            sent = socket.send_fds(self._channel, [message], [theirs.fileno(), *streams])
            self._channel.sendall(message[sent:])
        return ours

    def close(self) -> None:
        self._channel.close()
        self._wait()
        if self._folder:
            self._folder.cleanup()


_parents: list[_Parent] = []
_starting = threading.Lock()


def _parent() -> _Parent:
    with _starting:
        if not _parents:
            (channel,), process = start_parents(1)
            _parents.append(_Parent(channel, process.wait))
        return _parents[0]


def start_parents(count: int) -> tuple[list[socket.socket], subprocess.Popen[bytes]]:
    """Start a Python that imports the modules and then forks for the other ends of `count` channels."""
    pairs = [socket.socketpair() for _ in range(count)]
    numbers = [theirs.fileno() for _, theirs in pairs]
    command = [sys.executable, "-m", "tests.forked", *map(str, numbers)]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=numbers, stdin=subprocess.DEVNULL, process_group=0)
    for _, theirs in pairs:
        theirs.close()
    return [ours for ours, _ in pairs], process


def use_parent(channel: socket.socket) -> None:
    """Let the process at the other end of a channel of `start_parents` be the one that forks for this process."""
    _parents[:] = [_Parent(channel, lambda: None)]


def fork_parent() -> None:
    """Let a fork of this process be the one that forks. For a process without threads, with the modules it needs."""
    ours, theirs = socket.socketpair()
    pid = orphans.fork()
    if pid:
        theirs.close()
        _parents[:] = [_Parent(ours, lambda: os.waitpid(pid, 0))]
        return
    ours.close()
    atexit._clear()
    if program := _Forks(theirs).run():
        run_to_exit(program)
    sys.exit()


class _Forks:
    """Loop of the process that forks; `run` returns in each forked process, with what it has to do."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channels: dict[int, socket.socket] = {}
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker)

    def run(self) -> Callable[[], object] | None:
        """Return the program of a forked process, or None at the end of the tests."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._woken:
                        os.read(self._woken, 4096)
                        self._report_ended()
                        continue
                    if key.fileobj is self._channel:
                        start, fds, _, _ = socket.recv_fds(self._channel, 4, 4)
                        if not start:
                            self._kill_all()
                            return None
                        if start == _LISTEN:
                            selector.register(socket.socket(fileno=fds[0]), selectors.EVENT_READ)
                            continue
                        request = _read_request(self._channel, start)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        connection, _ = key.fileobj.accept()
                        start, streams, _, _ = socket.recv_fds(connection, 4, 3)
                        request, fds = _read_request(connection, start), [connection.detach(), *streams]
                    if not self._fork(fds):
                        return prepared(request)

    def _fork(self, fds: Sequence[int]) -> int:
        channel, *streams = fds
        pid = orphans.fork()
        if pid:
            self._channels[pid] = socket.socket(fileno=channel)
            self._channels[pid].sendall(b"%d\n" % pid)
            for stream in streams:
                os.close(stream)
        else:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for ended_by in (signal.SIGCHLD, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(ended_by, signal.SIG_DFL)  # nohup, or a shell's `&`, lets the tests ignore them
            for number, stream in zip((1, 2, 0), streams, strict=False):
                os.dup2(stream, number)
            os.closerange(3, _MAX_FDS)
        return pid

    def _kill_all(self) -> None:
        for pid in self._channels:
            os.kill(pid, signal.SIGKILL)

    def _report_ended(self) -> None:
        while self._channels:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if channel := self._channels.pop(pid, None):  # otherwise it forked for another channel
                with channel, suppress(OSError):
                    channel.sendall(b"%d" % os.waitstatus_to_exitcode(status))


def _read_request(channel: socket.socket, start: bytes) -> Mapping[str, Any]:
    size = int.from_bytes(start, "big")
    assert size <= _MAX_REQUEST_BYTES
    request: Mapping[str, Any] = json.loads(channel.recv(size, socket.MSG_WAITALL))
    return request


def prepared(request: Mapping[str, Any]) -> Callable[[], object]:
    """Enter the folder and environment of a request; return its program."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = request["cwd"]
        return lambda: runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    return lambda: runpy.run_path(arguments[0], run_name="__main__")


def run_to_exit(program: Callable[[], object]) -> NoReturn:
    """Run a program and end as Python does, but without the teardown of all modules: it takes 60 ms, a start 100."""
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # private
    atexit._run_exitfuncs()
    gc.collect()  # reports what was never awaited or retrieved
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 120
    os._exit(code)


def _fill_caches() -> None:
    """Compile the patterns of all routes, and what else a service computes at its start, a fifth of its CPU time."""
    app, settings, loguru = map(importlib.import_module, ("imagegen.app", "imagegen.settings", "loguru"))
    with TemporaryDirectory() as folder:
        app.create_app(settings.Settings.load({"DATA_DIR": folder}, None))
    loguru.logger.remove(loguru.logger.add(sys.stderr))  # it reads the library paths of a sink; the log stays as it is


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("imagegen.redis_client.server_binary").find_binary()  # asked once for its version
    importlib.import_module("tests.quick_drawing").install()
    importlib.import_module("tests.support").cache_library_paths()
    _fill_caches()
    gc.collect()
    gc.freeze()
    first, *others = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    parents: list[int] = []
    channel = first
    for each in others:
        if pid := orphans.fork():
            parents.append(pid)
        else:
            parents, channel = [], each
            break
    if program := _Forks(channel).run():
        run_to_exit(program)
    for pid in parents:  # they would die with this process
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    main()
