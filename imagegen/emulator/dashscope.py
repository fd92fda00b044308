"""Emulator of Alibaba's DashScope: https://www.alibabacloud.com/help/en/model-studio/manage-asynchronous-tasks

    python -m imagegen.emulator.job_command dashscope --port 8792

    PROVIDER=dashscope DASHSCOPE_API_KEY=any DASHSCOPE_API_URL=http://127.0.0.1:8792 imagegen

All three shapes are served: the older jobs, the jobs of messages, and messages that are answered at once. Each key is
one of the same account. Further options of the switch `job`: code= (of a failed job), part_code= (of the image that a
partial job lacks). Only a PENDING job is cancelled; a job is PENDING for the first `pending=` (0.3) of its time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import ClassVar, Final

from .job_emulator import Exchange, JobCall, JobEmulator, RunningJob, after_loss, as_json
from .together_responses import Response

_AIGC: Final = "/api/v1/services/aigc/"
_OLD: Final = frozenset((f"{_AIGC}text2image/image-synthesis", f"{_AIGC}image2image/image-synthesis"))
_MESSAGES: Final = f"{_AIGC}image-generation/generation"
_AT_ONCE: Final = f"{_AIGC}multimodal-generation/generation"
_TASK: Final = re.compile(r"/api/v1/tasks/([\w-]+)(/cancel)?")
_LIST: Final = frozenset(("/api/v1/tasks", "/api/v1/tasks/"))
_SIZE: Final = re.compile(r"([0-9]+)\*([0-9]+)")
_BEIJING: Final = timedelta(hours=8)

_MODELS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"z-image|qwen-image-(?:max|edit|[2-9])"), "at_once"),
    (re.compile(r"wan(?:2\.[6-9]|[3-9])"), "messages"),
)
_POLICY: Final = "Input data may contain inappropriate content."
_OUTPUT_POLICY: Final = "Output data may contain inappropriate content."


def refusal(status: int, code: str, message: str) -> Response:
    return as_json(status, {"code": code, "message": message, "request_id": "7438d53d-6eb8-4596-8835-000000000000"})


class DashScopeEmulator(JobEmulator):
    """Emulator of DashScope: models that begin with wan, qwen-image, z-image or flux are served."""

    name = "dashscope"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": refusal(400, "InvalidParameter", "size must be in [512*512, 1440*1440]"),
        "400_arrearage": refusal(400, "Arrearage", "Access denied, please make sure your account is in good standing."),
        "400_model": refusal(400, "InvalidParameter", "Model not exist."),
        "400_policy": refusal(400, "DataInspectionFailed", _POLICY),
        "400_url": refusal(400, "InvalidParameter", "url error, please check url!"),
        "401": refusal(401, "InvalidApiKey", "Invalid API-key provided."),
        "403": refusal(403, "AccessDenied", "current user api does not support synchronous calls."),
        "403_async": refusal(403, "AccessDenied", "current user api does not support asynchronous calls."),
        "403_free": refusal(
            403, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted. Please pay."
        ),
        "403_unpurchased": refusal(403, "AccessDenied.Unpurchased", "Access to model denied."),
        "404_model": refusal(404, "ModelNotFound", "The model can not be found."),
        "429": refusal(429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
        "429_quota": refusal(
            429, "Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit."
        ),
        "500": refusal(500, "InternalError", "An internal error has occurred, please try again later."),
        "500_timeout": refusal(500, "RequestTimeOut", "Request timed out, please try again later."),
        "503": refusal(503, "ModelUnavailable", "Model is unavailable, please try again later."),
        "200_throttling": refusal(200, "Throttling", "Requests throttling triggered."),
    }

    def answer(self, exchange: Exchange) -> Response | None:
        scheme, _, key = exchange.headers.get("Authorization", "").partition(" ")
        key = key.strip() if scheme == "Bearer" else ""
        task, is_post = _TASK.fullmatch(exchange.path), exchange.method == "POST"
        pays = is_post and exchange.path.startswith(_AIGC)
        if not self.accepts(key):
            return self.refuse(exchange, self.refusals["401"]) if pays else self.refusals["401"]
        if pays:
            return self._submit(exchange, key)
        if exchange.method == "GET" and exchange.path in _LIST:
            return self._list(exchange)
        if task is None or is_post != bool(task[2]):
            return None
        return self._cancel(task[1]) if task[2] else self._poll(task[1])

    def _submit(self, exchange: Exchange, key: str) -> Response:
        fields = exchange.fields() or {}
        call = _call_of(fields)
        is_async = exchange.headers.get("X-DashScope-Async") == "enable"
        if call is None:
            return self.refuse(exchange, self.refusals["400"])
        if refused := self._wrong_route(exchange.path, call.model, is_async=is_async):
            return self.refuse(exchange, refused)
        running = self.begin(exchange, key, call)
        if isinstance(running, Response):
            return running
        if "cost" not in running.fault.options:
            running.job.cost_usd = self.options.price_usd * self._made(running)
        if is_async:
            output = {"task_id": running.job.id, "task_status": "PENDING"}
            return after_loss(running, as_json(200, {"request_id": self.new_id(), "output": output}))
        running.run_s = 0.0
        if running.job.end in ("failed", "moderated"):
            code, message = self._fault(running)
            return after_loss(running, refusal(400 if code == "DataInspectionFailed" else 500, code, message))
        body = {"request_id": self.new_id(), "output": self._choices(running), "usage": self._usage(running)}
        return after_loss(running, as_json(200, body))

    def _wrong_route(self, path: str, model: str, *, is_async: bool) -> Response | None:
        shape = next((shape for pattern, shape in _MODELS if pattern.match(model)), "old")
        served = {"at_once": path == _AT_ONCE, "messages": path in (_MESSAGES, _AT_ONCE), "old": path in _OLD}[shape]
        if not re.match(r"wan|qwen-image|z-image|flux", model):
            return self.refusals["400_model"]
        if not served:
            return self.refusals["400_url"]
        if path == _AT_ONCE:
            return self.refusals["403_async"] if is_async else None
        return None if is_async else self.refusals["403"]

    def _poll(self, name: str) -> Response:
        running = self.running.get(name)
        if running is None or not running.is_known:
            return as_json(200, {"request_id": self.new_id(), "output": {"task_id": name, "task_status": "UNKNOWN"}})
        if (status := self.polled(running)) is not None:
            return refusal(status, "Throttling.RateQuota" if status == 429 else "InternalError", f"Status {status}")
        body: dict[str, object] = {"request_id": self.new_id(), "output": self._output(running)}
        if running.end in ("completed", "partial"):
            body["usage"] = self._usage(running)
        return as_json(200, body)

    def _output(self, running: RunningJob) -> dict[str, object]:
        output: dict[str, object] = {"task_id": running.job.id, "task_status": _status(running)}
        output["submit_time"] = _beijing(running.job.submitted_at)
        if _status(running) == "PENDING":
            return output
        output["scheduled_time"] = output["submit_time"]
        if running.end == "running":
            return output
        output["end_time"] = _beijing(running.job.submitted_at + running.run_s)
        total, image_count = running.call.count, self._made(running)
        if running.end in ("failed", "moderated"):
            output["code"], output["message"] = self._fault(running)
            image_count = 0
        elif running.end != "cancelled":
            is_old = "prompt" in _inputs(running.call.body)
            output |= self._results(running) if is_old else {"finished": True, **self._choices(running)}
        return {**output, "task_metrics": {"TOTAL": total, "SUCCEEDED": image_count, "FAILED": total - image_count}}

    def _results(self, running: RunningJob) -> dict[str, object]:
        prompt = running.call.prompt
        results: list[dict[str, object]] = [{"orig_prompt": prompt, "url": link} for link in self.images(running)]
        code = running.fault.text("part_code", "DataInspectionFailed")
        missing = running.call.count - len(results)
        return {"results": [*results, *({"code": code, "message": _OUTPUT_POLICY} for _ in range(missing))]}

    def _choices(self, running: RunningJob) -> dict[str, object]:
        contents: list[list[dict[str, object]]] = [[{"type": "image", "image": link}] for link in self.images(running)]
        messages = [{"role": "assistant", "content": content} for content in contents]
        return {"choices": [{"finish_reason": "stop", "message": message} for message in messages]}

    def _usage(self, running: RunningJob) -> dict[str, object]:
        width, height = running.call.size
        count = len(running.links)
        if "prompt" in _inputs(running.call.body):
            return {"image_count": count}
        if _MODELS[0][0].match(running.call.model):
            return {"output_image_count": count, "input_image_count": 0, "width": width, "height": height}
        return {"image_count": count, "size": f"{width}*{height}", "input_tokens": 0, "output_tokens": 0}

    @staticmethod
    def _made(running: RunningJob) -> int:
        count = running.call.count
        return int(running.fault.number("images", count - 1 if running.job.end == "partial" else count))

    @staticmethod
    def _fault(running: RunningJob) -> tuple[str, str]:
        if running.job.end == "moderated":
            return "DataInspectionFailed", _OUTPUT_POLICY
        return running.fault.text("code", "InternalError.Algo"), running.fault.text("error", "The algorithm failed")

    def _cancel(self, name: str) -> Response:
        running = self.running.get(name)
        if running is None or not running.is_known or _status(running) != "PENDING" or not self.cancel(running):
            message = "Failed to cancel the task, please confirm if the task is in PENDING status."
            return refusal(400, "UnsupportedOperation", message)
        return as_json(200, {"request_id": self.new_id()})

    def _list(self, exchange: Exchange) -> Response:
        """Return a page of the jobs, the newest first, with neither prompts nor results."""
        query = exchange.query
        try:
            page, size = int(query.get("page_no", "1")), int(query.get("page_size", "10"))
        except ValueError:
            page, size = 0, 0
        if page < 1 or not 1 <= size <= 100:
            return refusal(400, "InvalidParameter", "page_no or page_size is invalid")
        model, status = query.get("model_name"), query.get("status")
        jobs = [
            running
            for running in reversed(self.running.values())
            if running.is_known and model in (None, running.call.model) and status in (None, _status(running))
        ]
        listed = jobs[(page - 1) * size : page * size]
        for running in listed:
            running.job.listed += 1
        body = {
            "request_id": self.new_id(),
            "data": [self._listed(running) for running in listed],
            "total": len(jobs),
            "total_page": ceil(len(jobs) / size),
            "page_no": page,
            "page_size": size,
        }
        return as_json(200, body)

    def _listed(self, running: RunningJob) -> dict[str, object]:
        created, ended = int(running.job.submitted_at * 1000), {}
        if running.is_over:
            ended = {"end_time": created + int(running.run_s * 1000)}
        return {
            "api_key_id": "1",
            "caller_parent_id": "2",
            "caller_uid": "3",
            "gmt_create": created,
            "model_name": running.call.model,
            "region": "cn-beijing",
            "request_id": self.new_id(),
            "start_time": created,
            "status": _status(running),
            "task_id": running.job.id,
            "user_api_unique_key": f"apikey:v1:aigc:text2image:image-synthesis:{running.call.model}",
            **ended,
        }


def _status(running: RunningJob) -> str:
    """Return the state of a job in the provider's words."""
    if running.end == "running":
        return "PENDING" if running.progress < running.fault.number("pending", 0.3) else "RUNNING"
    return {"cancelled": "CANCELED", "failed": "FAILED", "moderated": "FAILED"}.get(running.end, "SUCCEEDED")


