"""Tests of the model table: its rows, the operator's rows, faults of a file, and end dates."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from pathlib import Path

import pytest

from imagegen.errors import SettingsError
from imagegen.providers.model_rules import ModelRow, ModelTable
from imagegen.providers.model_table import load_table, parse_rows
from imagegen.tasks.task import Task
from tests.support import over_rows

SCHNELL = "black-forest-labs/FLUX.1-schnell"


def a_task(model: str) -> Task:
    return Task("a" * 32, 1, 1, "digest", model, b"{}", 0.0)


def own_table(tmp_path: Path, text: str, provider: str = "together") -> ModelTable:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return load_table(provider, path)


def test_a_provider_has_only_its_own_rows() -> None:
    assert {row.provider for row in load_table("together").rows} == {"together"}
    assert load_table("together").find("gpt-image-2") is None
    assert load_table("openai").find(SCHNELL) is None
    assert load_table("a1111").rows == ()


def test_each_model_has_one_row_and_a_source() -> None:
    rows = load_table("").all_rows
    assert len(rows) > 90
    assert all(row.source and row.certainty for row in rows)
    assert len({(row.provider, name) for row in rows for name in (row.id, *row.aliases)}) == len(
        [name for row in rows for name in (row.id, *row.aliases)]
    )


def test_a_price_without_a_source_is_never_zero() -> None:
    unverified = [row.price for row in load_table("").all_rows if row.price and row.certainty == "unverified"]
    assert unverified
    assert all(price.per_image != 0 for price in unverified)


@over_rows("model", ["gpt-image-2", "openai/gpt-image-2", "azure/gpt-image-2", "a/b/gpt-image-2-2026-04-21"])
def test_a_gateways_prefix_does_not_matter(model: str) -> None:
    row = load_table("openai").find(model)
    assert row is not None
    assert row.id == "gpt-image-2"


@over_rows("model", ["gpt-image-2-all", "my-gpt-image-2", "gpt-image-2/edit", "", "/"])
def test_a_similar_name_is_another_model(model: str) -> None:
    assert load_table("openai").find(model) is None


def test_the_sandbox_has_no_limits_but_end_dates() -> None:
    table = load_table("sandbox")
    assert table.find("gpt-image-1") is None
    assert table.describe("gpt-image-1") == load_table("openai").find("gpt-image-1")


def test_own_rows_are_added_and_take_the_place_of_packaged_ones(tmp_path: Path) -> None:
    table = own_table(
        tmp_path,
        f"""
        models = [
          {{ id = "{SCHNELL}", max_n = 1 }},
          {{ id = "mine", provider = "together", steps = false }},
          {{ id = "theirs", provider = "fal", seed = false }},
        ]
        """,
    )
    assert table.find(SCHNELL) == ModelRow(SCHNELL, "together", max_n=1)
    assert table.find("mine") == ModelRow("mine", "together", steps=False)
    assert table.find("theirs") is None
    assert len(table.rows) == len(load_table("together").rows) + 1


def test_an_own_date_is_that_of_the_last_check_of_the_table(tmp_path: Path) -> None:
    assert own_table(tmp_path, "checked = 2027-05-01\nmodels = []").checked == date(2027, 5, 1)
    assert own_table(tmp_path, "models = []").checked == load_table("").checked


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("models = [", "is no TOML"),
        ("rows = []", "unknown field `rows`"),
        ("", "required field `models`"),
        ("models = [1]", "Expected `object`"),
        ('models = [{ id = "a" }, { id = "b", stepz = 1 }]', r"row 2 \(b\): .*unknown field `stepz`"),
        ("models = [{ max_n = 1 }]", r"row 1 \(without id\): .*required field `id`"),
        ('models = [{ id = " " }]', "id must not be empty"),
        ('models = [{ id = "a" }, { id = "a" }]', r"row 2 \(a\): a row of together has this id already"),
        ('models = [{ id = "a", max_n = 0 }]', "max_n must be at least 1"),
        ('models = [{ id = "a", max_n = "4" }]', r"Expected `int \| null`, got `str` - at `\$.max_n`"),
        ('models = [{ id = "a", steps = { max = -1 } }]', "steps.max must be at least 1"),
        ('models = [{ id = "a", sizes = { list = ["big"] } }]', "'big' is no size"),
        ('models = [{ id = "a", sizes = { multiple = 64, min = 70, max = 100 } }]', "no size meets all limits"),
        ('models = [{ id = "a", ends = "soon" }]', "Invalid RFC3339|Expected `date"),
        ('models = [{ id = "a", price = { per_image = -1 } }]', "price.per_image must be from 0"),
        ('models = [{ id = "a", price = { per_image = nan } }]', "price.per_image must be from 0"),
        ('models = [{ id = "a", price = { by_resolution = { 3K = 1 } } }]', "'3K' is not one of"),
        ('models = [{ id = "a", price = { by_quality_size = { low = { huge = 1 } } } }]', "'huge' is no size"),
        ('models = [{ id = "a", ratios = ["wide"] }]', "'wide' is no ratio"),
    ],
)
def test_a_bad_file_is_one_message_with_file_row_and_rule(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault) as caught:
        own_table(tmp_path, text)
    assert str(caught.value).startswith(f"MODELS_FILE: {tmp_path}/models.toml")
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"MODELS_FILE: .*missing\.toml can't be read"):
        load_table("together", tmp_path / "missing.toml")
    with pytest.raises(SettingsError, match=r"MODELS_FILE: .* can't be read"):
        load_table("together", tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match=r"MODELS_FILE: .*latin\.toml"):
        load_table("together", tmp_path / "latin.toml")


@over_rows(
    ("today", "notice"),
    [
        (date(2026, 10, 31), None),
        (date(2026, 11, 1), "gpt-image-1.5 ends on 2026-12-01; its successor is gpt-image-2.6-flare"),
        (date(2026, 11, 30), "gpt-image-1.5 ends on 2026-12-01; its successor is gpt-image-2.6-flare"),
        (date(2026, 12, 1), "gpt-image-1.5 ended on 2026-12-01; its successor is gpt-image-2.6-flare"),
    ],
)
def test_a_model_has_a_notice_from_30_days_before_its_end(today: date, notice: str | None) -> None:
    table, now = load_table("openai"), datetime.combine(today, time(23, 59), UTC).timestamp()
    task = a_task("openai/gpt-image-1.5")
    assert table.with_notices(task, now).warnings == ((notice,) if notice else ())
    assert table.with_notices(table.with_notices(task, now), now) == table.with_notices(task, now)
    for other in ("gpt-image-2", "unlisted"):
        assert table.with_notices(a_task(other), now).warnings == ()


def test_a_notice_without_a_successor_has_the_date_alone() -> None:
    rows, _ = parse_rows('models = [{ id = "a", ends = 2026-12-01 }]', "together")
    assert rows[0].end_notice(date(2026, 12, 24)) == "a ended on 2026-12-01"
