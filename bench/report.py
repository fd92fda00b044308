"""Output of the benchmarks: tables, and the spread of repeated measurements."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Options:
    """Extent of a measurement.

    runs: of each timed figure; full: the long windows; tiny: as little as shows that it works (for tests);
    peers: measure other queues too.
    """

    runs: int = 3
    full: bool = False
    tiny: bool = False
    peers: bool = False

    def count(self, tiny: int, quick: int, full: int | None = None) -> int:
        """Return the number of tasks or seconds for this extent."""
        return tiny if self.tiny else (full or quick) if self.full else quick

    def some(self, *values: _Value) -> tuple[_Value, ...]:
        """Return the values to measure with; the first alone if `tiny`."""
        return values[:1] if self.tiny else values

    @property
    def flags(self) -> str:
        """Return the flags of the command line that makes the same table."""
        flags = (" --tiny" if self.tiny else "") + (" --full" if self.full else "")
        return flags + (f" --runs {self.runs}" if self.runs != 3 else "")


class Table:
    """Rows of text under a title; printed by `show`."""

    def __init__(self, title: str, *columns: str) -> None:
        self._title = title
        self._rows: list[Sequence[str]] = [columns]

    def add(self, *cells: object) -> None:
        self._rows.append([str(cell) for cell in cells])

    def show(self, command: str, *notes: str) -> None:
        widths = [max(len(row[i]) for row in self._rows) for i in range(len(self._rows[0]))]
        print(f"\n{self._title}")
        for number, row in enumerate(self._rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            if number == 0:
                print("  " + "  ".join("-" * width for width in widths))
        for note in notes:
            print(f"  {note}")
        print(f"  $ {command}", flush=True)


def command(name: str, options: Options) -> str:
    """Return the command that makes a table."""
    return ("PEERS=1 " if options.peers else "") + f"python -m bench {name}{options.flags}"


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Return least / median / most."""
    return " / ".join(format(value, form) for value in (min(values), statistics.median(values), max(values)))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def machine() -> str:
    """Describe this machine."""
    load = os.getloadavg()[0]
    python = f"Python {platform.python_version()}"
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, {python}, load average {load:.2f} at start"
    )
