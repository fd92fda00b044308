"""Counts of the usage report: submits, ends of tasks, images, costs and savings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

from msgspec import Struct

_MAX_COUNT = 2**53
"""JSON has no larger number that all clients read exactly."""


class RowName(NamedTuple):
    """Names of a row. key: name of the API key, empty without one."""

    key: str
    model: str

    def encode(self) -> str:
        """Return the field of the row; names of keys have no space."""
        return f"{self.key} {self.model}"

    @classmethod
    def decode(cls, field: str) -> Self:
        key, _, model = field.partition(" ")
        return cls(key, model)


class Counts(Struct, gc=False):
    """Counts of one row. Money is in micro-dollars. The order of the fields is stored: a new one goes to the end.

    submitted: accepted submits. cached, coalesced: those of them that were hits, and that joined an unfinished task.
    completed, failed, cancelled: tasks by their end. images: those that were generated.
    spent: calls that were sent. ambiguous: the part of it for calls without an answer.
    saved_by_cache, saved_by_coalescing: estimates of hits and of joins.
    """

    submitted: int = 0
    cached: int = 0
    coalesced: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    images: int = 0
    spent: int = 0
    saved_by_cache: int = 0
    saved_by_coalescing: int = 0
    ambiguous: int = 0

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.__struct_fields__)

    def add(self, other: Counts) -> None:
        """Add the counts of another row."""
        for name in self.__struct_fields__:
            if amount := getattr(other, name):
                setattr(self, name, getattr(self, name) + amount)

    def encode(self) -> str:
        """Return the stored form: the numbers with spaces between."""
        return " ".join(map(str, self.values))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Parse the stored form, without numbers that a newer version has added. Raises ValueError."""
        numbers = list(map(int, text.split(" ")))
        if not all(-_MAX_COUNT <= number <= _MAX_COUNT for number in numbers):
            raise ValueError("a number is beyond 53 bits")
        return cls(*numbers[: len(cls.__struct_fields__)])


Rows = dict[RowName, Counts]
Usage = dict[int, Rows]
"""Rows by day (days since 1970-01-01 UTC)."""


def total_of(counts: Iterable[Counts]) -> Counts:
    """Return the sum of rows."""
    total = Counts()
    for row in counts:
        total.add(row)
    return total
