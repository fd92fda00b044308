"""Memory of which image files were checked, and the bytes of small ones that were read last."""

from __future__ import annotations

from dataclasses import dataclass

from imagegen.images.files import Signature

MAX_FILES = 10_000
MAX_DATA_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Checked:
    sha256: str
    signature: Signature
    data: bytes | None


class CheckedFiles:
    """Signatures of files whose content was hashed; bounded, the least recently used go first."""

    def __init__(self, *, max_files: int = MAX_FILES, max_data_bytes: int = MAX_DATA_BYTES) -> None:
        self._max_files = max_files
        self._max_data_bytes = max_data_bytes
        self._files: dict[str, _Checked] = {}
        self._with_data: dict[str, int] = {}
        self._data_bytes = 0

    def signature(self, name: str, sha256: str) -> Signature | None:
        """Return the file's signature when its content had this hash."""
        checked = self._files.get(name)
        return checked.signature if checked is not None and checked.sha256 == sha256 else None

    def data(self, name: str, sha256: str) -> bytes | None:
        """Return the file's bytes, if they are kept."""
        size_bytes = self._with_data.pop(name, None)
        if size_bytes is None:
            return None
        self._with_data[name] = size_bytes
        checked = self._files[name]
        return checked.data if checked.sha256 == sha256 else None

    def add(self, name: str, sha256: str, signature: Signature, data: bytes | None) -> None:
        """Record a file whose content was hashed, and keep its bytes if they are given."""
        self.forget(name)
        if len(self._files) >= self._max_files:
            self.forget(next(iter(self._files)))
        self._files[name] = _Checked(sha256, signature, data)
        if data is not None:
            self._with_data[name] = len(data)
            self._data_bytes += len(data)
        while self._data_bytes > self._max_data_bytes:
            oldest = next(iter(self._with_data))
            checked = self._files[oldest]
            self._data_bytes -= self._with_data.pop(oldest)
            self._files[oldest] = _Checked(checked.sha256, checked.signature, None)

    def forget(self, name: str) -> None:
        """Drop a file."""
        self._files.pop(name, None)
        self._data_bytes -= self._with_data.pop(name, 0)
