"""Quaint words in the texts of the repository, each with its plain replacement, counted per 1,000 words.

`python -m bench.words [-v] [PATH ...]` counts them in files and folders; -v prints each one with its line. In Python
files it reads docstrings, comments and texts of three or more words; in Lua, TOML, YAML and make files comments;
elsewhere all but code.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

THIS = Path(__file__).resolve()
ROOT = THIS.parent.parent
MAX_PER_1000 = 2.0

FLAGS = re.IGNORECASE | re.VERBOSE

REPLACEMENTS = {
    # Code does not speak or feel.
    r"tells?|told|telling": "return, publish, notify, show",
    r"says?|said|saying": "state, contain, report, show",
    r"asks?|asked|asking": "request, query, call",
    r"hears?|heard": "receive",
    r"knows?|knew|knowing": "have, cache, hold",
    r"known": "existing, cached, supported",
    r"cares?|cared": "handle",
    r"wants?|wanted": "need, require, request",
    r"brings?|brought": "carry, contain, return, produce",
    r"wish(?:es)?": "request, option",
    # Words for things that have another name.
    r"keepers?": "store, saver",
    r"pictures?": "image",
    r"rooms?": "package, capacity",
    r"floors?": "layer, minimum",
    # Old words.
    r"afresh|anew": "again",
    r"lest": "so that ... not",
    r"lately": "recently",
    r"seldom(?:er)?": "rarely, less often",
    r"thus|hence|whence": "so, therefore",
    r"hither|therein|thereof|aforesaid|betimes": "here, in it, of it, named above, early",
    r"amid": "during",
    r"beside": "next to, besides, with",
    r"stands?|stood|standing": "is, is written, state",
    r"whose": "with, that has",
    r"somebody|anybody|nobody": "a client, any client, no client",
    r"whoever|whatever|wherever": "who, any, where",
    r"mends?|mended|mending": "repair, fix",
    # Crooked sentences.
    r"hand(?:s|ed|ing)?\ back": "release",
    r"set(?:s|ting)?\ aside": "park",
    r"lets?\ go": "release",
    r"so\ (?:many|much)": "this number of, up to n",
    r"by\ its\ looks": "by its form",
    r"in\ vain": "without result",
    r"what\ (?:is|was)": "the noun",
    r"one\ that": "the noun",
    r"of\ its\ own": "its own, separate",
    r"by\ itself": "without help, automatically",
    r"as\ it\ is": "unchanged",
    r"where\ (?:it|there|none)\ (?:is|are)": "if there is",
    r"(?:none|that)\ is\ none|none\ is": "no ... is",
    r"all\ that": "everything that, each",
    r"for\ ever": "forever, without a limit",
    r"at\ once\ where": "immediately if",
}
"""Regular expressions of words, case ignored."""

CLAUSE = (
    r",\ (?:for|say)\b(?!\ (?:each|every|example|all|a|an|the|one|two|three|which|instance|this|that|these|any|up)\b)"
)
"""`, for` as "because", and `, say` as "for example"."""

BANNED = re.compile("|".join([rf"\b(?:{'|'.join(REPLACEMENTS)})\b", CLAUSE]), FLAGS)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_CODE = re.compile(r"```.*?```|``[^`]*``|`[^`]*`|https?://\S+", re.DOTALL)
_LITERAL_OR_COMMENT = re.compile(
    r'''(""")(?:\\.|[^\\])*?\1|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*''', re.DOTALL
)
"""A tenth of the time of Python's tokenizer."""

_TEXT_WORDS = 3
"""A string with fewer words is a name or a value."""

DOCUMENTS = ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", ".env.example", "docs/**/*.md")
TOOLS = ("pyproject.toml", "Makefile", "Dockerfile", "*.yaml", ".*.yaml", ".github/**/*.yml", ".github/*.py")
BENCHES = ("bench/**/*.py", "run.py")
PACKAGE = ("imagegen/**/*.py", "imagegen/**/*.lua")
AREAS = {"documents": DOCUMENTS, "tools": TOOLS, "bench": BENCHES, "package": PACKAGE}


@dataclass(frozen=True, slots=True)
class Text:
    """One docstring, comment or document, without its code."""

    path: Path
    line: int
    text: str

    @property
    def banned(self) -> list[tuple[int, str]]:
        """The line and the words of each hit."""
        return [
            (self.line + self.text.count("\n", 0, match.start()), match.group().lower())
            for match in BANNED.finditer(self.text)
        ]


@dataclass(frozen=True, slots=True)
class Count:
    banned: int
    words: int

    @property
    def per_1000(self) -> float:
        return 1000 * self.banned / max(self.words, 1)


def plain(text: str) -> str:
    """Return a text without code and addresses; the lines stay where they are."""
    return _CODE.sub(lambda match: "\n" * match.group().count("\n"), text)


def texts(path: Path) -> Iterator[Text]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from (Text(path, line, plain(text)) for line, text in chain(comments(source), strings(source)))
    elif path.suffix == ".lua":
        yield from (Text(path, line, text) for line, text in comments_after("--", source))
    elif path.suffix in {".toml", ".yml", ".yaml"} or path.name in {"Makefile", "Dockerfile"}:
        yield from (Text(path, line, text) for line, text in comments_after("#", source))
    else:
        yield Text(path, 1, plain(source))


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of Python code without the `#`, and those for tools without their codes."""
    for match in _LITERAL_OR_COMMENT.finditer(source):
        if match[0].startswith("#"):
            line = source.count("\n", 0, match.start()) + 1
            yield line, re.sub(r"#\s*(noqa|type|fmt|ruff|mypy):\S*( [A-Z]+\d+,?)*|#", "", match[0])


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings, and the other strings that are texts: log lines, errors, helps of metrics, descriptions."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in documented or (" " in node.value and len(WORD.findall(node.value)) >= _TEXT_WORDS):
            yield node.lineno, node.value


def comments_after(mark: str, source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.splitlines(), 1):
        _, found, comment = line.partition(mark)
        if found:
            yield number, plain(comment)


def files(patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path != THIS})


def count(paths: Iterable[Path], report: Callable[[Text], None] | None = None) -> Count:
    banned = words = 0
    for text in chain.from_iterable(map(texts, paths)):
        words += len(WORD.findall(text.text))
        banned += len(text.banned)
        if report:
            report(text)
    return Count(banned, words)


def count_by_area() -> dict[str, Count]:
    return {area: count(files(patterns)) for area, patterns in AREAS.items()}


def replacement(words: str) -> str:
    matches = (text for pattern, text in REPLACEMENTS.items() if re.fullmatch(pattern, words, FLAGS))
    return next(matches, "because; for example")


def show(text: Text) -> None:
    lines = text.text.splitlines()
    for line, words in text.banned:
        context = " ".join(lines[line - text.line].split())
        print(f"{text.path}:{line}: {words} -> {replacement(words)} | {context[:140]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.words", description="Counts quaint words.")
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders; without any, all areas")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print each one")
    given = parser.parse_args(arguments)
    report = show if given.verbose else None
    if not given.paths:
        for area, patterns in AREAS.items():
            print(f"{area}: {_sum(count(files(patterns), report))}")
        return
    for path in given.paths:
        found = [file for end in ("py", "lua", "md") for file in path.rglob(f"*.{end}")] if path.is_dir() else [path]
        print(f"{path}: {_sum(count(sorted(found), report))}")


def _sum(total: Count) -> str:
    return f"{total.banned} of {total.words} words, {total.per_1000:.1f} in 1,000"


if __name__ == "__main__":
    main()
