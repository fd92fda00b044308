"""Tests of the Python client against scripted responses: repeats, errors, the event stream, webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from imagegen.client import (
    AuthenticationFailed,
    BudgetUsedUp,
    ClientError,
    ConnectionFailed,
    DownloadBroken,
    ImageClient,
    RepeatPolicy,
    RequestConflict,
    RequestRefused,
    ResourceNotFound,
    ResponseError,
    ServiceUnavailable,
    TaskImage,
    TaskUnsuccessful,
    TooManyRequests,
    WaitTimeout,
    WebhookRejected,
    WebhookVerifier,
)
from imagegen.client.event_feed import EventFeed, EventParser
from imagegen.client.exceptions import parse_retry_after_s, response_error
from tests.support import over_rows

ID = "0" * 32
BASE = "http://service.test/behind"
QUICK = RepeatPolicy(max_attempts=3, base_s=0.0)
SUBMITTED = {"success": True, "taskId": ID, "cached": False, "status": "pending", "sequence": 1}
NOW = datetime(2026, 11, 29, tzinfo=UTC)

Reply = httpx.Response | Exception


def refusal(status: int, code: str, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"success": False, "statusCode": status, "code": code, "message": "no", "retryable": status >= 429}
    return httpx.Response(status, json=body | fields, headers=headers)


def task(status: str, **fields: Any) -> dict[str, Any]:
    return {"success": True, "taskId": ID, "status": status, "sequence": 2, "progress": 0, **fields}


class Script:
    """Replies of a service, in order, and the requests that it received."""

    def __init__(self, *replies: Reply) -> None:
        self.requests: list[httpx.Request] = []
        self._replies = list(replies)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def client(self, **options: Any) -> ImageClient:
        http = httpx.Client(transport=httpx.MockTransport(self))
        return ImageClient(BASE, http=http, repeats=QUICK, **options)


LOST = httpx.ReadError("lost")
REFUSED = httpx.ConnectError("refused")


@over_rows("loss", [LOST, REFUSED, refusal(503, "draining"), httpx.Response(502, text="<html>")])
def test_a_repeated_submit_has_the_same_idempotency_key_and_body(loss: Reply) -> None:
    script = Script(loss, loss, httpx.Response(202, json=SUBMITTED))
    with script.client() as client:
        assert client.submit("a fox", n=2, aspect_ratio="1:1").task_id == ID
    assert len(script.requests) == 3
    assert len({request.headers["Idempotency-Key"] for request in script.requests}) == 1
    assert {request.content for request in script.requests} == {b'{"prompt":"a fox","n":2,"aspect_ratio":"1:1"}'}
    assert str(script.requests[0].url) == f"{BASE}/api/images/generate"


def test_two_submits_have_different_keys() -> None:
    script = Script(*[httpx.Response(202, json=SUBMITTED)] * 3)
    with script.client() as client:
        client.submit("a")
        client.submit("a")
        client.submit("a", idempotency_key="mine", fresh=True)
    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"
    assert [request.headers.get("Cache-Control") for request in script.requests] == [None, None, "no-cache"]


def test_a_retry_that_may_have_arrived_is_not_repeated() -> None:
    for reply in (LOST, httpx.Response(502), refusal(503, "queue_unavailable")):
        script = Script(reply)
        with script.client() as client, pytest.raises(ClientError):
            client.retry(ID)
        assert len(script.requests) == 1
    for loss in (REFUSED, refusal(503, "draining"), refusal(429, "rate_limited")):
        script = Script(loss, httpx.Response(202, json=SUBMITTED))
        with script.client() as client:
            client.retry(ID)


def test_a_lost_connection_raises_whether_the_request_may_have_arrived() -> None:
    for loss, maybe_sent in ((LOST, True), (REFUSED, False)):
        with Script(*[loss] * 3).client() as client, pytest.raises(ConnectionFailed) as caught:
            client.submit("a")
        assert caught.value.maybe_sent == maybe_sent


@over_rows(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", RequestRefused),
        (401, "unauthorized", AuthenticationFailed),
        (402, "budget_exceeded", BudgetUsedUp),
        (403, "not_allowed", RequestRefused),
        (404, "route_not_found", ResourceNotFound),
        (409, "already_finished", RequestConflict),
        (410, "image_expired", ResourceNotFound),
        (422, "idempotency_mismatch", RequestRefused),
        (500, "internal_error", ServiceUnavailable),
    ],
)
def test_a_refusal_raises_its_code_and_details_and_is_not_repeated(
    status: int, code: str, kind: type[ResponseError]
) -> None:
    details = [{"field": "n", "message": "must be 1 to 16"}]
    more = {"details": details, "requestId": "r", "retryable": False, "resetsAt": "2026-11-30T00:00:00Z"}
    script = Script(refusal(status, code, headers={"X-Request-Id": "r"}, **more))
    with script.client() as client, pytest.raises(kind) as caught:
        client.submit("a")
    error = caught.value
    assert (error.status, error.code, error.request_id, error.retryable) == (status, code, "r", False)
    assert (error.details[0].field, error.details[0].message) == ("n", "must be 1 to 16")
    assert str(error) == "no (n: must be 1 to 16)"
    assert error.resets_at == datetime(2026, 11, 30, tzinfo=UTC)


def test_a_limit_with_a_long_pause_is_raised_with_its_seconds() -> None:
    script = Script(*(refusal(429, "rate_limited", headers={"Retry-After": seconds}) for seconds in ("0", "900")))
    with script.client() as client, pytest.raises(TooManyRequests) as caught:
        client.submit("a")
    assert caught.value.retry_after_s == 900
    assert len(script.requests) == 2


def test_an_unknown_task_and_the_page_of_a_proxy_are_exceptions() -> None:
    not_found = {"success": False, "status": "not_found", "message": "gone"}
    with Script(httpx.Response(404, json=not_found)).client() as client, pytest.raises(ResourceNotFound) as caught:
        client.get(ID)
    assert (caught.value.code, str(caught.value)) == ("not_found", "gone")
    with Script(httpx.Response(200, text="<html>")).client() as client, pytest.raises(ResponseError, match="proxies"):
        client.get(ID)
    broken = response_error(400, {}, b'{"code":5,"details":[{"x":1}],"message":[],"resetsAt":"never"}', NOW)
    assert (broken.code, broken.message, broken.details, broken.resets_at) == ("", "HTTP 400", (), None)


def test_retry_after_may_be_seconds_or_a_date() -> None:
    assert parse_retry_after_s("7", NOW) == 7
    assert parse_retry_after_s("Sun, 29 Nov 2026 00:01:00 GMT", NOW) == 60
    assert parse_retry_after_s("Sat, 28 Nov 2026 00:01:00 GMT", NOW) == 0
    assert parse_retry_after_s("soon", NOW) is None
    assert parse_retry_after_s(None, NOW) is None


def test_a_cancel_that_lost_its_answer_returns_the_cancelled_task() -> None:
    conflict = refusal(409, "already_finished", retryable=False)
    cancelled = httpx.Response(200, json=task("cancelled"))
    with Script(LOST, conflict, cancelled).client() as client:
        assert client.cancel(ID).status == "cancelled"
    completed = httpx.Response(200, json=task("completed"))
    with Script(LOST, conflict, completed).client() as client, pytest.raises(RequestConflict):
        client.cancel(ID)
    with Script(conflict).client() as client, pytest.raises(RequestConflict):
        client.cancel(ID)
    with Script(httpx.Response(200, json=task("processing", left=True))).client() as client:
        assert client.cancel(ID).left


def test_a_wait_outlives_lost_connections_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    running = httpx.Response(200, json=task("processing"))
    script = Script(LOST, REFUSED, running, refusal(503, "draining"), httpx.Response(200, json=task("completed")))
    with script.client() as client:
        assert client.wait(ID).is_final
    assert script.requests[0].url.params["wait"] == "60"
    with Script(*[running] * 5).client() as client, pytest.raises(WaitTimeout) as caught:
        client.wait(ID, timeout_s=2.5)
    assert caught.value.task.status == "processing"


def test_generate_raises_for_a_failed_task() -> None:
    error = {"code": "content_policy", "retryable": False}
    failed = httpx.Response(200, json=task("failed", error=error, message="it was refused"))
    with (
        Script(httpx.Response(202, json=SUBMITTED), failed).client() as client,
        pytest.raises(TaskUnsuccessful) as caught,
    ):
        client.generate("a")
    assert (caught.value.code, str(caught.value)) == ("content_policy", "it was refused")


def image(data: bytes, url: str = f"{BASE}/api/images/{ID}/0?v=1") -> TaskImage:
    return TaskImage(url, 0, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def test_a_download_is_compared_with_its_hash_and_repeated(tmp_path: Path) -> None:
    script = Script(httpx.Response(200, content=b"whol"), httpx.Response(200, content=b"whole"))
    with script.client() as client:
        path = client.save(image(b"whole"), tmp_path / "image.png")
    assert path.read_bytes() == b"whole"
    assert [each.name for each in tmp_path.iterdir()] == ["image.png"]
    with Script(*[httpx.Response(200, content=b"x")] * 3).client() as client, pytest.raises(DownloadBroken):
        client.save(image(b"whole"), tmp_path / "other.png")
    assert [each.name for each in tmp_path.iterdir()] == ["image.png"]


def test_the_key_goes_to_the_service_alone() -> None:
    away = httpx.Response(302, headers={"Location": "https://elsewhere.test/a.png"})
    replies = (httpx.Response(200, content=b"x"), away, httpx.Response(200, content=b"x"), httpx.Response(200, json={}))
    script = Script(*replies)
    with script.client(api_key="secret") as client:
        client.download("https://elsewhere.test/a.png")
        client.download(f"{BASE}/api/images/{ID}/0")
        with pytest.raises(ResponseError):
            client.get(ID)
    keys = [request.headers.get("Authorization") for request in script.requests]
    assert keys == [None, "Bearer secret", None, "Bearer secret"]


@over_rows("key", ["k\u00e4se", "two words", "a\nb"])
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be visible ASCII") as refused:
        ImageClient("http://127.0.0.1:1", api_key=key)
    assert key not in str(refused.value)


def test_a_line_break_behind_a_key_does_not_count() -> None:
    with ImageClient("http://127.0.0.1:1", api_key=" ig_key\n"):
        pass


@over_rows(
    "base", ["", "service.test", "ftp://service.test", "http://", "http://h?x=1", "http://h:port", "http://[::1"]
)
def test_a_wrong_base_address_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        ImageClient(base)


def test_an_event_stream_is_parsed_however_it_is_cut() -> None:
    data = json.dumps({"message": "a\u2028b\x85c"}, ensure_ascii=False)
    stream = f": ping\r\n\r\nid: 5\r\nevent: progress\r\ndata: {data}\r\n\r\nretry: 1500\ndata: x\rdata: y\r\r".encode()
    for size in range(1, len(stream) + 1):
        parser = EventParser()
        events = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
        events += parser.feed(b": end\n")
        assert [(event.name, event.id, event.data) for event in events] == [
            ("progress", "5", data),
            ("message", "5", "x\ny"),
        ]
        assert parser.retry_s == 1.5


def wire_events(*events: tuple[str, int, dict[str, Any]]) -> bytes:
    return b"".join(
        f"id: {number}\r\nevent: {name}\r\ndata: {json.dumps(data)}\r\n\r\n".encode() for name, number, data in events
    )


class Cut(httpx.SyncByteStream):
    """Stream that is lost after its bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        raise httpx.ReadError("cut")


