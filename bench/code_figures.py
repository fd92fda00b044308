"""Figures of the code's shape: names, sizes, import cycles, private names of aiohttp, plain words."""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import aiohttp

from bench import words
from bench.report import Options, Table, command
from bench.servers import ROOT

PACKAGE = ROOT / "imagegen"
MAX_FILE_LINES = 450

PARALLEL_MODULES = frozenset(
    {"bfl", "dashscope", "fal", "gemini", "replicate", "siliconflow"}  # a provider, and its emulator
    | {"error_responses", "models", "operations", "schemas"}  # the same for each of the APIs of `web`
)
"""Names that modules of several packages share, since these do the same for different APIs or providers."""

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def modules() -> dict[str, Path]:
    """Return the modules of the package by their dotted names."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def shared_class_names() -> tuple[dict[str, list[str]], int]:
    """Return the class names that two or more modules define, and the number of all class names."""
    places = defaultdict(list)
    for name, path in modules().items():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    return {name: modules for name, modules in places.items() if len(set(modules)) > 1}, len(places)


def repeated_module_names() -> dict[str, list[str]]:
    """Return the module names in two or more packages, without parallel ones."""
    places = defaultdict(list)
    for path in modules().values():
        if not path.stem.startswith("__") and path.stem not in PARALLEL_MODULES:
            places[path.stem].append(path.relative_to(PACKAGE).as_posix())
    return {name: paths for name, paths in places.items() if len(paths) > 1}


@cache
def function_lines() -> list[tuple[int, str]]:
    """Return the lines of each function, without its decorators and docstring, shortest first."""
    lengths = []
    for path in modules().values():
        for node in nodes(path):
            if isinstance(node, _FUNCTION):
                first = node.body[0]
                documented = ast.get_docstring(node, clean=False) is not None
                docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
                lengths.append((lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(lengths)


def file_lines() -> dict[str, int]:
    """Return the lines of each file of the package, its benchmarks and its tests."""
    paths = [path for folder in (PACKAGE, ROOT / "bench", ROOT / "tests") for path in sorted(folder.rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def long_files() -> list[str]:
    return [f"{path} {lines}" for path, lines in file_lines().items() if lines > MAX_FILE_LINES]


@cache
def imports() -> dict[str, set[str]]:
    """Return for each module those of the package that it imports when it is loaded."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in _loaded(tree(path)):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
            else:
                continue
            graph[name] |= {target for target in found if target in known and target != name}
    return graph


def _loaded(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is loaded: none inside functions and none only for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTION) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            continue
        yield child
        yield from _loaded(child)


def import_cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other; packages that only hold a docstring join none."""
    reached = {name: _reach(graph, name) for name in graph}
    cycles: list[set[str]] = []
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]}
        if len(group) > 1 and group not in cycles:
            cycles.append(group)
    return cycles


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found, left = set[str](), [start]
    while left:
        for target in graph[left.pop()] - found:
            found.add(target)
            left.append(target)
    return found


@cache
def private_names_of_aiohttp() -> dict[str, frozenset[str]]:
    """Return the private names that each class of aiohttp defines; under "" those of its modules."""
    names: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, list[str]] = {}
    for path in Path(aiohttp.__file__).parent.glob("*.py"):
        names[""] |= {node.name for node in tree(path).body if isinstance(node, (*_FUNCTION, ast.ClassDef))}
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                names[node.name] |= _members(node)
                bases[node.name] = [_name(base) for base in node.bases]

    def inherited(name: str) -> set[str]:
        return names[name].union(*(inherited(base) for base in bases.get(name, ()) if base in bases and base != name))

    return {name: frozenset(filter(_is_private, inherited(name))) for name in ["", *bases]}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def private_uses() -> dict[str, set[str]]:
    """Return the private names of aiohttp that each file uses: imported, read, set or overridden.

    A name that a class of the file defines is its own, unless the class inherits it from aiohttp.
    """
    uses = {}
    for path in modules().values():
        module = nodes(path)
        sources = {name.split(".")[0] for name in _imported(module)}
        if "aiohttp" not in sources:
            continue
        found = {name.split(".")[-1] for name in _imported(module) if name.startswith("aiohttp.")}
        found = set(filter(_is_private, found)) | _private_attributes(module)
        if found:
            uses[path.relative_to(ROOT).as_posix()] = found
    return uses


def _imported(module: list[ast.AST]) -> set[str]:
    names = set()
    for node in module:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _private_attributes(module: list[ast.AST]) -> set[str]:
    private = private_names_of_aiohttp()
    own, found = set[str](), set[str]()
    for node in module:
        if isinstance(node, ast.ClassDef):
            inherited = frozenset[str]().union(*(private.get(_name(base), ()) for base in node.bases))
            found |= _members(node) & inherited
            own |= _members(node) - inherited
    read = {node.attr for node in module if isinstance(node, ast.Attribute)}
    return found | (read & frozenset[str]().union(*private.values())) - own


def _name(base: ast.expr) -> str:
    while isinstance(base, ast.Subscript):
        base = base.value
    return base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""


def _members(node: ast.ClassDef) -> set[str]:
    """Return the private names that a class defines, or reads or sets on itself."""
    names = {child.name for child in node.body if isinstance(child, _FUNCTION)}
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id in {"self", "cls"}:
            names.add(child.attr)
        elif isinstance(child, ast.AnnAssign | ast.Assign) and child in node.body:
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            if any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets):
                names |= {str(item.value) for item in ast.walk(child) if isinstance(item, ast.Constant)}
    return set(filter(_is_private, names))


def show_figures(options: Options) -> None:
    table = Table("Shape of the code", "what", "goal", "figure")
    shared, classes = shared_class_names()
    repeated = repeated_module_names()
    lengths = function_lines()
    longest, longest_name = lengths[-1]
    cycles, long, private = import_cycles(imports()), long_files(), private_uses()
    names = set().union(*private.values())
    scale = 100 / max(classes, 1)
    table.add("class names in two or more modules", "<= 3 %", f"{len(shared) * scale:.1f} % ({_list(shared)})")
    table.add("module names used twice, without parallel ones", "0", f"{len(repeated)} ({_list(repeated)})")
    table.add("function lines, median", "<= 8", statistics.median(lines for lines, _ in lengths))
    table.add("function lines, longest", "<= 45", f"{longest} ({longest_name})")
    table.add("import cycles", "0", f"{len(cycles)} ({_list('/'.join(sorted(cycle)) for cycle in cycles)})")
    table.add(f"files over {MAX_FILE_LINES} lines", "0", f"{len(long)} ({_list(long)})")
    table.add("private names of aiohttp in use", "<= 15", len(names))
    for file, used in private.items():
        table.add(f"  in {file}", "", _list(used))
    for area, count in words.count_by_area().items():
        table.add(f"banned words in 1,000, {area}", f"<= {words.MAX_PER_1000:g}", f"{count.per_1000:.1f}")
    table.show(command("trace", options))


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
