"""Webhooks as values: validation, the result of a delivery, and merging."""

from __future__ import annotations

import base64
from dataclasses import replace

import orjson
import pytest

from imagegen.errors import InvalidRequest
from imagegen.ssrf import check_host
from imagegen.tasks.webhook import (
    JITTER,
    MAX_ALL_WEBHOOKS,
    MAX_WEBHOOKS,
    RETRY_DELAYS_S,
    Delivery,
    DeliveryStatus,
    Webhook,
    after_attempt,
    event_body,
    initial_deliveries,
    merge_deliveries,
    message_id,
    parse_url,
    with_added_webhooks,
)
from tests.support import over_rows

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
HOOK = Webhook("https://hooks.example.com/a", "http://here")

HOSTILE = [
    "", "x", "ftp://a.org/", "http://a.org/", "//a.org/", "javascript:alert(1)", "file:///etc/passwd", "https:a.org",
    "https:///x", "https://", "https://user@a.org/", "https://user:word@a.org/", "https://@a.org/",
    "https://a.org#part", "https://a.org\\@127.0.0.1/", "https://a.org /", " https://a.org/", "https://a.org/\n",
    "https://a.org/\0", "https://a\u200b.org/", "https://a.org:0/", "https://a.org:99999/", "https://a.org:x/",
    "https://[::1", "https://[v1.x]/", "https://127.0.0.1/", "https://127.1/", "https://2130706433/",
    "https://0x7f000001/", "https://0177.0.0.1/", "https://127.0.0.1./", "https://%31%32%37.0.0.1/",
    "https://１２７.0.0.1/", "https://①②⑦.0.0.1/", "https://localhost/", "https://LOCALHOST./", "https://a.localhost/",
    "https://10.0.0.1/", "https://169.254.169.254/latest", "https://192.168.0.1/", "https://[::1]/",
    "https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://[fe80::1%25lo]/",
    "https://a..b/", "https://*.org/", "https://" + "a." * 127 + "org/", "https://a.org/" + "x" * 2_000,
]  # fmt: skip


NO_NAMES = ["http://a..b/", "http://.a/", "http://a../", f"http://{'a' * 64}.b/", f"http://{'a.' * 127}b/"]


def parse(sent: object) -> Webhook:
    return Webhook.parse(sent, "http://here", check_host)


def faults(sent: object) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        parse(sent)
    return {fault.field: fault.message for fault in refused.value.details}


@over_rows("url", HOSTILE)
def test_a_malformed_address_is_refused_by_name(url: str) -> None:
    assert list(faults({"url": url})) == ["webhook.url"]


@over_rows(
    "url",
    [
        "https://hooks.example.com",
        "https://hooks.example.com:8443/a?b=c%2Fd&e",
        "HTTPS://Example.COM/x",
        "https://1.1.1.1/",
        "https://[2606:4700:4700::1111]/x",
        "https://bücher.example/ä",
    ],
)
def test_a_public_https_address_passes_as_it_was_written(url: str) -> None:
    assert parse({"url": url}).url == url


def test_private_and_plain_addresses_pass_if_allowed() -> None:
    for url in (
        "http://127.0.0.1:8080/x",
        "https://localhost/",
        "http://[::1]:1/",
        "http://my_app.",
        "http://b\xfc.de",
    ):
        assert Webhook.parse({"url": url}, "", None).url == url
    for url in ("ftp://127.0.0.1/", "http://u:p@127.0.0.1/", "http:///x", *NO_NAMES):
        with pytest.raises(ValueError, match=r"must|host"):
            parse_url(url, None)


@over_rows(
    ("sent", "field"),
    [
        ("https://a.org", "webhook"),
        ([], "webhook"),
        ({}, "webhook.url"),
        ({"url": None}, "webhook.url"),
        ({"url": 5}, "webhook.url"),
        ({"url": HOOK.url, "event": ["image.failed"]}, "webhook.event"),
        ({"url": HOOK.url, "events": "image.failed"}, "webhook.events"),
        ({"url": HOOK.url, "events": []}, "webhook.events"),
        ({"url": HOOK.url, "events": ["image.failed", "image.started"]}, "webhook.events[1]"),
        ({"url": HOOK.url, "secret": "word"}, "webhook.secret"),
        ({"url": HOOK.url, "secret": "whsec_" + base64.b64encode(b"short").decode()}, "webhook.secret"),
        ({"url": HOOK.url, "secret": "whsec_!"}, "webhook.secret"),
    ],
)
def test_a_fault_names_its_field_and_never_the_secret(sent: object, field: str) -> None:
    found = faults(sent)
    assert list(found) == [field]
    assert "word" not in found[field]


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    assert faults({"url": HOOK.url, "secrets": SECRET})["webhook.secrets"].endswith("did you mean secret?")


def test_events_are_taken_with_and_without_their_prefix() -> None:
    webhook = parse({"url": HOOK.url, "events": ["failed", "image.cancelled", "image.failed"], "secret": SECRET})
    assert webhook.events == ("image.failed", "image.cancelled")
    assert [webhook.subscribes_to(state) for state in ("completed", "failed", "cancelled")] == [False, True, True]
    assert HOOK.subscribes_to("completed")


def test_a_secret_is_never_shown() -> None:
    assert SECRET not in repr(replace(HOOK, secret=SECRET))