def stream(data: bytes | httpx.SyncByteStream) -> httpx.Response:
    headers = {"Content-Type": "text/event-stream"}
    if isinstance(data, bytes):
        return httpx.Response(200, content=data, headers=headers)
    return httpx.Response(200, stream=data, headers=headers)


FIRST, SECOND = ({"url": "u", "index": index, "sha256": str(index), "seed": None} for index in (0, 1))


def test_lost_event_streams_are_resumed_and_each_image_has_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    began = wire_events(
        ("snapshot", 1, task("pending")), ("image", 1, FIRST), ("progress", 3, task("processing", data=[FIRST]))
    )
    both = task("processing", data=[FIRST, SECOND])
    script = Script(
        stream(Cut(began + b"id: 4\r\nevent: prog")),
        refusal(503, "draining", headers={"Retry-After": "2"}),
        stream(wire_events(("snapshot", 5, both)) + b"retry: 1200\r\n\r\n"),
        stream(wire_events(("completed", 6, task("completed", data=[FIRST, SECOND])))),
    )
    with script.client() as client:
        events = list(client.events(ID))
    assert [event.name for event in events] == ["snapshot", "image", "progress", "image", "snapshot", "completed"]
    assert [event.image.index for event in events if event.image] == [0, 1]
    assert [request.headers.get("Last-Event-ID") for request in script.requests] == [None, "3", "3", "5"]
    assert pauses[1:] == [2, 1.2]


