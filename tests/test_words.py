"""Tests that the texts of the repository have at most two banned words in 1,000."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest

from bench import words

pytestmark = pytest.mark.usefixtures("no_garbage_collections")


def test_documents_are_in_plain_words() -> None:
    paths = words.files(words.DOCUMENTS)
    assert {"README.md", "CHANGELOG.md", "SECURITY.md", ".env.example", "api.md"} <= {path.name for path in paths}
    assert words.count(paths).per_1000 <= words.MAX_PER_1000


def test_files_for_tools_are_in_plain_words() -> None:
    paths = words.files(words.TOOLS)
    assert {"pyproject.toml", "Makefile", "Dockerfile", "render.yaml", "release.yml"} <= {path.name for path in paths}
    assert words.count(paths).per_1000 <= words.MAX_PER_1000


def test_benchmarks_are_in_plain_words() -> None:
    assert words.count(words.files(words.BENCHES)).per_1000 <= words.MAX_PER_1000


def test_the_package_is_in_plain_words() -> None:
    total = words.count(words.files(words.PACKAGE))
    assert total.words > 30_000
    assert total.per_1000 <= words.MAX_PER_1000


@pytest.mark.parametrize(("pattern", "plain"), words.REPLACEMENTS.items(), ids=lambda text: re.sub(r"\W+", " ", text))
def test_each_banned_word_has_a_plain_replacement(pattern: str, plain: str) -> None:
    assert plain
    assert not words.BANNED.search(plain.replace("the noun", "noun"))
    assert not words.BANNED.fullmatch(pattern + "x")


@pytest.mark.parametrize(
    "source",
    [
        '"""Tells the owner."""',
        "x = 1  # whose task it is",
        'raise ValueError("no room for it")',
        'x = f"the task {y} stands in line"',
    ],
)
def test_a_banned_word_is_found_in_each_kind_of_text(tmp_path: Path, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert words.count([path]).banned == 1


def test_code_in_a_text_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('"""Call `tell` of `room`."""\n\ntold = {"picture": "tell"}\n')
    (tmp_path / "page.md").write_text("Run `tell`:\n\n```\nsay whose\n```\n\nSee https://example.org/room.\n")
    (tmp_path / "script.lua").write_text('local told = "stands beside"\n')
    assert words.count(sorted(tmp_path.iterdir())).banned == 0


def test_a_comment_is_no_part_of_a_string(tmp_path: Path) -> None:
    lines = ["a = '# it stands'", 'b = "\\"# it stands"', 'c = """', "# it stands", '"""', "d = 1  # it says '# whose'"]
    assert list(words.comments("\n".join(lines))) == [(6, " it says ' whose'")]


def test_lua_comments_are_counted(tmp_path: Path) -> None:
    (tmp_path / "script.lua").write_text("-- Tells whose entry it is.\nreturn 1\n")
    assert words.count([tmp_path / "script.lua"]) == words.Count(2, 5)


def test_a_hit_has_its_line_and_its_replacement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    path.write_text("Plain.\n\nIt stands here.\n")
    words.main(["-v", str(path)])
    assert f"{path}:3: stands -> is, is written, state | It stands here." in capsys.readouterr().out


def test_for_as_because_is_banned_and_for_a_purpose_is_not(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("It waits, for Redis is away. Two calls, for example, or three, for each task.\n")
    assert words.count([path]).banned == 1


_TEXT = re.compile(r'"""(.*?)"""|#([^\n]*)', re.DOTALL)
_CONSTANT = re.compile(r"\b_?[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")
_RAISED = re.compile(r"Raises:? ((?:_?[A-Z]\w+)(?:, _?[A-Z]\w+)*)")


@pytest.mark.parametrize("pattern", [_CONSTANT, _RAISED], ids=["constants", "errors"])
def test_a_text_of_the_code_names_only_what_exists(pattern: re.Pattern[str]) -> None:
    sources = [path.read_text() for path in words.files(words.PACKAGE) if path.suffix == ".py"]
    names = {name for source in sources for name in re.findall(r"\w+", _TEXT.sub("", source))} | set(dir(builtins))
    names |= {"OPEN_MAX", "XDG_DATA_DIRS"}  # of macOS, of desktops
    texts = [text for source in sources for match in _TEXT.finditer(source) for text in match.groups() if text]
    named = {name for text in texts for part in pattern.findall(text) for name in re.split(r"[.,\s]+", part)}
    assert len(named) > 50
    assert named - names == set()
