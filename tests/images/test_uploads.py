"""Contract tests of uploads over every image store."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest
from PIL import Image

from imagegen.errors import BodyTooLarge, ImageTooLarge, StoreUnavailable, UnsupportedImage
from imagegen.images import needed_uploads
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.needed_uploads import NeededUploads
from imagegen.images.sniff import sniff
from imagegen.images.upload_records import UploadRecords
from imagegen.images.upload_rights import UploadRights
from imagegen.images.uploads import Uploads
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from tests.image_bytes import image_file, png_file
from tests.images.conftest import OpenStore
from tests.support import Clock, eventually

OpenUploads = Callable[..., Awaitable[Uploads]]


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
async def open_uploads(open_store: OpenStore, redis_url: str, prefix: str, clock: Clock) -> AsyncIterator[OpenUploads]:
    """Open the uploads of one more instance: `await open_uploads(life_s=60)`."""
    async with AsyncExitStack() as stack:

        async def open_one(
            *, life_s: float = 600.0, max_bytes: int = 1_000_000, store_bytes: int = 10_000_000
        ) -> Uploads:
            connection, keys = Connection(redis_url), Keys(prefix)
            stack.push_async_callback(connection.close)
            needed = NeededUploads(connection, keys)
            store = await open_store(store_bytes, needed.among)
            records, rights = UploadRecords(connection, keys, clock), UploadRights(connection, keys, clock)
            return Uploads(store, records, rights, needed, life_s=life_s, max_bytes=max_bytes)

        yield open_one


def names_in_spool(uploads: Uploads) -> list[str]:
    folder = uploads._store.spool_folder
    assert folder is not None
    return [path.name for path in folder.iterdir()]


def png_of(width: int, height: int) -> bytes:
    """Return a whole PNG of a few hundred bytes, with a header that claims any size."""
    return png_file(width, height, zlib.compress(bytes(64)), depth=1, colour_type=0)


def noise(side: int) -> bytes:
    """Return a JPEG that can't be compressed further."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, "JPEG", quality=75)
    return file.getvalue()


async def in_pieces(data: bytes, piece_bytes: int = 1_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), piece_bytes):
        yield data[at : at + piece_bytes]


async def load(uploads: Uploads, upload_id: str) -> bytes | None:
    opened = await uploads.open(upload_id)
    if opened is None:
        return None
    with closing(opened):
        return await opened.read_all()


async def test_an_upload_is_found_by_its_hash_on_every_instance(open_uploads: OpenUploads) -> None:
    first, second = await open_uploads(), await open_uploads()
    for kind in ("PNG", "JPEG", "WEBP"):
        data = image_file(kind=kind)
        upload, is_new = await first.save(in_pieces(data))
        assert is_new
        assert upload.id == f"upload:{hashlib.sha256(data).hexdigest()}"
        assert (upload.content_type, upload.size_bytes) == (f"image/{kind.lower()}", len(data))
        assert (upload.width, upload.height) == (24, 16)
        for uploads in (first, second):
            assert await uploads.find(upload.id) == upload
            assert await load(uploads, upload.id) == data


async def test_the_same_bytes_again_are_the_same_upload_with_a_longer_life(
    open_uploads: OpenUploads, clock: Clock
) -> None:
    uploads, data = await open_uploads(), image_file()
    first, _ = await uploads.save(in_pieces(data))
    clock.now += 10
    again, is_new = await uploads.save(in_pieces(data, 7))
    assert (again.id, is_new) == (first.id, False)
    assert again.expires_at == pytest.approx(first.expires_at + 10, abs=0.01)


async def test_an_expired_upload_is_not_found_but_can_be_uploaded_again(
    open_uploads: OpenUploads, clock: Clock
) -> None:
    uploads, data = await open_uploads(life_s=60), image_file()
    upload, _ = await uploads.save(in_pieces(data))
    clock.now += 61
    assert await uploads.find(upload.id) is None
    assert (await uploads.save(in_pieces(data)))[1]
    assert await uploads.find(upload.id) is not None


