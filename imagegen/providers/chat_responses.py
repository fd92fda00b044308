"""Parser of chat completions that carry images: in the message's `images`, in its content, or in Markdown. No I/O.

https://openrouter.ai/docs/features/multimodal/image-generation; the Markdown is the habit of many relays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import orjson
from msgspec.structs import replace

from imagegen.formats import DATA_URI_HEAD
from imagegen.providers.details_parser import parse_details
from imagegen.providers.gemini_responses import POLICY_ENDS, without_image
from imagegen.providers.large_body import CutObject, base64_in_place, cut_object
from imagegen.providers.odd_replies import MARKDOWN_LINK
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, parse_models, sanitize_detail
from imagegen.tasks.image import GivenImage, ImageLink
from imagegen.tasks.reply_details import ReplyDetails, Usage

_MAX_PARTS = 64
_START_BYTES = 4_096
_MAX_IMAGES = 16

_DATA_URI_HEAD = re.compile(DATA_URI_HEAD.encode().replace(b"/", rb"\\?/"))
_LINE = rb"[A-Za-z0-9+/=_%-]*(?:\\/[A-Za-z0-9+/=_%-]*)*"
_BASE64 = re.compile(_LINE)
_WRAPPED_BASE64 = re.compile(_LINE + rb"(?:(?:\r|\\r)?(?:\n|\\n)" + _LINE.replace(b"*", b"+", 1) + rb")*")
"""Also in JSON that escapes slashes and line breaks."""

_MAX_WRAPPED_CHARS = 128
"""Base64 in lines of up to this length goes on in the next line; after a longer one comes prose."""

_IMAGE_LINK = re.compile(
    r"https?://[^\s)\"'<>\]]{1,2000}\.(?:png|jpe?g|webp)(?:\?[^\s)\"'<>\]]{0,2000})?", re.IGNORECASE
)
_ONLY_LINK = re.compile(r"\s*(https?://\S{1,4000})\s*")


def parse_chat(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> Reply:
    """Return the images of a response. Raises UpstreamError for one without any; `charged` if its tokens are billed."""
    is_error = not 200 <= answer.status < 300
    cut = None if 300 <= answer.status < 400 else cut_object(answer.body)
    choices = cut.fields.get("choices") if cut else None
    if cut is None or cut.fields.get("error") or not isinstance(choices, list):
        raise error_from_response(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    details = _details(cut.fields)
    images: list[GivenImage] = []
    texts, ends = list[str](), list[str]()
    for choice in choices[:_MAX_PARTS]:
        if not isinstance(choice, dict) or len(images) >= _MAX_IMAGES:
            continue
        if isinstance(error := choice.get("error"), dict):
            body = orjson.dumps({"error": error})
            raise error_from_response(answer.status, answer.headers, body, secret=secret, now_s=now_s)
        ends += [str(choice.get(name) or "") for name in ("native_finish_reason", "finish_reason")]
        message = choice.get("message")
        if isinstance(message, dict):
            images += list(_listed(cut, message)) or list(_in_content(cut, message.get("content")))
            texts += _texts(cut, message)
    if images:
        return Reply(tuple(images[:_MAX_IMAGES]), details=details)
    if is_error:
        raise error_from_response(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    usage: dict[str, Any] | None = dict(details.usage) if details and details.usage else None
    if details and details.cost_micro_usd is not None:
        usage = (usage or {"output_tokens": 0}) | {"cost": details.cost_micro_usd / 1_000_000}
    reason = next((end for end in ends if end.upper() in POLICY_ENDS or end == "content_filter"), "")
    raise without_image(reason, next(filter(None, ends), ""), sanitize_detail(" ".join(texts), secret), usage)


def is_chat(answer: RawResponse) -> bool:
    """Return whether a response is a chat completion; some relays answer calls of their images API so."""
    return 200 <= answer.status < 300 and b'"choices"' in answer.body[:_START_BYTES]


def parse_chat_models(listing: object) -> tuple[Mapping[str, object], ...]:
    """Return the models of a list but those that state that they make no images."""
    return tuple(entry for entry in parse_models(listing) if "image" in _modalities(entry))


def _modalities(entry: Mapping[str, object]) -> list[object]:
    architecture = entry.get("architecture")
    modalities = architecture.get("output_modalities") if isinstance(architecture, dict) else None
    return modalities if isinstance(modalities, list) else ["image"]


def _details(fields: Mapping[str, object]) -> ReplyDetails | None:
    """Return the usage in the words of `ReplyDetails.usage`, and the cost that the service names."""
    usage, details = fields.get("usage"), parse_details(fields)
    if not isinstance(usage, dict):
        return details
    counts: Usage = {}
    for name, their_name in (
        ("input_tokens", "prompt_tokens"),
        ("output_tokens", "completion_tokens"),
        ("total_tokens", "total_tokens"),
    ):
        if (count := _count(usage.get(their_name))) is not None:
            counts[name] = count
    group = usage.get("completion_tokens_details")
    output_tokens, image_tokens = (
        counts.get("output_tokens"),
        _count(group.get("image_tokens")) if isinstance(group, dict) else None,
    )
    if image_tokens and isinstance(output_tokens, int) and image_tokens <= output_tokens:
        counts["output_tokens_details"] = {"text_tokens": output_tokens - image_tokens, "image_tokens": image_tokens}
    return replace(details or ReplyDetails(), usage=counts or None)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53 else None


def _listed(cut: CutObject, message: Mapping[str, object]) -> Iterator[GivenImage]:
    """Yield the images of the message's list, as OpenRouter answers."""
    entries = message.get("images")
    for entry in entries[:_MAX_PARTS] if isinstance(entries, list) else ():
        if image := _image(cut, entry):
            yield image


