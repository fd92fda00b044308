"""Transfers of images to clients over their sockets, past the transport: from a file or from memory, without a copy.

`loop.sendfile` adds and removes a writer for each part that the socket takes, which was 1.0 of 1.3 ms of processor time
for an image of 2.1 MB; here one writer stays for all of them, at its own descriptor. A transport copies what it
can't send at once into a buffer for each client; here all clients are sent the same bytes.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from io import FileIO

MAX_FILE_BYTES_PER_CALL = 1024 * 1024
"""More would keep the loop for longer than other clients should wait."""


class TransferUnsupported(Exception):
    """The platform, the connection or the file system can't do it; the bytes before `offset` were sent."""


class Transfer(ABC):
    """Bytes on their way to a client. Everything written to the transport before must have been sent.

    Args:
        part: the offsets of the bytes to send.

    Attributes:
        system_call: the function of `os` that sends.
        offset: of the next byte to send.
    """

    system_call: str

    def __init__(self, transport: asyncio.Transport, part: range) -> None:
        self.offset = part.start
        self._stop = part.stop
        self._transport = transport
        self._socket = -1
        self._timer: asyncio.TimerHandle | None = None
        self._end: asyncio.Future[None] | None = None

    @abstractmethod
    def _send_some(self, offset: int, count: int) -> int:
        """Send up to `count` bytes from `offset`; return how many the socket took. Raises OSError."""

    def start(self) -> bool:
        """Send what the socket takes at once; return whether that is all.

        Raises:
            TransferUnsupported, ConnectionError, OSError: as `run` does.
        """
        transport = self._transport
        if transport.is_closing():
            raise ConnectionResetError("the client left")
        if not hasattr(os, self.system_call) or transport.get_extra_info("sslcontext") is not None:
            raise TransferUnsupported
        self._socket = transport.get_extra_info("socket").fileno()
        return self._send()

    async def run(self, stall_s: float) -> None:
        """Send the rest, after `start`.

        Args:
            stall_s: how long the client may take nothing.

        Raises:
            TransferUnsupported: the rest must be sent in another way.
            ConnectionError: the client is gone.
            TimeoutError: it took nothing for `stall_s`.
            OSError: the file can't be read.
        """
        self._loop = asyncio.get_running_loop()
        self._stall_s, self._moved_at_s = stall_s, self._loop.time()
        try:
            self._socket = os.dup(self._socket)
        except OSError as error:
            raise TransferUnsupported from error
        end = self._end = self._loop.create_future()
        try:
            self._loop.add_writer(self._socket, self._send_on)
            self._watch()
            await end
        finally:
            self._end = None  # its error refers to this frame: the bytes would stay until a garbage collection
            del end
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_writer(self._socket)
            os.close(self._socket)

    def abort(self) -> None:
        """End `run`, because the client is gone."""
        self._fail(ConnectionResetError("the client left"))

    def _watch(self) -> None:
        """Fail if nothing was taken for too long, else look again when that may be."""
        until_s = self._moved_at_s + self._stall_s
        if self._loop.time() >= until_s:
            self._fail(TimeoutError("the client takes nothing"))
        else:
            self._timer = self._loop.call_at(until_s, self._watch)

    def _send(self) -> bool:
        """Send what the socket takes; return whether that is all of the rest."""
        try:
            self.offset += self._send_some(self.offset, self._stop - self.offset)
        except (BlockingIOError, InterruptedError):
            return False
        return self.offset >= self._stop

    def _send_on(self) -> None:
        before = self.offset
        try:
            sent_all = self._send()
        except (OSError, TransferUnsupported) as error:
            self._fail(error)
            return
        if self.offset > before:
            self._moved_at_s = self._loop.time()
        if sent_all and self._end is not None and not self._end.done():
            self._end.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)


class FileTransfer(Transfer):
    """A part of a file on its way to a client, sent by the system's own call."""

    system_call = "sendfile"

    def __init__(self, transport: asyncio.Transport, file: FileIO, part: range) -> None:
        super().__init__(transport, part)
        self._file = file
        self._start = part.start

    def _send_some(self, offset: int, count: int) -> int:
        try:
            sent = os.sendfile(self._socket, self._file.fileno(), offset, min(count, MAX_FILE_BYTES_PER_CALL))
        except (BlockingIOError, InterruptedError, ConnectionError):
            raise
        except OSError as error:
            if offset == self._start:
                raise TransferUnsupported from error
            raise
        if not sent:
            raise OSError("an image file ended early")
        return sent


class MemoryTransfer(Transfer):
    """The head of a response, and then the bytes of an image in memory, on their way to a client."""

    system_call = "writev"

    def __init__(self, transport: asyncio.Transport, head: bytes, body: bytes | memoryview) -> None:
        super().__init__(transport, range(len(head) + len(body)))
        self._head = head
        self._body = body

    def _send_some(self, offset: int, count: int) -> int:  # noqa: ARG002 - sends the whole rest
        return os.writev(self._socket, self.rest())

    def rest(self) -> tuple[bytes | memoryview, ...]:
        """Return the bytes that are not sent yet."""
        if not self.offset:
            return self._head, self._body
        in_body = self.offset - len(self._head)
        return (self._head[self.offset :], self._body) if in_body < 0 else (memoryview(self._body)[in_body:],)

    def release(self) -> None:
        """Drop the bytes: the request, which has `abort`, lives until the next one comes."""
        self._head = self._body = b""
