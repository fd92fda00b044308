from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as some

from imagegen.backoff import Backoff, doubled
from imagegen.formats import mask_quotes, parse_digits, parse_http_date, printable, rfc3339
from tests.support import over_rows


@settings(deadline=None)
@given(some.integers(0, 4_000_000_000_000_000).map(lambda micros: micros / 1e6))
def test_a_time_is_written_as_the_standard_library_does(unix_s: float) -> None:
    expected = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert rfc3339(unix_s) == expected


@over_rows(("text", "number"), [("0", 0), ("007", 7), ("1" * 18, int("1" * 18))])
def test_ascii_digits_are_a_number(text: str, number: int) -> None:
    assert parse_digits(text) == number


@over_rows("text", ["", "٣", "３", "1_0", "+1", "-1", " 1", "1 ", "1.0", "²", "1" * 19])
def test_other_text_is_not_a_number(text: str) -> None:
    assert parse_digits(text) is None


@over_rows("zone", ["GMT", "-0000", "+0000", ""])
def test_a_date_of_a_header_is_a_unix_time(zone: str) -> None:
    assert parse_http_date(f"Wed, 21 Oct 2026 07:28:00 {zone}") == 1_792_567_680


NO_DATES = [
    None,
    "",
    "soon",
    "Fri, 31 Dec 99999999999999999999 23:59:59 GMT",
    "Fri, 31 Dec 1999 23:59:59 +9999999999999999",
    "Fri, 31 Dec 10000 23:59:59 GMT",
    "Fri, 31 Dec 1999 99:59:59 GMT",
]


@over_rows("text", NO_DATES)
def test_any_other_text_is_no_date(text: str | None) -> None:
    assert parse_http_date(text) is None


def test_printable_text_replaces_unprintable_characters() -> None:
    assert printable("a\n\u202eb\ud800é") == "a??b?é"
    assert printable("abc\n", 2) == "ab"


def test_waits_double_up_to_a_limit_and_start_over_after_a_reset() -> None:
    backoff = Backoff(0.1, 0.5)
    assert [backoff.next_s() for _ in range(4)] == [0.1, 0.2, 0.4, 0.5]
    backoff.reset()
    assert backoff.next_s() == 0.1


def test_a_wait_stays_at_its_limit_after_any_number_of_failures() -> None:
    assert doubled(0.01, 10_000, 30.0) == 30.0


LONG = "a lighthouse at the end of the world, in fog"


@over_rows(
    ("text", "hidden", "masked"),
    [
        (f"refused: {LONG}", [LONG], "refused: [prompt]"),
        (f"'{LONG.upper()}' and {LONG}!", [LONG], "'[prompt]' and [prompt]!"),
        (f"refused: {LONG[:30]}…", [LONG], "refused: [prompt]…"),
        ("a lighthouse at sea", [LONG], "a lighthouse at sea"),
        ("no cat, no dog", ["cat", None, "dog"], "no [prompt], no [prompt]"),
        ("一只猫不行", ["一只猫"], "[prompt]不行"),
        ("a b c", ["a", "", None], "a b c"),
        ("the prompt is bad", ["prompt"], "the [prompt] is bad"),
        ("a cat in fog", ["a cat \n in  fog"], "[prompt]"),
    ],
)
def test_quotes_of_a_hidden_text_are_masked_as_far_as_they_go(text: str, hidden: list[str], masked: str) -> None:
    assert mask_quotes(text, hidden) == masked
