"""Owns how the pictures of a task are spread over calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from msgspec import Struct

from imagegen.tasks.request import MAX_SEED


class Share(Struct, frozen=True, gc=False):
    """One call's part: the places of its pictures in the task, and the seed to send."""

    indexes: tuple[int, ...]
    seed: int | None


def shares(wanted: int, have: Collection[int], per_call: int, seed: int | None) -> Iterator[Share]:
    """The calls that are still needed. Call k of a task sends `seed` + (images asked for so far)."""
    for first in range(0, wanted, per_call):
        missing = tuple([i for i in range(first, min(first + per_call, wanted)) if i not in have])
        if missing:
            yield Share(missing, _shifted(seed, missing[0]))


def second_shares(
    wanted: int, have: Collection[int], per_call: int, seed: int | None, sent: Collection[int | None] = ()
) -> Iterator[Share]:
    """The calls for what an upstream left out, asked for once more, with seeds that were not sent yet.

    sent: the seeds that brought the pictures there are; some are of an earlier such round that was broken off.
    """
    missing = [i for i in range(wanted) if i not in have]
    used = [(one - seed) % (MAX_SEED + 1) for one in sent if one is not None and seed is not None]
    unused = max((by + per_call for by in used if by >= wanted), default=wanted)
    for first in range(0, len(missing), per_call):
        yield Share(tuple(missing[first : first + per_call]), _shifted(seed, unused + first))


def _shifted(seed: int | None, by: int) -> int | None:
    return None if seed is None else (seed + by) % (MAX_SEED + 1)