async def test_an_unknown_upload_is_not_found(open_uploads: OpenUploads) -> None:
    uploads = await open_uploads()
    for upload_id in ("upload:" + "0" * 64, "upload:", "upload:../../etc/passwd", "", "0" * 64):
        assert await uploads.find(upload_id) is None, upload_id
        assert await uploads.open(upload_id) is None, upload_id
        await uploads.keep([upload_id], 1e12)


async def test_an_upload_that_a_task_needs_outlives_its_expiry(open_uploads: OpenUploads, clock: Clock) -> None:
    first, second, data = await open_uploads(life_s=60), await open_uploads(life_s=60), image_file()
    upload, _ = await first.save(in_pieces(data))
    await second.keep([upload.id], clock() + 3600)
    clock.now += 3599
    for uploads in (first, second):
        assert await uploads.find(upload.id) is None, "no new task may use it"
        assert await uploads.describe(upload.id) is not None
        assert await load(uploads, upload.id) == data


PAGE = b"<!DOCTYPE html><html><script>alert(1)</script></html>"
REFUSED = {
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UnsupportedImage),
    "a page": (PAGE, UnsupportedImage),
    "a PNG with a page behind it": (image_file() + PAGE, UnsupportedImage),
    "a JPEG with a page behind it": (image_file(kind="JPEG") + PAGE, UnsupportedImage),
    "a page with a PNG in it": (b"<html>" + image_file(), UnsupportedImage),
    "a GIF": (image_file(kind="GIF"), UnsupportedImage),
    "a truncated PNG": (image_file()[:-5], UnsupportedImage),
    "a truncated JPEG": (image_file(kind="JPEG")[:-5], UnsupportedImage),
    "a truncated WebP": (image_file(kind="WEBP")[:-5], UnsupportedImage),
    "nothing": (b"", UnsupportedImage),
    "a PNG of 100 megapixels": (png_of(10_000, 10_000), ImageTooLarge),
    "a PNG of four billion pixels a side": (png_of(2**31 - 1, 2**31 - 1), ImageTooLarge),
    "a PNG without a pixel": (png_of(0, 0), UnsupportedImage),
    "more bytes than allowed": (image_file() + bytes(1_000_000), BodyTooLarge),
}


async def test_nothing_is_kept_of_a_file_that_is_refused(open_uploads: OpenUploads) -> None:
    uploads = await open_uploads()
    for (name, (data, error)), piece_bytes in itertools.product(REFUSED.items(), (5, 1_000_000)):
        size = max(piece_bytes, 50_000) if len(data) > 100_000 else piece_bytes
        with pytest.raises(error):
            await uploads.save(in_pieces(data, size))
        assert await uploads.find(f"upload:{hashlib.sha256(data).hexdigest()}") is None, name
        await eventually(lambda: names_in_spool(uploads) == ["lock"])


async def test_bytes_behind_the_image_are_dropped(open_uploads: OpenUploads) -> None:
    uploads, data = await open_uploads(), image_file(kind="JPEG")
    upload, _ = await uploads.save(in_pieces(data + b"a short film"))
    assert upload.id == f"upload:{hashlib.sha256(data).hexdigest()}"
    assert await load(uploads, upload.id) == data


async def test_a_client_that_leaves_leaves_nothing(open_uploads: OpenUploads) -> None:
    uploads, data = await open_uploads(), image_file(size=(900, 900))

    async def cut() -> AsyncIterator[bytes]:
        yield data[:500]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await uploads.save(cut())
    await eventually(lambda: names_in_spool(uploads) == ["lock"])


async def test_a_store_that_can_not_be_written_refuses_uploads_before_a_byte(open_uploads: OpenUploads) -> None:
    uploads, read = await open_uploads(), []

    async def chunks() -> AsyncIterator[bytes]:
        read.append(1)
        yield image_file()

    uploads._store.health.mark_failed("ENOSPC")
    with pytest.raises(StoreUnavailable):
        await uploads.save(chunks())
    assert not read


