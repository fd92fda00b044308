"""Owns what clients send, as the document shows it: the models that parse, with what is parsed beside them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_snake

from imagegen.tasks.validation import GenerationParams, ModelId, Size
from imagegen.tasks.webhook import WebhookFields
from imagegen.web.api.batch import MAX_ENTRIES
from imagegen.web.openai.fields import DEFAULT_SIDE

_Model = Annotated[ModelId, Field(description="Any model id of the provider; `DEFAULT_MODEL` if absent.")]


class GenerationBody(GenerationParams):
    """A request for images. `null` is the same as absent."""

    model: _Model = ""
    webhook: Annotated[WebhookFields, Field(description="Whom to tell when the task ends.")] | None = None


class BatchBody(BaseModel):
    """Many requests for images."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[GenerationBody], Field(min_length=1, max_length=MAX_ENTRIES)]


class OpenAIBody(GenerationParams):
    """The fields of OpenAI's and of Together's image APIs. What is `null` or empty is absent, and unknown fields that
    do no harm are passed over."""

    model_config = ConfigDict(extra="allow", alias_generator=to_snake, validate_by_name=True)

    model: _Model = ""
    width: Annotated[Size, Field(description="Pixels; or by `size`.")] = DEFAULT_SIDE
    height: Annotated[Size, Field(description="Pixels; or by `size`.")] = DEFAULT_SIDE
    size: Annotated[str, Field(description=f"`WIDTHxHEIGHT`, or `auto`: {DEFAULT_SIDE}x{DEFAULT_SIDE}.")] | None = None
    aspect_ratio: Annotated[str, Field(description="Such as `16:9`, at most 4:1; of about a megapixel.")] | None = None
    response_format: Literal["url", "b64_json", "base64"] | None = None
    stream: Annotated[bool, Field(description="Answer by events, one for each image.")] | None = None
