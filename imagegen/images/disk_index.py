"""Index in memory of the files or objects of an image store: the oldest, and their total bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from imagegen.images.files import FoundFile

EXPIRED_AT_ONCE = 20
"""Expired files are removed by this many, so that few saves are delayed; the sweep removes the rest."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One file."""

    size_bytes: int
    expires_at_s: float


class DiskIndex:
    """Files or objects by name, the oldest first. It does not touch them itself.

    max_bytes: of all files together; the newest one always stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[str, IndexEntry] = {}
        self._total_bytes = 0
        self._writing: set[str] = set()

    def get(self, name: str) -> IndexEntry | None:
        """Return the entry of a file."""
        return self._entries.get(name)

    def add(self, name: str, size_bytes: int, expires_at_s: float) -> None:
        """Add a file as the newest one, or again."""
        self.forget(name)
        self._entries[name] = IndexEntry(size_bytes, expires_at_s)
        self._total_bytes += size_bytes

    def forget(self, name: str) -> None:
        """Drop a file."""
        if entry := self._entries.pop(name, None):
            self._total_bytes -= entry.size_bytes

    def share(self, name: str) -> None:
        """Count the bytes of a file under another name, which a later task gave it. Its place stays."""
        if entry := self._entries.get(name):
            self._entries[name] = IndexEntry(0, entry.expires_at_s)
            self._total_bytes -= entry.size_bytes

    def settled(self) -> set[str]:
        """Return the files that are not being written."""
        return self._entries.keys() - self._writing

    @contextmanager
    def writing(self, name: str, size_bytes: int, expires_at_s: float) -> Iterator[None]:
        """Add a file that is not removed while it is written."""
        self.add(name, size_bytes, expires_at_s)
        self._writing.add(name)
        try:
            yield
        finally:
            self._writing.discard(name)

    def place(self, order: dict[str, int]) -> None:
        """Sort by expiry; files with the same one keep the order of `order`."""
        oldest_first = sorted(self._entries.items(), key=lambda item: (item[1].expires_at_s, order.get(item[0], -1)))
        self._entries = dict(oldest_first)

    @property
    def is_over_cap(self) -> bool:
        """Return whether there are too many bytes, and not by a single file alone."""
        return self._total_bytes > self._max_bytes and len(self._entries) > 1

    def order(self) -> dict[str, int]:
        """Return the place of each file, the argument of `place`."""
        return {name: number for number, name in enumerate(self._entries)}

    def take_expired(self, now: float, *, batch: int | None = None) -> dict[str, IndexEntry]:
        """Take the expired files off the old end: all, or exactly `batch` of them or none."""
        expired: dict[str, IndexEntry] = {}
        for name, entry in self._entries.items():
            if entry.expires_at_s > now or name in self._writing or len(expired) == batch:
                break
            expired[name] = entry
        if batch is not None and len(expired) < batch:
            return {}
        for name in expired:
            self.forget(name)
        return expired

    def over_cap(self, is_needed: Callable[[str], bool]) -> list[str]:
        """Return the oldest files that have to go so that the rest fits; needed files and those being written stay."""
        oldest, newest = list[str](), next(reversed(self._entries), None)
        excess_bytes = self._total_bytes - self._max_bytes
        for name, entry in self._entries.items():
            if excess_bytes <= 0 or name == newest:
                break
            if name not in self._writing and not is_needed(name):
                oldest.append(name)
                excess_bytes -= entry.size_bytes
        return oldest


def shared_names(
    found_files: Mapping[str, FoundFile], expiries: Mapping[str, float], order: Mapping[str, int]
) -> set[str]:
    """Return the names of files that have another name which is removed later: their bytes count there."""
    linked = [name for name in expiries if found_files[name].links > 1]
    linked.sort(key=lambda name: (expiries[name], order.get(name, -1)))
    last = {found_files[name].inode: name for name in linked}
    return set(linked) - set(last.values())
