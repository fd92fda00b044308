"""Tests of large responses: their base64 stays in the body, and the memory of bodies is bounded."""

from __future__ import annotations

import gc
import json
import os

import aiohttp
import pybase64
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from imagegen.byte_budget import ByteBudget
from imagegen.errors import UpstreamError
from imagegen.providers import large_body, response_body
from imagegen.providers.large_body import LargeBody, parse_large
from imagegen.providers.post import PaidPost
from imagegen.providers.response_parser import parse_reply
from imagegen.tasks.image import ImageBase64, ImageLink
from tests.support import over_rows

DATA = os.urandom(600_001)
TEXT = pybase64.b64encode(DATA).decode()


def decoded(image: object) -> bytes:
    assert isinstance(image, ImageBase64)
    text = bytes(image.text)
    return pybase64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


@over_rows("name", ["b64_json", "base64", "image", "url"])
@over_rows("place", ["data", "images"])
@over_rows("form", [TEXT, TEXT.rstrip("="), f"data:image/png;base64,{TEXT}", "\n".join([TEXT[:400], TEXT[400:]])])
def test_the_base64_of_a_large_response_is_found_without_a_copy(name: str, place: str, form: str) -> None:
    body = json.dumps({"created": 1, place: [{name: form, "index": 0}], "usage": {"a": [1]}}).encode()
    (image,) = parse_reply(200, {}, body).images
    assert decoded(image) == DATA


def test_escaped_slashes_and_plain_texts_are_read() -> None:
    body = json.dumps({"images": [TEXT, TEXT]}).replace("/", "\\/").encode()
    assert [decoded(image) for image in parse_reply(200, {}, body).images] == [DATA, DATA]
    body = json.dumps({"images": [TEXT], "info": "x"}).encode()
    assert decoded(parse_reply(200, {}, body).images[0]) == DATA
    assert decoded(parse_reply(200, {}, body.replace(b'"x"', b"NaN")).images[0]) == DATA


@pytest.mark.parametrize("place", ["data", "images"])
def test_a_large_text_without_escapes_is_found_without_parsing_it(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(large_body, "_read_entries", None)
    monkeypatch.setattr(large_body, "_read_texts", None)
    prompts = ['a "cat" \\', "\\\\", '"', "", "\u00e9\n"]
    entries = [{"revised_prompt": prompt, "b64_json": TEXT, "seed": 1} for prompt in prompts]
    for entry in (*entries, TEXT):
        images = parse_reply(200, {}, LargeBody(json.dumps({"id": '\\"', place: [entry, entry]}).encode())).images
        assert [decoded(image) for image in images] == [DATA, DATA]


@over_rows(
    "rest",
    [{"tags": ["x"] * 5_000}, {"note": '"' * 3_000}, {"numbers": [1_000] * 60_000}],
)
@over_rows("rest_first", [True, False])
def test_a_body_with_other_large_fields_is_read(rest: dict[str, object], rest_first: bool) -> None:
    image: dict[str, object] = {"data": [{"b64_json": TEXT}]}
    body = json.dumps(rest | image if rest_first else image | rest).encode()
    assert large_body._cut_texts(body) is None
    assert decoded(parse_reply(200, {}, body).images[0]) == DATA


def test_links_next_to_large_or_missing_fields_are_read() -> None:
    items = [{"url": "https://a/b", "b64_json": None}, {"b64_json": TEXT, "url": "https://a/c"}, {"other": 1}]
    images = parse_reply(200, {}, json.dumps({"data": items}).encode()).images
    assert images[0] == ImageLink("https://a/b")
    assert decoded(images[1]) == DATA
    assert len(images) == 2


@over_rows("body", [b"[" * 300_000, b'{"data":7}', b'{"data":[]}', b'{"data":[{"b64_json":"'])
def test_a_body_without_an_image_list_is_parsed_normally(body: bytes) -> None:
    assert parse_large(body) is None


def test_a_large_response_without_an_image_list_is_parsed_normally() -> None:
    body = LargeBody(
        json.dumps({"error": {"message": "very long " * 40_000, "type": "invalid_request_error"}}).encode()
    )
    with pytest.raises(UpstreamError, match="very long"):
        parse_reply(400, {}, body)
    body = LargeBody(json.dumps({"data": [{"url": "https://a/b"}], "more": "x" * 300_000}).encode())
    assert parse_reply(200, {}, body).images == (ImageLink("https://a/b"),)
    with pytest.raises(UpstreamError):
        parse_reply(200, {}, LargeBody(b"<html>" * 100_000))


@pytest.mark.parametrize("form", ["whole", "chunked", "gzip"])
async def test_a_large_body_is_counted_until_its_last_image_is_freed(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        response = web.json_response({"data": [{"b64_json": TEXT}]})
        if form == "chunked":
            response.enable_chunked_encoding()
        elif form == "gzip":
            response.enable_compression(web.ContentCoding.gzip)
        return response

    budget = ByteBudget()
    monkeypatch.setattr(response_body, "_bodies", budget)
    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app, host="127.0.0.1") as server, aiohttp.ClientSession() as session:
        url = URL(f"http://127.0.0.1:{server.port}/")
        answered = await PaidPost(session, url, {}, 10.0).send(b"{}", lambda: None)
    assert isinstance(answered.body, LargeBody)
    assert budget.held >= len(answered.body) > len(TEXT)
    reply = parse_reply(answered.status, answered.headers, answered.body)
    del answered
    gc.collect()
    assert budget.held > len(TEXT)
    assert decoded(reply.images[0]) == DATA
    del reply
    gc.collect()
    assert budget.held == 0
