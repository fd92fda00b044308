"""Request to the emulator, parsed from the body of a POST."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from .input_files import InputFile, files_in


class BadBody(Exception):
    """The body is no request; its text is the message of the 400."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One request. `body` is as sent, without nulls; `body_hash` the SHA-256 of its canonical JSON.

    inputs: the images that it carries.
    """

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
    inputs: Sequence[InputFile] = ()


def parse(raw: bytes) -> ImageRequest:
    """Parse the body of a call. Raises BadBody."""
    body = _read_object(raw)
    return request_of(body, files_in(body))


def parse_webui(raw: bytes) -> ImageRequest:
    """Parse a call in the words of a Stable Diffusion web UI. Raises BadBody."""
    body = _read_object(raw)
    settings = body.get("override_settings")
    model = settings.get("sd_model_checkpoint") if isinstance(settings, dict) else None
    image_request = request_of(
        {**body, "model": model or "loaded checkpoint", "n": body.get("batch_size", 1)}, files_in(body), as_base64=True
    )
    return replace(image_request, body=body)


def _read_object(raw: bytes) -> dict[str, object]:
    try:
        sent = orjson.loads(raw)
    except orjson.JSONDecodeError as failure:
        raise BadBody("Request body is not valid JSON") from failure
    if not isinstance(sent, dict):
        raise BadBody("Request body must be a JSON object")
    return {name: value for name, value in sent.items() if value is not None}


def request_of(body: Mapping[str, object], inputs: Sequence[InputFile], *, as_base64: bool = False) -> ImageRequest:
    """Return the request of the fields of a body. Raises BadBody."""
    seed = body.get("seed")
    across, _, down = str(body.get("size", "")).partition("x")
    width, height = (int(across), int(down)) if across.isdigit() and down.isdigit() else (1024, 1024)
    return ImageRequest(
        prompt=_text(body, "prompt"),
        model=_text(body, "model"),
        n=_integer(body, "n", 1),
        width=_integer(body, "width", width),
        height=_integer(body, "height", height),
        seed=None if seed is None else _integer(body, "seed", 0),
        wants_base64=as_base64 or body.get("response_format") in ("base64", "b64_json"),
        output_format=_output_format(body),
        body=body,
        body_hash=hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest(),
        inputs=inputs,
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
