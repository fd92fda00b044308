"""Definitions of the tools: names, descriptions, and schemas made from the models of the API."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from imagegen.tasks.validation import GenerationParams
from imagegen.web.max_cost import MaxCost
from imagegen.web.mcp.views import QuoteView, ToolModelsView, ToolTaskView
from imagegen.web.openapi.document import Json
from imagegen.web.openapi.json_schemas import Schemas

GENERATE, EDIT, GET, CANCEL = "generate_image", "edit_image", "get_image_task", "cancel_image_task"
MODELS, QUOTE = "list_image_models", "quote_image"

SUMMARY, FULL = "summary", "full"
DETAILS = (SUMMARY, FULL)

INSTRUCTIONS = (
    "Image generation and editing as tasks. The same arguments are always the same task: a repeated call joins it or "
    "returns its images, and pays nothing. For another image of the same prompt change seed or variant. A call returns "
    f"after at most 45 seconds; if the task is unfinished then, call {GET} with its taskId. Give users the links in "
    "urls; they expire after a day."
)

_FIELDS = (
    "prompt",
    "model",
    "width",
    "height",
    "aspect_ratio",
    "resolution",
    "n",
    "seed",
    "variant",
    "steps",
    "negative_prompt",
    "guidance_scale",
    "output_format",
    "quality",
    "background",
    "style",
    "extra",
)
_IMAGE_FIELDS = ("image_url", "reference_images", "mask")

_DETAIL: Json = {
    "type": "string",
    "enum": [*DETAILS],
    "default": SUMMARY,
    "description": "full: the images' bytes too. They take much of the context; links are in every result.",
}
_TASK_ID: Json = {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "taskId of an earlier result."}
_IMAGE_SOURCE = (
    "An https address, a data: URI, an upload: id, or the URL of an image that this service made, as a result has it."
)


class _Options(BaseModel):
    """Fields of a submit that are no parameters of the image."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)

    max_cost_usd: MaxCost | None = None


class ToolDefinition(NamedTuple):
    """A tool. view: type of its structured result."""

    name: str
    title: str
    text: str
    input_schema: Json
    view: Any
    is_read_only: bool = False
    is_destructive: bool = False


def _object(properties: Json, *required: str) -> Json:
    schema: Json = {"type": "object", "properties": properties}
    return schema | {"required": [*required]} if required else schema


_OTHERS = (
    ToolDefinition(
        GET,
        "Get an image task",
        "Wait up to 45 s for a task and return its images. Costs nothing.",
        _object({"taskId": _TASK_ID, "detail": _DETAIL}, "taskId"),
        ToolTaskView,
        is_read_only=True,
    ),
    ToolDefinition(
        CANCEL,
        "Cancel an image task",
        "Cancel an unfinished task. A call that the provider has taken may be charged all the same.",
        _object({"taskId": _TASK_ID}, "taskId"),
        ToolTaskView,
        is_destructive=True,
    ),
    ToolDefinition(
        MODELS,
        "List image models",
        "List the models with their prices, or all limits of one model.",
        _object(
            {
                "filter": {"type": "string", "maxLength": 200, "description": "Part of the names to list."},
                "model": {"type": "string", "maxLength": 200, "description": "Id of one model."},
            }
        ),
        ToolModelsView,
        is_read_only=True,
    ),
)


@cache
def tools() -> tuple[ToolDefinition, ...]:
    """Return all tools; the first call takes some milliseconds."""
    components = Schemas([GenerationParams, _Options]).components
    fields = components["GenerationParams"]["properties"]
    limit = {"maxCostUsd": components["_Options"]["properties"]["maxCostUsd"]}
    parameters = _selected(fields, _FIELDS)
    images = _selected(fields, _IMAGE_FIELDS)
    images["imageUrl"]["description"] = f"The image to edit. {_IMAGE_SOURCE}"
    generate = ToolDefinition(
        GENERATE,
        "Generate images",
        "Make images of a prompt. Waits up to 45 s. Repeating a call with the same arguments is free.",
        _object(parameters | {"detail": _DETAIL} | limit, "prompt"),
        ToolTaskView,
    )
    edit = ToolDefinition(
        EDIT,
        "Edit images",
        "Make images from a prompt and input images. Otherwise as generate_image.",
        _object(images | parameters | {"detail": _DETAIL} | limit, "prompt", "imageUrl"),
        ToolTaskView,
    )
    quote = ToolDefinition(
        QUOTE,
        "Quote images",
        "Return what the same call would pay and meet now (price, time, budget left, refusal), without making it.",
        _object(images | parameters | limit, "prompt"),
        QuoteView,
        is_read_only=True,
    )
    return (generate, edit, *_OTHERS, quote)


@cache
def listing() -> list[Json]:
    """Return the tools as `tools/list` shows them."""
    return [_shown(tool) for tool in tools()]


@cache
def encoded_listing() -> orjson.Fragment:
    """Return `listing` as it is sent: 20 KB, of which each request would take 0.5 ms to look through."""
    return orjson.Fragment(orjson.dumps(listing()))


def _shown(tool: ToolDefinition) -> Json:
    hints: Json = {"title": tool.title, "readOnlyHint": tool.is_read_only, "openWorldHint": True}
    if not tool.is_read_only:
        hints |= {"destructiveHint": tool.is_destructive, "idempotentHint": True}
    return {
        "name": tool.name,
        "title": tool.title,
        "description": tool.text,
        "inputSchema": tool.input_schema,
        "outputSchema": output_schema(tool.view),
        "annotations": hints,
    }


def output_schema(view: Any) -> Json:
    """Return the schema of a structured result, without references."""
    schemas = Schemas([view])
    with_references = schemas.of(view)
    schema = _resolved(with_references, schemas.components)
    return {name: value for name, value in schema.items() if name != "description"}


def _resolved(schema: Any, components: Json) -> Any:
    """Return a schema with the parts in place that it refers to: not all clients follow references."""
    if isinstance(schema, list):
        return [_resolved(part, components) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = components[schema["$ref"].rpartition("/")[2]]
        rest = {name: part for name, part in schema.items() if name != "$ref"}
        return _resolved(target, components) | rest
    return {name: _resolved(part, components) for name, part in schema.items()}


def _selected(fields: Json, names: tuple[str, ...]) -> Json:
    """Return the schemas of some fields, without the patterns that the service checks anyway."""
    return {name: _without_patterns(fields[name]) for name in map(to_camel, names)}


def _without_patterns(schema: Json) -> Json:
    return {
        name: _without_patterns(part) if isinstance(part, dict) else part
        for name, part in schema.items()
        if name != "pattern"
    }
