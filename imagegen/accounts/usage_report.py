"""Usage report as clients and operators get it: grouped by day, key or model, as JSON or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, get_args

from msgspec import Struct

from imagegen.accounts.counts import Counts, RowName, Rows, total_of
from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.cost import day_of, dollars

MAX_DAYS = 92
DEFAULT_DAYS = 30

Grouping = Literal["day", "key", "model"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_EPOCH = date(1970, 1, 1)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make a spreadsheet take a text for a formula: https://owasp.org/www-community/attacks/CSV_Injection"""

COLUMNS = (
    "submitted",
    "cached",
    "coalesced",
    "completed",
    "failed",
    "cancelled",
    "images",
    "spent",
    "savedByCache",
    "savedByCoalescing",
    "ambiguous",
)
"""Names of the counts in reports, in the order of the fields of Counts."""

MONEY = frozenset({"spent", "savedByCache", "savedByCoalescing", "ambiguous"})
"""Columns in dollars."""


class UsageQuery(Struct, frozen=True):
    """Selection of a report. first, last: days since 1970-01-01 UTC, both included; key: of a client, None for all."""

    first: int
    last: int
    by: Grouping
    key: str | None

    @classmethod
    def parse(cls, values: Mapping[str, str], now: float, key: str | None = None) -> UsageQuery:
        """Parse `from`, `to` and `by`; now: Unix time. Raises InvalidRequest with every error."""
        errors: list[FieldError] = []

        def day(name: str, default: int) -> int:
            text = values.get(name)
            if text is None:
                return default
            try:
                return _day_of(text)
            except ValueError:
                errors.append(FieldError(name, "must be a date of the form YYYY-MM-DD, from 1970-01-01 on"))
                return default

        last = day("to", day_of(now))
        first = day("from", max(last - DEFAULT_DAYS + 1, 0))
        by = values.get("by", GROUPINGS[0])
        if by not in GROUPINGS:
            errors.append(FieldError("by", f"must be one of {', '.join(GROUPINGS)}"))
        if not errors and first > last:
            errors.append(FieldError("from", "must not be after `to`"))
        if not errors and last - first >= MAX_DAYS:
            errors.append(FieldError("from", f"must be at most {MAX_DAYS - 1} days before `to`"))
        if errors:
            raise InvalidRequest(details=errors)
        return cls(first, last, next(grouping for grouping in GROUPINGS if grouping == by), key)

    @property
    def days(self) -> range:
        return range(self.first, self.last + 1)


class UsageReport(Struct, frozen=True):
    """Counts by name of their group, in order, and their sum. A group has the name None if it has no key."""

    query: UsageQuery
    rows: Sequence[tuple[str | None, Counts]]
    total: Counts

    @classmethod
    async def of(cls, parts: AsyncIterable[tuple[int, Rows]], query: UsageQuery) -> UsageReport:
        """Group the counts of the days and keys that the query selects, as they come: all rows are too many to keep."""
        groups: dict[str, Counts] = {}
        async for day, rows in parts:
            for name, counts in rows.items():
                if query.key is None or name.key == query.key:
                    groups.setdefault(_group(query.by, day, name), Counts()).add(counts)
        grouped = [(label or None, groups[label]) for label in sorted(groups)]
        return cls(query, grouped, total_of(groups.values()))

    @property
    def file_name(self) -> str:
        """Return a name for the file of the report."""
        return f"usage-{shown_day(self.query.first)}-{shown_day(self.query.last)}.csv"

    def to_view(self) -> dict[str, Any]:
        """Return the JSON object of the report."""
        return {
            "success": True,
            "from": shown_day(self.query.first),
            "to": shown_day(self.query.last),
            "by": self.query.by,
            "currency": "USD",
            "rows": [{self.query.by: label} | _view(counts) for label, counts in self.rows],
            "total": _view(self.total),
        }

    def to_csv(self) -> str:
        """Return the rows as CSV (RFC 4180) with a header line. A text that looks like a formula begins with `'`."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([self.query.by, *COLUMNS])
        for label, counts in self.rows:
            name = label or ""
            cells = ("'" + name if name.startswith(_FORMULA) else name, *_view(counts).values())
            writer.writerow([_plain(cell) if isinstance(cell, float) else cell for cell in cells])
        return text.getvalue()


def shown_day(day: int) -> str:
    """Return a day (since 1970-01-01) as YYYY-MM-DD."""
    return str(_EPOCH + timedelta(days=day))


def _day_of(text: str) -> int:
    """Return the number of a day. Raises ValueError for another text, and for a day before the first one."""
    if not _DATE.fullmatch(text):
        raise ValueError(text)
    day = (datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date() - _EPOCH).days
    if day < 0:
        raise ValueError(text)
    return day


def _group(by: Grouping, day: int, name: RowName) -> str:
    match by:
        case "day":
            return shown_day(day)
        case "key":
            return name.key
        case "model":
            return name.model


def _view(counts: Counts) -> dict[str, int | float]:
    pairs = zip(COLUMNS, counts.values, strict=True)
    return {name: dollars(value) if name in MONEY else value for name, value in pairs}


def _plain(number: float) -> str:
    """Return a number of dollars without an exponent and without zeros at its end."""
    return f"{number:.6f}".rstrip("0").rstrip(".")
