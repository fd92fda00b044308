"""Emulator of Replicate's predictions: https://replicate.com/docs/reference/http

    python -m imagegen.emulator.job_command replicate --port 8790

    PROVIDER=replicate REPLICATE_API_TOKEN=any REPLICATE_API_URL=http://127.0.0.1:8790 imagegen

Further options of the switch `job`: prefix= (of a failed job's error), logs=TEXT, unlisted=1 (no list has the job),
aborted=1 (a failed job is `aborted`, as one is that did not start in time).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from time import time
from typing import ClassVar, Final

from .job_emulator import Exchange, JobCall, JobEmulator, RunningJob, after_loss, as_json
from .together_responses import HTML, Response

PAGE: Final = 100

_SUBMIT: Final = re.compile(r"/v1/(?:(models|deployments)/([\w.-]+/[\w.-]+)/)?predictions")
_PREDICTION: Final = re.compile(r"/v1/predictions/(\w+)(/cancel)?")
_VERSION: Final = re.compile(r"(?:[\w.-]+/[\w.-]+:)?[0-9a-f]{64}|[\w.-]+/[\w.-]+")
_ALPHABET: Final = "abcdefghjkmnpqrstvwxyz0123456789"
_STATUS: Final = {
    "completed": "succeeded",
    "partial": "succeeded",
    "failed": "failed",
    "moderated": "failed",
    "cancelled": "canceled",
}
_SENSITIVE: Final = "The input or output was flagged as sensitive. Please try again with different inputs. (E005)"
_THROTTLED: Final = "Request was throttled. Your rate limit resets in ~{}s."


def _json(status: int, fields: object, headers: Mapping[str, str] | None = None) -> Response:
    return as_json(status, fields, {"Date": formatdate(usegmt=True), **(headers or {})})


def problem(status: int, title: str, detail: str) -> Response:
    """Return an error: https://replicate.com/docs/reference/http#errors"""
    return _json(status, {"title": title, "detail": detail, "status": status})


