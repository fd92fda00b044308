"""Usage report: what a query selects, and its forms."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator

import pytest

from imagegen.accounts.counts import Counts, RowName, Rows, Usage
from imagegen.accounts.usage_report import COLUMNS, UsageQuery, UsageReport
from imagegen.errors import InvalidRequest
from imagegen.tasks.cost import day_of
from tests.support import over_rows

NOW = 1_767_225_600.0  # 2026-01-01
DAY = day_of(NOW)
USAGE: Usage = {
    DAY - 1: {
        RowName("ann", "m"): Counts(submitted=2, spent=2_700),
        RowName("", "=1+1"): Counts(submitted=1, spent=1),
    },
    DAY: {
        RowName("ann", "m"): Counts(submitted=1, saved_by_cache=100_000),
        RowName("bob", "n"): Counts(failed=1, ambiguous=3),
    },
}


def report(key: str | None = None, **values: str) -> UsageReport:
    async def parts() -> AsyncIterator[tuple[int, Rows]]:
        for day, rows in USAGE.items():
            for name, counts in rows.items():
                if day in query.days:
                    yield day, {name: counts}

    query = UsageQuery.parse({name.strip("_"): text for name, text in values.items()}, NOW, key)
    return asyncio.run(UsageReport.of(parts(), query))


def test_the_counts_have_one_name_each() -> None:
    assert [name.lower() for name in COLUMNS] == [name.replace("_", "") for name in Counts.__struct_fields__]


@over_rows(
    ("by", "labels"),
    [("day", ["2025-12-31", "2026-01-01"]), ("key", [None, "ann", "bob"]), ("model", ["=1+1", "m", "n"])],
)
def test_rows_are_grouped_and_add_up_to_the_total(by: str, labels: list[str | None]) -> None:
    view = report(by=by).to_view()
    assert [row[by] for row in view["rows"]] == labels
    for name in COLUMNS:
        assert sum(row[name] for row in view["rows"]) == pytest.approx(view["total"][name])
    assert (view["total"]["submitted"], view["total"]["spent"]) == (4, 0.002701)


def test_a_key_sees_its_own_rows() -> None:
    view = report(key="bob", by="model").to_view()
    assert [row["model"] for row in view["rows"]] == ["n"]
    assert (view["total"]["submitted"], view["total"]["failed"], view["total"]["ambiguous"]) == (0, 1, 3e-06)


def test_only_the_days_between_count() -> None:
    view = report(from_="2026-01-01", to="2026-01-01").to_view()
    assert (view["from"], view["to"], view["total"]["submitted"]) == ("2026-01-01", "2026-01-01", 1)
    assert report().to_view()["from"] == "2025-12-03", "30 days if no other first day is given"


def test_money_has_at_most_six_decimals_and_csv_no_exponent_and_no_formula() -> None:
    text = report(by="model").to_csv()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["model"] for row in rows] == ["'=1+1", "m", "n"]
    assert [row["spent"] for row in rows] == ["0.000001", "0.0027", "0"]
    assert text.splitlines()[0].split(",") == ["model", *COLUMNS]
    assert json.loads(json.dumps(report().to_view()["rows"][1]["savedByCache"])) == 0.1


@over_rows(
    ("values", "fields"),
    [
        ({"from_": "2026-02-30"}, ["from"]),
        ({"from_": "20260101", "to": "yesterday", "by": "week"}, ["to", "from", "by"]),
        ({"from_": "2026-01-02", "to": "2026-01-01"}, ["from"]),
        ({"from_": "2025-01-01"}, ["from"]),
        ({"to": ""}, ["to"]),
        ({"to": "２０２６-01-01"}, ["to"]),
        ({"to": "0001-01-01"}, ["to"]),
        ({"from_": "1969-12-31", "to": "1970-01-01"}, ["from"]),
    ],
)
def test_a_bad_value_is_named(values: dict[str, str], fields: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        report(**values)
    assert [error.field for error in refused.value.details] == fields


def test_a_report_begins_with_the_first_day_at_the_earliest() -> None:
    assert report(to="1970-01-02").to_view()["from"] == "1970-01-01"
