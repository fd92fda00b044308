"""Bodies of edits on `/v1`: forms, with files that become uploads as they come, and JSON."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import orjson
from aiohttp import web

from imagegen.errors import ApiError, FieldError, FormOrJsonNeeded, InvalidRequest
from imagegen.formats import printable
from imagegen.images.uploads import Uploads
from imagegen.tasks.request import MAX_IMAGES, UPLOAD_PREFIX
from imagegen.tasks.validation import MAX_FIELD_ERRORS, MAX_KEY_CHARS, MAX_PROMPT_CHARS, is_image_source
from imagegen.web.guard import client_of
from imagegen.web.http.body import ReceivedBody, check_type, parse_object, receive_json
from imagegen.web.http.body_admission import BODY_ADMISSION, QUICK_BODY_BYTES, STREAMED_BYTES, HeldMemory
from imagegen.web.http.body_stream import BodyStream, FormPart, is_form

MAX_PARTS = 80
MAX_TEXT_BYTES = 4 * MAX_PROMPT_CHARS
MAX_TEXTS_BYTES = 1024 * 1024
"""Of all fields of a form that are no files."""

_FILES = MAX_IMAGES + 1
_PLACE = re.compile(r"image_url|reference_images(?:\[([0-9]{1,2})\])?")
_SOURCE_NAMES = ("image", "images", "image_url", "imageUrl", "reference_images", "referenceImages")
_IMAGES = re.compile(rf"(?:{'|'.join(_SOURCE_NAMES)})(?:\[[0-9]{{0,2}}\])?")
_MASK = "mask"
_NO_FILE = "must be a file, sent with a file name, or the address of an image"
_LINK_NAMES = ("image_url", "file_id", "url")
"""Where an entry of `images` has its address or upload; `url` is xAI's name, and that of an `image_url` object."""

_LITERAL = re.compile(r"true|false|-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?")
_TEXT_FIELDS = frozenset({"prompt", "model", "user", "negative_prompt", "size"})
_OBJECTS = frozenset({"extra", "image_loras", "imageLoras"})


@dataclass(slots=True)
class EditBody:
    """Parsed body. images, mask: (client's name of the field, address or upload); fields: all others."""

    images: list[tuple[str, str]] = field(default_factory=list)
    mask: tuple[str, str] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)

    def add(self, name: str, source: str) -> None:
        """Add an input image, or the mask."""
        if name != _MASK:
            self.images.append((name, source))
        elif self.mask is None:
            self.mask = (name, source)
        else:
            self.errors.append(FieldError(_MASK, "must be sent once"))

    def as_generation(self) -> dict[str, Any]:
        """Return the fields of the same request on the route of generations. Raises InvalidRequest."""
        errors = [*self.errors, *_source_errors(self.images)]
        if not self.images and not any(_IMAGES.match(error.field) for error in errors):
            errors.append(FieldError("image", "is required"))
        elif len(self.images) > MAX_IMAGES:
            errors.append(FieldError(self.images[0][0], f"must have at most {MAX_IMAGES} images"))
        if self.mask is not None:
            errors += _source_errors([self.mask])
        if errors:
            raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS])
        (_, first), *rest = self.images
        fields = {**self.fields, "image_url": first}
        if rest:
            fields["reference_images"] = [source for _, source in rest]
        if self.mask is not None:
            fields[_MASK] = self.mask[1]
        return fields

    def spell(self, name: str) -> str:
        """Return the client's name of a field of the generation."""
        if name == _MASK and self.mask is not None:
            return self.mask[0]
        match = _PLACE.fullmatch(name)
        place = int(match[1] or -1) + 1 if match else len(self.images)
        return self.images[place][0] if place < len(self.images) else name


@asynccontextmanager
async def receive_edit(request: web.Request, uploads: Uploads) -> AsyncIterator[tuple[EditBody, ReceivedBody]]:
    """Read the body; the files of a form are saved as uploads while they come. Images cut out of JSON end with it.

    Raises what `BodyStream`, `Uploads.save` and `receive_json` raise, with the client's name of a file's field.
    """
    if is_form(request):
        memory, length = HeldMemory(request.app[BODY_ADMISSION]), request.content_length
        try:
            if length is None or length > QUICK_BODY_BYTES:
                await memory.begin(STREAMED_BYTES)
            yield await _read_form(request, uploads, memory), ReceivedBody(b"")
        finally:
            memory.end()
    else:
        check_type(request, FormOrJsonNeeded)
        async with receive_json(request, uploads) as body:
            yield _read_object(parse_object(body.raw)), body


