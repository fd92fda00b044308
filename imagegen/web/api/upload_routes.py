"""Route of POST /api/uploads: an input image, for use in requests."""

from __future__ import annotations

from aiohttp import web

from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import rfc3339
from imagegen.images.uploads import FILE_FIELD, Upload, Uploads
from imagegen.web.api.schemas import UploadView
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body_stream import FORM_BYTES, BodyStream, is_form
from imagegen.web.http.responses import json_response
from imagegen.web.submitter import refuse_while_draining

MAX_PARTS = 2


async def upload(request: web.Request) -> web.StreamResponse:
    """Save the image of the body, or of the form's field `file`."""
    services = request.app[SERVICES]
    refuse_while_draining(services)
    if is_form(request):
        saved, is_new = await _save_form(request, services.inputs.uploads)
    else:
        body = BodyStream(request, services.inputs.uploads.max_bytes)
        saved, is_new = await services.inputs.uploads.save(body.chunks(), scope=client_of(request).scope)
    return json_response(upload_view(saved), status=201 if is_new else 200)


async def _save_form(request: web.Request, uploads: Uploads) -> tuple[Upload, bool]:
    saved: tuple[Upload, bool] | None = None
    body = BodyStream(request, uploads.max_bytes + FORM_BYTES)
    async for part in body.parts(MAX_PARTS):
        if part.name != FILE_FIELD or saved is not None:
            rule = "must be sent once" if part.name == FILE_FIELD else "is not a known field; did you mean file?"
            raise InvalidRequest(details=[FieldError(part.name or "body", rule)])
        saved = await uploads.save(part.chunks(), scope=client_of(request).scope)
    if saved is None:
        raise InvalidRequest(details=[FieldError(FILE_FIELD, "is missing")])
    return saved


def upload_view(saved: Upload) -> UploadView:
    """Return the body of the response about an upload."""
    return {
        "success": True,
        "uploadId": saved.id,
        "contentType": saved.content_type,
        "bytes": saved.size_bytes,
        "width": saved.width,
        "height": saved.height,
        "expiresAt": rfc3339(saved.expires_at),
    }
