"""The command `imagegen generate`: images of a prompt into files, by a running service or by one in this process."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from imagegen import log
from imagegen.client import (
    AsyncImageClient,
    ClientError,
    ImageTask,
    RequestRefused,
    ResponseError,
    SubmitFields,
    SubmitReceipt,
    TaskImage,
    TaskUnsuccessful,
)
from imagegen.client.exchange import Pause
from imagegen.errors import SettingsError
from imagegen.generate_progress import (
    Progress,
    create_progress,
    describe_end,
    describe_pause,
    describe_submit,
    is_joined,
    printable,
)
from imagegen.output_files import check_folder, extension, file_stem, write_image
from imagegen.resolver import EventLoop
from imagegen.settings import Settings
from imagegen.standard_streams import open_null, open_standard_streams, print_result

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes."""

LEAVE_S = 5.0
"""After a Ctrl-C: for the answer of a submit, and for that of the cancel."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Hosts that no proxy of the environment is for."""

_LINKS = ("http://", "https://", "upload:")
_USAGE_STATUSES = frozenset({400, 413, 415, 422})


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of the command. images: files, links or uploads. url: None for the service in this process."""

    prompt: str
    fields: SubmitFields
    images: tuple[str, ...]
    folder: Path
    url: str | None
    key: str | None = field(repr=False)
    as_json: bool

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> GenerateOptions:
        """Return the options of parsed arguments. Raises ValueError."""
        images = list(chosen.image or ())
        prompt = chosen.prompt
        if prompt is None and len(images) > 1 and not _is_source(images[-1]):
            prompt = images.pop()  # `--image FILE PROMPT`
        if prompt is None or not prompt.strip():
            raise ValueError("PROMPT is required")
        for image in images:
            if not _is_source(image):
                raise ValueError(f"--image: {image} is no file that can be read")
        if chosen.key and not chosen.url:
            raise ValueError("--key is of no use without --url: the service in this process takes no key")
        fields = SubmitFields()
        if chosen.n is not None:
            fields["n"] = chosen.n
        if chosen.model is not None:
            fields["model"] = chosen.model
        if chosen.seed is not None:
            fields["seed"] = chosen.seed
        if chosen.size is not None:
            fields["width"], fields["height"] = chosen.size
        return cls(prompt, fields, tuple(images), Path(chosen.out), chosen.url, chosen.key, chosen.json)


def run(chosen: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    open_standard_streams()
    sys.stdout, sys.stderr = sys.stdout or open_null(), sys.stderr or open_null()
    log.configure("ERROR", "text")
    try:
        options = GenerateOptions.of(chosen)
        check_folder(options.folder)
    except ValueError as error:
        return _fail(str(error), USAGE)
    except OSError as error:
        return _fail(f"--out: {chosen.out} can't be written to ({error.strerror})", USAGE)
    try:
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            return runner.run(_generate(options))
    except (SettingsError, ValueError) as error:
        return _fail(str(error), USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED


async def _generate(options: GenerateOptions) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    progress = create_progress()

    def on_pause(pause: Pause) -> None:
        if text := describe_pause(pause):
            progress.note(text)

    async with _service(options, stop, on_pause) as client:
        with progress:
            return await GenerateRun(client, options, progress).run(stop)


@asynccontextmanager
async def _service(
    options: GenerateOptions, stop: asyncio.Event, on_pause: Callable[[Pause], object]
) -> AsyncIterator[AsyncImageClient]:
    """Yield a client of the running service, or of one in this process. Raises SettingsError, ValueError."""
    if options.url is not None:
        http = httpx.AsyncClient(trust_env=urlsplit(options.url).hostname not in _LOOPBACK)
        async with AsyncImageClient(options.url, api_key=options.key, http=http, on_pause=on_pause) as client:
            yield client
        return
    from imagegen.local_service import run_local_service  # noqa: PLC0415 - a running service needs none of it

    settings = Settings.load()
    if settings.is_sandbox:
        print("The sandbox draws the images: for real ones set TOGETHER_API_KEY, or --url", file=sys.stderr)
    async with run_local_service(settings, stop) as local:
        http = httpx.AsyncClient(trust_env=False)  # no proxy for this machine
        async with AsyncImageClient(local.url, api_key=local.secret, http=http) as client:
            yield client


class GenerateRun:
    """One run of the command: upload, submit, follow, save; after an interrupt, cancel."""

    def __init__(self, client: AsyncImageClient, options: GenerateOptions, progress: Progress) -> None:
        self._client = client
        self._options = options
        self._progress = progress
        self._stem = file_stem(options.prompt)
        self._submitting: asyncio.Task[SubmitReceipt] | None = None
        self._saved: dict[int, tuple[TaskImage, Path]] = {}

    async def run(self, stop: asyncio.Event) -> int:
        """Return the exit code. stop: set by a signal; a second one ends the wait for the service."""
        if stop.is_set():
            return INTERRUPTED
        working = asyncio.create_task(self._work_or_fail())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            return working.result()
        stop.clear()
        working.cancel()
        leaving, again = asyncio.create_task(self._leave()), asyncio.create_task(stop.wait())
        await asyncio.wait((leaving, again), return_when=asyncio.FIRST_COMPLETED)
        started = [
            started_task for started_task in (working, leaving, again, self._submitting) if started_task is not None
        ]
        for started_task in started:
            started_task.cancel()
        await asyncio.gather(*started, return_exceptions=True)
        return INTERRUPTED

    async def _work_or_fail(self) -> int:
        try:
            return await self._work()
        except TaskUnsuccessful as error:
            return self._failed(error.task.message or error.task.status, error.code, FAILED)
        except ResponseError as error:
            is_usage = isinstance(error, RequestRefused) and error.status in _USAGE_STATUSES
            text = f"{error} (try again in {error.retry_after_s:g} s)" if error.retry_after_s else str(error)
            if error.status == 401:
                text += ": give one with --key"
            return self._failed(text, error.code, USAGE if is_usage else FAILED)
        except ClientError as error:
            return self._failed(str(error), "", FAILED)
        except OSError as error:
            text = f"{error.filename or self._options.folder} can't be written ({error.strerror})"
            return self._failed(f"{text}; the same command pays nothing again while the task lives", "", FAILED)

    async def _work(self) -> int:
        fields = await self._with_images()
        self._submitting = asyncio.create_task(self._client.submit(self._options.prompt, **fields))
        receipt = await asyncio.shield(self._submitting)
        self._progress.note(describe_submit(receipt))
        for warning in receipt.warnings:
            self._progress.note(f"warning: {warning}")
        task = await self._follow(receipt)
        for warning in task.warnings:
            if warning not in receipt.warnings:
                self._progress.note(f"warning: {warning}")
        self._progress.note(describe_end(task, receipt))
        if task.status != "completed":
            raise TaskUnsuccessful(task)
        if self._options.as_json:
            self._print_json(task, receipt)
        return 0

    async def _with_images(self) -> SubmitFields:
        """Return the fields with the input images, files as uploads."""
        fields, sources = self._options.fields, []
        for image in self._options.images:
            if image.startswith(_LINKS):
                sources.append(image)
            else:
                sources.append((await self._client.upload(image)).upload_id)
        if sources:
            fields = {**fields, "image_url": sources[0]}
        if sources[1:]:
            fields = {**fields, "reference_images": sources[1:]}
        return fields

    async def _follow(self, receipt: SubmitReceipt) -> ImageTask:
        """Show the progress and save each image once it exists; return the finished task."""
        task: ImageTask | None = None
        try:
            async for event in self._client.events(receipt.task_id):
                if event.image is not None:
                    await self._save(event.image)
                elif event.task is not None:
                    task = event.task
                    self._progress.update(task)
        except ResponseError as error:
            if error.status != 200:
                raise
        if task is None or not task.is_final:  # something in between passes no event streams on
            task = await self._client.wait(receipt.task_id)
        for image in task.images:
            await self._save(image)
        return task

    async def _save(self, image: TaskImage) -> None:
        """Download an image, write it and print its path, once. Raises ClientError, OSError."""
        if image.stale or image.index in self._saved:
            return
        data = await self._client.download(image)
        suffix = extension(image.content_type, data)
        path = await asyncio.to_thread(write_image, self._options.folder, self._stem, image.index, suffix, data)
        self._saved[image.index] = image, path
        if not self._options.as_json:
            print_result(str(path))

    async def _leave(self) -> None:
        """Cancel the task unless it is another client's; show what becomes of it."""
        try:
            async with asyncio.timeout(LEAVE_S):
                if self._submitting is None:
                    return
                receipt = await self._submitting
                if receipt.cached:
                    return
                if receipt.coalesced:
                    reason = (
                        "another client submitted it" if is_joined(receipt) else "another client may have submitted it"
                    )
                    self._progress.note(f"{receipt.task_id} goes on: {reason}")
                    return
                task = await self._client.cancel(receipt.task_id)
        except (ClientError, TimeoutError) as error:
            self._progress.note(f"the task could not be cancelled: {str(error) or 'no answer in time'}")
            return
        if task.left:
            self._progress.note(f"{receipt.task_id} goes on: other clients joined it")
        else:
            self._progress.note(f"{receipt.task_id} is cancelled")

    def _failed(self, text: str, code: str, exit_code: int) -> int:
        self._progress.note(text)
        if self._options.as_json:
            error = {"code": code or None, "message": text}
            print_result(json.dumps({"success": False, "error": error, "images": self._views()}, ensure_ascii=False))
        return exit_code

    def _print_json(self, task: ImageTask, receipt: SubmitReceipt) -> None:
        cost = task.cost
        view = {
            "success": True,
            "taskId": task.task_id,
            "status": task.status,
            "cached": receipt.cached,
            "coalesced": receipt.coalesced,
            "cost": cost and {"currency": cost.currency, "estimated": cost.estimated, "charged": cost.charged},
            "warnings": list(task.warnings),
            "images": self._views(),
        }
        print_result(json.dumps(view, ensure_ascii=False))

    def _views(self) -> list[dict[str, Any]]:
        return [
            {
                "path": str(path),
                "index": image.index,
                "url": self._options.url and image.url,  # the service in this process ends with the command
                "contentType": image.content_type,
                "width": image.width,
                "height": image.height,
                "seed": image.seed,
                "sha256": image.sha256,
            }
            for _, (image, path) in sorted(self._saved.items())
        ]


def _is_source(text: str) -> bool:
    return text.startswith(_LINKS) or Path(text).is_file()


def _fail(text: str, code: int) -> int:
    print(printable(text), file=sys.stderr)
    return code
