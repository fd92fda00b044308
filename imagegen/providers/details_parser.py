"""Parser of what an upstream reports with the images: usage, cost, and the parameters that it has used. No I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

from imagegen.tasks.cost import MICRO_USD
from imagegen.tasks.reply_details import ReplyDetails, Usage

MAX_TEXT_CHARS = 40
MAX_PROMPT_CHARS = 1_000
MAX_COUNTS = 16
MAX_COUNT = 2**53
MAX_COST_USD = 10_000.0

_REPORTED = frozenset({"usage", "cost", "size", "quality", "background", "output_format"})


def parse_details(fields: Mapping[str, object]) -> ReplyDetails | None:
    """Return the details of a response's fields; None if it has none."""
    revised_prompt = _revised_prompt(fields.get("data"))
    if not revised_prompt and _REPORTED.isdisjoint(fields):
        return None
    usage = fields.get("usage")
    counts = _usage(usage) if isinstance(usage, dict) else None
    cost = fields.get("cost")
    if cost is None and isinstance(usage, dict):
        cost = usage.get("cost")  # https://openrouter.ai/docs/use-cases/usage-accounting
    details = ReplyDetails(
        usage=counts or None,
        size=_text(fields.get("size")),
        quality=_text(fields.get("quality")),
        background=_text(fields.get("background")),
        output_format=_text(fields.get("output_format")),
        revised_prompt=revised_prompt,
        cost_micro_usd=_micro_usd(cost),
    )
    return None if details == ReplyDetails() else details


def _usage(usage: Mapping[str, object]) -> Usage:
    counts: Usage = {}
    for name, value in list(usage.items())[:MAX_COUNTS]:
        if len(name) > MAX_TEXT_CHARS:
            continue
        if _is_count(value):
            counts[name] = value
        elif isinstance(value, dict):
            entries = list(value.items())[:MAX_COUNTS]
            if group := {key: count for key, count in entries if _is_count(count) and len(key) <= MAX_TEXT_CHARS}:
                counts[name] = group
    return counts


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _text(value: object) -> str:
    fits = isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and value.isprintable()
    return str(value) if fits else ""


def _revised_prompt(data: object) -> str:
    first = data[0] if isinstance(data, list) and data else None
    prompt = first.get("revised_prompt") if isinstance(first, dict) else None
    return prompt[:MAX_PROMPT_CHARS] if isinstance(prompt, str) else ""


def _micro_usd(value: object) -> int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return round(value * MICRO_USD) if math.isfinite(value) and 0 <= value <= MAX_COST_USD else None
