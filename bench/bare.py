"""The least an aiohttp service can do: parse JSON, answer JSON. `python -m bench.bare PORT`."""

from __future__ import annotations

import sys

import orjson
from aiohttp import web

ANSWER = {"success": True, "status": "completed", "progress": 100, "data": [{"url": "http://localhost/picture"}]}


async def post(request: web.Request) -> web.Response:
    orjson.loads(await request.read())
    return web.Response(body=orjson.dumps(ANSWER), content_type="application/json")


async def get(_request: web.Request) -> web.Response:
    return web.Response(body=orjson.dumps(ANSWER), content_type="application/json")


if __name__ == "__main__":
    app = web.Application()
    app.router.add_post("/", post)
    app.router.add_get("/", get)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
