"""Tests of the reader that cuts images out of JSON bodies."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from imagegen.errors import BodyTooLarge, InvalidRequest, UnsupportedImage
from imagegen.images.store import VerifiedImage
from imagegen.images.uploads import Uploads
from imagegen.web.http import body
from imagegen.web.http.body import ReceivedBody, _Cutter
from tests.image_bytes import data_uri

LONG = bytes(range(256)) * 160
"""Bytes of an image: their base64 is longer than a URI that stays in the body."""

SHORT = b"short"


class StandInUploads(Uploads):
    """Uploads that take any bytes but those that begin with `bad`."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    async def receive(self, chunks: AsyncIterator[bytes], _max_bytes: int | None = None) -> VerifiedImage:
        data = b"".join([chunk async for chunk in chunks])
        if data.startswith(b"bad"):
            raise UnsupportedImage
        self.received.append(data)
        return VerifiedImage("image/png", len(data), 1, 1, hashlib.sha256(data).hexdigest(), data)

    def discard(self, image: VerifiedImage) -> None:
        pass


def place(data: bytes) -> str:
    return f"upload:{hashlib.sha256(data).hexdigest()}"


async def cut(text: str | bytes, sizes: Any = (65_536,)) -> tuple[ReceivedBody, list[bytes]]:
    """Cut a body that comes in pieces of these sizes, in turn."""
    raw = text.encode() if isinstance(text, str) else text
    uploads, body = StandInUploads(), ReceivedBody(b"")

    async def chunks() -> AsyncGenerator[bytes, None]:
        at, number = 0, 0
        while at < len(raw):
            size = sizes[number % len(sizes)]
            yield raw[at : at + size]
            at, number = at + size, number + 1

    body.raw = await _Cutter(chunks(), uploads, body, lambda _: None).read()
    return body, uploads.received


FIELDS = {
    "imageUrl": data_uri(LONG),
    "image_url": data_uri(LONG + b"1", kind="jpeg"),
    "mask": data_uri(LONG + b"2", kind="webp"),
    "referenceImages": [data_uri(LONG + b"3"), "https://a.example/b.png", data_uri(SHORT), data_uri(LONG + b"4")],
    "images": [{"image_url": data_uri(LONG + b"5")}, {"image_url": data_uri(LONG + b"6")}],
    "image": [data_uri(LONG + b"7"), data_uri(LONG + b"7")],
    "prompt": 'a "quoted" cat, with "data:image/png;base64,AAAA"',
}


@pytest.mark.parametrize("sizes", [(65_536,), (7,), (1, 100, 50_000), (10**9,)])
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" ,\n", " :\n ")])
async def test_images_are_cut_out_wherever_the_body_is_split(sizes: tuple[int, ...], separators: Any) -> None:
    body, received = await cut(json.dumps(FIELDS, separators=separators), sizes)
    assert json.loads(body.raw) == {
        "imageUrl": place(LONG),
        "image_url": place(LONG + b"1"),
        "mask": place(LONG + b"2"),
        "referenceImages": [place(LONG + b"3"), "https://a.example/b.png", data_uri(SHORT), place(LONG + b"4")],
        "images": [{"image_url": place(LONG + b"5")}, {"image_url": place(LONG + b"6")}],
        "image": [place(LONG + b"7"), place(LONG + b"7")],
        "prompt": FIELDS["prompt"],
    }
    assert received == [LONG, *(LONG + b"%d" % number for number in (1, 2, 3, 4, 5, 6, 7, 7))]
    assert set(body.images) == {place(data) for data in received}


async def test_escaped_slashes_and_line_ends_do_no_harm() -> None:
    text = base64.encodebytes(LONG).decode().replace("\n", "\r\n")
    escaped = json.dumps({"imageUrl": f"data:image/png;base64,{text}"}).replace("/", "\\/")
    for sizes in ((65_536,), (3,), (11, 4_096)):
        body, received = await cut(escaped, sizes)
        assert json.loads(body.raw) == {"imageUrl": place(LONG)}
        assert received == [LONG]


async def test_the_url_safe_alphabet_without_padding_is_read() -> None:
    data = LONG + b"\xff\xfe"
    text = base64.urlsafe_b64encode(data).decode().rstrip("=")
    _, received = await cut(json.dumps({"mask": f"data:image/png;base64,{text}"}))
    assert received == [data]


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": data_uri(LONG)},
        {"extra": {"input_image": data_uri(LONG)}},
        {"imageLoras": [data_uri(LONG)]},
        {"prompt": f'see "{data_uri(LONG)}" there'},
        {"imageUrl": "x" + data_uri(LONG)},
        {data_uri(LONG): 1},
    ],
)
async def test_other_texts_stay(field: dict[str, Any]) -> None:
    body, received = await cut(json.dumps(field), (10_000,))
    assert json.loads(body.raw) == field
    assert not received
    assert not body.images


@pytest.mark.parametrize("data", [b"bad" + LONG, None])
async def test_a_text_that_is_no_image_is_remembered_as_refused(data: bytes | None) -> None:
    text = data_uri(data) if data else data_uri(LONG)[:-9] + "!" * 40_000
    body, received = await cut(json.dumps({"imageUrl": text, "mask": data_uri(LONG), "n": 1}), (10_000,))
    fields = json.loads(body.raw)
    assert fields["mask"] == place(LONG)
    assert isinstance(body.refusals[fields["imageUrl"]], UnsupportedImage)
    assert received == [LONG]


async def test_a_body_that_ends_in_an_image_stays_invalid() -> None:
    whole = json.dumps({"imageUrl": data_uri(LONG)})
    for missing in (1, 2, 1_000, 40_000):
        body, _ = await cut(whole[:-missing])
        with pytest.raises(json.JSONDecodeError):
            json.loads(body.raw)


async def test_what_is_no_image_is_bounded_by_1_mib() -> None:
    image = data_uri(LONG * 20)
    body, _ = await cut(json.dumps({"prompt": "p" * 1_000_000, "imageUrl": image}))
    assert len(body.raw) < 2**20
    with pytest.raises(BodyTooLarge):
        await cut(json.dumps({"imageUrl": image, "prompt": "p" * 1_100_000}))
    with pytest.raises(BodyTooLarge):
        await cut(json.dumps({"prompt": data_uri(LONG * 30)}))


async def test_the_number_of_images_is_bounded() -> None:
    with pytest.raises(InvalidRequest):
        await cut(json.dumps({"referenceImages": [data_uri(b"")] * (body.MAX_URIS + 1)}))


async def test_any_bytes_are_left_as_they_are_without_an_image() -> None:
    pick = random.Random(20261128)
    words = [b'"', b"\\", b"data:image/png;base64,", b'"data:image/png;base64,', b"AAAA", b"imageUrl", b":", b",", b" "]
    for _ in range(300):
        raw = b"".join(pick.choices(words, k=pick.randrange(60)))
        body, received = await cut(raw, (pick.randrange(1, 40),))
        assert body.raw == raw
        assert not received
