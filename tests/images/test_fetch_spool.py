"""Tests of images that are received or decoded into files, and of a disk that can not take them."""

from __future__ import annotations

import asyncio
import errno
import gzip
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pybase64
import pytest
from aiohttp import web

from imagegen.byte_budget import ByteBudget
from imagegen.errors import StoreUnavailable
from imagegen.images import fetch
from imagegen.tasks.image import GivenImage, ImageBase64, ImageBytes
from tests.images.backings import spool_in
from tests.images.link_server import LARGE, PNG, Upstream, answers, contents, make_fetcher, noise, open_session, refusal
from tests.support import eventually, over_rows

pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_image_is_spooled_and_uses_no_memory(upstream: Upstream, tmp_path: Path, chunked: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={} if chunked else {"Content-Length": str(len(LARGE))})
        await response.prepare(request)
        await response.write(LARGE)
        return response

    upstream.paths["/x"] = answer
    own, memory = frozenset({upstream.host}), ByteBudget()
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path, memory=memory)
        image = await fetcher.fetch(upstream.link("/x"))
    assert image.data is None
    assert image.path is not None
    assert contents(image.path) == LARGE
    assert (image.size_bytes, image.width, memory.held) == (len(LARGE), 700, 0)


@pytest.mark.parametrize("compressed", [False, True])
async def test_an_image_that_is_received_in_several_parts_is_whole(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(fetch, "_FLUSH_BYTES", 400_000)
    upstream.paths["/x"] = answers(body=gzip.compress(LARGE, 1) if compressed else LARGE)
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        image = await make_fetcher(session, own, folder=tmp_path).fetch(upstream.link("/x"))
    assert contents(image.path) == LARGE


async def test_many_large_images_of_hosts_that_stall_take_little_memory(upstream: Upstream, tmp_path: Path) -> None:
    waiting, count = 0, 40

    async def stall(request: web.Request) -> web.StreamResponse:
        nonlocal waiting
        response = web.StreamResponse(headers={"Content-Length": "8000000"})
        await response.prepare(request)
        await response.write(LARGE[:1000])
        waiting += 1
        await asyncio.Event().wait()
        return response

    upstream.paths["/x"] = stall
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path)
        tracemalloc.start()
        fetches = [asyncio.create_task(fetcher.fetch(upstream.link("/x"))) for _ in range(count)]
        try:
            await eventually(lambda: waiting == count)
            assert tracemalloc.get_traced_memory()[1] < count * 1_000_000
        finally:
            tracemalloc.stop()
            for fetch_of_one in fetches:
                fetch_of_one.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def base64_image(data: bytes) -> ImageBase64:
    return ImageBase64(memoryview(pybase64.b64encode(data)))


async def test_base64_is_decoded_to_a_file_with_or_without_padding(tmp_path: Path) -> None:
    async with open_session(frozenset()) as session:
        fetcher = make_fetcher(session, folder=tmp_path)
        for text in (pybase64.b64encode(LARGE), pybase64.b64encode(LARGE).rstrip(b"=")):
            image = await fetcher.fetch(ImageBase64(memoryview(text)))
            assert image.path is not None
            assert contents(image.path) == LARGE
        assert (await fetcher.fetch(base64_image(PNG))).data == PNG
        for text in (b"not base64!!", pybase64.b64encode(LARGE)[:-9] + b"*" * 9):
            assert not (await refusal(fetcher, ImageBase64(memoryview(text)))).lasting
    await eventually(lambda: len(names(tmp_path)) == 2)


@over_rows(
    "change",
    [
        lambda text: text.translate(bytes.maketrans(b"+/", b"-_")),
        lambda text: b" " + text.rstrip(b"=") + b"===\t",
        lambda text: text.replace(b"+", b"%2B").replace(b"/", b"%2F"),
        lambda text: b"\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        lambda text: text.replace(b"+", b"\\u002B").replace(b"/", b"\\/"),
    ],
)
async def test_base64_in_other_forms_is_read(change: Callable[[bytes], bytes]) -> None:
    async with open_session(frozenset()) as session:
        fetcher = make_fetcher(session)
        for data in (noise(60), LARGE):
            text = change(pybase64.b64encode(data))
            assert text != pybase64.b64encode(data)
            assert (await fetcher.fetch(ImageBase64(memoryview(text)))).size_bytes == len(data)


@pytest.mark.parametrize("given", [ImageBytes(LARGE), base64_image(LARGE), None])
@pytest.mark.parametrize("after_bytes", [0, 600_000])
async def test_an_image_that_a_full_disk_can_not_take_stays_in_memory(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: GivenImage | None, after_bytes: int
) -> None:
    free_bytes = after_bytes

    def write(file: int, data: memoryview) -> int:
        nonlocal free_bytes
        if not free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(file, data[:free_bytes])
        free_bytes -= done
        return done

    def write_pieces(file: int, pieces: Sequence[bytes]) -> int:
        return write(file, memoryview(b"".join(pieces)))

    real = os.write
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "writev", write_pieces, raising=False)
    upstream.paths["/x"] = answers(body=LARGE)
    own, memory = frozenset({upstream.host}), ByteBudget()
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path, memory=memory)
        image = await fetcher.fetch(given or upstream.link("/x"))
    assert image.data == LARGE
    assert memory.held == len(LARGE)
    await eventually(lambda: names(tmp_path) == [])
    fetcher._spool.discard(image)
    assert memory.held == 0


@pytest.mark.skipif(not hasattr(os, "writev"), reason="this system has no writev")
async def test_the_pieces_of_a_large_image_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], os.writev

    def write_pieces(file: int, pieces: Sequence[bytes]) -> int:
        calls.append(len(pieces))
        return real(file, pieces)

    monkeypatch.setattr(os, "writev", write_pieces)
    sink = spool_in(tmp_path).sink()
    image = sink.finish([LARGE[at : at + 5_000] for at in range(0, len(LARGE), 5_000)])
    assert image.path is not None
    assert image.path.read_bytes() == LARGE
    assert len(calls) == -(-len(LARGE) // (1024 * 1024))
    assert sum(calls) == -(-len(LARGE) // 5_000)


def test_an_image_that_was_left_while_its_file_was_closed_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, real = spool_in(tmp_path).sink(), os.close

    def close(file: int) -> None:
        sink.discard()
        real(file)

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(StoreUnavailable):
        sink.finish([LARGE])
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
async def test_an_image_stays_in_memory_if_no_file_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    async with open_session(frozenset()) as session:
        image = await make_fetcher(session, folder=tmp_path).fetch(ImageBytes(LARGE))
    assert image.data == LARGE


async def test_a_link_is_deferred_without_space_on_disk_and_in_memory(upstream: Upstream, tmp_path: Path) -> None:
    upstream.paths["/x"] = answers(body=LARGE)
    (tmp_path / "file").write_bytes(b"")
    own, memory = frozenset({upstream.host}), ByteBudget(1_000_000)
    assert memory.try_take(900_000)
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path / "file", memory=memory)
        with pytest.raises(StoreUnavailable):
            await fetcher.fetch(upstream.link("/x"))
    assert memory.held == 900_000


async def test_a_rejected_large_image_leaves_no_file(upstream: Upstream, tmp_path: Path) -> None:
    upstream.paths["/x"] = answers(body=LARGE[:-20])
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        await refusal(make_fetcher(session, own, folder=tmp_path), upstream.link("/x"), age_s=11.0)
    await eventually(lambda: names(tmp_path) == [])
