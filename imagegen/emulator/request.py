"""Request to the emulator, parsed from the body of a POST."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import orjson


class BadBody(Exception):
    """The body is no request; its text is the message of the 400."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One request. `body` is as sent, without nulls; `body_hash` the SHA-256 of its canonical JSON."""

    prompt: str
    model: str
    n: int
    width: int
    height: int
    seed: int | None
    wants_base64: bool
    output_format: str | None
    body: Mapping[str, object]
    body_hash: str


def parse(raw: bytes) -> ImageRequest:
    """Raises BadBody."""
    try:
        sent = orjson.loads(raw)
    except orjson.JSONDecodeError as failure:
        raise BadBody("Request body is not valid JSON") from failure
    if not isinstance(sent, dict):
        raise BadBody("Request body must be a JSON object")
    body = {name: value for name, value in sent.items() if value is not None}
    seed = body.get("seed")
    return ImageRequest(
        prompt=_text(body, "prompt"),
        model=_text(body, "model"),
        n=_integer(body, "n", 1),
        width=_integer(body, "width", 1024),
        height=_integer(body, "height", 1024),
        seed=None if seed is None else _integer(body, "seed", 0),
        wants_base64=body.get("response_format") in ("base64", "b64_json"),
        output_format=_output_format(body),
        body=body,
        body_hash=hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest(),
    )


def _text(body: Mapping[str, object], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadBody(f"{name} is required and must be a string")
    return value


def _integer(body: Mapping[str, object], name: str, default: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadBody(f"{name} must be an integer")
    return value


def _output_format(body: Mapping[str, object]) -> str | None:
    value = body.get("output_format")
    if value is None:
        return None
    if value not in ("jpeg", "png", "webp"):
        raise BadBody("output_format must be jpeg, png or webp")
    return str(value)
