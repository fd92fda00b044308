"""Emulator of Black Forest Labs' API: https://docs.bfl.ai (submit and get_result; no list, no cancellation).

    python -m imagegen.emulator.job_command bfl --port 8791

    PROVIDER=bfl BFL_API_KEY=any BFL_API_URL=http://127.0.0.1:8791 imagegen

The link of a result ends ten minutes after the job's end, or after `--link-ttl` if that is less. Further options of
the switch `job`: policy=content (the result of a moderated job was refused, not the request), reason=, state=Failed
(of a failed job instead of Error), address= (in place of the host of the polling address), no_id=1 (the polling
address has no id), field=state (the field of the state is not named `status`), missing=404 (status of a poll for a job
that is not found).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from time import time
from typing import ClassVar, Final
from urllib.parse import quote

from .job_emulator import BAD_GATEWAY, Exchange, JobCall, JobEmulator, JobOptions, RunningJob, after_loss, as_json
from .together_responses import Response

LINK_TTL_S: Final = 600.0
CREDITS_PER_USD: Final = 100

_SUBMIT: Final = re.compile(r"/v1/(flux-[\w.-]+)")
_POLL: Final = "/v1/get_result"
_SIDE: Final = (64, 4096)
_MAX_PIXELS: Final = 4_000_000


def invalid(field: str, kind: str, message: str) -> Response:
    """Return a 422 in FastAPI's shape."""
    return as_json(422, {"detail": [{"type": kind, "loc": ["body", field], "msg": message, "input": "?"}]})


def refusal(status: int, error: str, message: str, **extra: object) -> Response:
    return as_json(status, {"error": error, "message": message, **extra})


_LIMITED: Final = "Rate limit exceeded: at most 24 active tasks"


