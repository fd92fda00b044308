"""Schema versions of stored tasks: which version of the service is able to run them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import UPLOAD_PREFIX
from imagegen.tasks.task import State, Task

FIRST_VERSION = 1
INPUTS_VERSION = 2
"""Adds fields to requests, more images, uploads, and images that a task has before its first call."""

_ABSENT = Raw()


class _FirstRequest(Struct, forbid_unknown_fields=True, gc=False):
    """Request as the first version reads it; it fails a task with any other field. `Raw` values need no decoding."""

    prompt: Raw
    model: Raw
    width: Raw
    height: Raw
    n: Annotated[int, Meta(ge=1, le=8)]
    steps: Raw = _ABSENT
    seed: Raw = _ABSENT
    negative_prompt: Raw = _ABSENT
    guidance_scale: Raw = _ABSENT
    output_format: Raw = _ABSENT
    image_url: str | None = None
    reference_images: tuple[str, ...] | None = None


_read_first = msgspec.json.Decoder(_FirstRequest).decode


def request_version(request_json: bytes) -> int:
    """Return the lowest schema version that runs a stored request rightly."""
    try:
        request = _read_first(request_json)
    except msgspec.MsgspecError:
        return INPUTS_VERSION
    if request.image_url is None and request.reference_images is None:
        return FIRST_VERSION
    inputs = (request.image_url or "", *(request.reference_images or ()))
    return INPUTS_VERSION if any(address.startswith(UPLOAD_PREFIX) for address in inputs) else FIRST_VERSION


def version_of(task: Task) -> int:
    """Return the version that a task is written in. Every version shows a completed task rightly."""
    if task.state is State.COMPLETED or not task.request_json:
        return FIRST_VERSION
    return INPUTS_VERSION if reused_images(task) else request_version(task.request_json)


def reused_images(task: Task) -> tuple[StoredImage, ...]:
    """Return the images of an unfinished task that another task made."""
    if not task.images or task.stale_images:
        return ()
    return tuple([image for image in task.images if image.reused])
