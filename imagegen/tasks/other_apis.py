"""Names of fields in other image APIs: ours that mean the same, and those that no client may send."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
_RESERVED = _ALSO_OURS.union(_COUNTS, ("size", "image_size", "stream", "response_format", "max_cost_usd"))

_OUR_NAMES: Mapping[str, str] = {
    "prompt": "text text_prompt prompt_text positive_prompt positive description caption query inputs instruction "
    "instructions",
    "model": "model_id model_name model_version version engine engine_id base_model checkpoint sd_model_checkpoint",
    "width and height": "size image_size dimensions image_dimensions target_size megapixels",
    "width": "w image_width img_width",
    "height": "h image_height img_height",
    "aspectRatio": "aspect ratio image_aspect_ratio",
    "resolution": "image_resolution sample_image_size output_resolution",
    "n": " ".join(_COUNTS) + " count num number quantity amount images_count number_results num_results max_images",
    "steps": "num_inference_steps inference_steps sampling_steps sample_steps num_steps num_sampling_steps step_count "
    "iterations",
    "seed": "random_seed noise_seed manual_seed seed_value",
    "guidanceScale": "guidance cfg cfg_scale cfg_guidance guidance_strength",
    "outputFormat": "format response_format file_format image_format output_type file_type extension mime_type "
    "output_mime_type response_extension",
    "outputCompression": "output_quality jpeg_quality webp_quality compression_quality",
    "imageUrl": "image init_image init_images input_image input_image_url image_prompt image_base64 source_image "
    "src_image base_image base_image_url seed_image start_image img img_url",
    "referenceImages": "images image_urls input_images image_input reference_image reference_image_url "
    "reference_image_urls ref_image ref_images ref_img ref_images_url",
    "mask": "mask_url mask_image mask_image_url mask_base64 mask_img",
    "negativePrompt": "negative negative_text undesired undesired_content uc exclude",
    "imageLoras": "loras lora lora_weights lora_url lora_scale hf_lora extra_lora",
    "style": "style_preset preset_style style_type style_id styles",
    "background": "transparent transparent_bg transparent_background",
    "moderation": "moderation_level",
    "disableSafetyChecker": "enable_safety_checker safety_checker nsfw nsfw_filter safe_mode",
    "promptUpsampling": "prompt_extend enhance_prompt expand_prompt prompt_enhancement prompt_optimizer "
    "prompt_upsample upsample_prompt magic_prompt magic_prompt_option",
    "maxCostUsd": "max_cost_usd",
    "extra": "extra_body extra_params additional_params",
    "referenceImages, after imageUrl": " ".join(
        f"image{number} image_{number} input_image_{number}" for number in range(2, 10)
    ),
}
"""Our fields, and the names that mean the same in other APIs: OpenAI, Together, fal, Replicate, Stability,
AUTOMATIC1111, DashScope, Black Forest Labs, SiliconFlow, Google, Ideogram, Leonardo, Runware."""

_NO_SEPARATORS = str.maketrans("", "", "_-")


def _without_separators(name: str) -> str:
    """Return a name as all its spellings are: a body may have a thousand fields, and one look-up a field is quick."""
    return name.translate(_NO_SEPARATORS).lower()


_OTHERS = {name: name for name in _ALSO_OURS} | {
    _without_separators(name): ours for ours, names in _OUR_NAMES.items() for name in names.split()
}

_WRAPPERS = ("input", "parameters", "generation_config", "instances", "output_options", "params", "data", "body")
_ADVICE = {
    **dict.fromkeys(_WRAPPERS, "send the fields in it without it, next to the prompt"),
    **dict.fromkeys(("messages", "contents", "text_prompts"), "send one text as prompt"),
    **dict.fromkeys(("prompts", "requests"), "POST /api/images/batch takes several requests"),
    **dict.fromkeys(("idempotency_key", "request_id"), "send the header Idempotency-Key"),
    **dict.fromkeys(("api_key", "key", "token", "access_token", "authorization"), "send the header Authorization"),
    **dict.fromkeys(("wait", "sync", "sync_mode", "timeout", "async"), "add ?wait=N to the address to wait N seconds"),
    **dict.fromkeys(("stream", "partial_images"), "follow the eventsUrl of the answer"),
    **dict.fromkeys(("user", "metadata", "store", "safety_identifier", "priority", "id"), "leave it out"),
}
"""What to do with fields of other APIs that have no field here."""

_ADVICE_BY_NAME = {_without_separators(name): advice for name, advice in _ADVICE.items()}

_RESERVED_TOGETHER = frozenset(_without_separators(name) for name in _RESERVED)


def is_reserved(name: str) -> bool:
    """Return whether an unknown field would change what the service itself decides: image count, size, model, calls."""
    together = _without_separators(name)
    return together in _RESERVED_TOGETHER or _CALLBACK.search(together) is not None


def our_name(name: str) -> str | None:
    """Return our field that means the same as another image API's; None if there is none."""
    return _our_name(_without_separators(name))


def advice_for(name: str) -> str | None:
    """Return what to do with an unknown field that other image APIs have; None if none of them has it."""
    together = _without_separators(name)
    if ours := _our_name(together):
        return f"did you mean {ours}?"
    return _ADVICE_BY_NAME.get(together)


def _our_name(together: str) -> str | None:
    return "webhook" if _CALLBACK.search(together) else _OTHERS.get(together)
