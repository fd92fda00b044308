"""Fields of a submit besides the prompt, as docs/api.md lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict


class WebhookField(TypedDict):
    """A receiver of the task's end. secret: `whsec_` and base64, see `WebhookVerifier`."""

    url: str
    events: NotRequired[Sequence[str]]
    secret: NotRequired[str]


class SubmitFields(TypedDict, total=False):
    """Optional fields of a submit. An image is an https address, a `data:` URI or the `upload_id` of an upload."""

    model: str
    width: int
    height: int
    aspect_ratio: str
    resolution: Literal["512", "1K", "2K", "4K"]
    n: int
    seed: int
    steps: int
    variant: int
    negative_prompt: str
    guidance_scale: float
    output_format: Literal["jpeg", "png", "webp"]
    output_compression: int
    quality: str
    background: str
    moderation: str
    style: str
    input_fidelity: str
    disable_safety_checker: bool
    prompt_upsampling: bool
    image_loras: Sequence[Mapping[str, Any]]
    image_url: str
    reference_images: Sequence[str]
    mask: str
    extra: Mapping[str, Any]
    webhook: WebhookField
    max_cost_usd: float
