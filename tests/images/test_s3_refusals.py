"""Refusals and odd responses of an S3 service, or of what answers in its place: no image is lost or missing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import replace
from http import HTTPStatus

import pytest
from aiohttp import web

from imagegen.errors import SettingsError, StoreUnavailable
from imagegen.images import s3
from imagegen.images.s3 import DELETES_AT_ONCE, SETTLING_S, SWEEP_MARGIN_S, S3BlobStore
from imagegen.images.s3_client import Bucket
from imagegen.images.store import VerifiedImage
from imagegen.images.store_health import describe
from tests.images.conftest import MakeImage
from tests.s3_server import Objects, S3Server, error_response
from tests.support import logged

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f123456789abcdef0123456789abcdef"
LIFE_S = 600.0
UNKNOWN_END_S = 10.0**10


class Held:
    """An image in a bucket for longer than a service may show it late, and calls for it."""

    def __init__(self, store: S3BlobStore, image: VerifiedImage) -> None:
        self.store, self.given, self.image = store, image, image.stored_at(0)

    async def put(self, index: int = 1) -> None:
        await self.store.put(TASK, self.given.stored_at(index), self.given.source, time.time() + LIFE_S)

    async def get(self, offset: int = 0, length: int = 0) -> bytes:
        length = length or self.image.size_bytes
        return b"".join([piece async for piece in self.store.get(TASK, self.image, offset, length)])

    async def is_there(self) -> bool:
        return await self.store.contains_all(TASK, [self.image])

    async def reuse(self) -> bool:
        return await self.store.reuse(TASK, self.image, OTHER, 0, time.time() + LIFE_S)

    async def extend(self) -> None:
        await self.store.extend_expiry(TASK, [self.image], time.time() + LIFE_S)

    async def probe(self) -> None:
        await self.store.probe(0)

    async def sweep(self) -> None:
        await self.store.sweep_once()

    @property
    def calls(self) -> list[Callable[[], Awaitable[object]]]:
        return [self.put, self.get, self.is_there, self.reuse, self.extend, self.probe, self.sweep]


@pytest.fixture
async def held(bucket: Bucket, make_image: MakeImage) -> AsyncIterator[Held]:
    ahead_s = 0.0
    store = S3BlobStore(bucket, max_bytes=100_000, life_s=LIFE_S, clock=lambda: time.time() + ahead_s)
    await store.start()
    held = Held(store, make_image())
    await held.put(0)
    ahead_s = SETTLING_S + 1
    yield held
    await store.close()


@pytest.fixture
def refuse(s3: S3Server) -> Iterator[Callable[[Callable[[web.Request], web.Response | None]], None]]:
    """Let the service answer otherwise: `refuse(response_of)`."""
    yield lambda response_of: setattr(s3, "refuses", response_of)
    s3.refuses = lambda _request: None


Refuse = Callable[[Callable[[web.Request], web.Response | None]], None]


def text(body: str, status: int = 200, **headers: str) -> Callable[[web.Request], web.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _request: web.Response(status=status, text=body, headers=named)


def code(status: int, name: str) -> Callable[[web.Request], web.Response]:
    return lambda _request: error_response(HTTPStatus(status), name)


UNCERTAIN = {
    "the page of a proxy without its service": text("404 page not found", 404),
    "an empty 404": text("", 404),
    "a bucket that is gone": code(404, "NoSuchBucket"),
    "a key that was deleted": code(403, "InvalidAccessKeyId"),
    "a temporary key that has ended": code(400, "ExpiredToken"),
    "a clock that is wrong": code(403, "RequestTimeTooSkewed"),
    "another region": code(400, "AuthorizationHeaderMalformed"),
    "the page of a login": text("<p>Log in<br>", 200),
}


@pytest.mark.parametrize("name", UNCERTAIN)
async def test_no_refusal_of_the_whole_bucket_shows_that_an_image_is_missing(
    held: Held, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    refuse(UNCERTAIN[name])
    for call in held.calls:
        with pytest.raises(StoreUnavailable):
            await call()
    refuse(lambda _request: None)
    for call in held.calls:
        await call()
    assert await held.get() == held.given.data
    assert await held.is_there()


async def test_a_save_that_is_refused_as_if_it_were_a_read_is_not_done(held: Held, refuse: Refuse) -> None:
    refuse(code(404, "NoSuchKey"))
    for call in (held.put, held.probe, held.sweep):
        with pytest.raises(StoreUnavailable):
            await call()
    assert not await held.is_there()
    assert not await held.reuse()


async def test_an_object_that_a_head_does_not_find_but_a_get_is_there(held: Held, refuse: Refuse) -> None:
    refuse(lambda request: web.Response(status=404) if request.method == "HEAD" else None)
    assert await held.is_there()


async def test_a_copy_that_a_head_does_not_find_is_not_missing(held: Held, refuse: Refuse) -> None:
    """A bucket may show it late, and an image that is missing is paid again."""
    refuse(lambda request: web.Response(status=404) if request.method == "HEAD" else None)
    assert await held.reuse()
    await held.extend()


async def test_a_page_of_a_proxy_does_not_take_the_place_of_an_image(
    held: Held, refuse: Refuse, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy with the metadata of its source is written again, with what is read of it."""
    monkeypatch.setattr(s3, "copies_metadata", True)
    page = web.Response(text="<p>Log in", content_type="text/html")
    refuse(lambda request: page if request.method == "GET" else None)
    with pytest.raises(StoreUnavailable):
        await held.extend()
    refuse(lambda _request: None)
    assert await held.get() == held.given.data


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        (code(403, "InvalidAccessKeyId"), "S3_ACCESS_KEY_ID"),
        (code(403, "SignatureDoesNotMatch"), "S3_SECRET_ACCESS_KEY"),
        (code(400, "ExpiredToken"), "S3_ACCESS_KEY_ID: this key is a temporary one"),
        (code(403, "RequestTimeTooSkewed"), "the clocks of this machine"),
        (code(404, "NoSuchBucket"), "S3_BUCKET"),
    ],
)
async def test_a_refusal_of_a_save_names_what_to_change(
    held: Held, refuse: Refuse, refusal: Callable[[web.Request], web.Response], advice: str
) -> None:
    refuse(refusal)
    with pytest.raises(StoreUnavailable) as raised:
        await held.put()
    assert raised.value.__cause__
    assert advice in describe(raised.value.__cause__)


