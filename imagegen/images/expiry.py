"""Index of when the images of a task expire: one text file next to the image folder, shared by all its processes.

A line is `<task id> <Unix seconds>`, the last line of a task counts. Lines are appended; at times it is rewritten.
A line that is lost is no harm: a task without one lives at least as long as a new one.
"""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path

STEP_S = 60
"""Times are rounded up to it, so that the images of one task share a line."""

COMPACT_BYTES = 256 * 1024
"""A smaller file is not rewritten."""

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class ExpiryIndex:
    """Index in one file. All methods block, and may be called from several threads. Failing writes are ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._expiry_by_name: dict[str, int] = {}
        self._unwritten: list[str] = []
        self._offset = 0
        self._inode = 0
        self._lock = threading.Lock()

    def note(self, task_id: str, expires_at_s: float) -> None:
        """Record when the images of a task expire. `flush` writes it to the file."""
        rounded = -int(-expires_at_s // STEP_S) * STEP_S
        with self._lock:
            if self._expiry_by_name.get(task_id) != rounded:
                self._expiry_by_name[task_id] = rounded
                self._unwritten.append(f"{task_id} {rounded}\n")

    def flush(self) -> None:
        """Append the records since the last call. The file is not kept open: the disk can be remounted."""
        with self._lock:
            lines, self._unwritten = "".join(self._unwritten), []
            if lines:
                with suppress(OSError):
                    file = os.open(self._path, _APPEND, 0o666)
                    try:
                        os.write(file, lines.encode())
                    finally:
                        os.close(file)

    def expiry_of(self, task_id: str) -> float | None:
        """Return when the images of a task expire, None if no line has it."""
        return self._expiry_by_name.get(task_id)

    def later_than(self, task_id: str, expires_at_s: float) -> float | None:
        """Return when the images of a task expire, if that is later than this time, as noted by another process."""
        noted_s = self._expiry_by_name.get(task_id)
        return noted_s if noted_s is not None and noted_s >= expires_at_s + STEP_S else None

    def refresh(self) -> None:
        """Read the lines that were added since the last call, by other processes too. Raises OSError."""
        with self._lock, suppress(FileNotFoundError), self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode or os.fstat(file.fileno()).st_size < self._offset:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            lines = file.read()
            whole = lines.rfind(b"\n") + 1
            self._offset += whole
            for line in lines[:whole].splitlines():
                self._take(line)

    def forget_expired(self, now: float, keep: set[str]) -> None:
        """Drop expired tasks but those of `keep`, and rewrite the file if most of its lines are out of date."""
        with self._lock:
            self._expiry_by_name = {
                task: end_s for task, end_s in self._expiry_by_name.items() if end_s > now or task in keep
            }
            needed_bytes = sum(len(task_id) + 12 for task_id in self._expiry_by_name)
            if self._offset < max(COMPACT_BYTES, 2 * needed_bytes):
                return
            lines = "".join(f"{task_id} {expires_at_s}\n" for task_id, expires_at_s in self._expiry_by_name.items())
            part = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
            try:
                part.write_text(lines, encoding="ascii")
                part.replace(self._path)
            except OSError:
                with suppress(OSError):
                    part.unlink()

    def _take(self, line: bytes) -> None:
        """Read one line; skip a torn one, as a crash may leave it."""
        task_id, _, expires_at_s = line.decode("ascii", "replace").partition(" ")
        if expires_at_s.isascii() and expires_at_s.isdigit() and len(expires_at_s) < 12:
            self._expiry_by_name[task_id] = int(expires_at_s)
