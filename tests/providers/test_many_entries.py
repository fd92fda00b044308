"""Answers with very many entries: a hundred are looked at, in each shape, since each takes time of the event loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pytest

from imagegen.providers import chat_responses, dashscope_responses, gemini_responses, response_parser
from imagegen.providers.fal_responses import JobStatus, parse_result
from imagegen.providers.large_body import LARGE_BYTES
from imagegen.providers.post import RawResponse
from imagegen.tasks.image import GivenImage

COUNT = 20_000
LINKS = [f"https://images.example/{number}.png" for number in range(COUNT)]
OBJECTS = [{"url": link} for link in LINKS]
TEXT = "A" * (LARGE_BYTES + 4)


def of_reply(body: object) -> Iterable[GivenImage]:
    return response_parser.parse_reply(200, {}, json.dumps(body).encode()).images


def of_fal(body: object) -> Iterable[GivenImage]:
    state = parse_result(RawResponse(200, {}, json.dumps(body).encode()), JobStatus("done"))
    assert state.reply is not None
    return state.reply.images


def of_gemini(body: object) -> Iterable[GivenImage]:
    return gemini_responses.parse_generation(RawResponse(200, {}, json.dumps(body).encode())).images


def of_chat(body: object) -> Iterable[GivenImage]:
    return chat_responses.parse_chat(RawResponse(200, {}, json.dumps(body).encode())).images


def of_dashscope(body: object) -> Iterable[GivenImage]:
    return dashscope_responses.parse_reply(200, {}, json.dumps(body).encode(), now_s=0.0).images


GEMINI_PARTS = [{"fileData": {"fileUri": link}} for link in LINKS]
CHAT_MESSAGE = {"message": {"images": [{"image_url": {"url": link}} for link in LINKS[:1_000]]}}
DASHSCOPE_CHOICE = {"message": {"content": [{"image": link} for link in LINKS[:100]]}}
ANSWERS: dict[str, tuple[Callable[[object], Iterable[GivenImage]], object]] = {
    "data": (of_reply, {"data": OBJECTS}),
    "data of texts": (of_reply, {"data": LINKS}),
    "images": (of_reply, {"images": LINKS}),
    "data with a large image": (of_reply, {"data": [*OBJECTS, {"b64_json": TEXT}]}),
    "texts with a large image": (of_reply, {"images": [*LINKS, TEXT]}),
    "images of fal": (of_fal, {"images": OBJECTS}),
    "parts": (of_gemini, {"candidates": [{"content": {"parts": GEMINI_PARTS}}]}),
    "candidates": (of_gemini, {"candidates": [{"content": {"parts": GEMINI_PARTS[:200]}}] * 100}),
    "choices": (of_chat, {"choices": [CHAT_MESSAGE] * 20}),
    "choices of dashscope": (of_dashscope, {"output": {"choices": [DASHSCOPE_CHOICE] * 200}}),
}


@pytest.mark.parametrize(("read", "body"), ANSWERS.values(), ids=ANSWERS)
def test_no_answer_has_more_than_some_hundred_images(
    read: Callable[[object], Iterable[GivenImage]], body: object
) -> None:
    assert 1 <= len(list(read(body))) <= 256