def test_a_stream_that_the_caller_has_read_to_its_end_is_empty() -> None:
    script = Script(httpx.Response(204))
    with script.client() as client:
        assert list(client.events(ID, last_event_id="9")) == []
    assert script.requests[0].headers["Last-Event-ID"] == "9"


def test_a_stream_without_hope_ends_as_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with Script(refusal(401, "unauthorized")).client() as client, pytest.raises(AuthenticationFailed):
        list(client.events(ID))
    with Script(httpx.Response(200, text="<html>")).client() as client, pytest.raises(ResponseError, match="no event"):
        list(client.events(ID))
    feed = EventFeed(ID, policy=QUICK)
    feed.on_lost("x")
    feed.on_lost("x")
    with pytest.raises(ConnectionFailed):
        feed.on_lost("x")
    with pytest.raises(ConnectionFailed, match="too large"):
        list(EventFeed(ID).feed(b"data: " + b"x" * (8 * 2**20 + 1)))


SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
BODY = json.dumps(
    {"type": "image.completed", "timestamp": "2026-11-29T00:00:00Z", "data": task("completed", data=[FIRST])}
).encode()


def signed(body: bytes = BODY, at: int = 1000, key: bytes = b"k" * 24) -> dict[str, str]:
    signature = base64.b64encode(hmac.new(key, f"m1.{at}.".encode() + body, hashlib.sha256).digest()).decode()
    return {"Webhook-Id": "m1", "Webhook-Timestamp": str(at), "Webhook-Signature": f"v1a,xx v1,{signature}"}


