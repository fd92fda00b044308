"""Images of this service as input images: an agent edits what it has just made by the link in the result.

No other client of ours is called for such a link: its bytes are in the image store.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from aiohttp import web

from imagegen.errors import FieldError, ImageExpired, InvalidRequest
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.lookup import find_task

_SINGLE = ("imageUrl", "image_url", "mask")
_LISTS = ("referenceImages", "reference_images")
_PATH = re.compile(r"/api/images/([0-9a-f]{32})/([0-9]{1,2})(?:\?[!-~]*)?")


async def replace_own_images(request: web.Request, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with uploads in place of links to images of this service.

    Raises InvalidRequest if the client can't see such an image; ImageExpired, StoreUnavailable, QueueUnavailable.
    """
    replaced = dict(fields)
    for name in _SINGLE:
        if isinstance(link := replaced.get(name), str):
            replaced[name] = await _replaced(request, name, link)
    for name in _LISTS:
        if isinstance(links := replaced.get(name), list):
            replaced[name] = [
                await _replaced(request, f"{name}[{place}]", link) if isinstance(link, str) else link
                for place, link in enumerate(links[:16])
            ] + links[16:]
    return replaced


async def _replaced(request: web.Request, name: str, link: str) -> str:
    """Return the upload with the bytes of a link to an image of this service; any other text unchanged."""
    services = request.app[SERVICES]
    match = _PATH.fullmatch(link.removeprefix(services.link_base.url(request)))
    if match is None:
        return link
    task = await find_task(request, match[1])
    image = None if task is None else _image(task, int(match[2]))
    if task is None or image is None:
        raise InvalidRequest(details=[FieldError(name, "is no image of this service that you can see")])
    if image.url:
        return image.url
    return await _upload(request, services, task, image)


def _image(task: Task, index: int) -> StoredImage | None:
    return next((image for image in task.images if image.index == index), None)


async def _upload(request: web.Request, services: Services, task: Task, image: StoredImage) -> str:
    opened = await services.store.open(task.id, image)
    if opened is None:
        raise ImageExpired
    with closing(opened):
        data = await opened.read_all()
    upload, _ = await services.inputs.uploads.store(VerifiedImage.of(image, data=data), client_of(request).scope)
    return upload.id