@over_rows("status", [200, 201, 204, 299])
def test_any_2xx_is_delivered(status: int) -> None:
    delivery = after_attempt(Delivery(HOOK, 0), status, None, now=0, random=lambda: 0)
    assert (delivery.status, delivery.attempts, delivery.last_status) == (DeliveryStatus.DELIVERED, 1, status)


@over_rows("status", [None, 100, 301, 302, 400, 404, 429, 500, 503])
def test_any_other_status_is_retried_five_times(status: int | None) -> None:
    delivery, due = Delivery(HOOK, 0), []
    for _ in RETRY_DELAYS_S:
        delivery = after_attempt(delivery, status, None, now=1_000, random=lambda: 0)
        assert delivery.pending
        due.append(delivery.due_at)
    assert due == [1_005, 1_030, 1_120, 1_600, 4_600]
    delivery = after_attempt(delivery, status, None, now=1_000, random=lambda: 0)
    assert (delivery.status, delivery.attempts, delivery.due_at) == (DeliveryStatus.FAILED, 6, None)


def test_410_is_final() -> None:
    assert after_attempt(Delivery(HOOK, 0), 410, None, now=0, random=lambda: 0).status is DeliveryStatus.FAILED


def test_a_delay_is_spread_and_never_shorter_than_its_plan() -> None:
    assert after_attempt(Delivery(HOOK, 0), 500, None, now=0, random=lambda: 1).due_at == pytest.approx(
        5 * (1 + JITTER)
    )


@over_rows(
    ("status", "asked_s", "due_at"), [(429, 60, 60), (503, 7, 7), (503, 1, 5), (429, 90_000, 3_600), (500, 60, 5)]
)
def test_a_requested_delay_is_honoured_up_to_an_hour(status: int, asked_s: float, due_at: float) -> None:
    assert after_attempt(Delivery(HOOK, 0), status, asked_s, now=0, random=lambda: 0).due_at == due_at


def test_a_stored_delivery_survives_a_round_trip() -> None:
    for delivery in (
        Delivery(HOOK, 0),
        Delivery(
            Webhook("https://a.org", "", ("image.failed",), SECRET),
            3,
            DeliveryStatus.FAILED,
            6,
            500,
            added_after_finish=True,
        ),
        Delivery(HOOK, 1, attempts=2, due_at=17.5),
    ):
        assert Delivery.restore(orjson.loads(orjson.dumps(delivery.stored()))) == delivery


def test_joined_webhooks_get_distinct_numbers_up_to_the_limit() -> None:
    known = initial_deliveries([HOOK])
    for _ in range(MAX_WEBHOOKS - 1):
        known = with_added_webhooks(known, [HOOK], None)
    assert [delivery.number for delivery in known] == list(range(MAX_WEBHOOKS))
    with pytest.raises(InvalidRequest) as refused:
        with_added_webhooks(known, [HOOK], None)
    assert refused.value.details[0].field == "webhook"


def test_a_client_can_not_fill_the_places_of_another() -> None:
    theirs, own = replace(HOOK, owner="theirs"), replace(HOOK, owner="own")
    known = initial_deliveries([theirs] * MAX_WEBHOOKS)
    with pytest.raises(InvalidRequest):
        with_added_webhooks(known, [theirs], None)
    joined = with_added_webhooks(known, [own], None)
    assert [delivery.webhook.owner for delivery in joined] == ["theirs"] * MAX_WEBHOOKS + ["own"]
    assert joined[-1].number == MAX_WEBHOOKS


def test_the_webhooks_of_all_clients_of_a_task_are_bounded() -> None:
    known = initial_deliveries([replace(HOOK, owner=str(number)) for number in range(MAX_ALL_WEBHOOKS)])
    with pytest.raises(InvalidRequest):
        with_added_webhooks(known, [replace(HOOK, owner="one more")], None)
    delivered = (*known[1:], replace(known[0], status=DeliveryStatus.DELIVERED))
    late = with_added_webhooks(delivered, [replace(HOOK, owner="one more")], "completed")
    assert len(late) == MAX_ALL_WEBHOOKS
    assert late[-1].webhook.owner == "one more"


def test_delivered_webhooks_of_a_finished_task_free_their_places() -> None:
    known = initial_deliveries([HOOK] * MAX_WEBHOOKS)
    delivered = (replace(known[0], status=DeliveryStatus.DELIVERED), *known[1:])
    late = with_added_webhooks(delivered, [HOOK], "completed")
    assert [delivery.number for delivery in late] == [*range(1, MAX_WEBHOOKS), MAX_WEBHOOKS]
    assert late[-1].added_after_finish
    only_failures = tuple(Delivery(replace(HOOK, events=("image.failed",)), n) for n in range(MAX_WEBHOOKS))
    assert len(with_added_webhooks(only_failures, [HOOK], "completed")) == MAX_WEBHOOKS


def test_a_merge_selects_the_most_advanced_delivery_of_each_number() -> None:
    first, second = initial_deliveries([HOOK, HOOK])
    done = replace(first, status=DeliveryStatus.DELIVERED, attempts=1)
    failing = replace(second, attempts=2)
    assert merge_deliveries([first, failing], [done, second]) == (done, failing)
    assert merge_deliveries([done], [second, first]) == (done, second)


def test_the_body_and_the_id_are_the_same_each_time() -> None:
    body = event_body("completed", 1_700_000_000.25, {"success": True})
    assert orjson.loads(body) == {
        "type": "image.completed", "timestamp": "2023-11-14T22:13:20.250Z", "data": {"success": True},
    }  # fmt: skip
    assert message_id("ab", 17, 2) == "msg_ab_17_2"