def _beijing(moment: float) -> str:
    return (datetime.fromtimestamp(moment, UTC) + _BEIJING).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _inputs(fields: Mapping[str, object]) -> Mapping[str, object]:
    inputs = fields.get("input")
    return inputs if isinstance(inputs, dict) else {}


def _call_of(fields: Mapping[str, object]) -> JobCall | None:
    """Return the call of a body in any shape; None if it is none."""
    inputs, raw_parameters = _inputs(fields), fields.get("parameters")
    parameters: Mapping[str, object] = raw_parameters if isinstance(raw_parameters, dict) else {}
    model, prompt = fields.get("model"), inputs.get("prompt") or _prompt_of(inputs.get("messages"))
    count, seed = parameters.get("n", 4 if str(model).startswith("wan") else 1), parameters.get("seed")
    size = _SIZE.fullmatch(str(parameters.get("size", "1024*1024")))
    if not isinstance(model, str) or not isinstance(prompt, str) or not isinstance(count, int) or size is None:
        return None
    if not 1 <= count <= 6:
        return None
    return JobCall(
        prompt, model, fields, count, seed if isinstance(seed, int) else None, (int(size[1]), int(size[2])), "png"
    )


def _prompt_of(messages: object) -> str | None:
    """Return the text of the only message."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return None
    content = messages[0].get("content")
    texts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return next((text for text in texts if isinstance(text, str)), None)
