"""Faults by name: each replaces a good response."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import orjson

from . import together_responses
from .fault_schedule import UNREAD, Fault, UnknownFault
from .generation import Generation
from .image_files import IMAGE_FAULTS
from .together_responses import Entry, Response

Plan = Callable[[Generation, Fault], Response]

_ALIASES: Final = {
    "400": "400_unsupported",
    "404": "404_model",
    "422": "422_nsfw",
    "429": "429_model",
    "429_retry_after": "429_model",
    "429_reset": "429_model",
    "429_text": "429_model",
}
_LONG_BYTES: Final = 10_000_000


def plan(generation: Generation, fault: Fault) -> Response:
    """Return the response of the fault. Raises UnknownFault."""
    return _with_headers(_plan_of(fault.name)(generation, fault), fault)


def check(fault: Fault) -> None:
    """Raise UnknownFault for a name or an option that does not exist."""
    _plan_of(fault.name)


_STATUS = re.compile("[2-5][0-9]{2}")


def names() -> list[str]:
    return sorted({*FAULTS, *_ALIASES, *together_responses.ERRORS, *IMAGE_FAULTS, "flapping", "storm"})


def _plan_of(name: str) -> Plan:
    if name in FAULTS:
        return FAULTS[name]
    if name in IMAGE_FAULTS:
        return lambda generation, fault: generation.answer(generation.entries(fault=fault))
    if name in _ALIASES or name in together_responses.ERRORS:
        return _row
    if _STATUS.fullmatch(name):
        return _any_status
    raise UnknownFault(f"no fault named {name!r}; GET /_emulator/faults lists them")


def _row(generation: Generation, fault: Fault) -> Response:
    row = _ALIASES.get(fault.name, fault.name)
    return together_responses.error(
        row, generation.request_id, **{"model": generation.image_request.model, **fault.options}
    )


def _with_headers(answer: Response, fault: Fault) -> Response:
    headers: dict[str, str] = {}
    if answer.status == 429 and fault.name not in ("429_text", "429_retry_after"):
        reset = f"{fault.number('reset', 1):g}"
        headers |= {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
    if fault.name == "429_retry_after" or "retry_after" in fault.options:
        headers["Retry-After"] = fault.text("retry_after", "1")
    extra_headers = fault.options.get("headers")
    if isinstance(extra_headers, Mapping):
        headers |= {str(name): str(value) for name, value in extra_headers.items()}
    return answer.with_headers(headers) if headers else answer


def _any_status(generation: Generation, fault: Fault) -> Response:
    status = int(fault.number("status", int(fault.name) if _STATUS.fullmatch(fault.name) else 500))
    body = fault.options.get("body")
    if isinstance(body, str):
        return Response(status, body.encode(), fault.text("content_type", together_responses.TEXT))
    if body is None:
        data = together_responses.error_body(f"Status {status}", "server_error", None, generation.request_id)
    else:
        data = orjson.dumps(body)
    return Response(status, data, fault.text("content_type", together_responses.JSON))


def _delivered(delivery: str) -> Plan:
    return lambda generation, fault: replace(generation.answer(), delivery=delivery, options=fault.options)


def _json_200(body: object) -> Plan:
    return lambda _generation, _fault: Response(200, orjson.dumps(body))


def _changed(change: Callable[[Generation, Fault, Entry], None]) -> Plan:
    """Return a fault that changes every entry, or the one at the option `index`."""

    def made(generation: Generation, fault: Fault) -> Response:
        entries = generation.entries()
        for position, entry in enumerate(entries):
            if fault.number("index", position) == position:
                change(generation, fault, entry)
        return generation.answer(entries)

    return made


def _url(default: str) -> Plan:
    def change(_generation: Generation, fault: Fault, entry: Entry) -> None:
        entry.pop("b64_json", None)
        entry["url"] = fault.text("url", default)

    return _changed(change)


def _nulled(_generation: Generation, _fault: Fault, entry: Entry) -> None:
    entry["b64_json" if "b64_json" in entry else "url"] = None


def _garbled(_generation: Generation, fault: Fault, entry: Entry) -> None:
    entry.pop("url", None)
    entry["b64_json"] = fault.text("body", "%%% this is no base64 %%%")


def _fewer(generation: Generation, fault: Fault) -> Response:
    count = int(fault.number("images", max(0, generation.image_request.n - 1)))
    return generation.answer(generation.entries(count=count))


def _long_error(generation: Generation, fault: Fault) -> Response:
    message = "very long \x1b[31m" + "x" * int(fault.number("bytes", _LONG_BYTES))
    body = together_responses.error_body(message, "invalid_request_error", None, generation.request_id)
    return Response(int(fault.number("status", 400)), body)


def _error_in_200(generation: Generation, _fault: Fault) -> Response:
    return Response(
        200, together_responses.error_body("Internal server error", "server_error", None, generation.request_id)
    )


def _refused_field(generation: Generation, fault: Fault) -> Response:
    name = fault.text("parameter", "x_unknown")
    if name not in generation.image_request.body:
        return generation.answer()
    return together_responses.refused_field(fault.text("shape", "openai"), name, generation.request_id)


FAULTS: Final[Mapping[str, Plan]] = {
    "ok": lambda generation, _fault: generation.answer(),
    "job": lambda generation, fault: generation.accept(fault),
    "refused_field": _refused_field,
    "status": _any_status,
    "hang": _delivered("hang"),
    UNREAD: _delivered(UNREAD),
    "reset": _delivered("reset"),
    "reset_mid_answer": _delivered("reset_mid_answer"),
    "close": _delivered("close"),
    "trickle": _delivered("trickle"),
    "truncated": _delivered("truncated"),
    "huge_body": _delivered("huge_body"),
    "gzip_bomb": _delivered("gzip_bomb"),
    "empty": lambda _generation, _fault: Response(200, b""),
    "not_json": lambda _generation, _fault: Response(
        200, b"<html><body>Just a moment...</body></html>", together_responses.HTML
    ),
    "broken_json": lambda generation, _fault: replace(generation.answer(), body=generation.answer().body[:-3]),
    "error_in_200": _error_in_200,
    "no_images": lambda generation, _fault: generation.answer([]),
    "wrong_shape": _json_200({"id": 7, "object": ["list"], "data": {"url": "no list"}}),
    "wrong_root": _json_200(["not", "an", "object"]),
    "fewer_images": _fewer,
    "duplicate": lambda generation, _fault: generation.answer(generation.entries(same=True)),
    "null_url": _changed(_nulled),
    "garbage_base64": _changed(_garbled),
    "url": _url("ftp://images.invalid/a.png"),
    "javascript_url": _url("javascript:alert(1)"),
    "file_url": _url("file:///etc/passwd"),
    "private_url": _url("http://10.0.0.1/a.png"),
    "redirect": lambda _generation, fault: Response(
        302, b"", together_responses.TEXT, {"Location": fault.text("target", "http://127.0.0.1:9/")}
    ),
    "long_error": _long_error,
}
