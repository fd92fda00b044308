"""Did-you-mean search: the valid name nearest to an unknown one, at a bounded cost."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

MAX_NAME_CHARS = 40
"""No valid name is so long that a longer text could be near to it."""

_ALIKE = 0.75


def nearest(name: str, valid_names: Iterable[str], alike: float = _ALIKE) -> str | None:
    """Return the valid name that `name` most likely misspells, None without a near one.

    alike: from 0 to 1, how much of both must be the same.
    """
    if len(name) > MAX_NAME_CHARS:
        return None
    own, names = _letters(name), _by_letters(tuple(valid_names))
    if own in names:
        return names[own]
    few = [letters for letters in names if _shares_letters(own, letters)]
    close = difflib.get_close_matches(own, few, n=1, cutoff=alike) if few else ()
    return names[close[0]] if close else None


@lru_cache(maxsize=16)
def _by_letters(names: tuple[str, ...]) -> dict[str, str]:
    return {_letters(name): name for name in names}


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _shares_letters(name: str, other: str) -> bool:
    """Filter before difflib, which takes 10 microseconds a pair."""
    letters, other_letters = set(name), set(other)
    return len(letters & other_letters) >= _ALIKE * max(len(letters), len(other_letters))
