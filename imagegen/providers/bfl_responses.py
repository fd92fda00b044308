"""Parser of Black Forest Labs' responses: accepted jobs, states of a job, and the meaning of each refusal. No I/O.

https://docs.bfl.ai and https://github.com/black-forest-labs/skills have the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import orjson
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.formats import parse_http_date
from imagegen.providers.job_api import AcceptedCall, job_id
from imagegen.providers.job_polling import JobState, phase_of
from imagegen.providers.large_body import load_object
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, sanitize_detail, search_images
from imagegen.tasks.cost import MICRO_USD

MICRO_USD_PER_CREDIT = MICRO_USD // 100
"""https://docs.bfl.ai/quick_start/pricing"""

_MAX_CREDITS = 1_000_000
_MAX_REASONS = 5

_RUNNING = frozenset({"pending", "queued", "processing", "running"})
_MODERATED = frozenset({"request moderated", "content moderated"})
_FAILED = frozenset({"error", "failed"})
_FORGOTTEN = "task not found"
_OF_THE_REQUEST = frozenset({"content_policy", "upstream_billing", "upstream_auth"})


def parse_acceptance(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> AcceptedCall:
    """Return the job that a submit has begun. Raises UpstreamError for each other response."""
    fields = (load_object(body) if 200 <= status < 300 else None) or {}
    word, name, address = _state_word(fields), job_id(fields.get("id")), fields.get("polling_url")
    if word in _MODERATED or word in _FAILED:
        raise _job_error(fields, word, secret)
    if not name:
        raise submit_error(status, headers, body, secret=secret, now_s=now_s)
    poll_url = _with_id(address, name) if isinstance(address, str) else ""
    return AcceptedCall(name, poll_url, cost_micro_usd=_cost(fields.get("cost")))


def submit_error(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> UpstreamError:
    """Return the error that a refused submit or a failed poll means.

    The model is a part of the path, so a 404 is about the model. A 429 has the seconds to wait in its body.
    """
    error = error_from_response(status, headers, body, secret=secret, now_s=now_s)
    fields = load_object(body) or {}
    if status == 404 and error.code not in _OF_THE_REQUEST:
        detail = "The provider does not have this model"
        return UpstreamError("model_not_available", detail, status=status, upstream_detail=error.upstream_detail)
    if error.code == "upstream_rate_limited" and error.retry_after_s is None:
        error.retry_after_s = _seconds(fields.get("retry_after"))
    return error


def parse_job(
    status: int,
    headers: Mapping[str, str],
    body: bytes | bytearray,
    *,
    secret: str = "",
    now_s: float,
) -> JobState:
    """Read the response to a poll. Raises UpstreamError for a failed poll; the job's state is unclear then.

    A job with a link that has ended is forgotten: its image can't be fetched any more.
    """
    fields = load_object(body)
    word = _state_word(fields or {})
    if status in (404, 410) or word == _FORGOTTEN:
        return JobState("forgotten")
    if fields is None or not 200 <= status < 300 or not word:
        raise submit_error(status, headers, body, secret=secret, now_s=now_s)
    if word in _MODERATED or phase_of(word) == "failed":
        return JobState("failed", error=_job_error(fields, word, secret))
    if word != "ready":  # an unknown word is taken for a state of a job that runs
        is_known = word in _RUNNING
        progress = _progress(fields.get("progress")) if is_known else None
        return JobState("running", progress=progress, unclear=not is_known)
    result = fields.get("result")
    result = result if isinstance(result, dict) else {}
    link, ends_at = result.get("sample"), _link_ends_at(result.get("sample"))
    if ends_at is not None and ends_at <= _their_time(headers, now_s):
        return JobState("forgotten")
    image = parse_image({"url": link}) if isinstance(link, str) else None
    return JobState("done", reply=Reply(search_images(body) if image is None else (image,)))


def _job_error(fields: Mapping[str, object], word: str, secret: str) -> UpstreamError:
    """Return the error of a job that ended without an image."""
    if word in _MODERATED:
        reasons = "; ".join(_reasons(fields.get("details")))
        detail = sanitize_detail(f"{word.capitalize()}: {reasons}".removesuffix(": "), secret)
        return UpstreamError("content_policy", detail, upstream_detail=detail)
    places = (fields.get("error"), fields.get("message"), fields.get("detail"), fields.get("details"))
    text = next((text for value in places if (text := _text(value))), "the job failed")
    body = orjson.dumps({"error": {"message": text}})
    error = error_from_response(422, {}, body, secret=secret)
    return error if error.code in _OF_THE_REQUEST else error_from_response(500, {}, body, secret=secret)


def _reasons(details: object) -> list[str]:
    """Return why a job was moderated: `{"Moderation Reasons": ["Derivative Works Filter"]}`."""
    if not isinstance(details, dict):
        return [details] if isinstance(details, str) else []
    lists = [value if isinstance(value, list) else [value] for value in details.values()]
    return [reason for reasons in lists for reason in reasons if isinstance(reason, str)][:_MAX_REASONS]


def _text(value: object) -> str:
    if isinstance(value, dict):
        value = next((text for name in ("message", "error", "detail") if (text := value.get(name))), "")
    return value if isinstance(value, str) else ""


def _with_id(address: str, name: str) -> str:
    """Return the address of polls with the job's id; some clusters leave it out."""
    try:
        url = URL(address)
        return address if "id" in url.query else str(url.update_query(id=name))
    except ValueError:
        return ""


def _state_word(fields: Mapping[str, object]) -> str:
    """Return the state in lower case; some clusters name the field `state`."""
    word = fields.get("status") or fields.get("state")
    return re.sub(r"[\s_]+", " ", word).lower() if isinstance(word, str) else ""


def _progress(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return min(max(value / 100 if value > 1 else float(value), 0.0), 1.0)


def _cost(credits_: object) -> int | None:
    amount = _number(credits_)
    return round(amount * MICRO_USD_PER_CREDIT) if amount is not None and 0 <= amount <= _MAX_CREDITS else None


def _seconds(value: object) -> float | None:
    seconds = _number(value)
    return seconds if seconds is not None and 0 <= seconds <= 86_400 else None


def _number(value: object) -> float | None:
    """Return a number, which may come as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _link_ends_at(link: object) -> float | None:
    """Return the Unix time at which a link ends, by its signature's field `se`; None if it has none.

    https://learn.microsoft.com/rest/api/storageservices/create-service-sas
    """
    if not isinstance(link, str):
        return None
    try:
        ends = parse_qs(urlsplit(link).query, max_num_fields=100).get("se", [""])[0]
        moment = datetime.fromisoformat(ends)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _their_time(headers: Mapping[str, str], now_s: float) -> float:
    """Return the upstream's Unix time, which signs the links; ours if the response has no date."""
    sent_at = parse_http_date(headers.get("Date"))
    return now_s if sent_at is None else sent_at
