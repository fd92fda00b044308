"""Plan of the calls that generate the images of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

from msgspec import Struct
from msgspec.structs import replace

from imagegen.tasks.request import MAX_SEED, GenerationRequest

MAX_VARIANT_SEED = 2**31 - 1 - 1_024
"""Most services take a positive 32-bit integer with a sign, and some take 0 for a random one; the rest of the range is
for the images of one task."""


MAX_INLINE_PIXELS = 12 * 2**20
"""Of the images in one response together: as PNG in base64, four bytes a pixel at most, they fill one of 48 MiB, and
more of a response is not read."""


class PlannedCall(Struct, frozen=True, gc=False):
    """One call's part: the places of its images in the task, and the seed to send."""

    indexes: tuple[int, ...]
    seed: int | None


def most_inline(pixels: int) -> int:
    """Return how many images of a size one call may request if its response holds them, and not links."""
    return max(MAX_INLINE_PIXELS // max(pixels, 1), 1)


def plan_calls(wanted: int, have: Collection[int], per_call: int, seed: int | None) -> Iterator[PlannedCall]:
    """Return the calls that are still needed. Call k of a task sends `seed` + (images requested so far)."""
    for first in range(0, wanted, per_call):
        missing = tuple([i for i in range(first, min(first + per_call, wanted)) if i not in have])
        if missing:
            yield PlannedCall(missing, _offset_seed(seed, missing[0]))


def plan_missing_calls(
    wanted: int, have: Collection[int], per_call: int, seed: int | None, sent: Collection[int | None] = ()
) -> Iterator[PlannedCall]:
    """Return the calls that request missing images once more, with seeds that were not sent yet.

    sent: the seeds of the images that are there; some are of an earlier such round that was broken off.
    """
    missing = [i for i in range(wanted) if i not in have]
    used = [(other - seed) % (MAX_SEED + 1) for other in sent if other is not None and seed is not None]
    unused = max((by + per_call for by in used if by >= wanted), default=wanted)
    for first in range(0, len(missing), per_call):
        yield PlannedCall(tuple(missing[first : first + per_call]), _offset_seed(seed, unused + first))


def variant_seed(request: GenerationRequest, provider: str) -> int:
    """Return the seed of the first image of a variant, from 1 to MAX_VARIANT_SEED: the same for every `n`.

    request: the part of it that decides the task's id, see Provider.sent_request.
    """
    digest = hashlib.sha256(replace(request, n=1).canonical(provider, None)).digest()
    return 1 + int.from_bytes(digest[:8]) % MAX_VARIANT_SEED


def _offset_seed(seed: int | None, by: int) -> int | None:
    return None if seed is None else (seed + by) % (MAX_SEED + 1)