@pytest.mark.parametrize(
    "refusal",
    [text("404 page not found", 404), code(403, "RequestTimeTooSkewed"), text("", 403), code(409, "OperationAborted")],
)
async def test_a_refusal_that_may_pass_does_not_stop_the_start(
    bucket: Bucket, refuse: Refuse, refusal: Callable[[web.Request], web.Response]
) -> None:
    store = S3BlobStore(bucket, max_bytes=100_000, life_s=LIFE_S)
    refuse(refusal)
    with pytest.raises(StoreUnavailable):
        await store.start()
    refuse(lambda _request: None)
    await store.probe(0)
    await store.close()


async def test_a_temporary_key_that_has_ended_stops_the_start(bucket: Bucket, refuse: Refuse) -> None:
    refuse(code(400, "ExpiredToken"))
    store = S3BlobStore(bucket, max_bytes=100_000, life_s=LIFE_S)
    with pytest.raises(SettingsError, match="S3_ACCESS_KEY_ID: this key is a temporary one"):
        await store.start()
    await store.close()


def whole(held: Held, **headers: str) -> web.Response:
    """Return the object as a proxy may pass it on, to any request for it."""
    end = {"x-amz-meta-imagegen-expires-at": str(UNKNOWN_END_S), "ETag": '"1"'}
    return web.Response(body=held.given.data, headers=end | headers)


async def test_a_part_is_not_served_from_a_response_with_the_whole_object(held: Held, refuse: Refuse) -> None:
    refuse(lambda request: whole(held) if TASK in request.path else None)
    with pytest.raises(StoreUnavailable):
        await held.get(3, 5)
    assert await held.get() == held.given.data


async def test_an_object_whose_size_a_proxy_hides_is_read(held: Held, refuse: Refuse) -> None:
    def chunked(request: web.Request) -> web.Response | None:
        if TASK not in request.path:
            return None
        response = whole(held)
        response.enable_chunked_encoding()
        return response

    refuse(chunked)
    assert await held.is_there()
    assert await held.get() == held.given.data


