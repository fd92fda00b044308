"""Details of a result that an upstream reports with the images: usage, and the parameters that it has used."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

Usage = dict[str, int | dict[str, int]]
"""Counts by name, such as `input_tokens`; a group of counts is one level deep."""


class ReplyDetails(Struct, frozen=True, omit_defaults=True):
    """Details of one reply, or of all replies of a task together. Parsers bound its size.

    usage: the sum over all calls. cost_micro_usd: the upstream's own figure, in millionths of a US dollar.
    The rest is what the first reply reported.
    """

    usage: Usage | None = None
    size: str = ""
    quality: str = ""
    background: str = ""
    output_format: str = ""
    revised_prompt: str = ""
    cost_micro_usd: int | None = None


def add_details(earlier: ReplyDetails | None, later: ReplyDetails | None) -> ReplyDetails | None:
    """Return the details of two replies together."""
    if earlier is None or later is None:
        return earlier or later
    cost = earlier.cost_micro_usd
    if later.cost_micro_usd is not None:
        cost = later.cost_micro_usd + (cost or 0)
    texts = {
        name: getattr(earlier, name) or getattr(later, name)
        for name in ("size", "quality", "background", "output_format", "revised_prompt")
    }
    return replace(earlier, usage=_add_usage(earlier.usage, later.usage), cost_micro_usd=cost, **texts)


def _add_usage(earlier: Usage | None, later: Usage | None) -> Usage | None:
    if not earlier or not later:
        return earlier or later
    total = dict(earlier)
    for name, count in later.items():
        before = total.get(name)
        if isinstance(before, int) and isinstance(count, int):
            total[name] = before + count
        elif isinstance(before, dict) and isinstance(count, dict):
            total[name] = {key: before.get(key, 0) + count.get(key, 0) for key in before | count}
        elif before is None:
            total[name] = count
    return total
