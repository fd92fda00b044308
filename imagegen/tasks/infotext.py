"""Text of an image's parameters in the form of AUTOMATIC1111's web UI, for the metadata of its file."""

from __future__ import annotations

import json

from imagegen import __version__
from imagegen.tasks.request import GenerationRequest


def infotext(request: GenerationRequest, *, model: str, seed: int | None, width: int, height: int) -> str:
    """Return the prompt, the negative prompt if there is one, and a last line of `name: value` with commas between.

    Readers take the last line for parameters only if it has at least three of them:
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/modules/infotext_utils.py
    So size, model and version are always there.

    Args:
        model: that made the image, which may be a fallback.
        seed: that was sent for the image, None if none was.
        width, height: of the image that was made, pixels.
    """
    scale = request.guidance_scale
    parameters = {
        "Steps": request.steps,
        "CFG scale": None if scale is None else f"{scale:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": model,
        "Version": f"imagegen {__version__}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in parameters.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Return the value, as a JSON string if a reader would cut it."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
