"""Tests of the log: its two formats, excluded contents, and log calls that must never raise."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadStatusLine
from aiohttp.test_utils import TestServer
from loguru import logger

from imagegen import log
from tests.support import over_rows

ROOT = Path(__file__).resolve().parent.parent
Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Configure the log and return its stream; restore the previous configuration afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def make(level: str = "INFO", fmt: str = "text") -> io.StringIO:
        stream = io.StringIO()
        log.configure(level, fmt, sink=stream)
        return stream

    root.handlers[:] = []
    yield make
    root.handlers[:] = handlers
    root.setLevel(level)
    logger.remove()
    logger.add(write_to_stderr)


def write_to_stderr(line: str) -> None:
    """Write to the current standard error, not to that of the import."""
    sys.stderr.write(line)


def test_a_text_line_has_time_level_message_and_bound_fields(configure: Configure) -> None:
    out = configure()
    logger.bind(taskId="ab12", attempt=2).info("failed: {}", "upstream_timeout")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO     failed: upstream_timeout taskId=ab12 attempt=2\n",
        out.getvalue(),
    )


def test_a_text_line_does_not_repeat_fields_of_its_message(configure: Configure) -> None:
    out = configure()
    logger.info("{method} in {ms:.1f} ms", method="GET", ms=1.234, requestId="r1")
    assert out.getvalue().endswith("GET in 1.2 ms requestId=r1\n")


def test_a_json_line_is_one_object_with_all_bound_fields(configure: Configure) -> None:
    out = configure(fmt="json")
    logger.bind(requestId="r1", attempt=2, ms=1.5, path=Path("/a"), big=2**70, level="mine").warning("一\n二")
    (line,) = out.getvalue().splitlines()
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "WARNING",
        "message": "一\n二",
        "requestId": "r1",
        "attempt": 2,
        "ms": 1.5,
        "path": "/a",
        "big": str(2**70),
    }


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_has_its_trace_but_no_values_of_variables(configure: Configure, fmt: str) -> None:
    out = configure(fmt=fmt)
    secret = "hunter2"
    try:
        int(f"x{len(secret)}")
    except ValueError:
        logger.exception("It failed")
    text = out.getvalue()
    assert "hunter2" not in text.replace('secret = "hunter2"', "")
    if fmt == "json":
        (line,) = text.splitlines()
        text = json.loads(line)["exception"]
    assert "Traceback" in text
    assert "ValueError: invalid literal" in text


HOSTILE = "a\r\n2026-01-01T00:00:00.000Z INFO forged\x1b[2J\x00\x7f\x85\u2028\u202e\ud800z"


def test_a_message_can_not_forge_a_log_line(configure: Configure) -> None:
    out = configure()
    logger.bind(path=HOSTILE).info("{}", HOSTILE[::-1])
    line = out.getvalue()
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert "\\r\\n2026" in line
    assert "\\x1b[2J\\x00\\x7f\\x85\\u2028\\u202e\\ud800z" in line


def test_an_exception_can_not_forge_a_log_line(configure: Configure) -> None:
    out = configure()
    logger.opt(exception=ValueError(HOSTILE)).error("It failed")
    first, *others = out.getvalue().splitlines()
    assert "It failed" in first
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_json_holds_any_text(configure: Configure) -> None:
    out = configure(fmt="json")
    logger.bind(path=HOSTILE).info("{}", HOSTILE)
    assert out.getvalue()[:-1].isprintable()
    found = json.loads(out.getvalue())
    assert found["message"] == found["path"]
    assert found["message"].startswith("a\r\n2026")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_passwords_in_addresses_are_masked(configure: Configure, fmt: str) -> None:
    out = configure(fmt=fmt)
    error = ConnectionError("no answer from rediss://default:p@ss@h:6379/0")
    logger.opt(exception=error).error("{} away", "redis://:hunter2@h")
    assert "hunter2" not in out.getvalue()
    assert "p@ss" not in out.getvalue()
    assert "redis://***@h away" in out.getvalue()
    assert "rediss://***@h:6379/0" in out.getvalue()


def test_a_huge_text_is_cut(configure: Configure) -> None:
    out = configure()
    logger.info("{}", "x" * 10**6)
    assert len(out.getvalue()) < 10_000


# Levels, and logging


def test_records_below_the_level_are_hidden_by_default(configure: Configure) -> None:
    out = configure("WARNING")
    logger.info("no")
    logging.getLogger("library").info("no")
    logger.warning("yes")
    assert "no" not in out.getvalue()
    assert not log.is_enabled("INFO")
    assert log.is_enabled("WARNING")
    configure("DEBUG")
    assert log.is_enabled("DEBUG")
    assert not log.is_enabled("TRACE")


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_records_of_logging_keep_their_level_and_name_their_logger(configure: Configure, level: str) -> None:
    out = configure("DEBUG", "json")
    logging.getLogger("library.part").log(getattr(logging, level), "%s of {braces}", 5)
    found = json.loads(out.getvalue())
    assert (found["level"], found["message"], found["logger"]) == (level, "5 of {braces}", "library.part")


def test_a_record_of_logging_keeps_its_exception(configure: Configure) -> None:
    out = configure(fmt="json")
    logging.getLogger("library").error("It failed", exc_info=ValueError("why"))
    assert "ValueError: why" in json.loads(out.getvalue())["exception"]


def test_a_malformed_logging_record_does_not_raise(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    logging.getLogger("library").error("%d", "no number")
    assert "Logging error" in capsys.readouterr().err


def test_the_last_configuration_replaces_earlier_ones(configure: Configure) -> None:
    first, second = configure(), configure()
    logger.info("once")
    logging.getLogger("library").info("twice")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: " + b"hunter2" * 9000 + b"\r\n\r\n",
        b"hunter2\x00 / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n",
    ],
)
async def test_http_parse_errors_are_logged_without_bytes_or_traceback(configure: Configure, sent: bytes) -> None:
    async def read(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    out = configure("DEBUG")
    app = web.Application()
    app.router.add_route("*", "/", read)
    async with TestServer(app) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(sent)
        await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()
    assert "logger=aiohttp.server" in out.getvalue()
    assert "hunter2" not in out.getvalue()
    assert "Traceback" not in out.getvalue()


def test_a_rejected_request_is_not_logged_as_an_error(configure: Configure) -> None:
    out = configure(fmt="json")
    logging.getLogger("aiohttp.server").error("Error handling request", exc_info=BadStatusLine("hunter2"))
    found = json.loads(out.getvalue())
    assert (found["level"], found["message"]) == ("INFO", "Error handling request: BadStatusLine")


# Streams that fail


class Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_failing_stream_does_not_raise(configure: Configure) -> None:
    configure()
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        log.configure("INFO", "text", sink=stream)
        logger.info("into the void")


class Unread:
    """Pipe, or terminal, with a reader that reads nothing yet."""

    def __init__(self, open_pair: Callable[[], tuple[int, int]]) -> None:
        self.reading, writing = open_pair()
        self.stream = os.fdopen(writing, "w")

    def read_until(self, end: str) -> str:
        text = b""
        while end.encode() not in text and (piece := os.read(self.reading, 2**16)):
            text += piece
        return text.decode()


@pytest.fixture(params=[os.pipe, os.openpty], ids=["pipe", "terminal"])
def unread(request: pytest.FixtureRequest) -> Iterator[Unread]:
    unread = Unread(request.param)
    yield unread
    os.close(unread.reading)
    unread.stream.close()


async def test_a_log_that_is_not_read_blocks_no_one_and_its_lines_come_in_order_later(
    configure: Configure, unread: Unread
) -> None:
    configure()
    log.configure("INFO", "text", sink=unread.stream)
    writer = threading.Thread(target=lambda: [logger.info("{} {}", number, "x" * 1000) for number in range(3000)])
    writer.start()
    await asyncio.to_thread(writer.join, 20.0)
    if writer.is_alive():
        await asyncio.to_thread(unread.read_until, " 2999 ")  # frees the thread
        pytest.fail("the log waited for its reader")
    reading = asyncio.create_task(asyncio.to_thread(unread.read_until, "nothing read"))
    logger.info("last")  # is short enough for the rest of the space
    *lines, last, dropped = (await asyncio.wait_for(reading, 20)).splitlines()
    assert last.endswith(" last")
    numbers = [int(line.split()[2]) for line in lines]
    assert numbers == list(range(len(numbers)))
    assert dropped.endswith(f"{3000 - len(numbers)} lines of the log were dropped, since nothing read them")


def test_the_last_lines_and_the_count_of_dropped_ones_wait_for_a_slow_reader(
    configure: Configure, unread: Unread
) -> None:
    configure()
    log.configure("INFO", "text", sink=unread.stream)
    for number in range(2000):
        logger.info("{} {}", number, "x" * 1000)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(unread.read_until, "end of the log")
        log.finish(20.0)
        unread.stream.write("end of the log")
        unread.stream.flush()
        *lines, dropped, _ = reading.result(20).splitlines()
    assert dropped.split(" WARNING  ")[-1].startswith(f"{2000 - len(lines)} lines of the log were dropped")


@over_rows("closing", ["exec 2>&-; exec", "exec"])
def test_a_process_with_closed_standard_error_exits_cleanly(closing: str) -> None:
    script = (
        "import sys; from imagegen import log; from loguru import logger; log.configure('INFO', 'text');"
        "sys.stdin.read(); [logger.info('x' * 1000) for _ in range(100)]; print('alive')"
    )
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'{closing} "$0" -c "$1"', sys.executable, script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stderr.close()
    process.stdin.close()
    with process.stdout:
        assert process.stdout.read() == b"alive\n"
    assert process.wait(20) == 0


# Access lines


def put_access(request_id: str = "93dd8a6ec50b9199", path: str = "/api/images/a") -> None:
    log.log_access("GET", path, 200, 0.0015, request_id)


@pytest.mark.parametrize("fmt", ["text", "json"])
@pytest.mark.parametrize(
    ("request_id", "path"), [("r-1", "/a"), ("200", "/a"), ("GET", "/b"), ("r-1", "/a?redis://u:hunter2@h")]
)
def test_an_access_line_equals_a_record_with_the_same_fields(
    configure: Configure, fmt: str, request_id: str, path: str
) -> None:
    out = configure(fmt=fmt)
    put_access(request_id, path)
    quick = out.getvalue()
    logger.info(
        "{method} {path} {status} {ms:.1f} ms", method="GET", path=path, status=200, ms=1.5, requestId=request_id
    )
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert len(re.findall(time, quick)) == 1
    assert re.sub(time, "", quick) == re.sub(time, "", out.getvalue()[len(quick) :])
    assert "hunter2" not in quick


def test_an_access_line_makes_no_record_for_other_sinks(configure: Configure) -> None:
    out = configure()
    seen: list[str] = []
    sink = logger.add(seen.append, diagnose=False)
    put_access("r-1")
    logger.remove(sink)
    assert seen == []
    assert [line[-3:] for line in out.getvalue().splitlines()] == ["r-1"]


def test_no_access_line_is_written_without_a_log(monkeypatch: pytest.MonkeyPatch, configure: Configure) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log.configure("INFO", "text")
    put_access()


class CountingStream(io.StringIO):
    """Stream that counts its flushes."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture
