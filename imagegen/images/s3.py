"""Image store in a bucket of any S3-compatible service (the optional extra `s3`).

`<prefix>/<task>/<index>-<12 hex of the SHA-256>.<ext>`, with the end in the metadata. A listing shows no metadata and
is billed like a write, so the sweep, once an hour, goes by age: objects older than the longest life are deleted,
then the oldest until the rest is under the cap. Between sweeps this instance counts its own saves. Deleting
is free at most services; a lifecycle rule of the bucket can do it too, where this process is not always up.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
from loguru import logger
from msgspec.structs import replace

from imagegen.errors import SettingsError, StoreUnavailable
from imagegen.formats import parse_digits, parse_http_date
from imagegen.images.disk_index import DiskIndex, IndexEntry, oldest_first
from imagegen.images.needed_uploads import FindNeeded, is_upload, nothing_needed, take_over_cap
from imagegen.images.s3_client import Bucket, client_options, follow_no_redirect
from imagegen.images.s3_errors import NO_OBJECT, NO_OBJECT_OF_HEAD, BucketRefusal, code_of, may_pass
from imagegen.images.store import PIECE_BYTES, READ_S, StoreFull, file_threads, in_file_thread, in_hash_thread
from imagegen.images.store_health import describe
from imagegen.tasks.image import StoredImage

SWEEP_INTERVAL_S = 3600.0
SWEEP_MARGIN_S = 3600.0
"""Beyond the life, since clocks differ."""

SETTLING_S = 60.0
"""An object that this instance has saved can't be gone before this time: many services show it late."""

CALL_S = 30.0
REWRITE_WAIT_S = 30.0
"""How long an object waits for others that are written again before it, whose time limit grows with their size."""

LISTING_S = 600.0
SLOWEST_BYTES_PER_S = 256 * 1024
DELETES_AT_ONCE = 8
MAX_LOCKED = 10_000
"""Keys of objects that could not be deleted which are remembered."""

MAX_REFUSED_DELETES = 64
"""Deletes of one sweep that may be refused: locked objects must not keep the others, and each try is a request."""

_PROBE = b"imagegen probe\n"
_EXPIRES_METADATA = "imagegen-expires-at"


class _Missing(Exception):
    """There is no such object."""


