"""The least an aiohttp service can do: parse JSON, answer JSON, send bytes. `python -m bench.bare PORT [BYTES]`."""

from __future__ import annotations

import sys

import orjson
from aiohttp import web

from bench.imagehost import noise_png

ANSWER = {"success": True, "status": "completed", "progress": 100, "data": [{"url": "http://localhost/picture"}]}

IMAGE = web.AppKey("image", bytes)


async def post(request: web.Request) -> web.Response:
    orjson.loads(await request.read())
    return web.Response(body=orjson.dumps(ANSWER), content_type="application/json")


async def get(_request: web.Request) -> web.Response:
    return web.Response(body=orjson.dumps(ANSWER), content_type="application/json")


async def image(request: web.Request) -> web.Response:
    return web.Response(body=request.app[IMAGE], content_type="image/png")


if __name__ == "__main__":
    app = web.Application()
    app[IMAGE] = noise_png(int(sys.argv[2])) if len(sys.argv) > 2 else b""  # the pages of `bytes(n)` are all the same
    app.router.add_get("/image", image)
    app.router.add_post("/", post)
    app.router.add_get("/", get)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
