"""Routes for the clients of OpenAI and Together, with their documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec.structs import replace
from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_snake

from imagegen.errors import IdempotencyMismatch, MaxCostExceeded, QueueUnavailable, TaskNotFound, Unsupported
from imagegen.tasks.request import MAX_IMAGES
from imagegen.tasks.validation import GenerationParams, Size
from imagegen.web.api.schemas import TASK_ERRORS
from imagegen.web.openai.edits import edits, edits_async, variations
from imagegen.web.openai.error_responses import FAILED_STATUS, public_code
from imagegen.web.openai.fields import DEFAULT_SIDE
from imagegen.web.openai.generations import generations, generations_async, image_task
from imagegen.web.openai.models import get_model, list_models
from imagegen.web.openai.schemas import AcceptedResponse, AsyncTask, ImagesResponse, ModelEntry, ModelList
from imagegen.web.openai.stream import COMPLETED, EDITED
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi import samples
from imagegen.web.openapi.document import Body, EventStreamDoc, Operation, ResponseDoc, Route

COMPATIBLE, ALIASES = "OpenAI and Together", "OpenAI and Together, other bases"

_FAILURES = {
    status: tuple(public_code(code) for code in TASK_ERRORS if FAILED_STATUS.get(code, 502) == status)
    for status in sorted({502, *FAILED_STATUS.values()})
}

_OVER_BUDGET = {429: (*_FAILURES[429], "insufficient_quota")}

BASES = ("/v1", "", "/v1/v1")
"""Client versions differ in whether `/v1` is in their base URL or in the path that they add."""


class OpenAIBody(GenerationParams):
    """The fields of OpenAI's and of Together's image APIs. `null` and empty count as absent. An unknown field is sent
    to the provider unchanged; only `user`, `safety_identifier`, `metadata`, `store` and `partial_images` are ignored.
    """

    model_config = ConfigDict(extra="allow", alias_generator=to_snake, validate_by_name=True)

    model: named.ModelField = ""
    width: Annotated[Size, Field(description="Pixels; or by `size`.")] = DEFAULT_SIDE
    height: Annotated[Size, Field(description="Pixels; or by `size`.")] = DEFAULT_SIDE
    size: Annotated[str, Field(description=f"`WIDTHxHEIGHT`, or `auto`: {DEFAULT_SIDE}x{DEFAULT_SIDE}.")] | None = None
    response_format: Literal["url", "b64_json", "base64"] | None = None
    stream: Annotated[bool, Field(description="Answer by events, one for each image.")] | None = None
    max_cost_usd: named.MaxCostField | None = None


GENERATE = Operation(
    "post",
    "/v1/images/generations",
    "createImage",
    COMPATIBLE,
    "Generate images, as the clients of OpenAI and Together do",
    "The same queue as `/api/images/generate`. A repeat of a call that got no answer joins its task and pays nothing; "
    "another equal call is another image, the next `variant` of the request, unless it has a `seed`. A repeat has "
    "`x-stainless-retry-count` above 0 or the same `Idempotency-Key`, or the same client's earlier equal call ended "
    "without its answer. `V1_REUSE=always` makes equal calls one task.\n\n"
    "The answer comes when the images are there. An SDK that sends its timeout gets a 503 `unfinished` with "
    "`retry-after` a little before it would give up, any other client after `V1_MAX_WAIT`; the task goes on. "
    "With `V1_KEEPALIVE=true` other clients are sent spaces meanwhile: then a late error comes as `error` in a 200. "
    "A failed task has `x-should-retry: false`: a client's own repeat gets the same failure and starts no attempt.\n\n"
    "No size given is 1024x1024. No `response_format` given is `b64_json` for models with `gpt-image` or "
    "`chatgpt-image` in their name, else `url`; `V1_RESPONSE_FORMAT` sets it. "
    "With `stream: true` the images come as events `image_generation.completed`.",
    (
        ResponseDoc(
            200,
            "The images; by `stream: true` as events.",
            ImagesResponse,
            {"links": samples.IMAGES},
            ("Cache-Control",),
            events=EventStreamDoc((COMPLETED, "error"), None, samples.IMAGE_EVENTS),
        ),
        ResponseDoc(
            202,
            "Accepted: the client sent `Prefer: respond-async`.",
            AcceptedResponse,
            {"accepted": samples.ACCEPTED},
            ("Location", "Preference-Applied", "Retry-After"),
        ),
    ),
    (
        named.PREFER_ASYNC,
        named.WAIT,
        named.READ_TIMEOUT,
        named.RETRY_COUNT,
        named.CACHE_CONTROL,
        named.IDEMPOTENCY_KEY,
    ),
    Body(OpenAIBody, {"plain": samples.OPENAI_REQUEST}),
    (*named.SUBMIT_ERRORS, *named.INPUT_ERRORS, IdempotencyMismatch, MaxCostExceeded),
    _FAILURES | _OVER_BUDGET | {409: ("cancelled",), 503: (*_FAILURES[503], "unfinished")},
    limit="generation",
    envelope="openai",
)

_ASYNC_ACCEPTED = ResponseDoc(
    202,
    "Accepted: poll the task.",
    AsyncTask,
    {"accepted": samples.ASYNC_TASK},
    ("Location", "Retry-After"),
)

GENERATE_ASYNC = Operation(
    "post",
    "/v1/images/generations/async",
    "createImageTask",
    COMPATIBLE,
    "Generate images, and poll for them",
    "The same as `POST /v1/images/generations`, but the answer comes at once: poll `poll_url` until `status` is "
    "`completed` or `failed`. `stream` and `response_format` have no effect: the images are links.",
    (_ASYNC_ACCEPTED,),
    (named.CACHE_CONTROL, named.IDEMPOTENCY_KEY),
    Body(OpenAIBody, {"plain": samples.OPENAI_REQUEST}),
    (*named.SUBMIT_ERRORS, *named.INPUT_ERRORS, IdempotencyMismatch, MaxCostExceeded),
    _OVER_BUDGET,
    limit="generation",
    envelope="openai",
)

IMAGE_TASK = Operation(
    "get",
    "/v1/images/tasks/{taskId}",
    "getImageTask",
    COMPATIBLE,
    "Read a task of the asynchronous routes",
    "Any task of the service by its id. `http_status` is the status that the synchronous route answers.",
    (
        ResponseDoc(
            200,
            "The task in its present state.",
            AsyncTask,
            {"processing": samples.ASYNC_TASK, "completed": samples.ASYNC_TASK_COMPLETED},
            ("Retry-After",),
        ),
    ),
    (named.TASK,),
    errors=(TaskNotFound, QueueUnavailable),
    limit="general",
    envelope="openai",
)

MODELS = Operation(
    "get",
    "/v1/models",
    "listModels",
    COMPATIBLE,
    "List the models",
    "The models of the provider, cached for five minutes, those of the model table that have not ended, "
    "aliases and fallbacks. Together's client, recognised by its `User-Agent`, gets a bare array.",
    (
        ResponseDoc(
            200,
            "The models.",
            ModelList | list[ModelEntry],
            {"one": {"object": "list", "data": [samples.MODEL_ENTRY]}},
        ),
    ),
    limit="general",
    envelope="openai",
)

MODEL = Operation(
    "get",
    "/v1/models/{modelId}",
    "getModel",
    COMPATIBLE,
    "Read one model",
    "",
    (ResponseDoc(200, "The model.", ModelEntry, {"one": samples.MODEL_ENTRY}),),
    (named.MODEL,),
    failures={404: ("model_not_found",)},
    limit="general",
    envelope="openai",
)


_LINK = {
    "type": "string",
    "description": "An http(s) address, a `data:image/` URI, or an `uploadId`.",
    "examples": ["https://example.com/lighthouse.png"],
}
_UPLOAD_ID = {"type": "string", "description": "An `uploadId`.", "examples": [samples.UPLOAD["uploadId"]]}
_ENTRY = {"anyOf": [_LINK, {"type": "object", "properties": {"image_url": _LINK, "file_id": _UPLOAD_ID}}]}
_ENTRIES = {"type": "array", "items": _ENTRY, "maxItems": MAX_IMAGES}
_EDIT_FORM = {
    "type": "object",
    "required": ["image", "prompt"],
    "properties": {
        "image": {
            **named.FILE_BYTES,
            "description": "One file, or up to 16 as repeated `image` or `image[]`; or a link.",
        },
        "mask": {**named.FILE_BYTES, "description": "PNG, transparent where the image is to be changed."},
        "prompt": {
            "type": "string",
            "description": "What to change.",
            "example": "make it night",
            "examples": ["make it night"],
        },
    },
    "additionalProperties": {"type": "string", "description": "Each other field of a generation, as text."},
}


class OpenAIEditBody(OpenAIBody):
    """The fields of a generation, and the images to start from."""

    images: Annotated[Any, WithJsonSchema(_ENTRIES)] = None
    image: Annotated[Any, WithJsonSchema({"anyOf": [_ENTRY, _ENTRIES]})] = None
    mask: Annotated[Any, WithJsonSchema(_ENTRY)] = None


EDIT = replace(
    GENERATE,
    path="/v1/images/edits",
    name="editImage",
    summary="Edit images, as the clients of OpenAI and Together do",
    text="A generation that starts from images: up to 16 files of a form, which become uploads as they come, or links "
    "in JSON. From there it is the same request as with `imageUrl`, `referenceImages` and `mask` on "
    "`/api/images/generate`, with the answers of `/v1/images/generations`. A provider or model that takes no input "
    "images, fewer of them, or no mask is a 400. With `stream: true` the events are `image_edit.completed`.",
    answers=(
        replace(GENERATE.answers[0], events=EventStreamDoc((EDITED, "error"), None, samples.EDIT_EVENTS)),
        *GENERATE.answers[1:],
    ),
    body=Body(OpenAIEditBody, {"links": samples.EDIT_REQUEST}, others={"multipart/form-data": _EDIT_FORM}),
)

EDIT_ASYNC = replace(
    GENERATE_ASYNC,
    path="/v1/images/edits/async",
    name="editImageTask",
    summary="Edit images, and poll for them",
    text="The same as `POST /v1/images/edits`, with the answer of `POST /v1/images/generations/async`.",
    body=EDIT.body,
)

VARIATIONS = Operation(
    "post",
    "/v1/images/variations",
    "createImageVariation",
    COMPATIBLE,
    "Refuse image variations",
    "No upstream has them any more: use `/v1/images/edits`.",
    (),
    errors=(Unsupported,),
    limit="general",
    envelope="openai",
)


_ROUTES = (
    (GENERATE, generations),
    (GENERATE_ASYNC, generations_async),
    (EDIT, edits),
    (EDIT_ASYNC, edits_async),
    (VARIATIONS, variations),
    (IMAGE_TASK, image_task),
    (MODELS, list_models),
    (MODEL, get_model),
)


def _under_every_base() -> Iterator[Route]:
    yield from _ROUTES
    for number, base in enumerate(BASES[1:], start=2):
        for operation, handler in _ROUTES:
            alias = replace(
                operation,
                path=f"{base}{operation.path.removeprefix('/v1')}",
                name=f"{operation.name}{number}",
                tag=ALIASES,
                text=f"The same as `{operation.path}`.",
            )
            yield alias, handler


ROUTES: tuple[Route, ...] = tuple(_under_every_base())