def _image(cut: CutObject, entry: object) -> GivenImage | None:
    """Return the image of an entry: a text, `{image_url: {url}}`, `{url}` or `{b64_json}`."""
    inner = entry.get("image_url", entry) if isinstance(entry, dict) else entry
    if not isinstance(inner, dict):
        return parse_image(cut.base64(inner))
    for name in ("url", "b64_json", "data"):
        if image := parse_image(cut.base64(inner.get(name))):
            return image
    return None


def _in_content(cut: CutObject, content: object) -> Iterator[GivenImage]:
    """Yield the images of the content: of its parts, or of its text."""
    if isinstance(content, str):
        yield from _in_text(cut, content)
        return
    for part in content[:_MAX_PARTS] if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            yield from _in_text(cut, text)
        elif image := _image(cut, part):
            yield image


def _in_text(cut: CutObject, text: str) -> Iterator[GivenImage]:
    """Yield the images of a text: data URIs, else Markdown images, else links to image files, else a lone link.

    One image may be shown and offered for download too.
    """
    view = cut.view(text)
    data = memoryview(text.encode()) if view is None else view
    heads = islice(_DATA_URI_HEAD.finditer(data), _MAX_PARTS)
    embedded = [data[head.start() : _base64_end(data, head.end())] for head in heads]
    if embedded or view is not None:
        read = base64_in_place if view is not None else _small_image
        yield from (image for uri in embedded if (image := read(uri)) is not None)
        return
    links = MARKDOWN_LINK.findall(text) or _IMAGE_LINK.findall(text)
    if not links and (lone := _ONLY_LINK.fullmatch(text)):
        links = [lone[1]]
    yield from (ImageLink(link) for link in dict.fromkeys(links))


def _base64_end(data: memoryview, start: int) -> int:
    """Return where the base64 ends that begins at `start`."""
    line, wrapped = _BASE64.match(data, start), None
    end = line.end() if line else start
    if end - start <= _MAX_WRAPPED_CHARS:
        wrapped = _WRAPPED_BASE64.match(data, start)
    return wrapped.end() if wrapped else end


def _small_image(uri: memoryview) -> GivenImage | None:
    return parse_image(bytes(uri).decode())


def _texts(cut: CutObject, message: Mapping[str, object]) -> list[str]:
    """Return what the model has written."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts[:_MAX_PARTS] if isinstance(part, dict)] + [message.get("refusal")]
    return [text for text in texts if isinstance(text, str) and cut.view(text) is None]
