"""Emulator of fal's queue: https://fal.ai/docs/inference-api/queue (submit, status, result, cancel).

    python -m imagegen.emulator.job_command fal --port 8790

    PROVIDER=fal FAL_KEY=any FAL_API_URL=http://127.0.0.1:8790 imagegen

Further options of the switch `job`: policy=error (a moderated job has a 422 instead of black images),
error_type= (of a failed job; its result repeats it), failed_status= (of that result), position= (place in the queue
at the submit), pending= (share of the time of the job that it waits there, 0.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Final

from .fault_schedule import Fault
from .job_emulator import BAD_GATEWAY, Exchange, JobCall, JobEmulator, RunningJob, after_loss, as_json
from .together_responses import Response

SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}

_MODEL: Final = re.compile(r"/([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)")
_REQUEST: Final = re.compile(r"/([\w.-]+/[\w.-]+)/requests/([\w-]+)(/status|/cancel)?")
_FLAGGED: Final = "The content could not be processed because it contained material flagged by a content checker."


def model_error(status: int, kind: str, message: str, *, field: str = "prompt", retryable: bool = False) -> Response:
    """Return an error of a model: https://fal.ai/docs/documentation/model-apis/errors"""
    url = f"https://docs.fal.ai/errors/#{kind}"
    fault = {"loc": ["body", field], "msg": message, "type": kind, "url": url, "input": "?"}
    return as_json(status, {"detail": [fault]}, {"X-Fal-Retryable": str(retryable).lower()})


def request_error(status: int, kind: str, message: str) -> Response:
    """Return an error of the platform: https://fal.ai/docs/documentation/model-apis/request-errors"""
    return as_json(status, {"detail": message, "error_type": kind}, {"X-Fal-Error-Type": kind})


