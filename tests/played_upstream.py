"""Upstream that plays rows of answers over HTTP, and what must follow from each for a task, its money and its key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from imagegen.errors import UpstreamError
from imagegen.providers import dashscope, job_api, job_polling, replicate
from imagegen.providers.protocol import Call, Provider, Reply
from imagegen.tasks.retry import is_useless_response
from imagegen.worker.failover import without_tried
from imagegen.worker.key_health import KEY_REFUSALS, LIMITED
from imagegen.worker.permits import ANY
from tests.emulated_jobs import made, quick_polls
from tests.support import check_rows

Answer = tuple[int, object] | tuple[int, object, Mapping[str, str]]
"""Status, body (a text is sent as it is, `{BASE}` is the upstream's address), headers."""

IMAGE = "{BASE}/files/1.png"
GATEWAY_PAGE = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
FOREIGN = "https://foreign.example/jobs/1"

OUT: dict[str, Any] = {"elsewhere": True, "key": "out"}
COOLS: dict[str, Any] = {"retry": True, "elsewhere": True, "key": "cooling"}
AGAIN: dict[str, Any] = {"retry": True, "elsewhere": True}
NO_MODEL: dict[str, Any] = {"elsewhere": True}
"""What follows from a key that is refused, a limit, a fault that passes, and a model that is not there."""


@dataclass(frozen=True)
class Row:
    """Answers by stage (`submit`, `poll`, `result`); the last one of a stage repeats.

    code: of the error, or the number of images. paid: `no`, `yes`, or `unsure`. elsewhere: whether another channel or
    key may make the call at once. key: what becomes of the key. wait_s: before the next call, by the upstream.
    """

    name: str
    answers: Mapping[str, Answer | list[Answer]]
    code: str | int
    retry: bool = False
    paid: str = "no"
    elsewhere: bool = False
    key: str = "healthy"
    detail: str = ""
    wait_s: float | None = None
    model: str = ""
    count: int = 1


@dataclass
class PlayedUpstream:
    """The upstream. stage_of: returns the stage of a request, by its method and path."""

    stage_of: Callable[[str, str], str]
    usual: Mapping[str, Answer | list[Answer]]
    answers: Mapping[str, Answer | list[Answer]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        stage = self.stage_of(request.method, request.path)
        self.calls[stage] += 1
        given: Any = self.answers.get(stage) or self.usual[stage]
        entries = given if isinstance(given, list) else [given]
        status, body, *more = entries[min(self.calls[stage], len(entries)) - 1]
        if status == 0:
            if request.transport:
                request.transport.abort()
            return web.Response()
        is_text = isinstance(body, str | bytes)
        data = body if isinstance(body, bytes) else (body if is_text else json.dumps(body)).encode()
        headers = {"Content-Type": "text/html" if is_text else "application/json"} | (more[0] if more else {})
        return web.Response(status=status, body=data.replace(b"{BASE}", self.url.encode()), headers=headers)


@asynccontextmanager
async def played(upstream: PlayedUpstream) -> AsyncIterator[PlayedUpstream]:
    """Serve the upstream on a free loopback port."""
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{tail:.*}", upstream.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    upstream.url = f"http://{host}:{port}"
    try:
        yield upstream
    finally:
        await runner.cleanup()


def quick_polls_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let polls follow each other as `quick_polls` does, but faster, and give a job up that is not found in 0.1 s."""
    quick_polls(monkeypatch)
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "MAX_FAULT_DELAY_S"):
        monkeypatch.setattr(job_polling, name, 0.001)
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.1)
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 0.0)
    monkeypatch.setattr(job_api, "MIN_POLL_GAP_S", 0.0)
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 0.0)
    monkeypatch.setattr(replicate, "LISTED_WITHIN_S", 0.0)
    monkeypatch.setattr(dashscope, "LISTED_AFTER_S", 0.0)


def with_odd_answers(*rows: Row, job: bool = False) -> list[Row]:
    """Return the rows of a provider and those of any service. job: whether a call expects the id of a job."""
    every = [*rows, *odd_answers(job=job)]
    assert len({row.name for row in every}) == len(every)
    return every


async def play(
    rows: Sequence[Row], create: Callable[[str], Provider], upstream: PlayedUpstream, make_call: Any, model: str
) -> None:
    """Play each row to a new provider, which `create` makes for the address of the upstream."""

    async def play_row(row: Row) -> None:
        upstream.calls.clear()
        call = make_call(model=row.model or model, n=row.count, count=row.count)
        await check(row, create(upstream.url), upstream, call)

    async with played(upstream):
        await check_rows(rows, play_row)


async def check(row: Row, provider: Provider, upstream: PlayedUpstream, call: Call) -> None:
    """Play a row and compare all that follows from it."""
    upstream.answers = row.answers
    observer, result = await made(provider, call)
    assert upstream.calls["submit"] == 1
    if isinstance(row.code, int):
        assert isinstance(result, Reply), result
        assert len(result.images) == row.code
        assert row.detail in " ".join(result.warnings)
        return
    assert isinstance(result, UpstreamError), result
    seen = (result.code, result.retryable, paid(result), elsewhere(result, has_job=bool(observer.handles)), key(result))
    assert seen == (row.code, row.retry, row.paid, row.elsewhere, row.key), result
    assert row.detail in result.detail
    assert row.wait_s is None or result.retry_after_s == row.wait_s


def paid(error: UpstreamError) -> str:
    """Return whether a call that ended so is charged."""
    if error.ambiguous:
        return "unsure"
    return "yes" if error.charged or is_useless_response(error) else "no"


def elsewhere(error: UpstreamError, *, has_job: bool) -> bool:
    """Return whether another channel or key makes the call at once."""
    channel = SimpleNamespace(name="channel")
    turn: Any = SimpleNamespace(route=SimpleNamespace(account="key", place="channel/key", channel=channel))
    return without_tried(ANY, turn, error, has_job=has_job) is not None


def key(error: UpstreamError) -> str:
    """Return what becomes of the key."""
    return "cooling" if error.code == LIMITED else "out" if error.code in KEY_REFUSALS else "healthy"


def odd_answers(*, job: bool) -> list[Row]:
    """Return rows of answers that any service, or a gateway before it, may send to a call. job: it expects an id."""
    submit: list[tuple[str, Answer, dict[str, Any]]] = [
        ("page with a 200", (200, GATEWAY_PAGE), {"code": "upstream_bad_response", "paid": "yes"}),
        ("empty 200", (200, ""), {"code": "upstream_bad_response", "paid": "yes"}),
        ("array", (200, [1, 2]), {"code": "upstream_bad_response", "paid": "yes"}),
        ("text", (200, "ok"), {"code": "upstream_bad_response", "paid": "yes"}),
        ("object without a use", (200, {"ok": True}), {"code": "upstream_bad_response", "paid": "yes"}),
        ("redirect", (302, "", {"Location": "{BASE}/login"}), {"code": "upstream_bad_response", "elsewhere": True}),
        (
            "redirect of the body",
            (307, "", {"Location": FOREIGN}),
            {"code": "upstream_bad_response", "elsewhere": True},
        ),
        ("method", (405, {"detail": "Method Not Allowed"}), {"code": "upstream_invalid_request", "elsewhere": True}),
        ("conflict", (409, {"detail": "Conflict"}), {"code": "upstream_error", "retry": True, "elsewhere": True}),
        ("model gone", (410, {"detail": "This model is gone"}), {"code": "model_not_available", "elsewhere": True}),
        ("too large", (413, {"detail": "Too large"}), {"code": "upstream_invalid_request"}),
        ("too large for a gateway", (413, GATEWAY_PAGE), {"code": "upstream_invalid_request", "elsewhere": True}),
        ("page of a gateway", (400, GATEWAY_PAGE), {"code": "upstream_invalid_request", "elsewhere": True}),
        ("unknown 4xx", (418, {"detail": "teapot"}), {"code": "upstream_invalid_request"}),
        ("too early", (425, ""), {"code": "upstream_error", "retry": True}),
        ("for legal reasons", (451, GATEWAY_PAGE), {"code": "upstream_invalid_request", "elsewhere": True}),
        ("no body", (500, ""), {"code": "upstream_error", "retry": True, "elsewhere": True}),
        ("unknown 5xx", (507, ""), {"code": "upstream_error", "retry": True, "elsewhere": True}),
        ("gateway", (502, GATEWAY_PAGE), {"code": "upstream_error", "retry": True, "paid": "unsure"}),
        ("gateway waited", (504, GATEWAY_PAGE), {"code": "upstream_error", "retry": True, "paid": "unsure"}),
        ("Cloudflare waited", (524, GATEWAY_PAGE), {"code": "upstream_error", "retry": True, "paid": "unsure"}),
        ("no origin", (521, GATEWAY_PAGE), {"code": "upstream_error", "retry": True, "elsewhere": True}),
        ("overloaded", (529, ""), {"code": "upstream_overloaded", "retry": True, "elsewhere": True}),
        ("no answer", (0, ""), {"code": "upstream_error", "retry": True, "paid": "unsure"}),
        ("key, as a text", (401, '"Invalid token"'), {"code": "upstream_auth", "elsewhere": True, "key": "out"}),
        ("page of a firewall", (403, "error code: 1010"), {"code": "upstream_auth", "elsewhere": True, "key": "out"}),
        (
            "limit until a date",
            (429, "", {"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}),
            {"code": "upstream_rate_limited", "retry": True, "elsewhere": True, "key": "cooling", "wait_s": 30.0},
        ),
        (
            "limit for seconds",
            (429, GATEWAY_PAGE, {"Retry-After": "2.5"}),
            {"code": "upstream_rate_limited", "retry": True, "elsewhere": True, "key": "cooling", "wait_s": 2.5},
        ),
    ]
    rows = [Row(f"submit: {name}", {"submit": answer}, **follows) for name, answer, follows in submit]
    return rows + (_ODD_POLLS if job else [])


_UNREADABLE: dict[str, Any] = {"code": "upstream_bad_response", "paid": "unsure", "detail": "can't be read"}

_ODD_POLLS = [
    Row("poll: page", {"poll": (200, GATEWAY_PAGE)}, **_UNREADABLE),
    Row("poll: empty", {"poll": (200, "")}, **_UNREADABLE),
    Row("poll: array", {"poll": (200, [])}, **_UNREADABLE),
    Row("poll: no state", {"poll": (200, {"id": "1"})}, **_UNREADABLE),
    Row("poll: refused", {"poll": (400, {"detail": "bad", "code": "InvalidParameter"})}, **_UNREADABLE),
    Row("poll: redirect abroad", {"poll": (302, "", {"Location": FOREIGN})}, **_UNREADABLE),
    Row("poll: key", {"poll": (401, {"code": "InvalidApiKey"})}, "upstream_auth", paid="unsure", key="out"),
    Row("poll: no credit", {"poll": (402, {"detail": "no"})}, "upstream_billing", paid="unsure", key="out"),
    Row("poll: gone", {"poll": (404, {"detail": "not found"})}, "upstream_error", True, "unsure"),
]  # fmt: skip
