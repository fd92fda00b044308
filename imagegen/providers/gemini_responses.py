"""Parser of Gemini's responses: images, blocked prompts, responses without an image, and the meaning of each error.

https://ai.google.dev/api/generate-content and https://ai.google.dev/gemini-api/docs/troubleshooting. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from imagegen.errors import UpstreamError
from imagegen.providers.large_body import CutObject, cut_object, load_object
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Reply
from imagegen.providers.refusal_codes import is_refusal_text
from imagegen.providers.response_parser import error_from_response, parse_image, sanitize_detail, search_images
from imagegen.tasks.image import GivenImage
from imagegen.tasks.reply_details import ReplyDetails, Usage

POLICY_ENDS = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
    }
)
"""Reasons of an end that a repeat of the same prompt does not change:
https://ai.google.dev/api/generate-content#FinishReason"""

_NO_FREE_TIER = re.compile(r"\blimit: 0\b")
"""The project may not use the model before it has billing; the time to retry that comes with it does not help."""

_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,12})?)s")
_MAX_PARTS = 256
_MAX_TEXT_CHARS = 4_000
_MAX_COUNT = 2**53


@dataclass(slots=True)
class _Candidates:
    """Content of a response's candidates."""

    images: list[GivenImage] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def parse_generation(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> Reply:
    """Return the images of a response. Raises UpstreamError for one without any; `charged` if its tokens are billed."""
    is_error = not 200 <= answer.status < 300
    cut = None if 300 <= answer.status < 400 else cut_object(answer.body)
    if cut is None and 200 <= answer.status < 300 and (found := search_images(answer.body)):
        return Reply(found)  # such as the list of a streamed response
    if cut is None or cut.fields.get("error"):
        raise error_of(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    parts = _read_candidates(cut)
    if is_error and not parts.images:
        raise error_of(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    usage = usage_of(cut.fields.get("usageMetadata"), only_text=bool(parts.texts and not parts.images))
    if parts.images:
        return Reply(tuple(parts.images), details=ReplyDetails(usage=usage) if usage else None)
    error = _without_image(cut.fields, parts, usage, secret)
    if error.code == "upstream_bad_response" and (found := search_images(answer.body)):
        return Reply(found, details=ReplyDetails(usage=usage) if usage else None)
    raise error


def error_of(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> UpstreamError:
    """Return the error that a refused call means. Google charges nothing for one:
    https://ai.google.dev/gemini-api/docs/billing#failed-requests"""
    error = error_from_response(status, headers, body, secret=secret, now_s=now_s)
    upstream_detail, fields = error.upstream_detail, load_object(body) or {}
    inner = fields.get("error")
    inner = inner if isinstance(inner, dict) else {}
    text = str(inner.get("message") or "")[:_MAX_TEXT_CHARS]
    if error.code == "upstream_rate_limited" and _NO_FREE_TIER.search(text):
        detail = "This service's account with the provider may not use the model without billing"
        return UpstreamError("upstream_billing", detail, status=status, upstream_detail=upstream_detail)
    if error.code == "upstream_rate_limited" and error.retry_after_s is None:
        error.retry_after_s = _retry_delay_s(inner.get("details"))
    return error


def usage_of(metadata: object, *, only_text: bool = False) -> Usage | None:
    """Return the counts of tokens in the words of `ReplyDetails.usage`; None if there are none.

    What the model thinks and writes counts as output: https://ai.google.dev/gemini-api/docs/pricing
    only_text: the response has text and no image.
    """
    if not isinstance(metadata, Mapping):
        return None
    prompt_tokens, candidate_tokens = (
        _count(metadata.get("promptTokenCount")),
        _count(metadata.get("candidatesTokenCount")),
    )
    thoughts = _count(metadata.get("thoughtsTokenCount")) or 0
    if prompt_tokens is None and candidate_tokens is None:
        return None
    input_image_tokens, output_image_tokens = (
        _of_images(metadata.get("promptTokensDetails")),
        _of_images(metadata.get("candidatesTokensDetails")),
    )
    output_image_tokens = 0 if output_image_tokens is None and only_text else output_image_tokens
    output, input_image_tokens = (candidate_tokens or 0) + thoughts, min(input_image_tokens or 0, prompt_tokens or 0)
    usage: Usage = {
        "input_tokens": prompt_tokens or 0,
        "output_tokens": output,
        "total_tokens": (prompt_tokens or 0) + output,
        "input_tokens_details": {
            "text_tokens": (prompt_tokens or 0) - input_image_tokens,
            "image_tokens": input_image_tokens,
        },
    }
    if output_image_tokens is not None:
        usage["output_tokens_details"] = {
            "text_tokens": max(output - output_image_tokens, 0),
            "image_tokens": output_image_tokens,
        }
    return usage


def parse_model_list(listing: object) -> tuple[Mapping[str, object], ...]:
    """Return the models of a list that make images, by their names."""
    entries = listing.get("models") if isinstance(listing, dict) else None
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    ids = [name.removeprefix("models/") for name in names if isinstance(name, str)]
    return tuple({"id": name, "type": "image"} for name in ids if "image" in name or "banana" in name)


def _read_candidates(cut: CutObject) -> _Candidates:
    parts, left = _Candidates(), _MAX_PARTS
    candidates = cut.fields.get("candidates")
    for candidate in candidates[:_MAX_PARTS] if isinstance(candidates, list) else ():
        if not isinstance(candidate, dict):
            continue
        parts.ends.append(str(candidate.get("finishReason") or ""))
        parts.messages.append(str(candidate.get("finishMessage") or ""))
        for part in islice(_parts(candidate), left):
            left -= 1
            if image := _image(cut, part):
                parts.images.append(image)
            elif isinstance(text := part.get("text"), str) and cut.view(text) is None:
                parts.texts.append(text)
    return parts


def _image(cut: CutObject, part: Mapping[str, object]) -> GivenImage | None:
    """Return the image of a part: its bytes, or the link of a file."""
    data, file = part.get("inlineData") or part.get("inline_data"), part.get("fileData") or part.get("file_data")
    if isinstance(data, dict):
        return parse_image({"image": cut.base64(data.get("data"))})
    return parse_image({"url": file.get("fileUri") or file.get("file_uri")}) if isinstance(file, dict) else None


def _parts(candidate: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield the parts of a candidate but thoughts: their images are drafts."""
    content = candidate.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    for part in parts[:_MAX_PARTS] if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("thought") is not True:
            yield part


def _without_image(fields: Mapping[str, object], parts: _Candidates, usage: Usage | None, secret: str) -> UpstreamError:
    """Return the error of a response without an image."""
    feedback = fields.get("promptFeedback")
    feedback = feedback if isinstance(feedback, dict) else {}
    blocked = str(feedback.get("blockReason") or "")
    written = sanitize_detail(" ".join(parts.texts), secret)
    messages = [str(feedback.get("blockReasonMessage") or ""), *parts.messages]
    message = sanitize_detail(next(filter(None, messages), ""), secret) or written
    reason = blocked or next((end for end in parts.ends if end in POLICY_ENDS), "")
    if reason:
        return without_image(reason, reason, message, usage)
    end = next(filter(None, parts.ends), "")
    return without_image("", end, written or message, usage, is_written=bool(written))


def without_image(
    reason: str, end: str, text: str, usage: Mapping[str, Any] | None, *, is_written: bool = True
) -> UpstreamError:
    """Return the error of a model's response without an image. It is charged for what the model has made all the same.

    Args:
        reason: why its content policy withheld the image, empty if it did not.
        end: why the model stopped.
        text: the model's text, or the service's message.
        usage: the tokens; without any a policy's refusal counts as free.
        is_written: whether the model wrote `text`.
    """
    charged_tokens = (usage or {}).get("output_tokens") or (usage or {}).get("cost")
    tail = f": {text}" if text else ""
    if reason:
        detail = sanitize_detail(f"The provider's content policy withheld the image ({reason[:60]}){tail}")
        return UpstreamError(
            "content_policy", detail, charged=bool(charged_tokens), usage=usage if charged_tokens else None
        )
    if is_written and text and is_refusal_text(text):
        return UpstreamError("content_policy", sanitize_detail(f"The model refused{tail}"), charged=True, usage=usage)
    if is_written and text:
        detail = f"The model answered with text instead of an image{tail}"
    else:
        detail = f"The provider answered without an image{f' ({end[:60]})' if end else ''}{tail}"
    return UpstreamError("upstream_bad_response", sanitize_detail(detail), charged=True, usage=usage)


def _retry_delay_s(details: object) -> float | None:
    """Return the seconds of a RetryInfo."""
    for entry in details[:20] if isinstance(details, list) else ():
        delay = entry.get("retryDelay") if isinstance(entry, dict) else None
        if isinstance(delay, str) and (seconds := _DURATION.fullmatch(delay)):
            return float(seconds[1])
    return None


def _of_images(details: object) -> int | None:
    """Return the tokens of images in a list by modality; None if there is no list."""
    if not isinstance(details, list):
        return None
    return sum(
        _count(entry.get("tokenCount")) or 0
        for entry in details[:20]
        if isinstance(entry, dict) and entry.get("modality") == "IMAGE"
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT else None