class FalEmulator(JobEmulator):
    """Emulator of fal: each model is served; a model's id has an owner, an app, and perhaps a path."""

    name = "fal"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": request_error(400, "bad_request", "The request was malformed"),
        "401": as_json(401, {"detail": "Cannot access application. Authentication is required to access this app."}),
        "403_balance": as_json(403, {"detail": "User is locked. Reason: Exhausted balance. Top up your balance."}),
        "403": as_json(403, {"detail": "Forbidden"}),
        "404": as_json(404, {"detail": "Application not found"}),
        "422": model_error(422, "missing", "field required"),
        "422_count": model_error(422, "less_than_equal", "Input should be less than or equal to 1", field="num_images"),
        "422_extra": model_error(422, "extra_forbidden", "Extra inputs are not permitted", field="guidance_scale"),
        "422_policy": model_error(422, "content_policy_violation", _FLAGGED),
        "429": as_json(429, {"detail": "Too many requests"}),
        "500": request_error(500, "internal_error", "Internal server error"),
        "502": BAD_GATEWAY,
        "503": request_error(503, "runner_scheduling_failure", "No runner could be allocated"),
        "504": request_error(504, "request_timeout", "Request timed out"),
        "504_user": as_json(
            504, {"detail": "Request timed out"}, {"X-Fal-Request-Timeout-Type": "user", "X-Fal-Retryable": "false"}
        ),
    }

    def charges(self, end: str, fault: Fault) -> bool:
        """Return whether a job is charged: one with black images is."""
        return super().charges(end, fault) or (end == "moderated" and fault.text("policy", "") != "error")

    def answer(self, exchange: Exchange) -> Response | None:
        scheme, _, key = exchange.headers.get("Authorization", "").partition(" ")
        key = key.strip() if scheme == "Key" else ""
        request = _REQUEST.fullmatch(exchange.path)
        model = _MODEL.fullmatch(exchange.path)
        if not self.accepts(key):
            refusal = self.refusals["401"]
            return self.refuse(exchange, refusal) if exchange.method == "POST" else refusal
        if request and exchange.method in ("GET", "PUT"):
            return self._of_request(exchange, key, request)
        if model and exchange.method == "POST":
            return self._submit(exchange, key, model)
        return None

    def _submit(self, exchange: Exchange, key: str, model: re.Match[str]) -> Response:
        fields = exchange.fields()
        if fields is None or not isinstance(prompt := fields.get("prompt"), str) or not prompt:
            return self.refuse(exchange, self.refusals["422"])
        count, seed, form = fields.get("num_images", 1), fields.get("seed"), fields.get("output_format")
        running = self.begin(
            exchange,
            key,
            JobCall(
                prompt,
                model[1] + model[2],
                fields,
                count if isinstance(count, int) else 1,
                seed if isinstance(seed, int) else None,
                _size(fields.get("image_size")),
                form if isinstance(form, str) else None,
            ),
        )
        if isinstance(running, Response):
            return running
        address = self._address(running)
        body: dict[str, object] = {
            "status": "IN_QUEUE",
            "request_id": running.job.id,
            "response_url": address,
            "status_url": f"{address}/status",
            "cancel_url": f"{address}/cancel",
            "logs": None,
            "metrics": {},
            "queue_position": 0,
        }
        return after_loss(running, as_json(200, body, {"x-fal-request-id": running.job.id}))

    @staticmethod
    def _address(running: RunningJob) -> str:
        """Return the address of a job, which has owner and app only."""
        app = "/".join(running.call.model.split("/")[:2])
        return running.fault.text("address", f"{running.base_url}/{app}") + f"/requests/{running.job.id}"

    def _of_request(self, exchange: Exchange, key: str, match: re.Match[str]) -> Response:
        running = self.find(match[2], key)
        if running is None or not running.call.model.startswith(match[1]):
            status = {"status": "NOT_FOUND"} if match[3] == "/cancel" else {"detail": f"Request {match[2]} not found"}
            return as_json(404, status)
        if match[3] == "/cancel":
            return self._cancel(running) if exchange.method == "PUT" else as_json(405, {"detail": "Method Not Allowed"})
        if (status_code := self.polled(running)) is not None:
            return request_error(status_code, "internal_error", f"Status {status_code}")
        return self._status(running) if match[3] == "/status" else self._result(running)

    def _cancel(self, running: RunningJob) -> Response:
        if self.cancel(running):
            return as_json(202, {"status": "CANCELLATION_REQUESTED"})
        return as_json(400, {"status": "ALREADY_COMPLETED"})

    def _status(self, running: RunningJob) -> Response:
        address, end = self._address(running), running.end
        body: dict[str, object] = {
            "request_id": running.job.id,
            "response_url": address,
            "status_url": f"{address}/status",
            "cancel_url": f"{address}/cancel",
        }
        if end == "running":
            left = 1 - running.progress / max(running.fault.number("pending", 0.3), 1e-9)
            place = int(running.fault.number("position", 0) * left)
            queued = {"status": "IN_QUEUE", "queue_position": place}
            state = queued if left > 0 else {"status": "IN_PROGRESS", "logs": None}
            return as_json(202, {**state, **body})
        body |= {"status": "COMPLETED", "logs": None, "metrics": {"inference_time": running.run_s}}
        if end == "cancelled":
            body |= {"error": "Request was cancelled", "error_type": "client_cancelled"}
        elif end == "failed":
            kind = running.fault.text("error_type", "runner_server_error")
            body |= {"error": running.fault.text("error", "The runner failed"), "error_type": kind}
        elif end == "moderated" and running.fault.text("policy", "") == "error":
            body |= {"error": _FLAGGED, "error_type": "content_policy_violation"}
        return as_json(200, body)

    def _result(self, running: RunningJob) -> Response:
        end, fault = running.end, running.fault
        if end == "running":
            return as_json(400, {"detail": "Request is still in progress"})
        if end == "cancelled":
            return request_error(499, "client_cancelled", "Request was cancelled")
        if end == "failed":
            kind, status = fault.text("error_type", "runner_server_error"), int(fault.number("failed_status", 500))
            return request_error(status, kind, fault.text("error", "The runner failed"))
        moderated = end == "moderated"
        if moderated and fault.text("policy", "") == "error":
            return model_error(422, "content_policy_violation", _FLAGGED)
        width, height = running.call.size
        kind = f"image/{running.call.output_format or 'jpeg'}"
        images = [{"url": url, "width": width, "height": height, "content_type": kind} for url in self.images(running)]
        body = {
            "images": images,
            "timings": {"inference": running.run_s},
            "seed": self.seed_of(running),
            "has_nsfw_concepts": [moderated] * len(images),
            "prompt": running.call.prompt,
        }
        units = {"x-fal-billable-units": str(len(images)), "x-fal-request-id": running.job.id}
        return as_json(200, body, units)


def _size(value: object) -> tuple[int, int]:
    if isinstance(value, str):
        return SIZES.get(value, (1024, 768))
    if isinstance(value, dict) and isinstance(value.get("width"), int) and isinstance(value.get("height"), int):
        return value["width"], value["height"]
    return SIZES["landscape_4_3"]
