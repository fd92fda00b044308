"""Sending of a part of a file over a client's connection by the system's own call.

`loop.sendfile` adds and removes a writer for each part that the socket takes, which was 1.0 of 1.3 ms of processor time
for an image of 2.1 MB; here one writer stays for all of them, at a descriptor of its own.
"""

from __future__ import annotations

import asyncio
import os
from io import FileIO

MAX_BYTES_PER_CALL = 1024 * 1024
"""More would keep the loop for longer than other clients should wait."""


class SendfileUnsupported(Exception):
    """The platform, the connection or the file system can't do it; nothing was sent."""


class FileTransfer:
    """One part of a file on its way to a client. All that was written to the transport before must have been sent.

    part: the offsets in the file.
    stall_s: how long the client may take nothing.
    """

    def __init__(self, transport: asyncio.Transport, file: FileIO, part: range, *, stall_s: float) -> None:
        if not hasattr(os, "sendfile") or transport.get_extra_info("sslcontext") is not None:
            raise SendfileUnsupported
        self._loop = asyncio.get_running_loop()
        self._file = file.fileno()
        self._offset, self._part = part.start, part
        self._stall_s = stall_s
        self._moved_at_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._end: asyncio.Future[None] = self._loop.create_future()
        try:
            self._socket = os.dup(transport.get_extra_info("socket").fileno())
        except (AttributeError, OSError) as error:
            raise SendfileUnsupported from error

    async def run(self) -> None:
        """Send all of it.

        Raises:
            SendfileUnsupported: nothing was sent.
            ConnectionError: the client is gone.
            TimeoutError: it took nothing for `stall_s`.
            OSError: the file can't be read.
        """
        try:
            self._send()
            if not self._end.done():
                self._loop.add_writer(self._socket, self._send)
                self._watch()
            await self._end
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_writer(self._socket)
            os.close(self._socket)

    def abort(self) -> None:
        """End it, because the client is gone."""
        self._fail(ConnectionResetError("the client left"))

    def _watch(self) -> None:
        """Fail if nothing was taken for too long, else look again when that may be."""
        until_s = self._moved_at_s + self._stall_s
        if self._loop.time() >= until_s:
            self._fail(TimeoutError("the client takes nothing"))
        else:
            self._timer = self._loop.call_at(until_s, self._watch)

    def _send(self) -> None:
        left = self._part.stop - self._offset
        try:
            sent = os.sendfile(self._socket, self._file, self._offset, min(left, MAX_BYTES_PER_CALL))
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionError as error:
            self._fail(error)
            return
        except OSError as error:
            self._fail(SendfileUnsupported() if self._offset == self._part.start else error)
            return
        if not sent:
            self._fail(OSError("an image file ended early"))
            return
        self._offset += sent
        self._moved_at_s = self._loop.time()
        if sent == left and not self._end.done():
            self._end.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._end.done():
            self._end.set_exception(error)
