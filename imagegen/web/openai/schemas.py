"""Types of the JSON responses of `/v1`, as the clients of OpenAI and Together read them."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from imagegen.tasks.task import State
from imagegen.web.api.schemas import Count, Link, TaskId

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "insufficient_quota",
    "server_error",
]


class ImageEntry(TypedDict):
    """One image, as a link or as bytes."""

    index: Count
    type: Literal["url", "b64_json"]
    url: NotRequired[Link]
    b64_json: NotRequired[str]
    revised_prompt: NotRequired[str]


class TokenDetails(TypedDict):
    """Parts of a count of tokens."""

    text_tokens: Count
    image_tokens: Count


class TokenUsage(TypedDict):
    """Tokens of all calls of a task, as the upstream counted them."""

    input_tokens: Count
    input_tokens_details: TokenDetails
    output_tokens: Count
    output_tokens_details: TokenDetails
    total_tokens: Count


class ImagesResponse(TypedDict):
    """The images of a task."""

    id: TaskId
    object: Literal["list"]
    created: Annotated[Count, Field(description="Unix time.")]
    model: str
    data: list[ImageEntry]
    warnings: NotRequired[Annotated[list[str], Field(description="Changes that were made to the request.")]]
    usage: NotRequired[TokenUsage]
    size: NotRequired[str]
    quality: NotRequired[str]
    background: NotRequired[str]
    output_format: NotRequired[str]


class AcceptedResponse(TypedDict):
    """A task that goes on without its client."""

    id: TaskId
    object: Literal["image.task"]
    created: Annotated[Count, Field(description="Unix time.")]
    model: str
    status: State
    status_url: Link
    events_url: Link
    cancel_url: Annotated[Link, Field(description="Takes POST.")]


class OpenAIErrorFields(TypedDict):
    """The inside of the envelope."""

    message: Annotated[str, Field(description="For people, in English.")]
    type: ErrorType
    param: Annotated[str | None, Field(description="The field that is at fault, as the client spelled it.")]
    code: str


class OpenAIError(TypedDict):
    """An answer that is an error, in OpenAI's envelope."""

    error: OpenAIErrorFields


class LinkedImage(TypedDict):
    """An image of a task of the asynchronous routes."""

    url: Link


class AsyncResult(TypedDict):
    """The images of a task of the asynchronous routes."""

    created: Annotated[Count, Field(description="Unix time.")]
    data: list[LinkedImage]


class AsyncTask(TypedDict):
    """A task of the asynchronous routes. `result` is there once it is completed, `error` once it has failed."""

    id: TaskId
    task_id: TaskId
    object: Literal["image.generation.task"]
    status: Literal["processing", "completed", "failed"]
    created_at: Annotated[Count, Field(description="Unix time.")]
    expires_at: Annotated[Count, Field(description="Unix time.")]
    poll_url: Link
    http_status: NotRequired[Annotated[Count, Field(description="Status that the synchronous route answers.")]]
    image_url: NotRequired[Annotated[Link, Field(description="The first image.")]]
    result: NotRequired[AsyncResult]
    error: NotRequired[OpenAIErrorFields]


class ModelEntry(TypedDict):
    """A model of the provider."""

    id: str
    object: Literal["model"]
    created: Annotated[Count, Field(description="Unix time; 0 if unknown.")]
    owned_by: str
    type: Literal["image"]


class ModelList(TypedDict):
    """The models, as OpenAI's client reads them."""

    object: Literal["list"]
    data: list[ModelEntry]