class BflEmulator(JobEmulator):
    """Emulator of Black Forest Labs: each model that begins with `flux-` is served."""

    name = "bfl"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": refusal(400, "invalid_request", "The request is malformed", details={"prompt": "missing"}),
        "401": as_json(401, {"detail": "Invalid API key"}),
        "402": as_json(402, {"detail": "Insufficient credits. Please add credits to your account."}),
        "403": as_json(403, {"detail": "Not authenticated"}),
        "404": as_json(404, {"detail": "Not Found"}),
        "422": invalid("width", "multiple_of", "Input should be a multiple of 16"),
        "422_extra": invalid("guidance", "extra_forbidden", "Extra inputs are not permitted"),
        "422_policy": as_json(422, {"detail": "Request Moderated"}),
        "429": refusal(429, "rate_limit_exceeded", _LIMITED, retry_after=2).with_headers(
            {"X-RateLimit-Limit": "24", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "2"}
        ),
        "429_body": refusal(429, "rate_limit_exceeded", _LIMITED, retry_after=2),
        "500": as_json(500, {"detail": "Internal Server Error"}),
        "502": BAD_GATEWAY,
        "503": as_json(503, {"detail": "Service overloaded"}),
    }

    def __init__(self, options: JobOptions | None = None) -> None:
        options = options or JobOptions()
        super().__init__(replace(options, link_ttl_s=min(options.link_ttl_s, LINK_TTL_S)))

    def answer(self, exchange: Exchange) -> Response | None:
        key = exchange.headers.get("x-key", "")
        submit = _SUBMIT.fullmatch(exchange.path)
        if not self.accepts(key):
            refused = self.refusals["401" if key else "403"]
            return self.refuse(exchange, refused) if exchange.method == "POST" else refused
        if submit and exchange.method == "POST":
            return self._submit(exchange, key, submit[1])
        if exchange.path == _POLL and exchange.method == "GET":
            return self._state(exchange, key)
        return self.refusals["404"]

    def _submit(self, exchange: Exchange, key: str, model: str) -> Response:
        fields = exchange.fields() or {}
        if fault := _fault_of(fields):
            return self.refuse(exchange, fault)
        seed, form = fields.get("seed"), fields.get("output_format")
        size = (_side(fields, "width"), _side(fields, "height"))
        call = JobCall(
            str(fields["prompt"]),
            model,
            fields,
            seed=seed if isinstance(seed, int) else None,
            size=size,
            output_format=form if isinstance(form, str) else "jpeg",
        )
        running = self.begin(exchange, key, call)
        if isinstance(running, Response):
            return running
        body = {
            "id": running.job.id,
            "polling_url": self._address(running),
            "cost": running.job.cost_usd * CREDITS_PER_USD,
            "input_mp": 0.0,
            "output_mp": size[0] * size[1] / 1e6,
        }
        return after_loss(running, as_json(200, body))

    @staticmethod
    def _address(running: RunningJob) -> str:
        base = running.fault.text("address", running.base_url)
        return f"{base}{_POLL}" if running.fault.number("no_id", 0) else f"{base}{_POLL}?id={running.job.id}"

    def _state(self, exchange: Exchange, key: str) -> Response:
        name = exchange.query.get("id", "")
        running = self.find(name, key)
        if running is None:
            absent = self.running.get(name)
            status = int(absent.fault.number("missing", 200)) if absent else 404
            return as_json(status, {"id": name, "status": "Task not found", "result": None, "progress": None})
        if (status_code := self.polled(running)) is not None:
            return as_json(status_code, {"detail": f"Status {status_code}"})
        fault, end = running.fault, running.end
        body: dict[str, object] = {"id": name, "result": None, "progress": None, "details": None, "preview": None}
        word = {"failed": fault.text("state", "Error"), "running": "Pending"}.get(end, "Ready")
        if end == "running":
            body["progress"] = running.progress
        elif end == "failed":
            body |= {"error": fault.text("error", "Generation failed")}
        elif end == "moderated":
            word = "Content Moderated" if fault.text("policy", "") == "content" else "Request Moderated"
            body["details"] = {"Moderation Reasons": [fault.text("reason", "Safety Filter")]}
        else:
            body["result"] = self._result(running)
        return as_json(200, {**body, fault.text("field", "status"): word})

    def _result(self, running: RunningJob) -> dict[str, object]:
        ended_at = running.job.submitted_at + running.run_s
        ends_at = datetime.fromtimestamp(ended_at + self.options.link_ttl_s, UTC)
        signature = f"?se={quote(ends_at.strftime('%Y-%m-%dT%H:%M:%SZ'), safe='')}&sp=r&sv=2024-11-04&sr=b&sig=abc%3D"
        links = self.images(running)
        return {
            "sample": links[0] + signature if links else None,
            "prompt": running.call.prompt,
            "seed": self.seed_of(running),
            "start_time": running.job.submitted_at,
            "end_time": min(ended_at, time()),
            "duration": running.run_s,
        }

    def link_made_at(self, running: RunningJob) -> float:
        return running.begun_at + running.run_s


def _fault_of(fields: Mapping[str, object]) -> Response | None:
    """Return the refusal of fields that no model takes; None if there are none."""
    if not isinstance(fields.get("prompt"), str):
        return invalid("prompt", "missing", "Field required")
    for name in ("width", "height"):
        side = fields.get(name, _SIDE[0])
        if not isinstance(side, int) or not _SIDE[0] <= side <= _SIDE[1]:
            return invalid(name, "greater_than_equal", f"Input should be from {_SIDE[0]} to {_SIDE[1]}")
        if side % 16:
            return invalid(name, "multiple_of", "Input should be a multiple of 16")
    if _side(fields, "width") * _side(fields, "height") > _MAX_PIXELS:
        return invalid("width", "value_error", "Value error, the image may have at most 4 megapixels")
    if fields.get("output_format", "jpeg") not in ("jpeg", "png"):
        return invalid("output_format", "enum", "Input should be 'jpeg' or 'png'")
    return None


def _side(fields: Mapping[str, object], name: str) -> int:
    side = fields.get(name)
    return side if isinstance(side, int) else 1024
