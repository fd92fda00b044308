"""Routes of edits on `/v1`: their images become uploads, and from there they are generations."""

from __future__ import annotations

import asyncio

from aiohttp import web

from imagegen.errors import Unsupported
from imagegen.web.handler_services import SERVICES
from imagegen.web.openai.edit_bodies import receive_edit
from imagegen.web.openai.fields import OpenAIRequest
from imagegen.web.openai.generations import read_request, respond, respond_async
from imagegen.web.openai.stream import EDITED
from imagegen.web.submitter import refuse_while_draining


async def edits(request: web.Request) -> web.StreamResponse:
    """Parse an edit and answer it."""
    started_at = asyncio.get_running_loop().time()
    return await respond(request, await _read_edit(request), started_at, completed=EDITED)


async def edits_async(request: web.Request) -> web.StreamResponse:
    """Parse an edit and answer with its task."""
    return await respond_async(request, await _read_edit(request))


async def _read_edit(request: web.Request) -> OpenAIRequest:
    """Read an edit. Raises InvalidRequest under the names that the client used, and what `receive_edit` raises."""
    services = request.app[SERVICES]
    refuse_while_draining(services)
    async with receive_edit(request, services.inputs.uploads) as (edit, body):
        return await read_request(request, edit.as_generation(), body, spell=edit.spell)


async def variations(request: web.Request) -> web.StreamResponse:  # noqa: ARG001 - a handler's signature
    """Refuse the request: no upstream has this route any more."""
    raise Unsupported