async def _read_form(request: web.Request, uploads: Uploads, memory: HeldMemory) -> EditBody:
    edit, texts_bytes = EditBody(), 0
    stream = BodyStream(request, _FILES * uploads.max_bytes + MAX_TEXTS_BYTES)
    async for part in stream.parts(MAX_PARTS):
        name = part.name
        if name == _MASK or _IMAGES.fullmatch(name):
            if len(edit.images) > MAX_IMAGES:
                break
            if (source := await _read_source(part, uploads, client_of(request).scope)) is not None:
                edit.add(name, source)
            continue
        if part.filename:
            rule = "must be a text: files go into image and mask"
            raise InvalidRequest(details=[FieldError(printable(name, MAX_KEY_CHARS) or "body", rule)])
        text = await part.text(MAX_TEXT_BYTES)
        texts_bytes += len(text)
        if texts_bytes > MAX_TEXTS_BYTES:
            raise InvalidRequest(details=[FieldError("body", f"must have at most {MAX_TEXTS_BYTES} bytes of fields")])
        if texts_bytes > QUICK_BODY_BYTES:
            memory.grow_to(STREAMED_BYTES + texts_bytes)
        _add_text(edit, name, text)
    return edit


async def _read_source(part: FormPart, uploads: Uploads, scope: str | None) -> str | None:
    """Return the upload of a file, or the address that the field holds; None if it is empty, as forms have it."""
    if part.filename is None and not part.content_type.startswith(("image/", "application/octet-stream")):
        return (await part.text(MAX_TEXT_BYTES, _NO_FILE)).strip() or None
    chunks = part.chunks()
    first = await anext(chunks, b"")
    if not first and not part.filename:
        return None
    try:
        saved, _ = await uploads.save(_rejoined(first, chunks), scope=scope)
    except ApiError as error:
        error.details = tuple(FieldError(part.name, detail.message) for detail in error.details)
        raise
    return saved.id


async def _rejoined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for chunk in rest:
        yield chunk


def _add_text(edit: EditBody, name: str, text: str) -> None:
    """Add a field of a form, where numbers, booleans and objects are texts."""
    if name.endswith("[]"):
        edit.fields.setdefault(name[:-2], []).append(text)
    elif not name:
        edit.errors.append(FieldError("body", "has a part without a name"))
    elif name in edit.fields:
        edit.errors.append(FieldError(printable(name, MAX_KEY_CHARS), "must be sent once"))
    else:
        edit.fields[name] = _value(name, text)


def _value(name: str, text: str) -> object:
    if name in _TEXT_FIELDS:
        return text
    if _LITERAL.fullmatch(text) or (name in _OBJECTS and text[:1] in ("{", "[")):
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
    return text


def _read_object(body: Mapping[str, Any]) -> EditBody:
    edit = EditBody()
    entries = chain.from_iterable(_entries(name, body.get(name)) for name in _SOURCE_NAMES)
    for where, entry in islice(entries, MAX_FIELD_ERRORS):  # more than may be images
        _add_entry(edit, where, entry)
    if body.get(_MASK) not in (None, ""):
        _add_entry(edit, _MASK, body[_MASK])
    edit.fields = {name: value for name, value in body.items() if name not in _SOURCE_NAMES and name != _MASK}
    return edit


def _entries(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, list):
        yield from ((f"{name}[{place}]", entry) for place, entry in enumerate(value))
    elif value not in (None, ""):
        yield name, value


def _add_entry(edit: EditBody, where: str, entry: object) -> None:
    source, within = entry, where
    while isinstance(source, dict):
        names = [name for name in _LINK_NAMES if source.get(name) is not None]
        if len(names) != 1:
            edit.errors.append(FieldError(within, "must have image_url or file_id"))
            return
        within, source = f"{within}.{names[0]}", source[names[0]]
    if not isinstance(source, str):
        edit.errors.append(FieldError(within, "must be a string"))
    elif within.endswith("file_id") and not source.startswith(UPLOAD_PREFIX):
        edit.errors.append(FieldError(within, "must be an uploadId of POST /api/uploads"))
    elif where == _MASK:
        edit.mask = (within, source)
    else:
        edit.images.append((within, source))


def _source_errors(images: list[tuple[str, str]]) -> list[FieldError]:
    rule = "must be a file, an http(s) address, a data:image/ URI, or upload: and 64 hex digits"
    return [FieldError(name, rule) for name, source in images if not is_image_source(source.strip())]