async def test_in_a_full_store_the_oldest_uploads_go_that_no_unfinished_task_needs(
    open_uploads: OpenUploads, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needed_uploads, "FOUND_S", 0.0)
    files = [noise(100) for _ in range(5)]
    store_bytes = int(3.5 * max(map(len, files)))
    uploads, connection, stream = (
        await open_uploads(store_bytes=store_bytes),
        Connection(redis_url),
        Keys(prefix).stream,
    )
    needed, other = [(await uploads.save(in_pieces(data)))[0].id for data in files[:2]]
    for number in range(1_200):
        text = needed if number == 1_100 else f"https://a.example/{number}"
        await connection.commands.xadd(stream, {"task": f'{{"prompt":"p","image_url":"{text}"}}'})
    for data in files[2:]:
        await uploads.save(in_pieces(data))
    assert await uploads.find(needed) is not None
    assert await load(uploads, needed) == files[0]
    assert await uploads.find(other) is None
    await connection.commands.delete(stream)
    for data in (noise(100), noise(100), noise(100)):
        await uploads.save(in_pieces(data))
    assert await uploads.find(needed) is None
    await connection.close()


async def test_uploads_that_tasks_need_are_not_added_to_without_end(
    open_uploads: OpenUploads, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needed_uploads, "FOUND_S", 0.0)
    files = [noise(100) for _ in range(4)]
    uploads = await open_uploads(store_bytes=int(2.5 * max(map(len, files))))
    other, _ = await uploads.save(in_pieces(files[3]))
    needed = [(await uploads.save(in_pieces(data)))[0].id for data in files[:2]]
    connection = Connection(redis_url)
    await connection.commands.xadd(Keys(prefix).stream, {"task": json.dumps(needed)})
    with pytest.raises(StoreUnavailable):
        await uploads.save(in_pieces(files[2]))
    assert await uploads.find(other.id) is None, "the oldest that no task needs goes first"
    assert uploads._store.health.writable, "calls go on"
    for upload_id, data in zip(needed, files, strict=False):
        assert await load(uploads, upload_id) == data
    image = sniff(files[2])
    await uploads._store.save("f" * 32, 0, image, uploads._clock() + 60)
    assert await uploads._store.contains("f" * 32, image.stored_at(0)), "an image that is paid for is saved"
    await connection.commands.delete(Keys(prefix).stream)
    assert (await uploads.save(in_pieces(files[2])))[1]
    await connection.close()


async def test_an_upload_stays_while_its_task_waits_in_the_line_of_its_key(
    open_uploads: OpenUploads, redis_url: str, prefix: str
) -> None:
    files = [noise(100) for _ in range(4)]
    uploads = await open_uploads(store_bytes=int(2.5 * max(map(len, files))))
    needed, _ = await uploads.save(in_pieces(files[0]))
    connection, keys = Connection(redis_url), Keys(prefix)
    await connection.commands.rpush(keys.line("a"), json.dumps({"task": needed.id}))
    await connection.commands.sadd(keys.lines, "a")
    for data in files[1:]:
        await uploads.save(in_pieces(data))
    assert await load(uploads, needed.id) == files[0]
    await connection.close()


async def test_an_upload_that_a_task_needs_is_found_in_a_long_line_and_not_searched_for_with_each_save(
    redis_url: str, prefix: str
) -> None:
    connection, keys, upload = Connection(redis_url), Keys(prefix), "a" * 64
    await connection.commands.sadd(keys.lines, "a")
    await connection.commands.rpush(keys.line("a"), f"upload:{upload}", *["{}"] * 500)
    needed, commands = NeededUploads(connection, keys), connection.meter.commands
    assert await needed.among({upload, "b" * 64}) == {upload}
    before = commands["pictures"]
    assert await needed.among({upload}) == {upload}
    assert commands["pictures"] == before
    await connection.close()


async def test_an_upload_stays_while_its_task_is_being_submitted(open_uploads: OpenUploads) -> None:
    uploads = await open_uploads(store_bytes=int(2.5 * len(noise(100))))
    upload, _ = await uploads.save(in_pieces(noise(100)))
    await uploads.keep([upload.id], uploads._clock() + 60)
    for _ in range(4):
        await uploads.save(in_pieces(noise(100)))
    assert await uploads.find(upload.id) is not None


