"""Index in memory of the files or objects of an image store: the oldest, and their total bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import islice

from msgspec import Struct

EXPIRED_AT_ONCE = 20
"""Expired files are removed by this many, so that few saves are delayed; the sweep removes the rest."""


class IndexEntry(Struct, frozen=True, gc=False):
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
        self._changed: set[str] | None = None

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
        if self._changed is not None:
            self._changed.add(name)
        if entry := self._entries.pop(name, None):
            self._total_bytes -= entry.size_bytes

    def share(self, name: str) -> None:
        """Count the bytes of a file under another name, which a later task gave it. Its place stays."""
        if entry := self._entries.get(name):
            if self._changed is not None:
                self._changed.add(name)
            self._entries[name] = IndexEntry(0, entry.expires_at_s)
            self._total_bytes -= entry.size_bytes

    def snapshot(self) -> dict[str, IndexEntry]:
        """Return the files for a sweep, the oldest first, and record from now on which of them change."""
        self._changed = set(self._writing)
        return dict(self._entries)

    def replace(self, entries: dict[str, IndexEntry]) -> Collection[str]:
        """Take over the files that a sweep found, the oldest first. Return those that changed since the snapshot.

        These stay as they are now, and are the newest.
        """
        changed = self._changed or set()
        for name in changed:
            entries.pop(name, None)
            if (entry := self._entries.get(name)) is not None:
                entries[name] = entry
        self._entries, self._changed = entries, None
        self._total_bytes = sum([entry.size_bytes for entry in entries.values()])
        return changed

    def add_unwritten(self, name: str, size_bytes: int, expires_at_s: float) -> None:
        """Add a file that is not removed before `written`."""
        self.add(name, size_bytes, expires_at_s)
        self._writing.add(name)

    def written(self, name: str) -> None:
        """Record the end of writing a file, whether it succeeded or not."""
        self._writing.discard(name)

    def newest(self, count: int) -> list[str]:
        """Return up to `count` files that were written last."""
        return [name for name in islice(reversed(self._entries), count) if name not in self._writing]

    @property
    def is_over_cap(self) -> bool:
        """Return whether there are too many bytes, and not by a single file alone."""
        return self._total_bytes > self._max_bytes and len(self._entries) > 1

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


def oldest_first(entries: Mapping[str, IndexEntry], order: Mapping[str, int]) -> dict[str, IndexEntry]:
    """Sort files by expiry; those with the same one keep the order of `order`.

    It is called in threads. One sort of all files would stop the event loop, since it keeps the interpreter's lock.
    """
    by_minute: dict[int, list[str]] = {}
    for name, entry in entries.items():
        by_minute.setdefault(int(entry.expires_at_s // 60), []).append(name)
    names: list[str] = []
    for minute in sorted(by_minute):
        names += sorted(by_minute[minute], key=lambda name: (entries[name].expires_at_s, order.get(name, -1)))
    return {name: entries[name] for name in names}
