"""Owns what is said of the routes for the clients of OpenAI and Together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from imagegen.errors import Draining, QueueFull, QueueUnavailable, StoreUnavailable
from imagegen.web.api.schemas import TASK_ERRORS
from imagegen.web.openai.errors import FAILED_STATUS
from imagegen.web.openai.routes import BASES
from imagegen.web.openai.schemas import AcceptedResponse, ImagesResponse, ModelEntry, ModelList
from imagegen.web.openai.stream import COMPLETED
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi import samples
from imagegen.web.openapi.bodies import OpenAIBody
from imagegen.web.openapi.parts import Body, EventStream, Operation, ResponseDoc

COMPATIBLE, ALIASES = "OpenAI and Together", "OpenAI and Together, other bases"

_FAILURES = {
    status: tuple(code for code in TASK_ERRORS if FAILED_STATUS.get(code, 502) == status)
    for status in sorted({502, *FAILED_STATUS.values()})
}

GENERATE = Operation(
    "post",
    "/v1/images/generations",
    "createImage",
    COMPATIBLE,
    "Generate images, as OpenAI's and Together's clients ask for them",
    "The same queue as `/api/images/generate`: the same canonical request is the same task, so a client that times out "
    "and repeats its POST joins the task that runs, and pays once. The answer comes when the images are there; a "
    "little before the client would give up it is a 503 `unfinished` with `retry-after`, and the task goes on. "
    "A failed task has `x-should-retry: false`: a client's own repeat gets the same failure and starts no attempt.\n\n"
    "No size given is 1024x1024. With `stream: true` the images come as events `image_generation.completed`.",
    (
        ResponseDoc(
            200,
            "The images; by `stream: true` as events.",
            ImagesResponse,
            {"links": samples.IMAGES},
            ("Cache-Control",),
            events=EventStream((COMPLETED, "error"), None, samples.IMAGE_EVENTS),
        ),
        ResponseDoc(
            202,
            "Asked for by `Prefer: respond-async`.",
            AcceptedResponse,
            {"accepted": samples.ACCEPTED},
            ("Location", "Preference-Applied", "Retry-After"),
        ),
    ),
    (named.PREFER_ASYNC, named.WAIT, named.READ_TIMEOUT, named.CACHE_CONTROL),
    Body(OpenAIBody, {"plain": samples.OPENAI_REQUEST}),
    (QueueUnavailable, QueueFull, Draining, StoreUnavailable),
    _FAILURES | {409: ("cancelled",), 503: (*_FAILURES[503], "unfinished")},
    budgets=("general", "generation"),
    envelope="openai",
)

MODELS = Operation(
    "get",
    "/v1/models",
    "listModels",
    COMPATIBLE,
    "List the provider's models",
    "The provider is asked every few minutes at most. Together's client, known by its `User-Agent`, gets a bare array.",
    (
        ResponseDoc(
            200,
            "The models.",
            ModelList | list[ModelEntry],
            {"one": {"object": "list", "data": [samples.MODEL_ENTRY]}},
        ),
    ),
    budgets=("general",),
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
    budgets=("general",),
    envelope="openai",
)


def _under_every_base() -> Iterator[Operation]:
    for number, base in enumerate(BASES):
        for one in (GENERATE, MODELS, MODEL):
            path = one.path.removeprefix("/v1")
            yield (
                one
                if not number
                else replace(
                    one,
                    path=f"{base}{path}",
                    name=f"{one.name}{number + 1}",
                    tag=ALIASES,
                    text=f"The same as `{one.path}`.",
                )
            )


OPERATIONS = tuple(_under_every_base())
