"""Asynchronous client."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from imagegen.client.calls import (
    cancel_steps,
    completed,
    download_steps,
    get_steps,
    models_steps,
    retry_steps,
    submit_steps,
    upload_steps,
    wait_steps,
)
from imagegen.client.event_feed import EventFeed
from imagegen.client.exchange import HttpRequest, HttpResponse, NoResponse, Pause, RepeatPolicy, Steps
from imagegen.client.results import ImageTask, SubmitReceipt, TaskEvent, TaskImage, UploadReceipt
from imagegen.client.submit_fields import SubmitFields
from imagegen.client.wire import Wire, loss_of, may_redirect, response_of, write_file

_T = TypeVar("_T")


class AsyncImageClient:
    """Client of one service. It belongs to one event loop; close it, or use it in `async with`.

    Errors are those of `imagegen.client.exceptions`: ResponseError and its kinds, and ConnectionFailed.

    Args:
        base_url: as `https://images.example.org`, with the path of a proxy if there is one.
        api_key: `ig_...`; None for a service without keys.
        repeats: how often a request is sent.
        language: of messages, `en` or `zh`.
        http: client of httpx with settings such as proxies; it is closed too. None: a new one.
        on_pause: called before each pause between repeats, for a display.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        repeats: RepeatPolicy | None = None,
        language: str = "en",
        http: httpx.AsyncClient | None = None,
        on_pause: Callable[[Pause], object] | None = None,
    ) -> None:
        self._wire = Wire(base_url, api_key, language)
        self._policy = repeats or RepeatPolicy()
        self._http = http or httpx.AsyncClient()
        self._on_pause = on_pause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def submit(
        self, prompt: str, *, idempotency_key: str | None = None, fresh: bool = False, **fields: Unpack[SubmitFields]
    ) -> SubmitReceipt:
        """Submit a task, or join an equal one.

        Args:
            idempotency_key: repeats with the same key and fields pay once, also in another process, for 24 h; None: a
                new key, which is the same for all repeats of this call.
            fresh: generate again, even if the same request was completed before.
        """
        return await self._run(submit_steps(prompt, fields, self._policy, key=idempotency_key, fresh=fresh))

    async def get(self, task_id: str) -> ImageTask:
        """Return the state of a task. Raises ResourceNotFound if it does not exist or has expired."""
        return await self._run(get_steps(task_id, self._policy))

    async def wait(self, task_id: str, timeout_s: float | None = None) -> ImageTask:
        """Return a task once it is finished, however. Raises WaitTimeout after `timeout_s`; None: no limit."""
        return await self._run(wait_steps(task_id, timeout_s, time.monotonic))

    async def generate(
        self, prompt: str, *, timeout_s: float | None = None, fresh: bool = False, **fields: Unpack[SubmitFields]
    ) -> ImageTask:
        """Submit a task and return it once it is completed. Raises TaskUnsuccessful, WaitTimeout."""
        receipt = await self._run(submit_steps(prompt, fields, self._policy, key=None, fresh=fresh))
        return completed(await self.wait(receipt.task_id, timeout_s))

    async def events(self, task_id: str, last_event_id: str = "") -> AsyncIterator[TaskEvent]:
        """Yield the changes of a task until it is finished. A lost connection is resumed, so that none is missed.

        Args:
            last_event_id: `id` of the last event that the caller has. Images that the task has already come again.
        """
        feed = EventFeed(task_id, last_event_id)
        while not feed.is_over:
            try:
                request = self._wire.build(self._http, feed.request())
                async with aclosing(await self._http.send(request, stream=True)) as response:
                    if feed.on_opened(response.status_code, response.headers.get("Content-Type", "")):
                        async for piece in response.aiter_bytes():
                            for event in feed.feed(piece):
                                yield event
                        pause_s = feed.on_ended()
                    else:
                        await response.aread()
                        pause_s = feed.on_refused(response_of(response))
            except httpx.HTTPError as error:
                pause_s = feed.on_lost(str(loss_of(error)))
            if not feed.is_over:
                await asyncio.sleep(pause_s)

    async def cancel(self, task_id: str) -> ImageTask:
        """Cancel a task; `left` if it goes on for others that joined it. Raises RequestConflict if it was finished."""
        return await self._run(cancel_steps(task_id, self._policy))

    async def retry(self, task_id: str) -> SubmitReceipt:
        """Queue a failed or cancelled task again. Raises RequestConflict for another one.

        It is not repeated after a lost answer (ConnectionFailed.maybe_sent): read the task then.
        """
        return await self._run(retry_steps(task_id, self._policy))

    async def upload(self, image: bytes | str | os.PathLike[str]) -> UploadReceipt:
        """Upload an input image: PNG, JPEG or WebP, as bytes or the path of a file. Raises OSError."""
        data = image if isinstance(image, bytes) else await asyncio.to_thread(Path(image).read_bytes)
        return await self._run(upload_steps(data, self._policy))

    async def download(self, image: TaskImage | str) -> bytes:
        """Return the bytes of an image or link, compared with the image's SHA-256. Raises DownloadBroken."""
        return await self._run(download_steps(image, self._policy))

    async def save(self, image: TaskImage | str, path: str | os.PathLike[str]) -> Path:
        """Download an image into a file, which appears when it is whole; return its path. Raises OSError."""
        return await asyncio.to_thread(write_file, path, await self.download(image))

    async def models(self) -> list[dict[str, Any]]:
        """Return the models with their capabilities and prices."""
        return await self._run(models_steps(self._policy))

    async def _run(self, steps: Steps[_T]) -> _T:
        """Do the steps; return their result."""
        response: HttpResponse | None = None
        loss: NoResponse | None = None
        while True:
            try:
                step = steps.send(response) if loss is None else steps.throw(loss)
            except StopIteration as end:
                result: _T = end.value
                return result
            response = loss = None
            if isinstance(step, Pause):
                if self._on_pause is not None:
                    self._on_pause(step)
                await asyncio.sleep(step.seconds)
                continue
            try:
                response = await self._send(step)
            except httpx.HTTPError as error:
                loss = loss_of(error)

    async def _send(self, request: HttpRequest) -> HttpResponse:
        sent = self._wire.build(self._http, request)
        return response_of(await self._http.send(sent, follow_redirects=may_redirect(request)))
