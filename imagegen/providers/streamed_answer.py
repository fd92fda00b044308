"""Answers that came as an event stream though they were not requested so, as one JSON object. No I/O.

Relays stream responses without such a request, and `extra` may hold `"stream": true`. The images are paid for.
https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import orjson

from imagegen.providers.large_body import has_many_values, load_object

_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?::|(?:data|event|id|retry)(?::|[\r\n]))")
_LINE = re.compile(rb"([^\r\n]*)(?:\r\n|\r|\n|\Z)")
_MAX_LINES, _MAX_VALUES = 80_000, 2**19
_LAST = b"[DONE]"
_LISTS = ("data", "images", "candidates", "choices")
_OF_IMAGES = ("b64_json", "url")


class StreamedAnswer(NamedTuple):
    """The answer of an event stream. is_whole: whether nothing of it can be missing where the stream broke off."""

    body: bytes
    is_whole: bool


def is_event_stream(start: bytes | bytearray) -> bool:
    """Return whether a body that begins so is an event stream."""
    return _START.match(start) is not None


def read_answer(body: bytes | bytearray) -> StreamedAnswer | None:
    """Return the answer of an event stream in the form of one that is not streamed.

    None if it has no JSON object, very many values, or an object that is nested too deeply.
    """
    if has_many_values(body, _MAX_VALUES):
        return None
    texts = list(_texts(bytes(body)))
    events = [event for text in texts if (event := load_object(text)) is not None]
    if not events:
        return None
    images = [event for event in events if _is_final_image(event)]
    answer: dict[str, Any] = {"data": images} if images else _merged(events)
    for name in ("usage", "usageMetadata", "model"):
        if values := [event[name] for event in events if event.get(name)]:
            answer[name] = values[-1]
    try:
        return StreamedAnswer(orjson.dumps(answer), bool(images) or texts[-1] == _LAST)
    except orjson.JSONEncodeError:
        return None


def _merged(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last event with the lists of all; with the first error if it has no images."""
    answer = dict(events[-1])
    for name in _LISTS:
        if entries := [entry for event in events for entry in _list(event, name)]:
            answer[name] = _messages(entries) if name == "choices" else entries
    if fault := next((event["error"] for event in events if event.get("error")), None):
        answer.setdefault("error", fault)
    if any(answer.get(name) for name in ("data", "images")):
        answer.pop("error", None)
    return answer


def _texts(body: bytes) -> Iterator[bytes]:
    """Yield the data of each event; the last one need not end with an empty line."""
    lines: list[bytes] = []
    for match in islice(_LINE.finditer(body.removeprefix(b"\xef\xbb\xbf")), _MAX_LINES):
        line = match[1]
        name, _, value = line.partition(b":")
        if not line and lines:
            yield b"\n".join(lines).strip()
            lines = []
        elif name.strip() == b"data":
            lines.append(value.removeprefix(b" "))
    if lines:
        yield b"\n".join(lines).strip()


def _is_final_image(event: Mapping[str, Any]) -> bool:
    """Return whether an event is an image, and no preview of one.

    https://platform.openai.com/docs/api-reference/images-streaming, https://www.volcengine.com/docs/82379/1541523
    """
    kind = event.get("type")
    is_image = any(isinstance(event.get(name), str) and event[name] for name in _OF_IMAGES)
    return is_image and not (isinstance(kind, str) and kind.endswith("partial_image"))


def _list(event: Mapping[str, Any], name: str) -> list[Any]:
    entries = event.get(name)
    return entries if isinstance(entries, list) else []


def _messages(choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Join the pieces of each choice's message: https://platform.openai.com/docs/api-reference/chat-streaming"""
    messages: dict[object, dict[str, Any]] = {}
    texts: dict[object, list[str]] = {}
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        index = choice["index"] if isinstance(choice.get("index"), int) else 0
        whole = messages.setdefault(index, {"message": {"images": []}})
        whole.update({name: value for name, value in choice.items() if value and name not in ("delta", "message")})
        for piece in (choice.get("delta"), choice.get("message")):
            if isinstance(piece, dict):
                _append(whole["message"], texts.setdefault(index, []), piece)
    for index, whole in messages.items():
        whole["message"]["content"] = "".join(texts.get(index, ()))
    return list(messages.values())


def _append(message: dict[str, Any], texts: list[str], piece: Mapping[str, Any]) -> None:
    content = piece.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        texts += [part["text"] for part in parts if isinstance(part.get("text"), str)]
        message["images"] += [part for part in parts if "text" not in part]
    if isinstance(content, str):
        texts.append(content)
    message["images"] += _list(piece, "images")
    if isinstance(piece.get("refusal"), str):
        message["refusal"] = message.get("refusal", "") + piece["refusal"]
