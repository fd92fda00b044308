"""Embedded Redis: a real server child on a unix socket, with a data folder for each kind of server."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from loguru import logger
from msgspec import Struct

from imagegen.backoff import Backoff
from imagegen.disk_patience import until_answered
from imagegen.errors import SettingsError
from imagegen.redis_client.aof_repair import ensure_manifest, repair
from imagegen.redis_client.folder_lock import FolderLock, is_owner_gone, try_lock
from imagegen.redis_client.server_binary import ServerBinary, find_binary

_SILENT_S = 10.0
"""Seconds of silence after which a server has failed; a server that reports that it is loading may take longer."""

_POLL_S = 0.003
_LOCK_POLL_S = 0.02
_STOP_S, _FROZEN_STOP_S = 10.0, 1.0
"""How long a server may take to end; the second if it does not answer, since it may be frozen.

What it has answered is with the system by then, unless its disk stalls: then the writes of the last two seconds may not
be, https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/#how-durable-is-the-append-only-file.
"""

_ENDING_S = 2.0
"""A server answers for a moment after its parent was killed: it looks at signals ten times a second."""

_MAX_LOG_BYTES = 1024**2

_FOLDER_LOOK_S = 2.0
"""Interval of checks of the data folder: two system calls."""

_STEADY_S = 1.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 1.5
"""Between two starts of a server that dies again within _STEADY_S; the pause doubles each time."""

_DEATH_LOG_S = 60.0

_MAX_SOCKET_BYTES = 100
"""Of a socket's path; the system takes 108 on Linux, 104 on macOS."""

_SHORT_TEMPORARY = "/tmp"  # noqa: S108 - the folder in it must be this user's alone
_NO_SOCKETS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO}
"""Errors of file systems for a socket; the last is that of exfat-fuse."""

_FREE_SPACE, _GIVE_RIGHTS = "Free some space", "Make all of it readable and writable for this user"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: _GIVE_RIGHTS,
    errno.EPERM: _GIVE_RIGHTS,
    errno.EROFS: _GIVE_RIGHTS,
}

_PONG = b"+PONG\r\n"
_PR_SET_PDEATHSIG = 1


class _DataFolder(Struct, frozen=True):
    """Data folder of one engine and major version, as one often can't read another's files."""

    folder: Path
    socket: Path

    @classmethod
    def make(cls, data_dir: Path, binary: ServerBinary) -> _DataFolder:
        folder = Path(data_dir).absolute() / f"{binary.engine}-{binary.version[0]}"
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = folder.resolve()
            return cls(folder, _socket_path(folder))

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def marks(self) -> tuple[int, ...]:
        """Return marks that differ if the folders of the data are replaced or emptied; none for missing folders.

        Single files are not included: the server replaces them while it runs. Raises OSError.
        """
        marks: list[int | bool] = []
        for folder in (self.folder, self.folder / "appendonlydir"):
            try:
                status = folder.stat()
                marks += [status.st_dev, status.st_ino, any(folder.iterdir())]
            except (FileNotFoundError, NotADirectoryError):
                continue
        return tuple(marks)

    def warn_of_other_data(self) -> None:
        """Warn at the first start after a change of the server program: the tasks of the old one are not read."""
        if (self.folder / "appendonlydir").exists():
            return
        for other in self.folder.parent.glob("*-*/appendonlydir"):
            logger.warning("{} was written by another Redis server and is not read by this one", other.parent)


