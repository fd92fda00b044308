"""Tests of the S3 store: objects, sweeps, invalid settings, and an unavailable service."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace as replace_object

import pytest
from aiohttp import web
from msgspec.structs import replace
from msgspec.structs import replace as changed
from pytest_aiohttp import AiohttpServer

from imagegen.errors import SettingsError, StoreUnavailable
from imagegen.images.s3 import SWEEP_MARGIN_S, S3BlobStore
from imagegen.images.s3_client import Bucket
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import in_memory
from tests.images.conftest import MakeImage
from tests.s3_server import Objects, S3Object, S3Server
from tests.support import eventually

MakeBytes = Callable[..., Awaitable[S3BlobStore]]

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f123456789abcdef0123456789abcdef"
LIFE_S = 600.0


@pytest.fixture
async def make_bytes(bucket: Bucket) -> AsyncIterator[MakeBytes]:
    """Create stores of several instances: `await make_bytes(max_bytes=…, bucket=…)`."""
    async with AsyncExitStack() as stack:

        async def make(max_bytes: int = 100_000, bucket: Bucket = bucket) -> S3BlobStore:
            port = S3BlobStore(bucket, max_bytes=max_bytes, life_s=LIFE_S)
            stack.push_async_callback(port.close)
            with suppress(StoreUnavailable):
                await port.start()
            return port

        yield make


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


def later() -> float:
    return time.time() + LIFE_S


def age(objects: Objects, by_s: float) -> None:
    """Let all objects be saved so much earlier."""
    for key, found in list(objects.items()):
        objects[key] = replace_object(found, modified_at_s=found.modified_at_s - by_s)


async def got(port: S3BlobStore, image: StoredImage) -> bytes | None:
    """Return all bytes of an image, None if some are missing."""
    data = b"".join([piece async for piece in port.get(TASK, image, 0, image.size_bytes)])
    return data if len(data) == image.size_bytes else None


async def put(port: S3BlobStore, image: VerifiedImage, index: int = 0) -> StoredImage:
    await port.put(TASK, stored(image, index), image.source, later())
    return stored(image, index)


async def test_an_object_has_its_task_index_digest_type_and_expiry(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    port, expires_at = await make_bytes(), later()
    for index, (kind, extension) in enumerate((("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))):
        image = make_image(kind=kind)
        await port.put(TASK, stored(image, index), image.source, expires_at)
        key = f"imagegen/{TASK}/{index}-{image.sha256[:12]}.{extension}"
        found = objects[key]
        assert found.data == image.data
        assert found.content_type == image.content_type
        assert float(found.metadata["imagegen-expires-at"]) == pytest.approx(expires_at, abs=0.001)


async def test_an_extended_object_keeps_its_type(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    port = await make_bytes()
    image = await put(port, make_image())
    await port.extend_expiry(TASK, [image, changed(image, index=5)], time.time() + 5_000)
    key = f"imagegen/{TASK}/0-{image.sha256[:12]}.png"
    found = objects[key]
    assert found.content_type == "image/png"
    assert float(found.metadata["imagegen-expires-at"]) > time.time() + 4_900


async def test_an_object_deleted_externally_is_missing(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    port = await make_bytes()
    image = await put(await make_bytes(), make_image())
    objects.clear()
    assert await got(port, image) is None
    assert not await port.contains_all(TASK, [image])


async def test_an_object_that_was_saved_just_now_is_not_missing(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    port = await make_bytes()
    image = await put(port, make_image())
    objects.clear()
    with pytest.raises(StoreUnavailable):
        await got(port, image)
    with pytest.raises(StoreUnavailable):
        await port.contains_all(TASK, [image])


async def test_an_object_written_by_others_is_not_served(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    port = await make_bytes()
    image = await put(port, make_image())
    objects[next(iter(objects))] = S3Object(bytes(image.size_bytes + 1))
    assert await got(port, image) is None
    assert not await port.contains_all(TASK, [image])


@pytest.mark.parametrize("metadata", [{}, {"imagegen-expires-at": "an odd value"}, {"mtime": "1.5"}])
async def test_an_object_that_lost_its_metadata_lives_as_long_as_a_new_one(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage, metadata: dict[str, str]
) -> None:
    """A copy of a bucket may not have it (rclone without --metadata), nor an object after a restart of some servers."""
    image = make_image()
    stored_image, port = await put(await make_bytes(), image), await make_bytes()
    (key,) = objects
    objects[key] = S3Object(objects[key].data, "image/png", metadata)
    assert await got(port, stored_image) == image.data
    assert await port.contains_all(TASK, [stored_image])
    assert await port.reuse(TASK, stored_image, OTHER, 0, later())
    age(objects, LIFE_S + 60)
    assert await got(port, stored_image) is None
    assert not await port.contains_all(TASK, [stored_image])


async def test_a_copy_has_its_own_end_where_the_service_keeps_that_of_its_source(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "copies_metadata", True)
    port, image = await make_bytes(), make_image()
    stored_image = await put(port, image)
    assert await port.reuse(TASK, stored_image, OTHER, 2, time.time() + 4_000)
    await port.extend_expiry(TASK, [stored_image], time.time() + 5_000)
    lives_s = {
        key.split("/")[1]: float(found.metadata["imagegen-expires-at"]) - time.time() for key, found in objects.items()
    }
    assert lives_s == {TASK: pytest.approx(5_000, abs=60), OTHER: pytest.approx(4_000, abs=60)}
    assert {(found.data, found.content_type) for found in objects.values()} == {(image.data, image.content_type)}


async def test_images_that_are_written_again_are_in_memory_one_at_a_time(
    make_bytes: MakeBytes, make_image: MakeImage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "copies_metadata", True)
    port, requests = await make_bytes(), list[str]()
    images = [await put(port, make_image(colour), place) for place, colour in enumerate(("red", "green", "blue"))]

    def note(request: web.Request) -> None:
        if request.method != "HEAD" and "x-amz-copy-source" not in request.headers:
            requests.append(request.method)

    monkeypatch.setattr(s3, "refuses", note)
    await port.extend_expiry(TASK, images, time.time() + 5_000)
    assert requests == ["GET", "PUT"] * 3


async def test_an_image_waits_a_bounded_time_for_others_that_are_written_again(
    make_bytes: MakeBytes, make_image: MakeImage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "copies_metadata", True)
    monkeypatch.setattr("imagegen.images.s3.REWRITE_WAIT_S", 0.1)
    port, begun = await make_bytes(), list[str]()
    images = [await put(port, make_image(colour), place) for place, colour in enumerate(("red", "green"))]

    def delay_rewrite_s(request: web.Request) -> float:
        if request.method != "PUT" or "x-amz-copy-source" in request.headers:
            return 0.0
        begun.append(request.path)
        return 3.0

    monkeypatch.setattr(s3, "delay_s", delay_rewrite_s)
    first = asyncio.create_task(port.extend_expiry(TASK, images[:1], time.time() + 5_000))
    await eventually(lambda: begun)
    with pytest.raises(StoreUnavailable):
        await port.extend_expiry(TASK, images[1:], time.time() + 5_000)
    assert not first.done()
    await first
    await port.extend_expiry(TASK, images[1:], time.time() + 5_000)


async def test_a_sweep_deletes_only_objects_past_the_longest_lifetime(
    make_bytes: MakeBytes, objects: Objects, make_image: MakeImage
) -> None:
    await put(await make_bytes(), make_image())
    objects["not-ours.txt"] = S3Object(b"")
    age(objects, LIFE_S + SWEEP_MARGIN_S - 60)
    await (await make_bytes()).sweep_once()
    assert len(objects) == 2
    age(objects, 120)
    await (await make_bytes()).sweep_once()
    assert list(objects) == ["not-ours.txt"]


@pytest.mark.parametrize("metadata", ["kept", "lost"])
@pytest.mark.parametrize("ahead_s", [10 * LIFE_S + SWEEP_MARGIN_S, -10 * LIFE_S - SWEEP_MARGIN_S])
async def test_objects_live_as_long_where_the_clock_of_the_service_is_another(
    make_bytes: MakeBytes,
    objects: Objects,
    make_image: MakeImage,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    ahead_s: float,
    metadata: str,
) -> None:
    monkeypatch.setattr(s3, "clock", lambda: time.time() + ahead_s)
    monkeypatch.setattr(s3, "date_clock", lambda: time.time() + ahead_s)
    image = await put(await make_bytes(), make_image())
    if metadata == "lost":
        (key,) = objects
        objects[key] = replace_object(objects[key], metadata={})
    port = await make_bytes()
    await port.sweep_once()
    assert await port.contains_all(TASK, [image])
    age(objects, LIFE_S + SWEEP_MARGIN_S + 60)
    await port.sweep_once()
    assert not objects


async def test_a_sweep_counts_what_others_saved_and_deletes_the_oldest(
    make_bytes: MakeBytes, s3: S3Server, objects: Objects, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await make_bytes(max_bytes=10_000), await make_bytes(max_bytes=10_000)
    images = [make_image(colour, pad_bytes=4_000) for colour in ("red", "green", "blue", "teal")]
    saved = []
    for index, image in enumerate(images):
        monkeypatch.setattr(s3, "clock", lambda index=index: time.time() - 5 + index)
        saved.append(await put((first, second)[index % 2], image, index))
    assert len(objects) == 4
    await first.sweep_once()
    third = await make_bytes()
    assert [await third.contains_all(TASK, [image]) for image in saved] == [False, False, True, True]


async def test_a_sweep_reads_all_pages_of_a_listing(
    make_bytes: MakeBytes, s3: S3Server, objects: Objects, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "page_keys", 2)
    for index in range(5):
        await put(await make_bytes(), make_image(), index)
    age(objects, LIFE_S + SWEEP_MARGIN_S + 60)
    await (await make_bytes()).sweep_once()
    assert not objects


async def test_an_unavailable_service_fails_calls_but_not_the_start(
    make_bytes: MakeBytes, bucket: Bucket, make_image: MakeImage
) -> None:
    port, image = await make_bytes(bucket=replace(bucket, endpoint="http://127.0.0.1:1")), make_image()
    calls: list[Awaitable[object]] = [
        port.put(TASK, stored(image), image.source, later()),
        got(port, stored(image)),
        port.contains_all(TASK, [stored(image)]),
        port.extend_expiry(TASK, [stored(image)], later()),
        port.sweep_once(),
    ]
    sweeping = asyncio.create_task(port.sweep())
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert not sweeping.done()
    sweeping.cancel()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "no-such-bucket"}, "S3_BUCKET"),
        ({"name": "not a bucket's name"}, "S3_BUCKET"),
        ({"endpoint": "http://"}, "S3_ENDPOINT"),
    ],
)
async def test_a_bucket_that_can_not_work_stops_the_start(
    make_bytes: MakeBytes, bucket: Bucket, change: dict[str, str], named: str
) -> None:
    with pytest.raises(SettingsError, match=named) as raised:
        await make_bytes(bucket=replace(bucket, **change))
    assert bucket.secret_access_key not in str(raised.value)


async def served(
    aiohttp_server: AiohttpServer, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> Bucket:
    """Return a bucket of a service with scripted responses."""
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handler)
    return Bucket("pictures", "a-key", "a-secret", endpoint=str((await aiohttp_server(app)).make_url("/")))


@pytest.mark.parametrize(
    ("status", "code", "named"),
    [
        (403, "InvalidAccessKeyId", "S3_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "S3_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "lacks a right"),
        (401, "Unauthorized", "the service refuses us"),
        (503, "SlowDown", None),
    ],
)
async def test_a_rejected_key_stops_the_start_and_a_busy_service_not(
    make_bytes: MakeBytes, aiohttp_server: AiohttpServer, status: int, code: str, named: str | None
) -> None:
    async def refuse(_: web.Request) -> web.Response:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        return web.Response(status=status, text=text, content_type="application/xml")

    bucket = await served(aiohttp_server, refuse)
    if named is None:
        await make_bytes(bucket=bucket)
    else:
        with pytest.raises(SettingsError, match=named):
            await make_bytes(bucket=bucket)


async def test_a_service_that_redirects_everything_stops_the_start(
    make_bytes: MakeBytes, aiohttp_server: AiohttpServer
) -> None:
    asked: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append(request.method)
        text = "<?xml version='1.0'?><Error><Code>PermanentRedirect</Code><Message>no</Message></Error>"
        return web.Response(status=301, text=text, content_type="application/xml")

    bucket = await served(aiohttp_server, redirect)
    with pytest.raises(SettingsError, match="the bucket is elsewhere"):
        await make_bytes(bucket=bucket)
    assert len(asked) <= 3


async def test_nothing_is_saved_or_missing_where_a_page_answers_for_the_service(
    make_bytes: MakeBytes, aiohttp_server: AiohttpServer, make_image: MakeImage
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="<html>Log in</html>", content_type="text/html")

    port, image = await make_bytes(bucket=await served(aiohttp_server, answer)), make_image()
    with pytest.raises(StoreUnavailable):
        await put(port, image)
    with pytest.raises(StoreUnavailable):
        await got(port, stored(image))
    with pytest.raises(StoreUnavailable):
        await port.contains_all(TASK, [stored(image)])


async def test_the_connection_of_an_endless_page_is_closed(
    make_bytes: MakeBytes, aiohttp_server: AiohttpServer, make_image: MakeImage
) -> None:
    left = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-amz-meta-imagegen-expires-at": "1e10"})
        if request.method == "GET" and TASK in request.path:
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(1_000))
                    await asyncio.sleep(0.01)
            except (ConnectionError, asyncio.CancelledError):
                left.set()
        return response

    port, image = await make_bytes(bucket=await served(aiohttp_server, answer)), make_image()
    with pytest.raises(StoreUnavailable) as raised:
        await got(port, stored(image))
    await asyncio.wait_for(left.wait(), 20)
    assert "no ETag" in str(raised.value.__cause__)


async def test_a_truncated_body_is_not_an_image(
    make_bytes: MakeBytes, aiohttp_server: AiohttpServer, make_image: MakeImage
) -> None:
    image = make_image()

    async def break_off(request: web.Request) -> web.StreamResponse:
        if "list-type" in request.query:
            return web.Response(text="<ListBucketResult/>", content_type="application/xml")
        response = web.StreamResponse(headers={"x-amz-meta-imagegen-expires-at": "1e10", "ETag": '"1"'})
        response.content_length = image.size_bytes
        await response.prepare(request)
        await response.write(in_memory(image)[:20])
        assert request.transport
        request.transport.close()
        return response

    port = await make_bytes(bucket=await served(aiohttp_server, break_off))
    with pytest.raises(StoreUnavailable):
        await got(port, stored(image))


def test_a_missing_extra_is_reported_with_its_installation(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiobotocore.session", None)
    with pytest.raises(SettingsError, match=r"pip install -e '.\[s3\]'"):
        S3BlobStore(bucket, max_bytes=1, life_s=1.0)
