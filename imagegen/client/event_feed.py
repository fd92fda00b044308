"""Server-sent events of one task without I/O: the parser, and the state that survives a lost connection.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from imagegen.client.calls import task_path
from imagegen.client.exceptions import ConnectionFailed, ResponseError
from imagegen.client.exchange import PATIENT, HttpRequest, HttpResponse, RepeatPolicy, error_of, may_repeat
from imagegen.client.results import FINAL, ImageTask, TaskEvent, TaskImage

SILENCE_S = 45.0
"""A stream sends a comment every 15 seconds; without one for this time its connection is dead."""

MAX_EVENT_BYTES = 8 * 2**20


class RawEvent(Struct, frozen=True):
    """Event of the stream, not parsed yet."""

    name: str
    id: str
    data: str


class EventParser:
    """Parser of an event stream. Lines end only as the standard defines, so that text in JSON splits none."""

    def __init__(self) -> None:
        self.last_id = ""
        self.retry_s: float | None = None
        self._rest = b""
        self._id = self._name = ""
        self._data: list[str] = []

    def reset(self) -> None:
        """Drop what a lost connection left unfinished."""
        self._rest, self._name, self._data = b"", "", []
        self._id = self.last_id

    def feed(self, piece: bytes) -> Iterator[RawEvent]:
        """Yield the events that are whole after this piece. Raises ConnectionFailed if one is too large."""
        text = self._rest + piece
        ends_in_cr = text.endswith(b"\r")  # it may be the first half of a line's end
        lines = (text[:-1] if ends_in_cr else text).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + (b"\r" if ends_in_cr else b"")
        if len(self._rest) > MAX_EVENT_BYTES or sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ConnectionFailed("an event of the stream is too large", maybe_sent=True)
        for line in lines:
            event = self._line(line.decode("utf-8", errors="replace"))
            if event is not None:
                yield event

    def _line(self, line: str) -> RawEvent | None:
        if not line:
            self.last_id = self._id  # not before: the rest of the event may be lost
            name, data = self._name or "message", "\n".join(self._data)
            has_data = bool(self._data)
            self._name, self._data = "", []
            return RawEvent(name, self.last_id, data) if has_data else None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._name = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isdecimal():
                self.retry_s = int(value[:9]) / 1000
        return None


class EventFeed:
    """Events of a task over any number of connections. Each image has one `image` event.

    Args:
        last_event_id: of the last event that the caller has, to continue after it.
    """

    def __init__(self, task_id: str, last_event_id: str = "", policy: RepeatPolicy = PATIENT) -> None:
        self.is_over = False
        self._task_id = task_id
        self._policy = policy
        self._parser = EventParser()
        self._parser.last_id = last_event_id
        self._images: set[tuple[int, str | None]] = set()
        self._losses = 0

    def request(self) -> HttpRequest:
        """Return the request of the next connection."""
        self._parser.reset()
        headers = {"Accept": "text/event-stream"}
        if self._parser.last_id:
            headers["Last-Event-ID"] = self._parser.last_id
        return HttpRequest("GET", f"{task_path(self._task_id)}/events", headers, timeout_s=SILENCE_S)

    def on_opened(self, status: int, content_type: str) -> bool:
        """Return whether events follow. Raises ResponseError if something else answers."""
        if status == 200 and not content_type.startswith("text/event-stream"):
            raise ResponseError(
                status, "", "the response is no event stream; check the address, and proxies in between"
            )
        return status == 200

    def on_refused(self, response: HttpResponse) -> float:
        """Return the seconds until the next connection. Raises ResponseError if none can help.

        With 204 the caller has the last event of the task already.
        """
        if response.status == 204:
            self.is_over = True
            return 0.0
        error = error_of(response)
        pause_s = self._pause_s(error.retry_after_s)
        if not may_repeat(self.request(), error) or pause_s is None or pause_s > self._policy.max_retry_after_s:
            raise error
        return pause_s

    def on_ended(self) -> float:
        """Return the seconds until the next connection, 0 if the task is finished."""
        return 0.0 if self.is_over else self.on_lost("the event stream ended before the task")

    def on_lost(self, message: str) -> float:
        """Return the seconds until the next connection. Raises ConnectionFailed after too many in a row."""
        pause_s = self._pause_s(self._parser.retry_s)
        if pause_s is None:
            raise ConnectionFailed(message, maybe_sent=True)
        return pause_s

    def feed(self, piece: bytes) -> Iterator[TaskEvent]:
        """Yield the events in a piece of the stream."""
        for raw in self._parser.feed(piece):
            self._losses = 0
            yield from self._events(raw)
            if raw.name in FINAL:
                self.is_over = True

    def _events(self, raw: RawEvent) -> Iterator[TaskEvent]:
        if raw.name == "image":
            image = msgspec.json.decode(raw.data, type=TaskImage)
            if self._is_new(image):
                yield TaskEvent("image", raw.id, image=image)
            return
        task = msgspec.json.decode(raw.data, type=ImageTask)
        for image in task.images:  # those from before the connection have no event on the wire
            if not image.stale and self._is_new(image):
                yield TaskEvent("image", raw.id, image=image)
        yield TaskEvent(raw.name, raw.id, task=task)

    def _is_new(self, image: TaskImage) -> bool:
        mark = (image.index, image.sha256)
        is_new = mark not in self._images
        self._images.add(mark)
        return is_new

    def _pause_s(self, given_s: float | None) -> float | None:
        self._losses += 1
        if self._losses >= self._policy.max_attempts:
            return None
        return self._policy.pause_s(self._losses) if given_s is None else given_s