class ReplicateEmulator(JobEmulator):
    """Emulator of Replicate: each model and version is served, official models by `models/OWNER/NAME/predictions`."""

    name = "replicate"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": problem(400, "Bad Request", "The request body is not valid JSON"),
        "401": problem(401, "Unauthenticated", "You did not pass a valid authentication token"),
        "402": problem(
            402,
            "Insufficient credit",
            "You have insufficient credit to run this model. Go to https://replicate.com/account/billing#billing to "
            "purchase credit.",
        ),
        "402_limit": problem(402, "Monthly spend limit reached", "You've hit your monthly spend limit."),
        "403": problem(403, "Forbidden", "You do not have permission to perform this action."),
        "404": problem(404, "Not Found", "The requested resource could not be found."),
        "422": problem(422, "Input validation failed", "- input: prompt is required\n"),
        "422_version": problem(
            422,
            "Invalid version or not permitted",
            "The specified version does not exist (or perhaps you don't have permission to use it?)",
        ),
        "422_extra": problem(
            422, "Input validation failed", "- input: Additional property guidance_scale is not allowed\n"
        ),
        "422_count": problem(422, "Input validation failed", "- input.num_outputs: Must be less than or equal to 1\n"),
        "429": _json(
            429, {"detail": _THROTTLED.format(30), "status": 429, "title": "Too Many Requests"}, {"Retry-After": "30"}
        ),
        "500": problem(500, "Internal server error", "An unexpected error occurred"),
        "502": Response(502, b"<html>502 Bad Gateway</html>", HTML),
        "503": problem(503, "Service unavailable", "The service is temporarily unavailable"),
        "504": Response(504, b"<html>504 Gateway Time-out</html>", HTML),
    }

    def new_id(self) -> str:
        return "".join(self.rng.choices(_ALPHABET, k=26))

    def answer(self, exchange: Exchange) -> Response | None:
        scheme, _, key = exchange.headers.get("Authorization", "").partition(" ")
        key = key.strip() if scheme in ("Bearer", "Token") else ""
        submit, prediction = _SUBMIT.fullmatch(exchange.path), _PREDICTION.fullmatch(exchange.path)
        is_submit = submit is not None and exchange.method == "POST"
        if not self.accepts(key):
            refusal = self.refusals["401"]
            return self.refuse(exchange, refusal) if is_submit else refusal
        if submit and is_submit:
            return self._submit(exchange, key, submit)
        if exchange.path == "/v1/predictions" and exchange.method == "GET":
            return self._list(exchange, key)
        if exchange.path == "/v1/account" and exchange.method == "GET":
            return _json(200, {"type": "user", "username": "emulated", "name": "Emulated"})
        return self._of_prediction(exchange, key, prediction) if prediction else None

    def _submit(self, exchange: Exchange, key: str, match: re.Match[str]) -> Response:
        fields = exchange.fields()
        if fields is None:
            return self.refuse(exchange, self.refusals["400"])
        inputs, version = fields.get("input"), str(fields.get("version") or "")
        if not isinstance(inputs, dict) or not isinstance(prompt := inputs.get("prompt"), str) or not prompt:
            return self.refuse(exchange, self.refusals["422"])
        if not match[2] and not _VERSION.fullmatch(version):
            return self.refuse(exchange, self.refusals["422_version"])
        count, seed, form = inputs.get("num_outputs", 1), inputs.get("seed"), inputs.get("output_format")
        width, height = inputs.get("width"), inputs.get("height")
        has_size = isinstance(width, int) and isinstance(height, int)
        running = self.begin(
            exchange,
            key,
            JobCall(
                prompt,
                match[2] or version,
                inputs,
                count if isinstance(count, int) else 1,
                seed if isinstance(seed, int) else None,
                (width, height) if has_size else (1024, 1024),  # type: ignore[arg-type]
                form if isinstance(form, str) else None,
            ),
        )
        if isinstance(running, Response):
            return running
        return after_loss(running, _json(201, self._object(running, starting=True)))

    def _of_prediction(self, exchange: Exchange, key: str, match: re.Match[str]) -> Response:
        running = self.find(match[1], key)
        if running is None:
            return self.refusals["404"]
        if match[2]:
            if exchange.method != "POST":
                return problem(405, "Method Not Allowed", 'Method "GET" not allowed.')
            self.cancel(running)
            return _json(200, self._object(running))
        if (status := self.polled(running)) is not None:
            return problem(status, "Error", f"Status {status}")
        return _json(200, self._object(running))

    def _list(self, exchange: Exchange, key: str) -> Response:
        """Return a page of the account's jobs, newest first. The cursor is the number of a job."""
        after, before = _moment(exchange.query.get("created_after")), _moment(exchange.query.get("created_before"))
        cursor = exchange.query.get("cursor", "")
        below = int(cursor) if cursor.isdigit() else len(self.running)
        matching = [
            running
            for running in self.running.values()
            if running.is_known and self.may_read(running, key) and not running.fault.number("unlisted", 0)
            if running.number < below and (after or 0) <= running.job.submitted_at <= (before or time())
        ]
        page = sorted(matching, key=lambda running: -running.number)[:PAGE]
        for running in page:
            running.job.listed += 1
        query = "".join(
            f"&{name}={exchange.query[name]}" for name in ("created_after", "created_before") if name in exchange.query
        )
        address = f"{exchange.base_url}/v1/predictions?cursor={page[-1].number if page else 0}{query}"
        results = [{**self._object(running, listed=True), "source": "api"} for running in page]
        has_more = len(matching) > len(page)
        return _json(200, {"previous": None, "next": address if has_more else None, "results": results})

    def _object(self, running: RunningJob, *, starting: bool = False, listed: bool = False) -> dict[str, object]:
        """Return the prediction. listed: in a list, which has no output of it."""
        job, end = running.job, "running" if starting else running.end
        address = running.fault.text("address", running.base_url) + f"/v1/predictions/{job.id}"
        status = _STATUS.get(end, "starting" if starting or running.progress < 0.3 else "processing")
        if end == "failed" and running.fault.number("aborted", 0):
            status = "aborted"
        is_version = ":" in running.call.model or "/" not in running.call.model
        body: dict[str, object] = {
            "id": job.id,
            "model": running.call.model.partition(":")[0] if "/" in running.call.model else "",
            "version": running.call.model.rpartition(":")[2] if is_version else "hidden",
            "input": running.call.body,
            "logs": "" if end == "running" else running.fault.text("logs", ""),
            "output": None,
            "data_removed": False,
            "error": None,
            "status": status,
            "created_at": _text(job.submitted_at),
            "urls": {"cancel": f"{address}/cancel", "get": address, "web": f"https://replicate.com/p/{job.id}"},
        }
        if end == "running":
            return body
        body |= {"completed_at": _text(time()), "metrics": {"predict_time": running.run_s, "total_time": running.run_s}}
        if status == "succeeded" and not listed:
            links = self.images(running)
            body["output"] = links[0] if running.fault.number("single", 0) else links
        elif end == "moderated":
            body["error"] = running.fault.text("error", _SENSITIVE)
        elif end == "failed":
            body["error"] = running.fault.text("error", "Prediction interrupted; please retry (code: PA)")
        return body


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _moment(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None
