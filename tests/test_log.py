from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from loguru import logger

from imagegen import log

PROGRAM = """
import logging, sys
from loguru import logger
from imagegen import log
log.configure("INFO", {fmt!r})
{before}
logger.info("one")
logging.getLogger("other").warning("two")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("three")
print("alive")
"""


def run(fmt: str = "text", before: str = "", **how: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM.format(fmt=fmt, before=before)]
    return subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=20, check=False, **how)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # `configure` closes those that it finds, and these are pytest's
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logger.remove()
    logger.add(sys.__stderr__ or sys.stderr)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines on stderr since the last call."""

    def lines() -> list[str]:
        return capsys.readouterr().err.splitlines()

    return lines


def test_a_text_line_has_time_level_message_and_the_bound_extras(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "text")
    logger.bind(taskId="abc", attempt=2).warning("Tried {} times", 2)
    [line] = said()
    time, level, rest = line.split(maxsplit=2)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(seconds=10)
    assert time.endswith("Z")
    assert (level, rest) == ("WARNING", "Tried 2 times taskId=abc attempt=2")


def test_a_value_with_spaces_quotes_or_nothing_in_it_is_quoted(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "text")
    logger.bind(a="b c=d", e='"', f="", g=None).info("m")
    assert said()[0].endswith(r'm a="b c=d" e="\"" f="" g=None')


def test_a_json_line_is_one_object_with_every_extra(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "json")
    logger.bind(requestId="r1", taskId="t1", attempt=3, where=object).info("完成 {}", "{}")
    [line] = said()
    event = json.loads(line)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(event.pop("time"))) < timedelta(seconds=10)
    assert event == {
        "level": "INFO",
        "message": "完成 {}",
        "requestId": "r1",
        "taskId": "t1",
        "attempt": 3,
        "where": "<class 'object'>",
    }


def test_an_extra_can_not_replace_what_the_event_itself_says(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "json")
    logger.bind(level="DEBUG", time=0, message="forged").info("true")
    event = json.loads(said()[0])
    assert (event["level"], event["message"]) == ("INFO", "true")


def test_an_exception_is_one_string_field_of_a_json_line(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "json")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logger.exception("failed")
    [line] = said()
    event = json.loads(line)
    assert (event["level"], event["message"]) == ("ERROR", "failed")
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith("ValueError: bad\nvalue")


def test_a_traceback_in_text_keeps_its_lines_indented_under_the_event(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "text")
    try:
        raise ValueError("bad\n2026-01-01T00:00:00.000Z INFO     forged\x1b[31m")
    except ValueError:
        logger.exception("failed")
    event, *trace = said()
    assert event.endswith("ERROR    failed")
    assert trace[0] == "    Traceback (most recent call last):"
    assert trace[-2].strip() == "ValueError: bad"
    assert trace[-1] == r"    2026-01-01T00:00:00.000Z INFO     forged\x1b[31m"
    assert all(line.startswith("    ") for line in trace)


def test_a_traceback_never_shows_the_values_of_variables(said: Callable[[], list[str]]) -> None:
    log.configure("DEBUG", "text")
    key = "sk-canary"
    try:
        raise LookupError if key else KeyError
    except LookupError:
        logger.exception("failed")
    assert not any("canary" in line for line in said())


@pytest.mark.parametrize("mark", ["\n", "\r", "\x00", "\x1b[2J", "\x7f", "\x85", "\x9b", "\u2028", "\u202e", "\ud800"])
@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_control_character_in_message_name_or_value_is_escaped(
    said: Callable[[], list[str]], fmt: str, mark: str
) -> None:
    log.configure("INFO", fmt)
    logger.bind(**{"id": f"a{mark}b", f"k{mark}": 1}).info(f"x{mark}y")
    [line] = said()
    assert line.isprintable()
    assert mark[0] not in line


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_events_of_the_standard_library_keep_level_and_name(said: Callable[[], list[str]], fmt: str) -> None:
    log.configure("INFO", fmt)
    other = logging.getLogger("some.library")
    other.debug("not this")
    other.error("kept {braces} %s", "and <red>arguments</red>")
    other.log(25, "between")
    kept, between = said()
    for part in ("ERROR", "kept {braces} and <red>arguments</red>", "some.library"):
        assert part in kept
    assert "Level 25" in between


def test_an_exception_of_the_standard_library_comes_with_its_traceback(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "json")
    try:
        raise KeyError("gone")
    except KeyError:
        logging.getLogger("some").exception("failed")
    assert json.loads(said()[0])["exception"].endswith("KeyError: 'gone'")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_asked_for_where_there_is_none_adds_nothing(said: Callable[[], list[str]], fmt: str) -> None:
    log.configure("INFO", fmt)
    logging.getLogger("some").error("failed", exc_info=True)
    [line] = said()
    assert "None" not in line


def test_an_event_whose_arguments_do_not_fit_harms_nobody(said: Callable[[], list[str]]) -> None:
    log.configure("INFO", "text")
    logging.getLogger("some").warning("%d", "word")
    logger.info("next")
    assert said()[-1].endswith("next")


def test_a_value_that_can_not_be_shown_harms_nobody(said: Callable[[], list[str]]) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

        __repr__ = __str__

    log.configure("INFO", "json")
    logger.bind(odd=Odd()).info("lost")
    logger.info("next")
    assert json.loads(said()[-1])["message"] == "next"


def test_nothing_below_the_level_is_logged_and_the_last_configuration_holds(said: Callable[[], list[str]]) -> None:
    log.configure("DEBUG", "json")
    log.configure("WARNING", "text")
    logger.info("no")
    logging.getLogger("some").info("no")
    logger.warning("yes")
    logging.getLogger("some").warning("yes")
    assert [line.split()[1] for line in said()] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("level", "logged"),
    [("TRACE", "TRACE DEBUG INFO ERROR"), ("INFO", "INFO ERROR"), ("ERROR", "ERROR"), ("CRITICAL", "")],
)
def test_enabled_tells_whether_a_level_is_logged_now(level: str, logged: str) -> None:
    log.configure(level, "text")
    assert [name for name in ("TRACE", "DEBUG", "INFO", "ERROR") if log.enabled(name)] == logged.split()


def test_a_prompt_is_told_by_length_and_hash_and_never_by_its_words() -> None:
    told = log.prompt_excerpt("a red fox")
    assert told.startswith("9 characters, sha256 ")
    assert not any(word in told for word in ("red", "fox"))
    assert told == log.prompt_excerpt("a red fox") != log.prompt_excerpt("a red box")
    assert log.prompt_excerpt("\ud800").startswith("1 characters")


@pytest.mark.parametrize("fmt", ["text", "json"])
@pytest.mark.parametrize("before", ["", "sys.stderr.close()", "import os; os.close(2)"])
def test_a_service_whose_stderr_is_closed_goes_on(fmt: str, before: str) -> None:
    closed_from_the_start = None if before else lambda: os.close(2)
    ended = run(fmt, before, preexec_fn=closed_from_the_start)
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_service_whose_log_reader_left_goes_on(fmt: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run(fmt, stderr=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


def test_a_process_of_its_own_logs_one_line_an_event() -> None:
    ended = run("json", stderr=subprocess.PIPE)
    assert [json.loads(line)["message"] for line in ended.stderr.splitlines()] == ["one", "two", "three"]
