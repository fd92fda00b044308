"""Input images in the words of OpenAI's images API and of the services that speak almost the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import Base64Image, link_or_data_uri
from imagegen.providers.protocol import Call, Edits, InputImage

EditStyle = Literal["form", "objects", "numbered", "ref_images"]
"""How a service takes input images.

form: as files of a multipart form to /images/edits (OpenAI's way): https://platform.openai.com/docs/api-reference/images/createEdit
objects: as `{"url", "type"}` in JSON to /images/edits (xAI): https://docs.x.ai/developers/model-capabilities/images
numbered: `image`, `image2`, `image3` (SiliconFlow): https://docs.siliconflow.cn/en/api-reference/images/images-generations
ref_images: a list of links and base64 texts (LocalAI): https://localai.io/features/image-generation/
"""

_EDITS: Mapping[EditStyle, Edits] = {
    "form": Edits(mask=True, links=False),
    "objects": Edits(max_images=3),
    "numbered": Edits(max_images=3),
    "ref_images": Edits(),
}


def edits_of(style: EditStyle | None) -> Edits | None:
    """Return what a service of this style takes, None if it takes no input images."""
    return None if style is None else _EDITS[style]


def input_files(call: Call) -> list[tuple[str, InputImage]]:
    """Return the files of a form, by the names of their fields."""
    images = call.request.input_images
    name = "image" if len(images) == 1 else "image[]"
    sources = [(name, source) for source in images]
    if call.request.mask is not None:
        sources.append(("mask", call.request.mask))
    return [(name, call.input_bytes(source)) for name, source in sources]


def input_fields(call: Call, style: EditStyle | None) -> dict[str, object]:
    """Return the fields with the input images for a JSON body. Raises UpstreamError if the service takes none."""
    images = [call.input(source) for source in call.request.input_images]
    match style:
        case "objects":
            objects = [{"url": link_or_data_uri(image), "type": "image_url"} for image in images]
            return {"image": objects[0]} if len(objects) == 1 else {"images": objects}
        case "numbered":
            return {
                f"image{place if place > 1 else ''}": link_or_data_uri(image) for place, image in enumerate(images, 1)
            }
        case "ref_images":
            return {"ref_images": [image if isinstance(image, str) else Base64Image(image) for image in images]}
    raise UpstreamError("upstream_invalid_request", "this provider takes no input images")
