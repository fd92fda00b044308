"""Tests of JSON bodies: accepted forms, and the error for each other form."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st

from imagegen.errors import ApiError, BadRequest, BodyTimeout, BodyTooLarge, InvalidJson, UnsupportedMediaType
from imagegen.web.http.body import parse_object, read_body
from tests.support import LoopTime, examples, over_rows

JSON_TYPE = {"Content-Type": "application/json"}


async def read_json(request: web.Request, **limits: Any) -> dict[str, Any]:
    return parse_object(await read_body(request, **limits))


def nested(levels: int, opening: str = '{"a":', closing: str = "}") -> bytes:
    return f"{opening * levels}1{closing * levels}".encode()


@pytest.fixture
async def protocol() -> BaseProtocol:
    protocol = BaseProtocol(asyncio.get_running_loop())
    protocol.connection_made(Mock(spec=asyncio.Transport))
    return protocol


@pytest.fixture
async def stream(protocol: BaseProtocol) -> StreamReader:
    return StreamReader(protocol, 2**16, loop=asyncio.get_running_loop())


def request_with(stream: StreamReader, **headers: str) -> web.Request:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("POST", "/", headers=JSON_TYPE | names, payload=stream)


@over_rows(
    ("body", "parsed"),
    [
        (b"{}", {}),
        (b' \n{"prompt":"a cat","n":2,"seed":null} ', {"prompt": "a cat", "n": 2, "seed": None}),
        ('{"prompt":"一只猫: 画"}'.encode(), {"prompt": "一只猫: 画"}),
        (b'{"prompt":"\\ud83d\\ude00"}', {"prompt": "😀"}),
        (b'{"width":512.0,"guidanceScale":3.5}', {"width": 512.0, "guidanceScale": 3.5}),
        (b'{"seed":9223372036854775807}', {"seed": 2**63 - 1}),
        (b'{"a":{"b":[1,{"c":2}]},"d":[]}', {"a": {"b": [1, {"c": 2}]}, "d": []}),
        (b'{"a":[{"b":1},{"b":1}],"b":1}', {"a": [{"b": 1}, {"b": 1}], "b": 1}),
    ],
)
def test_a_plain_object_is_read(body: bytes, parsed: dict[str, Any]) -> None:
    assert parse_object(body) == parsed


@over_rows(
    ("body", "reason"),
    [
        (b"", "is empty: send an object"),
        (b" \n", "is empty"),
        (b"{", "it ends too early, at line 1, column"),
        (b'{"a":"cut', "ends too early"),
        (b'{"a":1} trailing', "something follows after the object, at line 1, column 9"),
        (b'{"a":1}{"b":2}', "something follows"),
        (b"prompt=a+cat&n=2", "it is a form"),
        (b"webhook[url]=x", "it is a form"),
        (b"{'a':1}", "double quotes, at line 1, column 2"),
        (b"{\"a\":'b'}", "double quotes"),
        ('{"a":\u201cb\u201d}'.encode(), "straight double quotes"),
        (b"{a:1}", "names of fields need double quotes"),
        (b'{"a":1,\n "b":2,\n}', "comma before a closing bracket, at line 2, column 7"),
        (b'{"a":[1,]}', "comma before a closing bracket"),
        (b'{\n"a":NaN}', "no NaN and no Infinity, at line 2, column 5"),
        (b'{"a":Infinity}', "no Infinity"),
        (b'{"a":-Infinity}', "no Infinity, at line 1, column 6"),
        (b'{"a":True}', "write true, false or null"),
        (b'{"a":None}', "write true, false or null"),
        (b'{"a":undefined}', "write true, false or null"),
        (b'{"a":1 // one\n}', "no comments"),
        (b'{"a":1\n"b":2}', "a comma or a closing bracket is missing, at line 2, column 1"),
        (b'{"a" 1}', "a colon is missing"),
        (b'{"a":01}', "such as 7, -7 or 0.7"),
        (b'{"a":.5}', "such as 7, -7 or 0.7"),
        (b'{"a":"C:\\x"}', "write \\\\ for a backslash"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"a":"\\udc00 x"}', "surrogate"),
        (b'{"\\ud800":1}', "surrogate"),
        (b'{"a":"\n"}', "write \\n for a line break"),
        (b"<html>", "can't be parsed, at line 1, column 1"),
        (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
        (b'{\n"a":"\xff"}', "UTF-8: send it encoded as UTF-8, at line 2, column 6"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"a":1}'.decode().encode("utf-16"), "UTF-8"),
        (b'{"a":1}'.decode().encode("utf-16-le"), "UTF-8"),
        (b'"{\\"a\\":1}"', "encode the object only once"),
        (b"[]", "not an object"),
        (b'"text"', "not an object"),
        (b"null", "not an object"),
        (b"[" * 100_000, "levels deep"),
        (nested(33), "levels deep"),
        (nested(400), "levels deep"),
        (b'{"a":' + nested(32, "[", "]") + b"}", "levels deep"),
        (b'{"a":1,"a":2}', "comes twice"),
        (b'{"a":1,"\\u0061":2}', "comes twice"),
        (b'{"a":{"b":1,"b":2}}', "comes twice"),
        (b'{"a":[{"b":1,"b":2}],"c":1}', "comes twice"),
        (b'{"a":1e400}', "number"),
        (b'{"a":-1e400}', "number"),
        (b'{"a":18446744073709551616}', "number"),
        (b'{"a":-9223372036854775809}', "number"),
        (b'{"a":' + b"9" * 5000 + b"}", "number"),
        (b'{"a":0.' + b"1" * 5000 + b"}", "number"),
        (b'{"a":1.' + b"0" * 40 + b"}", "number"),
    ],
)
def test_everything_else_is_invalid_json_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJson) as refused:
        parse_object(body)
    assert reason in refused.value.message("en")
    assert refused.value.message("zh").startswith("请求体不是有效的JSON：")
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


@over_rows("body", [nested(32), b'{"a":' + nested(31, "[", "]") + b"}"])
def test_thirty_two_levels_are_allowed(body: bytes) -> None:
    assert parse_object(body) == json.loads(body)


def test_the_reason_quotes_nothing_of_the_body() -> None:
    with pytest.raises(InvalidJson) as refused:
        parse_object(b'{"secret-of-another":1,"secret-of-another":2}')
    assert "secret" not in refused.value.message("en") + refused.value.message("zh")


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=examples(40), deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), _values, max_size=4), st.booleans())
def test_every_valid_object_parses_like_the_standard_library(value: dict[str, Any], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON;Charset=UTF-8",
        'application/json; charset="utf-8"',
        "application/json;",
        "application/json; odata.metadata=minimal; charset=utf-8",
        'application/json; profile="https://example.com/a"',
    ],
)
async def test_json_in_utf8_is_the_right_content_type(stream: StreamReader, content_type: str) -> None:
    stream.feed_data(b'{"a":1}')
    stream.feed_eof()
    assert await read_json(request_with(stream, Content_Type=content_type)) == {"a": 1}


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/json, text/plain",
        "application/json; charset=latin-1",
        "application/json; charset=nonsense",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ],
)
async def test_another_content_type_is_415(stream: StreamReader, content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_json(request_with(stream, Content_Type=content_type))


async def test_no_content_type_is_415(stream: StreamReader) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_json(make_mocked_request("POST", "/", payload=stream))


@pytest.mark.parametrize("encoding", ["gzip", "identity", "br", ""])
async def test_any_content_encoding_is_415(stream: StreamReader, encoding: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_json(request_with(stream, Content_Encoding=encoding))


async def test_a_declared_length_over_the_limit_is_rejected_unread(stream: StreamReader) -> None:
    with pytest.raises(BodyTooLarge) as refused:
        await read_json(request_with(stream, Content_Length="101"), max_bytes=100)
    assert refused.value.closes_connection
    assert "100" in refused.value.message("zh")


async def test_an_undeclared_body_is_rejected_once_over_the_limit(stream: StreamReader) -> None:
    reading = asyncio.ensure_future(read_json(request_with(stream), max_bytes=100))
    for _ in range(11):
        stream.feed_data(b"x" * 10)
        await asyncio.sleep(0)
    with pytest.raises(BodyTooLarge):
        await asyncio.wait_for(reading, 20)


async def test_a_body_of_exactly_the_limit_is_read(stream: StreamReader) -> None:
    stream.feed_data(b'{"a":"' + b"x" * 92 + b'"}')
    stream.feed_eof()
    assert await read_json(request_with(stream), max_bytes=100) == {"a": "x" * 92}


async def test_a_body_in_pieces_is_read(stream: StreamReader) -> None:
    reading = asyncio.ensure_future(read_json(request_with(stream)))
    for piece in (b'{"prom', b'pt":"a', b' cat"}'):
        await asyncio.sleep(0)
        stream.feed_data(piece)
    stream.feed_eof()
    assert await asyncio.wait_for(reading, 20) == {"prompt": "a cat"}


async def test_a_stalled_body_times_out_and_closes(stream: StreamReader) -> None:
    stream.feed_data(b'{"a"')
    with pytest.raises(BodyTimeout) as refused:
        await read_json(request_with(stream), timeout_s=0.05)
    assert refused.value.closes_connection


async def test_a_trickling_body_times_out(stream: StreamReader) -> None:
    time = LoopTime()
    reading = asyncio.ensure_future(read_json(request_with(stream), timeout_s=100.0))
    await time.move(0.0)  # it begins
    for _ in range(11):
        stream.feed_data(b" ")
        await time.move(50.0)
    assert not reading.done()
    stream.feed_data(b" ")
    await time.move(50.0)
    with pytest.raises(BodyTimeout):
        await asyncio.wait_for(reading, 20)  # sooner than without a byte


async def test_bad_framing_in_the_body_is_a_bad_request(stream: StreamReader) -> None:
    stream.set_exception(web.RequestPayloadError("b'zz'"))
    with pytest.raises(BadRequest) as refused:
        await read_json(request_with(stream))
    assert isinstance(refused.value, ApiError)
    assert "zz" not in refused.value.message("en")


async def test_a_client_that_leaves_before_its_body_is_a_lost_connection(
    stream: StreamReader, protocol: BaseProtocol
) -> None:
    protocol.connection_lost(None)
    with pytest.raises(ConnectionError):
        await read_json(request_with(stream))
