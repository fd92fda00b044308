"""Delivery of a response: as it should be, and in the ways in which upstreams and networks break it."""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import hdrs, web

from .together_responses import Response

Delivery = Callable[[web.BaseRequest, Response], Awaitable[web.StreamResponse]]

_CHUNK: Final = 64 * 1024
_HUGE_BYTES: Final = 40 * 1024 * 1024
_BOMB_BYTES: Final = 256 * 1024 * 1024


def response_of(answer: Response) -> web.Response:
    return web.Response(
        status=answer.status, body=answer.body, headers={hdrs.CONTENT_TYPE: answer.content_type, **answer.headers}
    )


def is_there(request: web.BaseRequest) -> bool:
    """Return whether the client is still connected."""
    return request.transport is not None and not request.transport.is_closing()


async def deliver(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    """Send a response in the way that it names. Raises ConnectionError if the client leaves meanwhile."""
    return await DELIVERIES[answer.delivery](request, answer)


async def _plain(_request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    return response_of(answer)


async def _hang(_request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    """Send nothing until the client leaves or the emulator stops, which cancels the handler."""
    await asyncio.get_running_loop().create_future()
    return response_of(answer)


async def _reset(request: web.BaseRequest, _answer: Response) -> web.StreamResponse:
    _abort(request)
    return web.Response()


async def _reset_mid_answer(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    response = await _started(request, answer, length=len(answer.body))
    await response.write(answer.body[: len(answer.body) // 2])
    _abort(request)
    return response


async def _close(request: web.BaseRequest, _answer: Response) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _trickle(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    interval_s = _number(answer, "interval_s", 0.01)
    response = await _started(request, answer, length=len(answer.body))
    for position in range(len(answer.body)):
        await response.write(answer.body[position : position + 1])
        await asyncio.sleep(interval_s)
    return response


async def _truncated(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    response = await _started(request, answer, length=len(answer.body))
    await response.write(answer.body[: len(answer.body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


async def _huge_body(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    """Send well-formed JSON with one image of `bytes` bytes."""
    response = await _started(request, answer)
    await response.write(b'{"id":"huge","model":"huge","object":"list","data":[{"index":0,"b64_json":"')
    await _stream(response, b"A" * _CHUNK, int(_number(answer, "bytes", _HUGE_BYTES)))
    await response.write(b'"}]}')
    return response


async def _endless(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    """Send the first bytes of a real image, then zeros until the client leaves."""
    response = await _started(request, answer)
    await response.write(answer.body[:128])
    while is_there(request):
        await _stream(response, bytes(_CHUNK), _CHUNK * 16)
    return response


async def _gzip_bomb(request: web.BaseRequest, answer: Response) -> web.StreamResponse:
    """Send `bytes` blanks before the good body, compressed to about a thousandth of that."""
    answer = answer.with_headers({hdrs.CONTENT_ENCODING: "gzip"})
    response = await _started(request, answer)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    blanks = b" " * (1024 * 1024)
    for _ in range(int(_number(answer, "bytes", _BOMB_BYTES)) // len(blanks)):
        await response.write(squeeze.compress(blanks) + squeeze.flush(zlib.Z_SYNC_FLUSH))
        await asyncio.sleep(0)
    await response.write(squeeze.compress(answer.body) + squeeze.flush())
    return response


async def _stream(response: web.StreamResponse, chunk: bytes, length: int) -> None:
    while length > 0:
        await response.write(chunk[:length])
        length -= len(chunk)
        await asyncio.sleep(0)


async def _started(request: web.BaseRequest, answer: Response, length: int | None = None) -> web.StreamResponse:
    headers = {hdrs.CONTENT_TYPE: answer.content_type, **answer.headers}
    response = web.StreamResponse(status=answer.status, headers=headers)
    if length is None:
        response.enable_chunked_encoding()
    else:
        response.content_length = length
    await response.prepare(request)
    return response


def _abort(request: web.BaseRequest) -> None:
    """Close with a RST and drop unsent bytes, by an SO_LINGER of 0 s."""
    transport = request.transport
    if transport is None:
        return
    endpoint = transport.get_extra_info("socket")
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _number(answer: Response, name: str, default: float) -> float:
    value = answer.options.get(name, default)
    return value if isinstance(value, (int, float)) else default


DELIVERIES: Final[Mapping[str, Delivery]] = {
    "plain": _plain,
    "hang": _hang,
    "reset": _reset,
    "reset_before_read": _reset,
    "reset_mid_answer": _reset_mid_answer,
    "close": _close,
    "trickle": _trickle,
    "truncated": _truncated,
    "huge_body": _huge_body,
    "endless": _endless,
    "gzip_bomb": _gzip_bomb,
}
