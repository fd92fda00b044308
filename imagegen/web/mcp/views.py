"""Types of the structured results of tools, from which their output schemas are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from imagegen.web.api.schemas import CapabilitiesView

NEXT = "call get_image_task"
"""What an agent does about a task that is unfinished."""


class ToolErrorView(TypedDict):
    """Why there is no image."""

    code: Annotated[str, Field(description="An error code of the API.")]
    message: str
    retryable: Annotated[bool, Field(description="Whether the same call may succeed later.")]
    details: NotRequired[list[str]]
    estimatedCostUsd: NotRequired[float | None]
    resetsAt: NotRequired[Annotated[str, Field(description="When the budget is reset.")]]
    retryAfterSeconds: NotRequired[int]


class ToolTaskView(TypedDict):
    """A task of images."""

    status: Literal["pending", "processing", "completed", "failed", "cancelled", "refused"]
    taskId: NotRequired[Annotated[str, Field(description="For get_image_task and cancel_image_task.")]]
    urls: NotRequired[Annotated[list[str], Field(description="Links to the images.")]]
    width: NotRequired[int | None]
    height: NotRequired[int | None]
    seed: NotRequired[Annotated[int | None, Field(description="Of the first image.")]]
    cached: NotRequired[Annotated[bool, Field(description="The images existed already: nothing was paid.")]]
    costUsd: NotRequired[Annotated[float | None, Field(description="Of the task; estimated until its end.")]]
    progress: NotRequired[Annotated[int, Field(description="Percent.")]]
    queuePosition: NotRequired[int | None]
    etaSeconds: NotRequired[float | None]
    next: NotRequired[Annotated[str, Field(description="What to do about an unfinished task.")]]
    warnings: NotRequired[list[str]]
    error: NotRequired[ToolErrorView]


class ListedModelView(TypedDict):
    """A model in short. Null: not published."""

    id: str
    usd: Annotated[float | None, Field(description="Price of an image of 1024 x 1024; null: unknown.")]
    edit: Annotated[bool | None, Field(description="Whether it takes input images.")]
    maxN: NotRequired[int | None]


class ToolModelsView(TypedDict):
    """Models that a call may name."""

    models: NotRequired[list[ListedModelView]]
    more: NotRequired[Annotated[int, Field(description="Models that are left out: use filter.")]]
    model: NotRequired[Annotated[dict[str, Any], Field(description="The limits and the price of one model.")]]
    error: NotRequired[ToolErrorView]


class QuoteView(TypedDict):
    """What a call would cost. Nothing was submitted."""

    model: NotRequired[str]
    n: NotRequired[int]
    width: NotRequired[int]
    height: NotRequired[int]
    costUsd: NotRequired[
        Annotated[float | None, Field(description="Would be paid now: 0 if cached or joins; null: unknown price.")]
    ]
    cached: NotRequired[Annotated[bool, Field(description="The images exist already.")]]
    joins: NotRequired[Annotated[bool, Field(description="The same images are being made: joining them is free.")]]
    reusedImages: NotRequired[
        Annotated[int, Field(description="Images of a call that differs only in n: not paid again.")]
    ]
    taskId: NotRequired[str]
    queuePosition: NotRequired[Annotated[int | None, Field(description="Behind the own tasks that wait; 1 is next.")]]
    etaSeconds: NotRequired[Annotated[float | None, Field(description="Time until the images; null: unknown.")]]
    budgetLeftUsd: NotRequired[Annotated[float | None, Field(description="Of today; null: no budget.")]]
    budgetResetsAt: NotRequired[Annotated[str, Field(description="When the budget is reset.")]]
    callsLeft: NotRequired[Annotated[int | None, Field(description="Of the rate limit now; null: no limit.")]]
    refusal: NotRequired[Annotated[ToolErrorView, Field(description="Why the call would be refused now.")]]
    limits: NotRequired[Annotated[CapabilitiesView | None, Field(description="Of the model; null: unknown model.")]]
    warnings: NotRequired[list[str]]
    status: NotRequired[Literal["refused"]]
    error: NotRequired[ToolErrorView]