class S3BlobStore:
    """IMAGE_STORE=s3: one request an image to put, to get and to check.

    life_s: how long an image is kept at most; max_bytes: of all, the newest one always stays.
    find_needed: returns the uploads that stay though they are the oldest.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        max_bytes: int,
        life_s: float,
        clock: Callable[[], float] = time.time,
        find_needed: FindNeeded = nothing_needed,
    ) -> None:
        try:
            from aiobotocore.session import get_session  # noqa: PLC0415 - an optional extra, and slow to import
            from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError  # noqa: PLC0415
        except ImportError as error:
            remedy = "pip install -e '.[s3]' in the checkout, or pip install aiobotocore"
            raise SettingsError(f"IMAGE_STORE: s3 needs one more package: {remedy}") from error
        self._bucket = bucket
        self._max_bytes = max_bytes
        self._life_s = life_s
        self._find_needed = find_needed
        self._clock = clock
        self._session = get_session()
        self._cause = (ParamValidationError, ValueError)
        self._refused: type[Exception] = ClientError
        self._failures = (BotoCoreError, aiohttp.ClientError, OSError, TimeoutError)  # a cut body is aiohttp's own
        self._stack = AsyncExitStack()
        self._client: Any = None
        self._rewriting = asyncio.Lock()
        self._index = DiskIndex(max_bytes)
        self._logged_refusal = False
        self._locked: set[str] = set()

    async def start(self) -> None:
        """List, write, read and delete once.

        Raises: SettingsError if the bucket refuses us; StoreUnavailable if it is away, which may pass.
        """
        async with self._starting():
            await self._write_and_delete(f"{self._bucket.prefix}/probe-{secrets.token_hex(6)}")

    async def start_reading(self) -> None:
        """List once, for a store that is only read from. Raises as `start`."""
        async with self._starting():
            pass

    @asynccontextmanager
    async def _starting(self) -> AsyncIterator[None]:
        try:
            opening = self._session.create_client("s3", **client_options(self._bucket))
            self._client = await self._stack.enter_async_context(opening)
            self._client.meta.events.register("before-call.s3.HeadBucket", follow_no_redirect)
            async with asyncio.timeout(CALL_S):
                await self._client.list_objects_v2(Bucket=self._bucket.name, Prefix=self._bucket.prefix, MaxKeys=1)
                yield
        except self._refused as error:
            refusal = BucketRefusal(error)
            if not may_pass(error):
                raise SettingsError(refusal.with_advice) from error
            raise StoreUnavailable from refusal
        except self._cause as error:
            raise SettingsError(f"S3_ENDPOINT, S3_BUCKET, S3_REGION: they can't be used: {error}") from error
        except self._failures as error:
            raise StoreUnavailable from error

    @property
    def loops(self) -> Mapping[str, Callable[[], Coroutine[None, None, None]]]:
        return {"bucket-sweeper": self.sweep}

    async def close(self) -> None:
        await self._stack.aclose()

    async def put(self, task_id: str, image: StoredImage, source: bytes | Path, expires_at_s: float) -> None:
        """Write the object, a file in pieces, then delete the oldest that are over the cap. Raises StoreUnavailable."""
        key = self._key(task_id, image)
        async with self._request(CALL_S + image.size_bytes / SLOWEST_BYTES_PER_S), _opened(source) as body:
            reply = await self._client.put_object(
                Bucket=self._bucket.name,
                Key=key,
                Body=body,
                ContentLength=image.size_bytes,
                ContentMD5=await (in_hash_thread if isinstance(source, bytes) else in_file_thread)(_md5, source),
                ContentType=image.content_type,
                Metadata={_EXPIRES_METADATA: f"{expires_at_s:.3f}"},
            )
            _check_origin(reply)
        await self._count(key, image)

    async def _count(self, key: str, image: StoredImage) -> None:
        """Count a saved object, and delete the oldest ones that are over the cap. Raises StoreFull for an upload."""
        self._index.add(key, image.size_bytes, self._sweep_at(self._clock()))
        with suppress(StoreUnavailable):  # the image is safe; the next sweep finds leftovers
            await self._delete(await take_over_cap(self._index, _task_of, self._find_needed))
        if is_upload(_task_of(key)) and self._index.is_over_cap:
            self._index.forget(key)
            await self._delete([key])
            raise StoreFull

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Copy the object within the service; return False if it is gone. Raises StoreUnavailable."""
        key = self._key(task_id, replace(image, index=index))
        try:
            await self._copy(self._key(source_id, image), key, image, expires_at_s)
        except _Missing:
            return False
        await self._count(key, image)
        return True

    async def get(self, task_id: str, image: StoredImage, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield the object's bytes from `offset` in pieces; none if it is gone or expired. Raises StoreUnavailable."""
        part = {} if length == image.size_bytes else {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            async with self._request(missing=NO_OBJECT):
                reply = await self._client.get_object(Bucket=self._bucket.name, Key=self._key(task_id, image), **part)
        except _Missing:
            self._check_settled(self._key(task_id, image))
            return
        with closing(reply["Body"]) as body:
            async with self._request():
                _check_origin(reply)
                if part and not reply.get("ContentRange"):
                    raise OSError("the response is the whole object in place of a part")
            if not self._is_current(reply, image):
                return
            while True:
                async with self._request():
                    piece = await body.read(PIECE_BYTES)
                if not piece:
                    return
                yield piece

    async def probe(self, _size_bytes: int) -> None:
        """Write a small object, read it back and delete it. Raises StoreUnavailable."""
        key = f"{self._bucket.prefix}/probe-{secrets.token_hex(6)}"
        async with self._request():
            await self._write_and_delete(key)

    async def _write_and_delete(self, key: str) -> None:
        md5 = await in_hash_thread(_md5, _PROBE)  # a bucket with a lock refuses objects without
        await self._client.put_object(Bucket=self._bucket.name, Key=key, Body=_PROBE, ContentMD5=md5)
        reply = await self._client.get_object(Bucket=self._bucket.name, Key=key)
        async with reply["Body"] as body:
            content = await body.read()
        await self._client.delete_object(Bucket=self._bucket.name, Key=key)
        if content != _PROBE:
            raise OSError("an object reads back differently from what was written")

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether each object is there, of its size and before its end. Raises StoreUnavailable."""
        return all(await asyncio.gather(*(self._has(task_id, image) for image in images)))

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Copy each object onto itself with a new end, since metadata can't be changed. Raises StoreUnavailable."""
        await asyncio.gather(*(self._set_end(self._key(task_id, image), image, expires_at_s) for image in images))

    async def sweep(self) -> None:
        """Sweep until cancelled: once now, then once an hour."""
        while True:
            try:
                await self.sweep_once()
            except StoreUnavailable:
                logger.debug("The bucket could not be swept")
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep_once(self) -> None:
        """List the bucket, delete expired objects, and keep the rest under the cap. Raises StoreUnavailable."""
        before = self._index.snapshot()
        order = {key: number for number, key in enumerate(before)}
        self._index.replace(await in_hash_thread(oldest_first, await self._list(), order))
        expired = self._index.take_expired(self._clock())
        await self._delete([*expired, *await take_over_cap(self._index, _task_of, self._find_needed)])

    async def _list(self) -> dict[str, IndexEntry]:
        entries: dict[str, IndexEntry] = {}
        pages = self._client.get_paginator("list_objects_v2")
        async with self._request(LISTING_S):
            async for page in pages.paginate(Bucket=self._bucket.name, Prefix=f"{self._bucket.prefix}/"):
                behind_s = self._behind_s(page)
                for item in page.get("Contents", ()):
                    saved_at_s = item["LastModified"].timestamp() + behind_s
                    entries[item["Key"]] = IndexEntry(item["Size"], self._sweep_at(saved_at_s))
        return entries

    async def _has(self, task_id: str, image: StoredImage) -> bool:
        key = self._key(task_id, image)
        try:
            try:
                async with self._request(missing=NO_OBJECT_OF_HEAD):
                    reply = await self._client.head_object(Bucket=self._bucket.name, Key=key)
                    _check_origin(reply)
            except _Missing:
                reply = await self._get_first_byte(key)
        except _Missing:
            self._check_settled(key)
            return False
        return self._is_current(reply, image)

    async def _get_first_byte(self, key: str) -> Mapping[str, Any]:
        """Return the response for an object that a HEAD did not find; only an error with a body shows why."""
        async with self._request(missing=NO_OBJECT):
            reply: Mapping[str, Any] = await self._client.get_object(
                Bucket=self._bucket.name, Key=key, Range="bytes=0-0"
            )
            reply["Body"].close()
            _check_origin(reply)
        return reply

    def _check_settled(self, key: str) -> None:
        """Raise StoreUnavailable if an object was saved so recently that it is not gone."""
        entry = self._index.get(key)
        if entry is not None and self._sweep_at(self._clock()) - entry.expires_at_s < SETTLING_S:
            raise StoreUnavailable

    async def _set_end(self, key: str, image: StoredImage, expires_at_s: float) -> None:
        with suppress(_Missing):
            await self._copy(key, key, image, expires_at_s)

    async def _copy(self, source: str, key: str, image: StoredImage, expires_at_s: float) -> None:
        """Copy an object with a new end. Raises _Missing, StoreUnavailable."""
        end = {_EXPIRES_METADATA: f"{expires_at_s:.3f}"}
        async with self._request(missing=NO_OBJECT):
            reply = await self._client.copy_object(
                Bucket=self._bucket.name,
                Key=key,
                CopySource={"Bucket": self._bucket.name, "Key": source},
                ContentType=image.content_type,
                Metadata=end,
                MetadataDirective="REPLACE",
            )
            _check_origin(reply.get("CopyObjectResult", {}))
        with suppress(_Missing):  # the copy is there: a bucket may show it late, and a proxy answer a HEAD with 404
            await self._check_end(key, image, end)

    async def _check_end(self, key: str, image: StoredImage, end: Mapping[str, str]) -> None:
        """Write a copy again if it has another end than it was given. Raises _Missing, StoreUnavailable."""
        async with self._request(missing=NO_OBJECT_OF_HEAD):
            copied = await self._client.head_object(Bucket=self._bucket.name, Key=key)
            has_end = copied["Metadata"].get(_EXPIRES_METADATA, end[_EXPIRES_METADATA]) == end[_EXPIRES_METADATA]
        if has_end:
            return
        async with self._request(REWRITE_WAIT_S):
            await self._rewriting.acquire()  # one whole image in memory
        limit_s = CALL_S + image.size_bytes / SLOWEST_BYTES_PER_S
        try:
            async with self._request(limit_s, missing=NO_OBJECT_OF_HEAD):
                await self._rewrite(key, image, end)
        finally:
            self._rewriting.release()

    async def _rewrite(self, key: str, image: StoredImage, metadata: Mapping[str, str]) -> None:
        """Write an object with other metadata. Some services keep the metadata of the source of a copy."""
        reply = await self._client.get_object(Bucket=self._bucket.name, Key=key)
        async with reply["Body"] as body:
            data = await body.read()
        if len(data) != image.size_bytes:  # a page of a proxy would take the place of the image
            raise OSError("the response is not the image that was copied")
        await self._client.put_object(
            Bucket=self._bucket.name,
            Key=key,
            Body=data,
            ContentMD5=await in_hash_thread(_md5, data),
            ContentType=reply["ContentType"],
            Metadata=metadata,
        )

    async def _delete(self, keys: Sequence[str]) -> None:
        """Delete one by one: not every service supports multi-object deletes. Objects that are refused, as locks of the
        bucket do it, stay, and are tried last from then on. Raises StoreUnavailable.
        """
        if not keys:
            return
        keys, refusals = sorted(keys, key=self._locked.__contains__), list[BaseException]()
        for at in range(0, len(keys), DELETES_AT_ONCE):
            batch = keys[at : at + DELETES_AT_ONCE]
            errors = await asyncio.gather(*map(self._delete_one, batch), return_exceptions=True)
            for key, error in zip(batch, errors, strict=True):
                if error is None:
                    self._locked.discard(key)
                elif isinstance(error.__cause__, BucketRefusal):
                    refusals.append(error.__cause__)
                    self._locked.add(key)
                else:
                    raise error
            if len(refusals) >= MAX_REFUSED_DELETES:
                break
        if len(self._locked) > MAX_LOCKED:
            self._locked.clear()
        self._log_refusals(refusals)

    def _log_refusals(self, refusals: Sequence[BaseException]) -> None:
        """Log that objects can't be deleted, once until all can."""
        if refusals and not self._logged_refusal:
            logger.warning("Expired images can't be deleted in the bucket: {}", describe(refusals[0]))
        self._logged_refusal = bool(refusals)

    async def _delete_one(self, key: str) -> None:
        with suppress(_Missing):
            async with self._request(missing=NO_OBJECT):
                await self._client.delete_object(Bucket=self._bucket.name, Key=key)

    @asynccontextmanager
    async def _request(
        self, deadline_s: float = CALL_S, *, missing: Collection[str] = frozenset()
    ) -> AsyncIterator[None]:
        """Raise _Missing for an error with one of the codes `missing`, StoreUnavailable for any other failure."""
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except self._refused as error:
            if code_of(error) in missing:
                raise _Missing from error
            raise StoreUnavailable from BucketRefusal(error)
        except (*self._failures, LookupError, ValueError) as error:  # the last two: odd responses
            raise StoreUnavailable from error

    def _key(self, task_id: str, image: StoredImage) -> str:
        return f"{self._bucket.prefix}/{task_id}/{image.index}-{image.sha256[:12]}.{image.extension}"

    def _is_current(self, reply: Mapping[str, Any], image: StoredImage) -> bool:
        """Return whether an object is an image that has not expired. A proxy may hide its size.

        Some services keep no metadata, nor do some copies of a bucket: such an object lives as long as a new one.
        """
        end_s, saved_at = _seconds(reply["Metadata"].get(_EXPIRES_METADATA, "")), reply.get("LastModified")
        if end_s is None:
            end_s = math.inf if saved_at is None else saved_at.timestamp() + self._behind_s(reply) + self._life_s
        whole_bytes = parse_digits(str(reply.get("ContentRange", "")).rpartition("/")[2])
        size_bytes = reply.get("ContentLength", image.size_bytes) if whole_bytes is None else whole_bytes
        return bool(size_bytes == image.size_bytes and end_s > self._clock())

    def _behind_s(self, reply: Mapping[str, Any]) -> float:
        """Return the seconds that the service's clock is behind ours by the date of its response.

        The ages of objects are measured by the clock that dates them.
        """
        sent_at_s = parse_http_date(reply["ResponseMetadata"]["HTTPHeaders"].get("date"))
        return 0.0 if sent_at_s is None else self._clock() - sent_at_s

    def _sweep_at(self, saved_at_s: float) -> float:
        """Return the Unix time from which the sweep deletes an object."""
        return saved_at_s + self._life_s + SWEEP_MARGIN_S


def _check_origin(reply: Mapping[str, Any]) -> None:
    """Raise OSError for the response of something else than an S3 service, such as the page of a proxy or a login."""
    if not reply.get("ETag"):
        raise OSError("the response has no ETag, so it is not that of an S3 service")


@asynccontextmanager
async def _opened(source: bytes | Path) -> AsyncIterator[bytes | BinaryIO]:
    if isinstance(source, bytes):
        yield source
        return
    file = await file_threads.run_within(READ_S, source.open, "rb")
    try:
        yield file
    finally:
        file.close()


def _md5(source: bytes | Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    return base64.b64encode(digest.digest()).decode()


def _task_of(key: str) -> str:
    return key.rpartition("/")[0].rpartition("/")[2]


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
