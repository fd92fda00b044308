"""CRC-32 where `isal` has no wheel, with its function for two parts of a text."""

from __future__ import annotations

from zlib import crc32

__all__ = ["crc32", "crc32_combine"]

_ZEROS = bytes(64 * 1024)


def crc32_combine(first: int, second: int, length: int) -> int:
    """Return the CRC of two texts, one behind the other, from those of each; length: bytes of the second."""
    behind, alone = first, 0
    for at in range(0, length, len(_ZEROS)):
        zeros = _ZEROS[: length - at]
        behind, alone = crc32(zeros, behind), crc32(zeros, alone)
    return behind ^ alone ^ second
