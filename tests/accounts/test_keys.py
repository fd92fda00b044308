"""Tests of the records of API keys, and of the ring that authenticates by them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.accounts.api_keys import (
    MAX_SECRETS,
    ApiKey,
    SecretHash,
    decode_key,
    encode_key,
    fixed_keys,
    new_secret,
    secret_digest,
)
from imagegen.accounts.key_fields import NewKeyFields, parse_fields
from imagegen.accounts.key_store import KeyRing
from imagegen.errors import InvalidRequest
from tests.support import Clock, over_rows


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def key(name: str, *secrets: str, **limits: Any) -> ApiKey:
    return ApiKey(name, tuple(SecretHash(sha256(secret)) for secret in secrets), **limits)


def name_of(ring: KeyRing, secret: str) -> str | None:
    match = ring.find(secret_digest(secret))
    return match.name if match else None


def test_a_secret_has_the_prefix_and_43_characters_and_is_never_the_same() -> None:
    made = [new_secret() for _ in range(100)]
    assert {(secret[:3], len(secret)) for secret in made} == {("ig_", 46)}
    assert len(set(made)) == 100


def test_a_record_has_no_secret_and_comes_back_without_its_slot() -> None:
    record = key("web", "s3cret", rate=5, models=("flux*",), slot=7)
    stored = encode_key(record)
    assert b"s3cret" not in stored
    assert decode_key(stored, "web") == replace(record, slot=0)


@over_rows("stored", [b"", b"[]", b'{"name":"b"}', b'{"name":"a","secrets":[{"sha256":"zz"}]}', b'{"secrets":[]}'])
def test_a_record_that_can_not_be_read_raises_value_error(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_key(stored, "a")


@over_rows(
    ("patterns", "model", "allowed"),
    [
        ((), "anything", True),
        (("flux*",), "flux-1", True),
        (("flux*",), "FLUX-1", True),
        (("*/FLUX.1-schnell*",), "black-forest-labs/FLUX.1-schnell-Free", True),
        (("flux*", "gpt-image-1"), "gpt-image-1", True),
        (("gpt-image-1",), "gpt-image-1.5", False),
        (("gpt-image-?",), "gpt-image-12", False),
    ],
)
def test_models_are_matched_by_patterns(patterns: tuple[str, ...], model: str, allowed: bool) -> None:
    assert key("a", models=patterns).allows_model(model) is allowed


def test_the_size_of_an_image_is_limited_in_megapixels() -> None:
    one = key("a", max_megapixels=1.0)
    assert one.allows_size(1024, 1024)
    assert not one.allows_size(1024, 1032)
    assert key("a").allows_size(8192, 8192)


def test_a_rotated_key_has_two_secrets_until_the_grace_is_over() -> None:
    clock = Clock(100.0)
    ring = KeyRing(clock=clock)
    ring.replace_stored([key("a", "old").with_secret(sha256("new"), 100.0, 60.0)], {})
    assert [name_of(ring, secret) for secret in ("old", "new", "other")] == ["a", "a", None]
    clock.now = 160.0
    assert [name_of(ring, secret) for secret in ("old", "new")] == [None, "a"]


def test_a_grace_never_extends_the_life_of_an_older_secret() -> None:
    rotated = key("a", "1").with_secret(sha256("2"), 0.0, 10.0).with_secret(sha256("3"), 5.0, 100.0)
    assert [secret.ends_at for secret in rotated.secrets] == [None, 105.0, 10.0]
    assert [secret.ends_at for secret in rotated.with_secret(sha256("4"), 20.0, 0.0).secrets] == [None]


def test_a_key_has_a_bounded_number_of_secrets() -> None:
    record = key("a", "0")
    for number in range(1, 20):
        record = record.with_secret(sha256(str(number)), 0.0, 60.0)
    assert [secret.sha256 for secret in record.secrets[:2]] == [sha256("19"), sha256("18")]
    assert len(record.secrets) == MAX_SECRETS


def test_an_expired_key_is_refused_and_still_keeps_the_service_closed() -> None:
    clock = Clock(0.0)
    ring = KeyRing(clock=clock)
    ring.replace_stored([key("a", "secret", expires_at=10.0)], {})
    assert name_of(ring, "secret") == "a"
    assert ring.by_name("a")
    clock.now = 10.0
    assert name_of(ring, "secret") is None
    assert ring.by_name("a") is None
    assert ring.has_keys


def test_fixed_and_stored_keys_have_the_slots_of_their_names() -> None:
    ring = KeyRing(fixed_keys({"web": sha256("w"), "app": sha256("a")}))
    assert (ring.is_loaded, name_of(ring, "w")) == (False, "web")
    ring.replace_stored([key("cli", "c")], {"web": 1, "app": 2, "cli": 3})
    assert ring.is_loaded
    found = [ring.find(secret_digest(secret)) for secret in "wac"]
    assert [(match.name, match.slot) for match in found if match] == [("web", 1), ("app", 2), ("cli", 3)]


def test_those_who_wait_are_called_only_when_the_keys_changed() -> None:
    ring, calls = KeyRing(), []
    ring.on_change.append(lambda: calls.append(1))
    for _ in range(2):
        ring.replace_stored([key("a", "s")], {"a": 1})
    assert calls == [1]
    ring.replace_stored([], {"a": 1})
    assert calls == [1, 1]
    assert not ring.has_keys


def test_a_secret_that_is_no_utf_8_is_unknown() -> None:
    ring = KeyRing(fixed_keys({"web": sha256("w")}))
    assert name_of(ring, "\udcff") is None


@over_rows(("dollars", "micro_usd"), [(0.0000019, 1), (0.000708, 708), (123456789.123457, 123456789123457)])
def test_the_budget_of_a_key_is_never_rounded_up(dollars: float, micro_usd: int) -> None:
    fields = parse_fields(NewKeyFields, {"name": "a", "dailyUsd": dollars})
    assert fields.to_key(0.0).daily_micro_usd == micro_usd


def test_a_whole_number_of_a_limit_may_be_written_with_a_fraction_of_zero() -> None:
    assert parse_fields(NewKeyFields, {"name": "a", "rate": 60.0, "openTasks": 3}).to_key(0.0).rate == 60
    for rate in (60.5, "60", True, 0.0):
        with pytest.raises(InvalidRequest):
            parse_fields(NewKeyFields, {"name": "a", "rate": rate})


@over_rows(
    ("fields", "field"),
    [
        ({"name": "."}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a", "models": []}, "models"),
        ({"name": "a", "models": [""]}, "models"),
    ],
)
def test_a_name_that_paths_change_and_an_empty_limit_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_fields(NewKeyFields, fields)
    assert {re.split(r"[.[]", error.field)[0] for error in refused.value.details} == {field}
