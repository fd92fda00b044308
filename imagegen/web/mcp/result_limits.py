"""Limit of a result's size, however long the texts of providers, clients and settings in it are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

MAX_RESULT_CHARS = 7_400
"""Of a result as JSON, without the bytes of `detail: full`: under 2,000 tokens of four characters, with spaces too."""

LINK_WEIGHT = 4 / 2.5
"""Characters that a character of a link counts for: hashes and signatures have about 2.5 characters a token."""

_LINK = re.compile(rb'https?://[^"\\\s]+')

_LENGTHS = (300, 150, 60, 20)
"""Characters to which texts are cut, one after the other, until the result fits."""

_TEXT_BLOCK = 8
"""How many times longer the text for the model may be than one text of the structured result."""

_KEPT = frozenset({"urls", "taskId", "status", "code", "next", "id", "model"})
"""Fields that are of no use in part."""

_MAX_ITEMS = 10
"""Items of other lists once texts have to be cut."""

Blocks = Sequence[Mapping[str, Any]]


def size_of(content: Blocks, structured: Mapping[str, Any]) -> int:
    """Return the length of a result as JSON; links count for more."""
    text = orjson.dumps({"content": list(content), "structuredContent": structured, "isError": False})
    return len(text) + math.ceil(sum(map(len, _LINK.findall(text))) * (LINK_WEIGHT - 1))


def fit(content: Blocks, structured: Mapping[str, Any]) -> tuple[Blocks, Mapping[str, Any]]:
    """Return a result within `MAX_RESULT_CHARS`: without links that `urls` has too, and with shorter texts."""
    blocks = list(content)
    if size_of(blocks, structured) > MAX_RESULT_CHARS:  # the name of a link has its type too
        blocks = [{name: block[name] for name in block if name != "mimeType"} for block in blocks]
    while size_of(blocks, structured) > MAX_RESULT_CHARS and blocks and blocks[-1]["type"] == "resource_link":
        blocks.pop()
    for max_chars in _LENGTHS:
        if size_of(blocks, structured) <= MAX_RESULT_CHARS:
            break
        structured = _cut(structured, max_chars)
        blocks = [_cut_block(block, max_chars * _TEXT_BLOCK) for block in blocks]
    return blocks, structured


def _cut(value: Any, max_chars: int, name: str = "") -> Any:
    """Return a value with shorter texts and lists."""
    if name in _KEPT and not isinstance(value, dict):
        return value
    if isinstance(value, str):
        return value if len(value) <= max_chars else f"{value[: max_chars - 1]}…"
    if isinstance(value, dict):
        return {field: _cut(part, max_chars, field) for field, part in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(part, max_chars) for part in value[:_MAX_ITEMS]]
    return value


def _cut_block(block: Mapping[str, Any], max_chars: int) -> Mapping[str, Any]:
    return {**block, "text": _cut(block["text"], max_chars)} if block["type"] == "text" else block