class EmbeddedRedis:
    """One server for all processes with the same `data_dir`: the holder of the lock runs it, the others attach to it.

    It is a child that dies with its parent; its data stays. Start it from the main thread: on Linux it dies with the
    *thread* that started it. `binary`: as in REDIS_SERVER.
    """

    def __init__(self, data_dir: Path, binary: str | None = None) -> None:
        self._data_dir = data_dir
        self._named = binary
        self._lock: FolderLock | None = None
        self._is_up = False
        self._child: subprocess.Popen[bytes] | None = None
        self._marks: tuple[int, ...] = ()
        self._logged_gone = False
        self._deaths = 0
        self._quiet_until = 0.0

    @property
    def url(self) -> str:
        """URL for redis-py, set by `start`, and the same for all processes."""
        return f"unix://{quote(str(self._home.socket))}"

    @property
    def pid(self) -> int | None:
        """Process id of the server; None if another process runs it."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Start the server, or attach to it, and wait until it answers. Raises SettingsError with a remedy."""
        self._binary = find_binary(self._named)
        self._home = await until_answered(_DataFolder.make, self._data_dir, self._binary)
        with _usable(self._home.folder):
            self._home.warn_of_other_data()
        try:
            await self._ensure_running()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server if this process runs it; all data is written then. End `watch` before."""
        child, self._child = self._child, None
        lock, self._lock = self._lock, None
        try:
            if child is not None:
                await _end(child, _STOP_S if await _ping(self._home.socket) else _FROZEN_STOP_S)
        finally:
            for descriptor in lock or ():
                os.close(descriptor)

    async def watch(self) -> None:
        """Start the server again whenever it dies, also one of another process that is gone. Never returns."""
        backoff, last_error = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S), ""
        while True:
            connected_at = time.monotonic()
            await _until_disconnected(self._home.socket)
            if time.monotonic() - connected_at > _STEADY_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())
            try:
                await self._ensure_running()
                last_error = ""
            except SettingsError as error:
                if str(error) != last_error:
                    logger.error("The embedded Redis does not come back: {}", error)
                last_error = str(error)

    async def _ensure_running(self) -> None:
        """Start the server unless it runs. May be called at any time. Raises SettingsError."""
        with _usable(self._home.folder):
            _ = _socket_path(self._home.folder)  # its folder may have been deleted, and made again by another user
            if self._lock is None:
                self._lock = await self._lock_or_attach()
            if self._lock is None:
                self._marks = self._home.marks()
                return
            if self._child is None or self._child.poll() is not None:
                if self._child is not None:
                    self._log_death(self._child.returncode)
                await self._run(self._lock)

    def _log_death(self, code: int) -> None:
        """Log it at most once in _DEATH_LOG_S: what ends a server, often ends the next one as well."""
        self._deaths += 1
        if time.monotonic() >= self._quiet_until:
            again = f", the {self._deaths}th time since the last such line" if self._deaths > 1 else ""
            logger.warning("The embedded Redis died with code {}{}; it is started again", code, again)
            self._deaths, self._quiet_until = 0, time.monotonic() + _DEATH_LOG_S

    async def _lock_or_attach(self) -> FolderLock | None:
        """Return the lock; None as soon as the server of its holder answers.

        A server that outlives its owner is about to end, so it is not used at once.
        """
        began_at = replied_at = time.monotonic()
        while (lock := try_lock(self._home.folder)) is None:
            reply = await _ping(self._home.socket)
            if reply == _PONG and (not is_owner_gone(self._home.folder) or time.monotonic() - began_at > _ENDING_S):
                return None
            if reply:
                replied_at = time.monotonic()
            if time.monotonic() - replied_at > _SILENT_S:
                raise SettingsError(
                    f"DATA_DIR: another process holds {self._home.folder}, but its Redis does not answer. "
                    "End that process, or set another DATA_DIR, or set REDIS_URL"
                )
            await asyncio.sleep(_LOCK_POLL_S)
        return lock

    async def _run(self, lock: FolderLock) -> None:
        """Start the child and wait until it answers; repair its append-only file once if that is damaged."""
        try:
            await self._start_child(lock)
        except SettingsError:
            with _usable(self._home.folder):
                repaired = repair(self._home.folder)
            if repaired is None:
                raise
            logger.warning(
                "The embedded Redis could not read the end of its data, as a power cut leaves it: {} of {} bytes were "
                "cut, after the last whole command; the file as it was is kept as {}",
                repaired.cut_bytes,
                repaired.size_bytes,
                repaired.backup,
            )
            await self._start_child(lock)
        self._marks = self._home.marks()
        self._logged_gone = False

    async def _start_child(self, lock: FolderLock) -> None:
        home, began_at, self._is_up = self._home, time.monotonic(), False
        with _usable(home.folder):
            ensure_manifest(home.folder)
            home.socket.unlink(missing_ok=True)
            if home.log.exists() and home.log.stat().st_size > _MAX_LOG_BYTES:
                os.truncate(home.log, 0)
            log_start = home.log.stat().st_size if home.log.exists() else 0
            child = self._child = _spawn(self._binary, home, lock)
        replied_at = time.monotonic()
        while (reply := await _ping(home.socket)) != _PONG:
            if reply:
                replied_at = time.monotonic()
            silent = time.monotonic() - replied_at > _SILENT_S
            if silent:
                child.kill()
                child.wait()
            if child.poll() is not None:
                self._child = None
                raise SettingsError(_failure(self._binary, home, child.returncode, log_start))
            await asyncio.sleep(_POLL_S)
        self._is_up = True
        took_ms = (time.monotonic() - began_at) * 1000
        if not self._deaths:
            logger.info("The embedded Redis runs: {} in {}, started in {:.0f} ms", self._binary, home.folder, took_ms)

    @property
    def intact(self) -> bool:
        """Whether the server still writes to this data folder; otherwise its data is lost."""
        try:
            gone = bool(self._marks) and self._home.marks() != self._marks
        except OSError:  # for example no free file descriptor
            return not self._logged_gone
        if gone and not self._logged_gone:
            logger.error(
                "DATA_DIR: {} was deleted or replaced under the running Redis: what it takes now is lost with the "
                "process. Put the folder back, or restart the service",
                self._home.folder,
            )
        if self._logged_gone and not gone:
            logger.info("DATA_DIR: {} is back", self._home.folder)
        self._logged_gone = gone
        return not gone

    async def watch_folder(self) -> None:
        """Check now and then whether the data folder is there, so that its loss is logged in time. Never returns.

        A socket that is gone alone (a cleaner of temporary files) is made again by a new start of the server.
        """
        while True:
            await asyncio.sleep(_FOLDER_LOOK_S)
            if self.intact:
                self._renew_socket()

    def _renew_socket(self) -> None:
        """Let the server start again if it runs here and its socket is gone, since it can't make another one."""
        if self._child is not None and self._is_up and _is_missing(self._home.socket):
            logger.warning("{} was deleted; the embedded Redis is started again", self._home.socket)
            self._is_up = False
            self._child.terminate()


