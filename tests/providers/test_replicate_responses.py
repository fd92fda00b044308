"""Tests of Replicate's responses: its errors, its predictions and their progress."""

from __future__ import annotations

from typing import Any

import pytest

from imagegen.emulator.replicate import ReplicateEmulator
from imagegen.errors import UpstreamError
from imagegen.providers.post import RawResponse
from imagegen.providers.replicate_responses import job_error, job_state, parse_acceptance
from imagegen.tasks.retry import was_never_sent
from tests.support import over_rows

LINK = "https://a.example/1.png"
LINKS = [f"https://a.example/{number}.png" for number in range(3)]

ERRORS = [
    # switch of the emulator, code, retryable, ambiguous, part of the detail
    ("400", "upstream_invalid_request", False, False, "not valid JSON"),
    ("401", "upstream_auth", False, False, "operator"),
    ("402", "upstream_billing", False, False, "no credit"),
    ("402_limit", "upstream_billing", False, False, "no credit"),
    ("403", "upstream_auth", False, False, "operator"),
    ("404", "model_not_available", False, False, "could not be found"),
    ("422", "upstream_invalid_request", False, False, "prompt is required"),
    ("422_version", "model_not_available", False, False, "does not exist"),
    ("422_extra", "upstream_invalid_request", False, False, "guidance_scale"),
    ("422_count", "upstream_invalid_request", False, False, "num_outputs"),
    ("429", "upstream_rate_limited", True, False, "throttled"),
    ("500", "upstream_error", True, False, "unexpected"),
    ("502", "upstream_error", True, True, "not JSON"),
    ("503", "upstream_overloaded", True, False, "unavailable"),
    ("504", "upstream_error", True, True, "not JSON"),
]


def refused(name: str, **headers: str) -> UpstreamError:
    refusal = ReplicateEmulator.refusals[name]
    with pytest.raises(UpstreamError) as caught:
        parse_acceptance(RawResponse(refusal.status, headers, refusal.body))
    return caught.value


@over_rows(("name", "code", "retryable", "ambiguous", "detail"), ERRORS)
def test_a_refused_submit_has_its_code(name: str, code: str, retryable: bool, ambiguous: bool, detail: str) -> None:
    error = refused(name)
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, ambiguous)
    assert detail in error.detail


def test_every_refusal_of_the_emulator_is_a_row() -> None:
    assert {row[0] for row in ERRORS} == ReplicateEmulator.refusals.keys()


def test_a_refused_count_or_field_is_named() -> None:
    assert refused("422_count").max_count == 1
    assert "guidance_scale" in refused("422_extra").refused


def test_the_wait_of_a_throttled_submit_is_read_from_its_text() -> None:
    assert refused("429").retry_after_s == 30


JOB_ERRORS = [
    # status, error, code, retryable
    ("failed", "The input or output was flagged as sensitive. (E005)", "content_policy", False),
    ("failed", "NSFW content detected. Try running it again, or try a different prompt.", "content_policy", False),
    ("failed", "All generated images contained NSFW content. Try running it again", "content_policy", False),
    ("failed", "Input validation error: prompt is too long", "upstream_invalid_request", False),
    ("failed", "Prediction interrupted; please retry (code: PA)", "upstream_error", True),
    ("failed", "Director: unexpected error handling prediction (E6716)", "upstream_error", True),
    ("failed", "CUDA out of memory. Tried to allocate 2.00 GiB", "upstream_error", False),
    ("failed", "The prediction timed out", "upstream_timeout", True),
    ("failed", "list index out of range", "upstream_error", True),
    ("failed", "", "upstream_error", True),
    ("canceled", "", "upstream_error", False),
    ("aborted", "", "upstream_overloaded", True),
]


@over_rows(("status", "message", "code", "retryable"), JOB_ERRORS)
def test_a_failed_job_has_its_code(status: str, message: str, code: str, retryable: bool) -> None:
    error = job_error(status, message)
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)
    assert not was_never_sent(error)
    assert error.detail


@over_rows(
    ("fields", "phase", "images"),
    [
        ({"status": "starting"}, "running", None),
        ({"status": "processing"}, "running", None),
        ({"status": "a new word"}, "running", None),
        ({"status": "succeeded", "output": LINK}, "done", 1),
        ({"status": "succeeded", "output": LINKS}, "done", 3),
        ({"status": "succeeded", "output": ["data:image/png;base64,AAAA"]}, "done", 1),
        ({"status": "succeeded", "output": None}, "done", 0),
        ({"status": "succeeded", "output": None, "data_removed": True}, "forgotten", None),
        ({"status": "failed", "error": "x"}, "failed", None),
        ({"status": "canceled"}, "failed", None),
        ({"status": "aborted"}, "failed", None),
    ],
)
def test_a_prediction_is_read(fields: dict[str, Any], phase: str, images: int | None) -> None:
    state = job_state(fields)
    assert (state.phase, None if state.reply is None else len(state.reply.images)) == (phase, images)
    assert state.unclear is (fields["status"] == "a new word")


def test_progress_is_that_of_the_logs() -> None:
    logs = "Using seed: 7\n  0%|          | 0/4\n 50%|█████     | 2/4"
    assert job_state({"status": "processing", "logs": logs}).progress == 0.5
    assert job_state({"status": "processing", "logs": "100% sure"}).progress is None
