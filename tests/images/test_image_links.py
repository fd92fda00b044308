"""Tests of the lifetime of an image link, derived from its parameters."""

from __future__ import annotations

from datetime import UTC, datetime

from imagegen.images.image_links import LINK_TTL_S, expires_at
from tests.support import over_rows

NOW = datetime(2026, 11, 28, 12, 0, 0, tzinfo=UTC).timestamp()


@over_rows(
    ("query", "life_s"),
    [
        ("", LINK_TTL_S),
        ("?X-Amz-Date=20261128T115900Z&X-Amz-Expires=3600&X-Amz-Signature=a%2Fb", 3540.0),
        ("?x-goog-date=20261128T120000Z&x-goog-expires=60", 60.0),
        (f"?Expires={int(NOW) + 7200}&Signature=x&Key-Pair-Id=y", 7200.0),
        ("?sv=2024&se=2026-11-28T14:00:00Z&sig=x", 7200.0),
        ("?X-Amz-Expires=3600", LINK_TTL_S),
        ("?Expires=100", LINK_TTL_S),
        ("?Expires=99999999999999", LINK_TTL_S),
        ("?Expires=soon", LINK_TTL_S),
        (f"?Expires={int(NOW) + 10**9}", LINK_TTL_S),
    ],
)
def test_a_signed_link_has_its_own_lifetime_and_others_ten_minutes(query: str, life_s: float) -> None:
    assert expires_at(f"https://images.example.com/a.png{query}", NOW) == NOW + life_s


@over_rows("link", ["http://[::1", "/relative.png", ""])
def test_a_malformed_link_lives_ten_minutes(link: str) -> None:
    assert expires_at(link, NOW) == NOW + LINK_TTL_S