def _spawn(binary: ServerBinary, home: _DataFolder, lock: FolderLock) -> subprocess.Popen[bytes]:
    """Start the child. It holds the lock too: if it outlives its parent, no second server starts on its files."""
    arguments = [binary.path, "--port", "0", "--unixsocket", str(home.socket), "--unixsocketperm", "700"]
    arguments += ["--dir", str(home.folder), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    arguments += ["--maxmemory-policy", "noeviction", "--daemonize", "no"]
    with home.log.open("ab") as log, warnings.catch_warnings():
        # Python 3.12 warns of any fork of a process with threads; this child makes one system call before its exec.
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(  # noqa: S603 - the operator names the program
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C must not reach it before the service has drained
            pass_fds=lock,
            preexec_fn=_die_with_parent(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
        )


def _die_with_parent(parent: int) -> Callable[[], None]:
    """Return the child's first step: the kernel shall end it with its parent, kill -9 included. Linux only."""
    prctl = ctypes.CDLL(None).prctl

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return die_with_parent


async def _end(child: subprocess.Popen[bytes], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    try:
        child.terminate()
        while child.poll() is None:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _failure(binary: ServerBinary, home: _DataFolder, code: int, log_start: int) -> str:
    with home.log.open("rb") as log:
        log.seek(log_start)
        last_lines = log.read().decode(errors="replace").strip().splitlines()[-5:]
    fault = f"DATA_DIR: the embedded Redis ({binary.path}) can't work in {home.folder}, it ended with code {code}"
    advice = "Repair the cause, or move that folder away to begin with nothing, or set REDIS_URL. It reports"
    return "\n    ".join([f"{fault}. {advice}:", *last_lines])


def _socket_path(folder: Path) -> Path:
    """Return a path in the folder; in a private folder of the temporary one if that is too long or takes no sockets."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_BYTES and (path.is_socket() or _takes_sockets(folder)):
        return path
    name = f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"
    private = Path(tempfile.gettempdir(), f"imagegen-{os.getuid()}")
    if len(os.fsencode(private / name)) > _MAX_SOCKET_BYTES:
        private = Path(_SHORT_TEMPORARY, private.name)
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        why = f"{folder} is too long, or takes no sockets, and {private} is not yours alone"
        raise SettingsError(f"DATA_DIR: {why}. Set a shorter DATA_DIR, on another disk")
    return private / name


def _takes_sockets(folder: Path) -> bool:
    """Return whether the file system has sockets; FAT, exFAT, SMB and some of FUSE have none. Raises OSError."""
    probe = folder / f".{secrets.token_hex(2)}"
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.fsencode(probe))
    except OSError as error:
        if error.errno in _NO_SOCKETS:
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)
    return True


def _is_missing(path: Path) -> bool:
    """Return whether there is certainly no file of this name."""
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Remove the cause")
        advice = f"{remedy}, or set another DATA_DIR, or set REDIS_URL"
        raise SettingsError(
            f"DATA_DIR: {error.filename or folder} can't be used ({error.strerror}). {advice}"
        ) from error


@asynccontextmanager
async def _connected(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):  # it would take the place of a cancellation
            await writer.wait_closed()


async def _ping(socket: Path) -> bytes:
    """Return the server's reply, nothing if it does not answer."""
    try:
        async with asyncio.timeout(1.0), _connected(socket) as (reader, writer):
            writer.write(b"PING\r\n")
            return await reader.read(64)
    except (OSError, TimeoutError):
        return b""


async def _until_disconnected(socket: Path) -> None:
    """Wait until the server ends, over an idle connection, which costs nothing."""
    try:
        async with _connected(socket) as (reader, _):
            while await reader.read(1024):
                pass
    except OSError:
        return
