"""The log: one line a record, as text or JSON, escaped so that no text can forge another line."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import orjson
from loguru import logger

from imagegen.formats import rfc3339
from imagegen.log_stream import NonBlockingStream, non_blocking

if TYPE_CHECKING:
    from loguru import Message, Record

_MAX_CHARS = 8_000
_C0 = frozenset(map(chr, range(0x20)))
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^\s/]*@")


def configure(level: str, fmt: str, *, sink: TextIO | None = None) -> None:
    """Send every record of loguru and of `logging` from `level` on to `sink` (standard error if None).

    fmt: `text` or `json`, one object a line. May be called again; the last call counts.
    """
    global _lines  # noqa: PLW0603 - a process has one log, as loguru has it
    render, access_line = (_json_line, _json_access) if fmt == "json" else (_text_line, _text_access)
    number = logger.level(level).no
    logger.remove()
    stream = sys.stderr if sink is None else sink
    if stream is None:  # a process can be started without a standard error
        _lines = None
    else:
        _lines = _Lines(non_blocking(stream, _log_dropped), render, access_line)
        logger.add(_lines.write, level=number, format=_no_text, backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[InterceptHandler()], level=number, force=True)


def log_access(method: str, path: str, status: int, took_s: float, request_id: str) -> None:
    """Write the line of one response. The caller has checked that INFO is enabled.

    The line does not go through loguru: a record costs as much as a small response: no other sink receives it.
    method, path: printable ASCII.
    """
    if _lines is not None:
        path = _sanitize(path) if "://" in path else path
        _lines.write_access_line(method, path, status, took_s * 1000, request_id)


def is_enabled(level: str) -> bool:
    """Return whether a record of this level would be shown, if its text is expensive."""
    return logging.getLogger().isEnabledFor(logger.level(level).no)


class InterceptHandler(logging.Handler):
    """Handler that passes the records of `logging` to loguru, with their level and the name of their logger."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on. One with arguments that don't fit its text is shown as `logging` itself would show it."""
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):
            self.handleError(record)
            return
        error = record.exc_info[1] if record.exc_info else None
        bound = logger.bind(logger=record.name)
        if error is not None and _quotes_the_client(record.name, error):
            bound.log("DEBUG" if record.levelno < logging.INFO else "INFO", "{}: {}", text, type(error).__name__)
        else:
            bound.opt(exception=error).log(_level_of(record), "{}", text)


def _quotes_the_client(source: str, error: BaseException) -> bool:
    """Return whether an error repeats bytes of a client, such as an Authorization header, as aiohttp's parser does."""
    kinds = {type(link) for link in (error, error.__cause__, error.__context__)}
    return source.startswith("aiohttp.") and any(
        kind.__module__ == "aiohttp.http_exceptions" or kind.__name__ == "RequestPayloadError" for kind in kinds
    )


def _level_of(record: logging.LogRecord) -> str | int:
    try:
        return logger.level(record.levelname).name
    except ValueError:
        return record.levelno


def _no_text(_: Record) -> str:
    return ""


class _Lines:
    """The stream of all lines, in order. The access lines of one turn of the event loop are written together."""

    def __init__(
        self, stream: TextIO | NonBlockingStream, render: Callable[[Record], str], access_line: Callable[..., str]
    ) -> None:
        self._stream = stream
        self._render = render
        self._access_line = access_line
        self._waiting: list[str] = []
        self._lock = threading.RLock()

    def write(self, message: Message) -> None:
        line = self._render(message.record)
        with self._lock:
            self._waiting.append(line)
            self._flush()

    def write_access_line(self, method: str, path: str, status: int, ms: float, request_id: str) -> None:
        """Write it before the next turn is over, or at once without an event loop."""
        line = self._access_line(method, path, status, ms, request_id)
        with self._lock:
            self._waiting.append(line)
            if len(self._waiting) > 1:
                return
        try:
            asyncio.get_running_loop().call_soon(self.flush)
        except RuntimeError:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def finish(self, within_s: float) -> None:
        self.flush()
        if isinstance(self._stream, NonBlockingStream):
            self._stream.finish(within_s)

    def _flush(self) -> None:
        if not self._waiting:
            return
        text = "\n".join([*self._waiting, ""])
        self._waiting.clear()
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            _detach_broken_pipe(self._stream)
        except (OSError, ValueError):  # a full disk, a closed stream: the service goes on without a log
            return


_lines: _Lines | None = None


def finish(within_s: float) -> None:
    """Write the lines that wait for a slow reader, and how many were dropped, at the end of the process."""
    if _lines is not None:
        _lines.finish(within_s)


def _log_dropped(count: int) -> None:
    logger.warning("{} lines of the log were dropped, since nothing read them", count)


def _detach_broken_pipe(stream: TextIO | NonBlockingStream) -> None:
    """Point the stream at /dev/null: the rest of its buffer would change the exit code.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    try:
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except (OSError, ValueError):
        return


def _text_line(record: Record) -> str:
    message = _sanitize(record["message"])
    line = f"{_time(record)} {record['level'].name:<8} {message}{_text_extras(record['extra'], message)}"
    trace = _trace(record)
    return f"{line}\n{_indented(trace)}" if trace else line


def _text_extras(extra: Mapping[str, Any], message: str) -> str:
    """Return the extras that the message lacks: loguru adds what it was formatted with, too."""
    texts = ((name, _sanitize(str(value))) for name, value in extra.items() if not isinstance(value, float))
    return "".join(f" {name}={value}" for name, value in texts if value not in message)


def _indented(trace: str) -> str:
    return "\n".join(f"    {_sanitize(line)}" for line in trace.splitlines())


def _json_line(record: Record) -> str:
    fields: dict[str, Any] = {"time": _time(record), "level": record["level"].name}
    fields["message"] = _sanitize(record["message"], keep=_C0)
    fields |= {name: _json_safe(value) for name, value in record["extra"].items() if name not in fields}
    if trace := _trace(record):
        fields["exception"] = _sanitize(trace, keep=_C0)
    return orjson.dumps(fields).decode()


def _text_access(method: str, path: str, status: int, ms: float, request_id: str) -> str:
    message = f"{method} {path} {status} {ms:.1f} ms"
    extra = "" if request_id in message else f" requestId={request_id}"
    return f"{rfc3339(time.time())} INFO     {message}{extra}"


def _json_access(method: str, path: str, status: int, ms: float, request_id: str) -> str:
    fields = {
        "time": rfc3339(time.time()),
        "level": "INFO",
        "message": f"{method} {path} {status} {ms:.1f} ms",
        "method": method,
        "path": path,
        "status": status,
        "ms": ms,
        "requestId": request_id,
    }
    return orjson.dumps(fields).decode()


def _json_safe(value: object) -> object:
    """Return a value that JSON can hold; other types become text."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    return _sanitize(str(value), keep=_C0)


def _time(record: Record) -> str:
    return rfc3339(record["time"].timestamp())


def _trace(record: Record) -> str:
    error = record["exception"]
    if error is None:
        return ""
    return "".join(traceback.format_exception(error.type, error.value, error.traceback)).rstrip()


def _sanitize(text: str, keep: frozenset[str] = frozenset()) -> str:
    """Return a text cut short, without passwords in addresses and characters that could forge or hide a line."""
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS // 2]} … {text[-_MAX_CHARS // 2 :]}"
    if "://" in text:
        text = _PASSWORD_IN_URL.sub("***@", text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode() if ord(char) > 0x7F else repr(char)[1:-1]