async def test_an_upload_is_found_only_by_the_keys_that_sent_it(open_uploads: OpenUploads, clock: Clock) -> None:
    here, elsewhere, data = await open_uploads(life_s=60), await open_uploads(life_s=60), image_file()
    upload, is_new = await here.save(in_pieces(data), scope="a")
    assert is_new
    assert [await uploads.find(upload.id, "b") for uploads in (here, elsewhere)] == [None, None]
    assert [await uploads.find(upload.id, "a") for uploads in (here, elsewhere)] == [upload, upload]
    clock.now += 30
    theirs, is_new = await elsewhere.save(in_pieces(data), scope="b")
    assert is_new, "the answer does not show that another key has sent it"
    assert theirs.expires_at == upload.expires_at + 30
    assert not (await here.save(in_pieces(data), scope="b"))[1]
    assert await here.find(upload.id, "b") is not None
    clock.now += 31
    assert await here.find(upload.id, "b") is not None
    assert await here.find(upload.id, "a") is None, "its own time is over"
    assert await here.find(upload.id) is not None


async def test_an_upload_whose_keys_hold_another_type_is_not_found_but_can_be_uploaded_again(
    open_uploads: OpenUploads, redis_url: str, prefix: str
) -> None:
    first, second, third = await open_uploads(), await open_uploads(), await open_uploads()
    data, connection = image_file(), Connection(redis_url)
    upload, _ = await first.save(in_pieces(data), scope="a")
    names = [key async for key in _keys(connection, f"{{{prefix}}}:upload:*")]
    assert len(names) == 2
    for name in names:
        await connection.commands.delete(name)
        await connection.commands.rpush(name, b"of another program")
    await connection.close()
    assert await second.find(upload.id, "a") is None
    assert await second.find(upload.id) is None
    assert (await second.save(in_pieces(data), scope="a"))[0].id == upload.id
    assert await third.find(upload.id, "a") is not None


async def _keys(connection: Connection, match: str) -> AsyncIterator[bytes]:
    cursor = -1
    while cursor:
        cursor, names = await connection.scan(max(cursor, 0), match, 1000)
        for name in names:
            yield name


async def test_no_upload_is_removed_for_space_while_redis_is_away(open_uploads: OpenUploads) -> None:
    needed = NeededUploads(Connection("redis://127.0.0.1:1"), Keys("nowhere"))
    assert set(await needed.among({"a" * 64, "b" * 64})) == {"a" * 64, "b" * 64}
    await needed._connection.close()


@pytest.mark.parametrize("which", ["client", "lines", "line"])
async def test_no_upload_is_removed_for_space_while_foreign_values_are_among_the_lines(
    redis_url: str, prefix: str, which: str
) -> None:
    connection, keys, uploads = Connection(redis_url), Keys(prefix), {"a" * 64}
    redis, needed = connection.commands, NeededUploads(connection, keys)
    if which == "lines":
        await redis.set(keys.lines, b"\xff")
    else:
        await redis.sadd(keys.lines, b"\xff\xfe", "b")
        await redis.rpush(keys.line("b"), b"\xff")
    if which == "line":
        await redis.set(keys.line("c"), b"\xff")
        await redis.sadd(keys.lines, "c")
    assert set(await needed.among(uploads)) == (set() if which == "client" else uploads)
    assert connection.health.down_since is None
    await connection.close()


async def test_an_instance_keeps_its_own_copy_if_another_one_has_its_own_folder(
    redis_url: str, prefix: str, clock: Clock, tmp_path: Path
) -> None:
    connection, keys, data = Connection(redis_url), Keys(prefix), image_file()
    both = []
    for name in ("a", "b"):
        store = DiskStore(tmp_path / name / "images", 10**6, lookups=DiskLookups(lambda: True))
        await store.start()
        records, rights = UploadRecords(connection, keys, clock), UploadRights(connection, keys, clock)
        both.append(Uploads(store, records, rights, NeededUploads(connection, keys), life_s=60.0, max_bytes=10**6))
    first, second = both
    upload, _ = await first.save(in_pieces(data))
    with pytest.raises(StoreUnavailable):
        await second.find(upload.id)
    await second.save(in_pieces(data))
    for uploads in both:
        assert await load(uploads, upload.id) == data
        await uploads._store.close()
    await connection.close()
