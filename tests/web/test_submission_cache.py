"""Tests of the submission cache: a repeated body is not parsed again and gets the same response."""

from __future__ import annotations

import pytest

from imagegen.tasks.submission import Submission
from imagegen.web import submitter
from imagegen.web.submitter import SubmissionCache
from tests.web.conftest import Client

BODY = b'{"prompt": "seen"}'
JSON = {"Content-Type": "application/json"}
ALICE, ALICE_ALONE, BOB = ("alice", "a", None), ("alice", "a", "a"), ("bob", "a", None)


def submission_of(name: str) -> Submission:
    return Submission(name, name, "m", b"{}")


def test_the_oldest_entry_is_evicted_when_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "MAX_SUBMISSIONS", 2)
    bodies = SubmissionCache()
    for name in ("a", "b", "c"):
        bodies.put(ALICE, name.encode(), submission_of(name), 1)
    cached = [bodies.get(ALICE, name) for name in (b"a", b"b", b"c")]
    assert cached == [None, (submission_of("b"), 1), (submission_of("c"), 1)]


def test_a_large_body_is_not_cached() -> None:
    bodies = SubmissionCache()
    bodies.put(ALICE, b"x" * (submitter.MAX_CACHED_BODY_BYTES + 1), submission_of("a"), 1)
    assert bodies.get(ALICE, b"x" * (submitter.MAX_CACHED_BODY_BYTES + 1)) is None


async def test_the_same_bytes_still_need_their_content_type(service: Client) -> None:
    first = await service.post("/api/images/generate?wait=10", data=BODY, headers=JSON)
    again = await service.post("/api/images/generate", data=BODY, headers=JSON)
    assert (first.status, again.status, again.headers["X-Cache"]) == (200, 200, "HIT")
    assert (await again.json())["taskId"] == (await first.json())["taskId"]
    refused = await service.post("/api/images/generate", data=BODY, headers={"Content-Type": "text/plain"})
    assert refused.status == 415


async def test_the_same_bytes_with_no_cache_are_generated_again(service: Client) -> None:
    await service.post("/api/images/generate?wait=10", data=BODY, headers=JSON)
    afresh = await service.post("/api/images/generate", data=BODY, headers=JSON | {"Cache-Control": "no-cache"})
    assert (afresh.status, afresh.headers["X-Cache"]) == (202, "REFRESH")


def test_a_body_is_cached_for_each_owner() -> None:
    bodies = SubmissionCache()
    bodies.put(ALICE, BODY, submission_of("a"), 4)
    assert (bodies.get(ALICE, BODY), bodies.get(ALICE_ALONE, BODY), bodies.get(BOB, BODY)) == (
        (submission_of("a"), 4),
        None,
        None,
    )
