"""Route of image bytes and thumbnails: GET and HEAD /api/images/{taskId}/{index}."""

from __future__ import annotations

import re

from aiohttp import hdrs, web

from imagegen.errors import FieldError, ImageExpired, ImageNotFound, InvalidRequest, TaskNotFound
from imagegen.images.thumbnails import SIZES, ThumbnailSpec
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.image_sending import ImageSender
from imagegen.web.http.responses import etag_matches, is_other_version
from imagegen.web.lookup import find_fresh_task, find_task

IMAGE_SENDER = web.AppKey("image_sender", ImageSender)

_INDEX = re.compile(r"0|[1-9][0-9]?")
_OWN_QUERY = re.compile(r"v=([0-9a-f]{12})(?:&exp=[0-9]{1,12}&sig=[\w-]{22})?")
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE | re.ASCII)
_MAX_DIGITS = 18
_SIZES = {str(size): size for size in SIZES}


async def get_image(request: web.Request) -> web.StreamResponse:
    """Send one image's bytes, or those of its thumbnail.

    Raises: TaskNotFound, ImageNotFound, ImageExpired, StoreUnavailable, QueueUnavailable. For a thumbnail also
    InvalidRequest, UnsupportedImage.
    """
    size = _thumbnail_size(request)
    services = request.app[SERVICES]
    task = await find_task(request)
    image = _image(task, request.match_info["index"])
    if task is not None and image is None and services.queue.may_be_outdated(task.id):
        task = await find_fresh_task(request)  # a link of another instance comes at once
        image = _image(task, request.match_info["index"])
    if task is None:
        raise TaskNotFound
    if image is None:
        raise ImageNotFound
    if image.url:
        raise web.HTTPFound(image.url)
    version = _version(request)
    if version is not None and version != image.sha256[:12]:
        raise ImageExpired
    if size is not None:
        return await _thumbnail(request, services, task, ThumbnailSpec(task.id, image, size, task.expires_at))
    return await _answer(request, services, task, image)


def _version(request: web.Request) -> str | None:
    """Return the `v` of the query."""
    match = _OWN_QUERY.fullmatch(request.rel_url.raw_query_string)
    return match[1] if match else request.query.get("v")


def _thumbnail_size(request: web.Request) -> int | None:
    """Return the `size` of the query, None if there is none. Raises InvalidRequest."""
    query = request.rel_url.raw_query_string
    if not query or _OWN_QUERY.fullmatch(query) or "size" not in request.query:
        return None
    sizes = request.query.getall("size")
    size = _SIZES.get(sizes[0])
    if size is None or len(sizes) > 1:
        raise InvalidRequest(details=[FieldError("size", f"must be one of {', '.join(_SIZES)}")])
    return size


def _image(task: Task | None, index: str) -> StoredImage | None:
    if task is None or not _INDEX.fullmatch(index):
        return None
    return next((image for image in task.images if image.index == int(index)), None)


async def _answer(request: web.Request, services: Services, task: Task, image: StoredImage) -> web.StreamResponse:
    """Answer from the record alone if no bytes are to be sent."""
    etag, size_bytes = f'"{image.sha256[:32]}"', image.size_bytes
    headers = _headers(request, task, image, etag)
    if is_other_version(request, etag):
        return await _without_body(services, task, image, web.Response(status=412, headers=headers))
    if etag_matches(request, etag):
        return await _without_body(services, task, image, web.Response(status=304, headers=headers))
    headers[hdrs.CONTENT_TYPE] = image.content_type
    if request.method == hdrs.METH_HEAD:
        head = web.Response(headers={**headers, hdrs.CONTENT_LENGTH: str(size_bytes)})
        return await _without_body(services, task, image, head)
    status, part = 200, range(size_bytes)
    wanted = request.headers.get(hdrs.RANGE)
    if wanted is not None and request.headers.get(hdrs.IF_RANGE, etag) == etag:
        requested = requested_range(wanted, size_bytes)
        if requested is not None and not requested:
            del headers[hdrs.CONTENT_TYPE]
            refusal = web.Response(status=416, headers={**headers, hdrs.CONTENT_RANGE: f"bytes */{size_bytes}"})
            return await _without_body(services, task, image, refusal)
        if requested is not None:
            status, part = 206, requested
            headers[hdrs.CONTENT_RANGE] = f"bytes {part.start}-{part.stop - 1}/{size_bytes}"
    opened = await services.store.open(task.id, image)
    if opened is None:
        raise ImageExpired
    return await request.app[IMAGE_SENDER].send(request, opened, part, status, headers)


async def _thumbnail(request: web.Request, services: Services, task: Task, spec: ThumbnailSpec) -> web.StreamResponse:
    """Answer with a thumbnail, as long as its image is there."""
    image = spec.image
    etag = f'"{image.sha256[:32]}-{spec.size}"'
    if not await services.store.contains(task.id, image):
        raise ImageExpired
    if is_other_version(request, etag):
        return web.Response(status=412, headers=_thumbnail_headers(request, task, spec, etag))
    if etag_matches(request, etag):
        return web.Response(status=304, headers=_thumbnail_headers(request, task, spec, etag))
    thumbnail_with_bytes = await services.thumbnails.open(spec)
    if thumbnail_with_bytes is None:
        raise ImageExpired
    thumbnail, opened = thumbnail_with_bytes
    headers = _thumbnail_headers(request, task, spec, etag) | {hdrs.CONTENT_TYPE: thumbnail.content_type}
    if request.method == hdrs.METH_HEAD:
        opened.close()
        return web.Response(headers=headers | {hdrs.CONTENT_LENGTH: str(thumbnail.size_bytes)})
    return await request.app[IMAGE_SENDER].send(request, opened, range(thumbnail.size_bytes), 200, headers)


def _thumbnail_headers(request: web.Request, task: Task, spec: ThumbnailSpec, etag: str) -> dict[str, str]:
    headers = _headers(request, task, spec.image, etag)
    name = f"{task.id}-{spec.image.index}-{spec.size}.webp"
    return headers | {"Accept-Ranges": "none", "Content-Disposition": f'inline; filename="{name}"'}


async def _without_body(
    services: Services, task: Task, image: StoredImage, response: web.StreamResponse
) -> web.StreamResponse:
    if not await services.store.contains(task.id, image):
        raise ImageExpired
    return response


def _headers(request: web.Request, task: Task, image: StoredImage, etag: str) -> dict[str, str]:
    return {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": _cache_control(request, task),
        "Content-Disposition": f'inline; filename="{task.id}-{image.index}.{image.extension}"',
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }


def _cache_control(request: web.Request, task: Task) -> str:
    if task.expires_at is None or _version(request) is None:
        return "no-cache"
    services = request.app[SERVICES]
    readers = "private" if services.links.is_on() else "public"
    return f"{readers}, max-age={max(int(task.expires_at - services.queue.clock()), 0)}, immutable"


def requested_range(header: str, size_bytes: int) -> range | None:
    """Return the bytes that a Range header requests (RFC 9110, 14.2).

    Empty if they can't be had, which is a 416; None if the header is to be ignored: several ranges, or no valid one.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return range(max(size_bytes - _number(match[2]), 0), size_bytes)
    first = _number(match[1])
    last = _number(match[2]) if match[2] else size_bytes - 1
    if match[2] and last < first:
        return None
    return range(first, min(last + 1, size_bytes)) if first < size_bytes else range(0)


def _number(digits: str) -> int:
    """Return the number; all those over the size of any file are the same."""
    digits = digits.lstrip("0")
    return 10**_MAX_DIGITS if len(digits) > _MAX_DIGITS else int(digits or 0)
