"""The admin token: `ADMIN_TOKEN`, or a file of `DATA_DIR` that is made once and read at every later start."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from loguru import logger

from imagegen.disk_patience import answer_soon
from imagegen.setting_parsers import MIN_SECRET_CHARS

FILE_NAME = "admin.token"
SETTING = "ADMIN_TOKEN"

_MODE = 0o600
_MAX_BYTES = 4096
_TOKEN = re.compile(rf"[!-~]{{{MIN_SECRET_CHARS},}}")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""Errors of a file system without locks."""


@dataclass(frozen=True, slots=True)
class AdminToken:
    """A token, and where the operator finds it.

    place: a setting or a file. fault: why the file could not be used; then no client has the token.
    is_late: whether its disk did not answer, so that the file may still be read.
    """

    secret: str = field(repr=False)
    place: str
    fault: str = ""
    is_late: bool = False

    def log_place(self, base_url: str, *, is_local: bool) -> None:
        """Log where the token is, and the address of the board.

        is_local: only this machine can open the address. Then the link carries the token of a file, which a browser
        sends to no server, since it is after the `#`.
        """
        self._log_place()
        has_link = is_local and not self.fault and self.place != SETTING
        logger.info("The board is at {}/board{}", base_url, f"#token={quote(self.secret, safe='')}" if has_link else "")

    def _log_place(self) -> None:
        if self.fault:
            remedy = "set ADMIN_TOKEN, or repair that file and restart"
            if self.is_late:
                remedy = "they open once it does"
            logger.warning(
                "The admin routes are closed, since {} can't be used ({}): {}", self.place, self.fault, remedy
            )
        else:
            logger.info("The admin token is in {}", self.place)


def load_admin_token(setting: str | None, data_dir: Path) -> AdminToken:
    """Return the token of the setting, else that of the file, which is made if it is missing.

    Instances that share the folder share the token. If the file can't be used, the token is random, for now if its disk
    does not answer.
    """
    if setting:
        return AdminToken(setting, SETTING)
    try:
        return answer_soon(read_admin_token, data_dir)
    except TimeoutError:
        return AdminToken(_new_token(), str(data_dir.absolute() / FILE_NAME), "its disk does not answer", is_late=True)


def read_admin_token(data_dir: Path) -> AdminToken:
    """Return the token of the file as `load_admin_token` does, however long that takes. Blocks."""
    path = data_dir.absolute() / FILE_NAME
    try:
        return AdminToken(_read_or_create(path), str(path))
    except OSError as error:
        fault = error.strerror or type(error).__name__
    except ValueError as error:
        fault = str(error)
    return AdminToken(_new_token(), str(path), fault)


def _new_token() -> str:
    return secrets.token_urlsafe(32)


def _read_or_create(path: Path) -> str:
    """Return the token of the file, which is made if it is missing.

    Raises OSError, or ValueError if the file holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, writable = _open(path)
    try:
        if not writable:
            return _token_in(number) or _refuse("it is empty")
        with _locked(number):
            token = _token_in(number)
            if not token:
                token = _new_token()
                _write(number, token)
            return token
    finally:
        os.close(number)


def _open(path: Path) -> tuple[int, bool]:
    """Return the descriptor of the file, and whether it may be written: a mounted secret is read-only."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, _MODE), True
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise
    return os.open(path, flags | os.O_RDONLY), False


def _refuse(fault: str) -> str:
    raise ValueError(fault)


@contextmanager
def _locked(number: int) -> Iterator[None]:
    """Hold the lock of a file, so that instances that start at once make one token."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    yield  # closing the file unlocks it


def _token_in(number: int) -> str:
    """Return the token of an open file, empty for an empty file. Others lose the right to read it."""
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        with suppress(OSError):  # a read-only mount
            os.fchmod(number, _MODE)
    text = os.pread(number, _MAX_BYTES, 0).decode("ascii", "replace").strip()
    if text and not _TOKEN.fullmatch(text):
        least = f"at least {MIN_SECRET_CHARS} visible ASCII characters"
        raise ValueError(f"it holds something else than {least}; delete it, and the next start makes one")
    return text


def _write(number: int, token: str) -> None:
    """Write the token; leave an empty file if that fails."""
    line = f"{token}\n".encode()
    try:
        if os.pwrite(number, line, 0) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(number)
    except OSError:
        os.ftruncate(number, 0)
        raise
