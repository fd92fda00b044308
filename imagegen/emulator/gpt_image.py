"""Responses of OpenAI's GPT image models: always base64, with usage, and strict about fields.

https://platform.openai.com/docs/api-reference/images/create
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time
from typing import Final

import orjson

from .image_request import ImageRequest
from .together_responses import Entry, Response, refused_field

_FIELDS: Final = frozenset(
    (
        *("model", "prompt", "n", "size", "quality", "background", "output_format", "output_compression", "moderation"),
        *("stream", "partial_images", "user", "image", "images", "mask", "input_fidelity"),
    )
)
_TOKENS: Final[Mapping[object, int]] = {"low": 272, "medium": 1056, "high": 4160}
_MAX_IMAGES: Final = 10


def is_for_openai(image_request: ImageRequest) -> bool:
    """Return whether a call names a GPT image model, and is not in the words of Together."""
    return "gpt-image" in image_request.model.rpartition("/")[2] and "width" not in image_request.body


def refusal(image_request: ImageRequest, request_id: str) -> Response | None:
    """Return why the model refuses a call, or None."""
    for name in sorted(image_request.body):
        if name not in _FIELDS:
            return refused_field("openai", name, request_id)
    if not 1 <= image_request.n <= _MAX_IMAGES:
        return refused_field("openai", "n", request_id, f"Invalid 'n': must be between 1 and {_MAX_IMAGES}.")
    return None


def answer(image_request: ImageRequest, entries: Sequence[Entry]) -> Response:
    """Return the 200; a parameter that was `auto` has a value in it."""
    body = image_request.body
    quality = body.get("quality") if body.get("quality") in _TOKENS else "medium"
    background = body.get("background")
    text_tokens, image_tokens = 8 + len(image_request.prompt) // 4, _TOKENS[quality] * len(entries)
    return Response(
        200,
        orjson.dumps(
            {
                "created": int(time()),
                "background": background if background in ("transparent", "opaque") else "opaque",
                "data": [{"b64_json": entry["b64_json"]} for entry in entries],
                "output_format": image_request.output_format or "png",
                "quality": quality,
                "size": f"{image_request.width}x{image_request.height}",
                "usage": {
                    "input_tokens": text_tokens,
                    "input_tokens_details": {"image_tokens": 0, "text_tokens": text_tokens},
                    "output_tokens": image_tokens,
                    "total_tokens": text_tokens + image_tokens,
                },
            }
        ),
    )
