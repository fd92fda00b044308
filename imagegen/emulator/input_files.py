"""Input images of a call to the emulator: files of a multipart form, `data:` URIs and base64 texts in JSON."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import BodyPartReader, MultipartReader, hdrs, web

_CHUNK_BYTES: Final = 256 * 1024
_BASE64_FIELDS: Final = frozenset(("init_images", "mask", "ref_images", "image", "image_prompt", "input_image"))
_NUMBERED: Final = "input_image_"
_NUMBERS: Final = frozenset(("n", "seed", "width", "height", "steps", "output_compression"))


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input image as it arrived: the hash of its bytes proves that they are whole."""

    field: str
    sha256: str
    size_bytes: int
    content_type: str


class BadForm(Exception):
    """The body is no multipart form; the text is the reason."""


async def read_form(request: web.BaseRequest) -> tuple[dict[str, object], list[InputFile]]:
    """Read the fields and the files; bytes are hashed and dropped. Raises BadForm."""
    fields: dict[str, object] = {}
    files: list[InputFile] = []
    try:
        reader = MultipartReader(request.headers, request.content)
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader) or not part.name:
                raise BadForm("a part has no name")
            if part.filename is None:
                fields[part.name] = _number(part.name, (await part.read()).decode())
            else:
                files.append(await _read_file(part, part.name))
    except (ValueError, UnicodeDecodeError) as failure:
        raise BadForm(f"the form can't be read: {failure}") from failure
    return fields, files


async def _read_file(part: BodyPartReader, name: str) -> InputFile:
    digest, size = hashlib.sha256(), 0
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return InputFile(name, digest.hexdigest(), size, part.headers.get(hdrs.CONTENT_TYPE, ""))


def files_in(body: Mapping[str, object]) -> list[InputFile]:
    """Return the images that a JSON body carries itself; links are none."""
    return [
        InputFile(name, hashlib.sha256(data).hexdigest(), len(data), kind)
        for name, value in body.items()
        for text in _texts(value)
        for kind, data in _decoded(name, text)
    ]


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for entry in value:
                yield from _texts(entry)
        case {"url": str(url)}:
            yield url
        case {"inlineData": {"mimeType": str(kind), "data": str(encoded)}}:
            yield f"data:{kind};base64,{encoded}"
        case {"parts": inner} | {"content": list(inner)} | {"image_url": inner}:
            yield from _texts(inner)


def _decoded(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    if text.startswith("data:"):
        head, _, encoded = text.partition(",")
        yield head.removeprefix("data:").removesuffix(";base64"), b64decode(encoded)
    elif (name in _BASE64_FIELDS or name.startswith(_NUMBERED)) and "://" not in text:
        yield "", b64decode(text)


def _number(name: str, text: str) -> object:
    return int(text) if name in _NUMBERS and text.lstrip("-").isdigit() else text
