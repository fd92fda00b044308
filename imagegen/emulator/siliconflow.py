"""Emulator of SiliconFlow's images API: https://docs.siliconflow.cn/en/api-reference/images/images-generations

    python -m imagegen.emulator.job_command siliconflow --port 8790

    PROVIDER=siliconflow SILICONFLOW_API_KEY=any SILICONFLOW_API_URL=http://127.0.0.1:8790 imagegen

A call is answered at once, so its job is over with the response: job_s= is how long that takes. `batch_size` counts for
Kolors alone, as at SiliconFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Final

import orjson

from .job_emulator import Exchange, JobCall, JobEmulator, RunningJob, after_loss
from .together_responses import HTML, Response

_MODELS: Final = ("Kwai-Kolors/Kolors", "Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509")
_MAX_BATCH: Final = 4


def fault(status: int, code: int, message: str) -> Response:
    """Return an error: https://docs.siliconflow.cn/en/faqs/error-code"""
    return Response(status, orjson.dumps({"code": code, "message": message, "data": None}))


class SiliconFlowEmulator(JobEmulator):
    """Emulator of SiliconFlow: a few models are served; others do not exist."""

    name = "siliconflow"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": fault(400, 20015, "The parameter is invalid. Please check again."),
        "400_model": fault(400, 20012, "Model does not exist. Please check it carefully."),
        "401": Response(401, b'"Invalid token"'),
        "403": fault(403, 30011, "The model requires real-name authentication. Please complete it first."),
        "403_balance": fault(403, 30001, "Sorry, your account balance is insufficient"),
        "403_disabled": fault(403, 30003, "Model disabled."),
        "404": Response(404, b"404 page not found", "text/plain"),
        "429": fault(429, 50603, "Request was rejected due to rate limiting. Details: IPM limit reached."),
        "429_day": fault(429, 50604, "Request was rejected due to rate limiting. Details: IPD limit reached."),
        "451": fault(451, 60300, "The prompt contains sensitive content. Please change it and try again."),
        "500": fault(500, 50500, "Unknown error, please contact us with the trace id."),
        "502": Response(502, b"<html>502 Bad Gateway</html>", HTML),
        "503": fault(503, 50505, "Model service overloaded. Please try again later."),
        "504": Response(504, b"<html>504 Gateway Time-out</html>", HTML),
    }

    def new_id(self) -> str:
        return f"ti_{''.join(self.rng.choices('abcdefghijklmnopqrstuvwxyz0123456789', k=20))}"

    def answer(self, exchange: Exchange) -> Response | None:
        is_paid = exchange.method == "POST" and exchange.path == "/v1/images/generations"
        key = exchange.headers.get("Authorization", "").partition(" ")[2].strip()
        if not self.accepts(key):
            return self.refuse(exchange, self.refusals["401"]) if is_paid else self.refusals["401"]
        if exchange.method == "GET" and exchange.path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in _MODELS]
            return Response(200, orjson.dumps({"object": "list", "data": data}))
        if not is_paid:
            return None
        fields = exchange.fields()
        prompt = fields.get("prompt") if fields else None
        if fields is None or not isinstance(prompt, str) or not prompt:
            return self.refuse(exchange, self.refusals["400"])
        if fields.get("model") not in _MODELS:
            return self.refuse(exchange, self.refusals["400_model"])
        running = self.begin(exchange, key, _call(prompt, fields))
        return running if isinstance(running, Response) else self._answered(running)

    def _answered(self, running: RunningJob) -> Response:
        """Return the response to a call, after the time that it takes; its job is over with that."""
        job = running.job
        if job.end in ("failed", "expired"):
            answer = self.refusals["500"]
        elif job.end == "moderated":
            answer = self.refusals["451"]
        else:
            images = [{"url": link} for link in self.images(running)]
            fields = {"images": images, "timings": {"inference": running.run_s}, "seed": self.seed_of(running)}
            answer = Response(200, orjson.dumps(fields), headers={"x-siliconcloud-trace-id": job.id})
            job.collected = not job.answer_lost
        delay_s = running.fault.number("job_s", self.options.job_s)
        return replace(after_loss(running, answer), delay_s=delay_s, job=job)


def _call(prompt: str, fields: Mapping[str, object]) -> JobCall:
    count, seed, model = fields.get("batch_size", 1), fields.get("seed"), str(fields["model"])
    width, _, height = str(fields.get("image_size", "1024x1024")).partition("x")
    has_size = width.isdigit() and height.isdigit()
    return JobCall(
        prompt,
        model,
        fields,
        min(count, _MAX_BATCH) if "Kolors" in model and isinstance(count, int) else 1,
        seed if isinstance(seed, int) else None,
        (int(width), int(height)) if has_size else (1024, 1024),
    )
