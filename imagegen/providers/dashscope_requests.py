"""Requests in the three shapes of Alibaba's DashScope (Model Studio), which the model decides. No I/O.

https://www.alibabacloud.com/help/en/model-studio/text-to-image
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import link_or_data_uri
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, request_fields
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest

TEXT_TO_IMAGE = "services/aigc/text2image/image-synthesis"
IMAGE_TO_IMAGE = "services/aigc/image2image/image-synthesis"
MESSAGES = "services/aigc/image-generation/generation"
MESSAGES_AT_ONCE = "services/aigc/multimodal-generation/generation"

ASYNC_HEADERS = (("X-DashScope-Async", "enable"),)
"""The path for answers at once refuses it, the others need it."""

_UNKNOWN = frozenset(
    {
        "output_format",
        "output_compression",
        "quality",
        "background",
        "moderation",
        "style",
        "input_fidelity",
        "disable_safety_checker",
        "image_loras",
    }
)
_STEPS = frozenset({"steps", "guidance_scale"})
_WORDS = {"guidance_scale": "guidance", "prompt_upsampling": "prompt_extend"}
_INPUT_FIELDS = frozenset(
    {"function", "ref_img", "images", "base_image_url", "mask_image_url", "sketch_image_url", "image_url"}
)
"""Fields of `extra` that belong to `input`; all others are parameters."""

_FLUX = re.compile(r"^flux", re.IGNORECASE)
_SINGLE = re.compile(r"^z-image", re.IGNORECASE)
_STYLED = re.compile(r"^wanx-(?:v1|background)", re.IGNORECASE)


class Shape(Struct, frozen=True):
    """Form of the calls of a model. path: below the base. images: how it takes input images, None if it takes none.

    A call to MESSAGES_AT_ONCE is answered with its images; each other one begins a job.
    """

    path: str
    images: Literal["messages", "base_image", "list"] | None = None
    max_images: int = 0
    mask: bool = False

    @property
    def is_job(self) -> bool:
        return self.path != MESSAGES_AT_ONCE

    @property
    def has_messages(self) -> bool:
        return self.path in (MESSAGES, MESSAGES_AT_ONCE)


_SHAPES: tuple[tuple[re.Pattern[str], Shape], ...] = (
    (re.compile(r"imageedit"), Shape(IMAGE_TO_IMAGE, "base_image", 1, mask=True)),
    (re.compile(r"^wan2\.5-i2i"), Shape(IMAGE_TO_IMAGE, "list", 3)),
    (re.compile(r"^wan(?:2\.[6-9]|[3-9]).*t2i"), Shape(MESSAGES)),
    (re.compile(r"^wan(?:2\.[6-9]|[3-9])"), Shape(MESSAGES, "messages", 4)),
    (re.compile(r"^z-image"), Shape(MESSAGES_AT_ONCE)),
    (re.compile(r"^qwen-image-max"), Shape(MESSAGES_AT_ONCE)),
    (re.compile(r"^qwen-image-(?:edit|[2-9])"), Shape(MESSAGES_AT_ONCE, "messages", 3)),
)


def shape_of(model: str) -> Shape:
    """Return the shape for a model; an unknown one is called as the older models are."""
    return next((shape for pattern, shape in _SHAPES if pattern.search(model.lower())), Shape(TEXT_TO_IMAGE))


def edits_of(model: str) -> Edits | None:
    """Return what a model takes, None if it takes no input images."""
    shape = shape_of(model)
    return None if shape.images is None else Edits(shape.max_images, shape.mask)


def vocabulary_of(model: str) -> Vocabulary:
    """Return the words for the fields of a model; only FLUX takes steps, only the first Wan a style."""
    unknown = _UNKNOWN if _FLUX.search(model) else _UNKNOWN | _STEPS
    return Vocabulary("size", _WORDS, unknown - {"style"} if _STYLED.search(model) else unknown)


def fields_of(call: Call) -> dict[str, object]:
    """Build the body: `{"model", "input", "parameters"}`."""
    request, shape = call.request, shape_of(call.request.model)
    fields = request_fields(call, vocabulary_of(request.model))
    model, prompt = fields.pop("model"), fields.pop("prompt")
    negative = fields.pop("negative_prompt", None)
    size = fields.get("size")
    if isinstance(size, str):
        fields["size"] = size.replace("x", "*")
    input_fields = {name: fields.pop(name) for name in _INPUT_FIELDS & fields.keys()}
    if not _SINGLE.search(request.model):
        fields["n"] = call.count  # left out, some models make four images
    if shape.has_messages:
        content = [{"image": _image(call, source)} for source in request.input_images]
        message = {"role": "user", "content": [*content, {"text": prompt}]}
        inputs: dict[str, object] = {"messages": [message], **input_fields}
        fields |= {} if negative is None else {"negative_prompt": negative}
    else:
        inputs = {"prompt": prompt, **({} if negative is None else {"negative_prompt": negative})}
        inputs |= {**_input_images(call, shape), **input_fields}
    return {"model": model, "input": inputs, "parameters": fields}


def _input_images(call: Call, shape: Shape) -> Mapping[str, object]:
    """Return the input images of the older shape. Raises UpstreamError if the model takes none."""
    request = call.request
    images = [_image(call, source) for source in request.input_images]
    if not images:
        return {}
    if shape.images == "list":
        return {"images": images}
    if shape.images is None:
        raise UpstreamError("upstream_invalid_request", "this provider takes no input images for this model")
    if request.mask is None:
        return {"base_image_url": images[0], "function": "description_edit"}
    mask = _image(call, request.mask)
    return {"base_image_url": images[0], "mask_image_url": mask, "function": "description_edit_with_mask"}


def _image(call: Call, source: str) -> object:
    return link_or_data_uri(call.input(source))


def warnings_of(call: Call) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    return left_out_warnings(call, vocabulary_of(call.request.model))


def sent_request(request: GenerationRequest) -> GenerationRequest:
    """Return the request without what a call does not carry."""
    return replace(sent_in_words(request, vocabulary_of(request.model)), aspect_ratio=None, resolution=None)
