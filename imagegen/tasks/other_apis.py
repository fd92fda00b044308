"""Names of fields in other image APIs: ours that mean the same, and those that no client may send."""

from __future__ import annotations

import re

from pydantic.alias_generators import to_snake

_CALLBACK = re.compile(r"webhook|callback|notifyurl|notifyhook|notificationurl")
"""In a name without separators, in lower case."""
_COUNTS = (
    "num_images",
    "num_images_per_prompt",
    "number_of_images",
    "num_outputs",
    "num_samples",
    "n_images",
    "image_count",
    "batch_count",
    "samples",
    "n_iter",
    "sample_count",
    "batch_size",
)
"""Names of the number of images."""

_ALSO_OURS = frozenset({"n", "width", "height", "model", "prompt"})
_RESERVED = _ALSO_OURS.union(_COUNTS, ("size", "image_size", "stream", "response_format"))

_OTHERS = {
    "size": "width and height",
    "image_size": "width and height",
    **dict.fromkeys(_COUNTS, "n"),
    "num_inference_steps": "steps",
    "inference_steps": "steps",
    "guidance": "guidanceScale",
    "cfg_scale": "guidanceScale",
    "format": "outputFormat",
    "response_format": "outputFormat",
    "image": "imageUrl",
    "init_image": "imageUrl",
    "image_urls": "referenceImages",
    "images": "referenceImages",
    "input_image": "imageUrl",
    "init_images": "imageUrl",
    "input_images": "referenceImages",
    "image_prompt": "imageUrl",
    "aspect": "aspectRatio",
    "ratio": "aspectRatio",
    "output_quality": "outputCompression",
    "negative": "negativePrompt",
    "mask_url": "mask",
    "mask_image": "mask",
    "loras": "imageLoras",
    "enable_safety_checker": "disableSafetyChecker",
    "extra_body": "extra",
    "text": "prompt",
    "model_id": "model",
    "model_name": "model",
}
"""Fields of other image APIs, and ours that means the same."""


_NO_SEPARATORS = str.maketrans("", "", "_-")
_RESERVED_TOGETHER = frozenset(name.replace("_", "") for name in _RESERVED)
"""Names without separators: a body may have a thousand fields, and another spelling is the same field."""


def is_reserved(name: str) -> bool:
    """Return whether an unknown field would change what the service itself decides: image count, size, model, calls."""
    together = _without_separators(name)
    return together in _RESERVED_TOGETHER or _CALLBACK.search(together) is not None


def our_name(name: str) -> str | None:
    """Return our field that means the same as another image API's; None if there is none."""
    if _CALLBACK.search(_without_separators(name)):
        return "webhook"
    spelling = to_snake(name).lower()
    return _OTHERS.get(spelling) or (spelling if spelling in _ALSO_OURS else None)


def _without_separators(name: str) -> str:
    return name.translate(_NO_SEPARATORS).lower()