async def test_a_response_with_an_unreadable_time_is_not_that_of_the_service(held: Held, refuse: Refuse) -> None:
    refuse(lambda request: whole(held, **{"Last-Modified": "yesterday"}) if TASK in request.path else None)
    with pytest.raises(StoreUnavailable):
        await held.get()
    with pytest.raises(StoreUnavailable):
        await held.is_there()


@pytest.mark.parametrize("entry", ["<Key>imagegen/a</Key>", "<Key>b</Key><LastModified>then</LastModified>"])
async def test_a_listing_without_readable_entries_ends_no_sweep_loop(
    held: Held, refuse: Refuse, objects: Objects, entry: str
) -> None:
    listing = f"<?xml version='1.0'?><ListBucketResult><Contents>{entry}</Contents></ListBucketResult>"
    refuse(lambda request: web.Response(text=listing) if "list-type" in request.query else None)
    with pytest.raises(StoreUnavailable):
        await held.sweep()
    assert len(objects) == 1


def lock(refuse: Refuse, keys: Collection[str]) -> None:
    """Let the bucket refuse to delete objects."""
    refuse(
        lambda request: (
            error_response(HTTPStatus.FORBIDDEN, "AccessDenied")
            if request.method == "DELETE" and any(key in request.path for key in keys)
            else None
        )
    )


@pytest.fixture
async def expiring(bucket: Bucket, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3BlobStore]:
    """Return a store in which everything has expired when it is saved."""
    monkeypatch.setattr(s3, "clock", lambda: time.time() - LIFE_S - SWEEP_MARGIN_S - 2)
    store = S3BlobStore(bucket, max_bytes=100_000, life_s=LIFE_S)
    await store.start()
    yield store
    await store.close()


async def test_an_object_that_is_locked_keeps_no_other_one_from_being_deleted(
    expiring: S3BlobStore, refuse: Refuse, objects: Objects, make_image: MakeImage
) -> None:
    image = make_image()
    for index in range(20):
        await expiring.put(TASK, image.stored_at(index), image.source, time.time() + LIFE_S)
    locked = sorted(objects)[:2]
    lock(refuse, locked)
    with logged("WARNING") as lines:
        for _ in range(2):
            await expiring.put(OTHER, image.stored_at(0), image.source, time.time() + LIFE_S)
            await expiring.sweep_once()
            assert sorted(objects) == locked
    assert len([line for line in lines if "can't be deleted in the bucket" in line]) == 1


async def test_very_many_locked_objects_do_not_stop_each_sweep_at_the_same_place(
    expiring: S3BlobStore, refuse: Refuse, objects: Objects, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image()
    for index in range(2 * DELETES_AT_ONCE):
        await expiring.put(TASK, image.stored_at(index), image.source, time.time() + LIFE_S)
    for number, (key, found) in enumerate(list(objects.items())):
        objects[key] = replace(found, modified_at_s=found.modified_at_s - 1_000 + number)
    locked = list(objects)[: DELETES_AT_ONCE + 1]
    lock(refuse, locked)
    monkeypatch.setattr(s3, "MAX_REFUSED_DELETES", DELETES_AT_ONCE)
    for _ in range(3):
        await expiring.sweep_once()
    assert set(objects) == set(locked)


async def test_a_bucket_with_a_lock_takes_images_and_the_probe(
    bucket: Bucket, s3: S3Server, make_image: MakeImage
) -> None:
    """AWS and others want a Content-MD5 with each object that gets a retention period."""

    def refuse(request: web.Request) -> web.Response | None:
        needs_hash = request.method == "PUT" and "x-amz-copy-source" not in request.headers
        if needs_hash and "Content-MD5" not in request.headers:
            return error_response(HTTPStatus.BAD_REQUEST, "MissingUploadObjectWithObjectLockHeaders")
        return None

    s3.refuses = refuse
    store = S3BlobStore(bucket, max_bytes=100_000, life_s=LIFE_S)
    try:
        await store.start()
        held = Held(store, make_image())
        await held.put(0)
        assert await held.is_there()
        await held.extend()
        await held.probe()
    finally:
        s3.refuses = lambda _request: None
        await store.close()
