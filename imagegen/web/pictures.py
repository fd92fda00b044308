"""Owns the serving of image bytes: GET /api/images/{taskId}/{index}."""

from __future__ import annotations

import re
import time

from aiohttp import web

from imagegen.errors import ImageExpired, TaskNotFound
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task
from imagegen.web.context import CONTEXT
from imagegen.web.tasks import matches

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


async def get_picture(request: web.Request) -> web.StreamResponse:
    """One picture's bytes. Raises TaskNotFound, ImageExpired, StoreUnavailable."""
    context = request.app[CONTEXT]
    task = await context.queue.get(request.match_info["task_id"])
    image = _image(task, request.match_info["index"])
    if task is None or image is None:
        raise TaskNotFound
    if image.url:
        raise web.HTTPFound(image.url)
    version = request.query.get("v")
    if version is not None and version != image.sha256[:12]:
        raise ImageExpired
    opened = await context.store.open(task.id, image)
    if opened is None:
        raise ImageExpired
    data = await opened.read_all()
    opened.close()
    return _response(request, task, image, data)


def _image(task: Task | None, index: str) -> StoredImage | None:
    if task is None or not re.fullmatch(r"\d{1,2}", index):
        return None
    return next((image for image in task.images if image.index == int(index)), None)


def _response(request: web.Request, task: Task, image: StoredImage, data: bytes) -> web.Response:
    etag = f'"{image.sha256[:32]}"'
    extension = _EXTENSIONS.get(image.content_type, "bin")
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": _cache_control(request, task),
        "Content-Disposition": f'inline; filename="{task.id}-{image.index}.{extension}"',
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    if matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers=headers)
    wanted = _range(request, etag, len(data))
    if wanted is None:
        return web.Response(body=data, headers=headers, content_type=image.content_type)
    first, last = wanted
    if first > last:
        headers["Content-Range"] = f"bytes */{len(data)}"
        return web.Response(status=416, headers=headers)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return web.Response(status=206, body=data[first : last + 1], headers=headers, content_type=image.content_type)


def _cache_control(request: web.Request, task: Task) -> str:
    if "v" not in request.query or task.expires_at is None:
        return "no-cache"
    return f"public, max-age={max(int(task.expires_at - time.time()), 0)}, immutable"


def _range(request: web.Request, etag: str, size: int) -> tuple[int, int] | None:
    """First and last byte wanted; first > last where it can't be had; None for the whole (RFC 9110, 14.2)."""
    found = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
    if not found or found[0] == "bytes=-" or request.headers.get("If-Range", etag) != etag:
        return None
    if not found[1]:
        length = min(int(found[2]), size)
        return (size - length, size - 1) if length else (1, 0)
    first, last = int(found[1]), min(int(found[2]) if found[2] else size - 1, size - 1)
    if found[2] and int(found[2]) < first:
        return None
    return (first, last) if first < size else (1, 0)
