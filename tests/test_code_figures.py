"""The shape of the code: few names twice, short files and functions, no import cycle, few private names of aiohttp."""

from __future__ import annotations

import re
import statistics

import pytest

from bench import code_figures, trace, words
from bench.report import Options
from imagegen.app import create_app

pytestmark = pytest.mark.usefixtures("no_garbage_collections")

MAX_FUNCTION_LINES = 45
MAX_PRIVATE_NAMES = 15


def test_few_class_names_are_in_two_modules() -> None:
    shared, classes = code_figures.shared_class_names()
    assert classes > 100
    assert len(shared) <= 0.03 * classes, shared


def test_no_module_name_is_in_two_packages_unless_they_do_the_same_for_two_apis() -> None:
    assert code_figures.repeated_module_names() == {}


def test_no_modules_import_each_other() -> None:
    graph = code_figures.imports()
    assert graph["imagegen.app"] > {"imagegen.settings", "imagegen.lifecycle"}
    assert not code_figures.import_cycles(graph)


def test_an_import_cycle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str]()}
    assert code_figures.import_cycles(graph) == [{"a", "b", "c"}]


def test_functions_are_short() -> None:
    lengths = code_figures.function_lines()
    assert statistics.median(lines for lines, _ in lengths) <= 8
    assert lengths[-1][0] <= MAX_FUNCTION_LINES, lengths[-1]


def test_files_of_the_package_its_benchmarks_and_its_tests_are_short() -> None:
    assert code_figures.file_lines().keys() >= {"imagegen/app.py", "bench/words.py", "tests/support.py"}
    assert not code_figures.long_files()


def test_few_private_names_of_aiohttp_are_used() -> None:
    uses = code_figures.private_uses()
    names = set().union(*uses.values())
    assert "_make_server" in names, "an override counts"
    assert "_ErrInfo" in names, "an import counts"
    assert len(names) <= MAX_PRIVATE_NAMES, uses


def test_the_figures_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "count_by_area", lambda: {"documents": words.Count(1, 1000)})
    code_figures.show_figures(Options())
    printed = capsys.readouterr().out
    assert re.search(r"import cycles +0 +0 \(none\)", printed)
    assert re.search(r"banned words in 1,000, documents +<= 2 +1.0", printed)
    assert "$ python -m bench trace" in printed


def test_a_route_holds_only_the_calls_common_to_all_runs() -> None:
    first, second, third = trace.common.__code__, trace.file_of.__code__, trace.main.__code__
    assert trace.common([[first, second, third], [third, first]]) == [third, first]


def test_file_changes_are_counted_between_neighbours() -> None:
    of_figures, of_package = code_figures.modules.__code__, create_app.__code__
    paths = [code.co_filename for code in (of_figures, of_package)]
    assert paths[0] != paths[1]
    assert trace.file_changes([of_package, of_package]) == 0
