"""Tests of answers that come as an event stream though JSON was requested."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Awaitable, Callable

import aiohttp
import pybase64
import pytest
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.chat_responses import parse_chat
from imagegen.providers.gemini_responses import parse_generation
from imagegen.providers.post import PaidPost, RawResponse
from imagegen.providers.response_parser import parse_reply
from imagegen.tasks.image import ImageBase64, ImageBytes, ImageLink
from tests.emulated_jobs import Recorder
from tests.providers.conftest import RawServer, ReadRequest, details_of

PNG = pybase64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100)).decode()
LARGE = pybase64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(600_000)).decode()
LINK = "https://h.example/1.png"


def event(data: object, kind: str = "") -> str:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {kind}\n" if kind else "") + f"data: {text}\n\n"


def chunk(**delta: object) -> str:
    return event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]})


DONE = event("[DONE]")
PARTIAL = {"type": "image_generation.partial_image", "b64_json": "AAAA", "partial_image_index": 0}
COMPLETED = {"type": "image_generation.completed", "b64_json": PNG, "usage": {"output_tokens": 9}}
ANSWER = {"data": [{"url": LINK}], "usage": {"output_tokens": 9}}


Answered = Callable[..., Awaitable[RawResponse]]


@pytest.fixture
def answered(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> Answered:
    """Return the response to a paid POST that is answered with a body."""

    async def send(body: str, status: str = "200 OK", framing: str = "Content-Length") -> RawResponse:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            data = body.encode()
            length = f"Content-Length: {len(data)}" if framing == "Content-Length" else "Connection: close"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\n{length}\r\n\r\n".encode() + data)

        return await PaidPost(session, URL(await raw_server(serve)), {}, 20.0).send(b"{}", watcher.sent)

    return send


@pytest.mark.parametrize(
    ("stream", "count"),
    [
        (event(PARTIAL, "image_generation.partial_image") + event(COMPLETED, "image_generation.completed"), 1),
        (event(COMPLETED) + event(COMPLETED) + DONE, 2),
        (event(ANSWER) + DONE, 1),
        (": keep-alive\n\n: keep-alive\n\n" + event(ANSWER), 1),
        ("\ufeffdata: " + json.dumps(ANSWER), 1),
        ("retry: 100\r\nid: 1\r\n" + event(ANSWER).replace("\n", "\r\n"), 1),
        (event(ANSWER).replace(", ", ",\ndata: "), 1),
        (event({"status": "queued"}) + event({"status": "running"}) + event(ANSWER), 1),
        (event({"data": [{"url": LINK}]}) + event({"data": [{"url": LINK}]}), 2),
        (event({"type": "x.partial_failed", "error": {"message": "no"}}) + event(COMPLETED), 1),
        # https://www.volcengine.com/docs/82379/1541523
        (
            event({"type": "image_generation.partial_succeeded", "image_index": 0, "url": LINK})
            + event({"type": "image_generation.completed", "usage": {"output_tokens": 9}}),
            1,
        ),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length", "close"])
async def test_the_images_of_an_event_stream_are_read(
    answered: Answered, stream: str, count: int, framing: str
) -> None:
    answer = await answered(stream, framing=framing)
    reply = parse_reply(answer.status, answer.headers, answer.body)
    assert len(reply.images) == count
    assert all(image in (ImageLink(LINK), ImageBytes(pybase64.b64decode(PNG))) for image in reply.images)
    if "usage" in stream:
        assert details_of(reply).usage == {"output_tokens": 9}


async def test_a_large_image_of_an_event_stream_is_read(answered: Answered) -> None:
    answer = await answered(event(PARTIAL) + event({**COMPLETED, "b64_json": LARGE}) + DONE)
    (image,) = parse_reply(answer.status, answer.headers, answer.body).images
    assert isinstance(image, ImageBase64)
    assert bytes(image.text).decode() == LARGE


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(role="assistant", content="Here: ![a]("), chunk(content=f"{LINK[:9]}"), chunk(content=f"{LINK[9:]})")],
        [chunk(content="Here"), chunk(images=[{"type": "image_url", "image_url": {"url": LINK}}])],
        [chunk(content=[{"type": "image_url", "image_url": {"url": LINK}}])],
        [event({"choices": [{"index": 0, "message": {"content": f"![a]({LINK})"}}]})],
    ],
)
async def test_a_streamed_chat_is_one_message(answered: Answered, chunks: list[str]) -> None:
    stop = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
    answer = await answered("".join(chunks) + event(stop) + DONE)
    reply = parse_chat(answer)
    assert reply.images == (ImageLink(LINK),)
    assert details_of(reply).usage == {"output_tokens": 7}


async def test_a_large_image_in_many_pieces_of_a_chat_takes_little_time(answered: Answered) -> None:
    image = LARGE.rstrip("=") + "A" * 2_400_000
    pieces = [image[at : at + 100] for at in range(0, len(image), 100)]
    texts = ["![a](data:image/png;base64,", *pieces, ")"]
    stream = "".join(chunk(content=text) for text in texts) + DONE
    began_s = time.process_time()
    answer = await answered(stream)
    assert time.process_time() - began_s < 3
    found = [bytes(each.text).decode() for each in parse_chat(answer).images if isinstance(each, ImageBase64)]
    assert found == [image]


async def test_a_stream_of_short_lines_takes_little_memory(answered: Answered) -> None:
    tracemalloc.start()
    try:
        await answered(event(ANSWER) + "ab\n" * 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        '{"choices":[{"index":[1],"delta":{"content":"Here"}}]}',
        '{"choices":[{"index":{},"delta":[]}]}',
        '{"a":' + "[" * 400 + "]" * 400 + "}",
    ],
)
async def test_an_odd_event_is_a_response_without_an_image(answered: Answered, data: str) -> None:
    answer = await answered(event(data))
    with pytest.raises(UpstreamError):
        parse_chat(answer)


async def test_all_parts_of_a_streamed_generation_count(answered: Answered) -> None:
    text = {"candidates": [{"content": {"parts": [{"text": "Here"}]}}]}
    image = {"candidates": [{"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": PNG}}]}}]}
    end = {"candidates": [{"finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 1}}
    answer = await answered(event(text) + event(image) + event(end))
    reply = parse_generation(answer)
    assert reply.images == (ImageBytes(pybase64.b64decode(PNG)),)
    usage = details_of(reply).usage
    assert usage is not None
    assert usage["input_tokens"] == 1


@pytest.mark.parametrize(
    ("stream", "status", "code"),
    [
        (event({"error": {"message": "overloaded", "type": "server_error"}}, "error"), "200 OK", "upstream_error"),
        (event({"error": {"message": "slow", "code": "429"}}) + DONE, "200 OK", "upstream_rate_limited"),
        (event({"error": {"message": "no such key"}}), "401 Unauthorized", "upstream_auth"),
        (event(PARTIAL), "200 OK", "upstream_bad_response"),
        (event("ping") + DONE, "200 OK", "upstream_bad_response"),
        ("data: " + "x" * 300, "200 OK", "upstream_bad_response"),
    ],
)
async def test_an_event_stream_without_an_image_has_its_error(
    answered: Answered, stream: str, status: str, code: str
) -> None:
    answer = await answered(stream, status)
    with pytest.raises(UpstreamError) as caught:
        parse_reply(answer.status, answer.headers, answer.body)
    assert caught.value.code == code