def stream(configure: Configure) -> CountingStream:
    configure()
    stream = CountingStream()
    log.configure("INFO", "text", sink=stream)
    return stream


async def test_access_lines_of_one_loop_iteration_are_written_together(stream: CountingStream) -> None:
    for number in range(3):
        put_access(f"r-{number}")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [line[-3:] for line in stream.getvalue().splitlines()] == ["r-0", "r-1", "r-2"]
    assert stream.flushes == 1


async def test_access_lines_and_others_keep_their_order(stream: CountingStream) -> None:
    put_access("r-1")
    logger.warning("between")
    put_access("r-2")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == [
        "requestId=r-1",
        "between",
        "requestId=r-2",
    ]


def test_no_access_line_waits_when_the_event_loop_has_ended(stream: CountingStream) -> None:
    async def last() -> None:
        put_access("last")

    asyncio.run(last())
    assert stream.getvalue().endswith("requestId=last\n")


async def test_lines_of_other_threads_do_not_lose_access_lines(stream: CountingStream) -> None:
    async def answers() -> None:
        for number in range(300):
            put_access(f"r-{number}")
            if number % 7 == 0:
                await asyncio.sleep(0)

    def others() -> None:
        for _ in range(300):
            logger.info("other")

    await asyncio.gather(answers(), asyncio.to_thread(others))
    await asyncio.sleep(0)
    lines = stream.getvalue().splitlines()
    assert sum(line.endswith("other") for line in lines) == 300
    assert [line.split("=")[1] for line in lines if "=" in line] == [f"r-{number}" for number in range(300)]
