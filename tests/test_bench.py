"""Tests that each bench finishes in seconds in its tiny mode and prints its table with the command to reproduce it."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from bench.__main__ import BENCHES
from bench.report import Options, Table, command, percentile, spread
from tests.browser.conftest import BROWSER
from tests.forked import ForkedProcess

MAX_SUBMIT_FILES, MAX_SUBMIT_CHANGES = 24, 45
"""Of one traced submit: lower them with each step towards the goals in bench/trace.py."""

ROOT = Path(__file__).resolve().parent.parent

TITLES = {
    "queue": "No-op tasks",
    "pace": "tasks of 100 ms",
    "latency": "Submit to start",
    "http": "HTTP end to end",
    "keys": "API keys, a budget and signed links",
    "commands": "Redis commands, inner ones too",
    "images": "CPU of a task with a real image",
    "footprint": "Start and memory",
    "recovery": "Recovery",
    "soak": "Soak",
    "studio": "The studio in Chromium",
    "trace": "Route of one submit",
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark. The services, emulators and loads that it starts are forked."""
    command_line = [str(ROOT / "tests" / "forked_bench.py"), *arguments]
    with TemporaryFile("w+") as output:
        process = ForkedProcess(command_line, cwd=ROOT, env=os.environ, stdout=output, stderr=output)
        try:
            code = process.wait(300)
        finally:
            process.kill()
        output.seek(0)
        shown = output.read()
    return subprocess.CompletedProcess(command_line, code, shown, shown)


@pytest.mark.timeout(320)
@pytest.mark.parametrize("name", TITLES)
def test_a_bench_prints_its_table_and_the_command_that_made_it(name: str) -> None:
    if name == "studio" and (BROWSER is None or find_spec("playwright") is None):
        pytest.skip("needs Chromium and Playwright")
    done = bench(name, "--tiny", "--runs", "1")
    assert done.returncode == 0, done.stderr
    assert TITLES[name] in done.stdout
    assert f"$ python -m bench {name} --tiny --runs 1" in done.stdout


@pytest.mark.timeout(320)
def test_a_submit_leads_through_the_few_files_of_the_architecture_page() -> None:
    done = bench("trace", "--tiny", "--runs", "2")
    match = re.search(r"functions in (\d+) files with (\d+) changes of file", done.stdout)
    assert match, done.stderr
    files, changes = map(int, match.groups())
    assert files <= MAX_SUBMIT_FILES, done.stdout
    assert changes <= MAX_SUBMIT_CHANGES, done.stdout
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Route of one submit")[2]
    named = set(re.findall(r"\*\*`([^`]+)`\*\*", page.partition("## Route of one task")[0]))
    assert named == set(re.findall(r"^  (\S+\.py) ", done.stdout[: match.start()], re.MULTILINE))


def test_every_bench_is_tried_here_but_the_one_that_takes_minutes() -> None:
    assert set(BENCHES) == set(TITLES) | {"instructions"}


def test_an_unknown_name_is_rejected_with_the_valid_names() -> None:
    done = bench("nonsense")
    assert done.returncode == 2
    assert "latency" in done.stderr


def test_a_table_lines_up_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("Title", "a", "long column")
    table.add("wide cell", 1)
    table.show("python -m bench x", "a note")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "Title",
        "  a          long column",
        "  ---------  -----------",
        "  wide cell  1",
        "  a note",
        "  $ python -m bench x",
    ]


def test_the_command_shows_options_that_differ_from_the_default() -> None:
    assert command("queue", Options()) == "python -m bench queue"
    assert command("queue", Options(runs=5, full=True, peers=True)) == "PEERS=1 python -m bench queue --full --runs 5"


def test_a_spread_is_least_median_and_most() -> None:
    assert spread([3000, 1000, 2000]) == "1,000 / 2,000 / 3,000"


def test_a_percentile_is_a_measured_value() -> None:
    assert percentile(list(range(100)), 0.99) == 99
    assert percentile([7.0], 0.5) == 7.0