def test_a_webhook_is_verified_with_its_task() -> None:
    verifier = WebhookVerifier(["whsec_" + base64.b64encode(b"old").decode(), SECRET], clock=lambda: 1200.0)
    event = verifier.verify(BODY, signed())
    assert (event.id, event.type, event.task.task_id) == ("m1", "image.completed", ID)
    assert event.task.images[0].index == 0


def test_a_signature_of_the_library_that_the_service_signs_with_is_valid() -> None:
    sent_at = datetime.fromtimestamp(1000, UTC)
    signature = Webhook(SECRET).sign("m1", sent_at, BODY.decode())
    headers = {"webhook-id": "m1", "webhook-timestamp": "1000", "webhook-signature": signature}
    assert WebhookVerifier(SECRET, clock=lambda: 1000.0).verify(BODY, headers).id == "m1"


@over_rows(
    "change",
    [
        lambda headers: headers | signed(at=899),
        lambda headers: headers | signed(at=1501),
        lambda headers: headers | signed(key=b"other"),
        lambda headers: headers | {"Webhook-Id": "m2"},
        lambda headers: headers | {"Webhook-Timestamp": "now"},
        lambda headers: headers | {"Webhook-Signature": "v1,é v1, v2,AAAA garbage"},
        lambda headers: {name: value for name, value in headers.items() if name != "Webhook-Signature"},
    ],
)
def test_a_webhook_with_a_wrong_signature_or_time_is_refused(
    change: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    verifier = WebhookVerifier(SECRET, clock=lambda: 1200.0)
    with pytest.raises(WebhookRejected):
        verifier.verify(BODY, change(signed()))
    with pytest.raises(WebhookRejected):
        verifier.verify(BODY + b" ", signed())
    with pytest.raises(WebhookRejected):
        verifier.verify(b"[]", signed(b"[]"))


@over_rows("secret", ["", [], "whsec_", "whsec_***"])
def test_a_secret_that_can_verify_nothing_is_refused(secret: str | list[str]) -> None:
    with pytest.raises(ValueError, match="secret"):
        WebhookVerifier(secret)
