"""Routes of edits on `/v1`: their images become uploads, and from there they are generations."""

from __future__ import annotations

import asyncio

from aiohttp import web

from imagegen.errors import InvalidRequest, Unsupported
from imagegen.web.context import SERVICES
from imagegen.web.openai.edit_bodies import read_edit
from imagegen.web.openai.fields import OpenAIRequest, parse
from imagegen.web.openai.generations import respond, respond_async
from imagegen.web.openai.stream import EDITED
from imagegen.web.submitter import refuse_while_draining


async def edits(request: web.Request) -> web.StreamResponse:
    """Parse an edit and answer it."""
    started_at = asyncio.get_running_loop().time()
    return await respond(request, await _read_request(request), started_at, completed=EDITED)


async def edits_async(request: web.Request) -> web.StreamResponse:
    """Parse an edit and answer with its task."""
    return await respond_async(request, await _read_request(request))


async def _read_request(request: web.Request) -> OpenAIRequest:
    """Read an edit. Raises InvalidRequest under the names that the client used, and what `read_edit` raises."""
    services = request.app[SERVICES]
    identity = services.identity
    refuse_while_draining(services)
    edit = await read_edit(request, services.uploads)
    fields = edit.as_generation()
    try:
        return parse(fields, default_model=identity.default_model, aliases=identity.aliases, adjust=identity.adjust)
    except InvalidRequest as error:
        raise edit.respelled(error) from error


async def variations(request: web.Request) -> web.StreamResponse:  # noqa: ARG001 - a handler's signature
    """Refuse: no upstream has this route any more."""
    raise Unsupported
