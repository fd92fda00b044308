"""Emulator of Gemini's generateContent, and of a relay that has the same models behind a chat.

    python -m imagegen.emulator.job_command gemini --port 8790

    PROVIDER=gemini GEMINI_API_KEY=any GEMINI_API_URL=http://127.0.0.1:8790 imagegen
    PROVIDER=gemini GEMINI_API_KEY=any GEMINI_API_URL=http://127.0.0.1:8790/v1/chat/completions imagegen

https://ai.google.dev/api/generate-content and https://openrouter.ai/docs/features/multimodal/image-generation

A call is answered at once, so its job is over with the response: job_s= is how long that takes. Further options of the
switch `job`: reason= (of a moderated image), blocked= (of a moderated prompt), text= (in place of the image), empty=1
(no image, and no word), charged=1 (a moderated image is charged), thought=1 (a draft precedes the image), and of the
chat form= (`images`, `markdown`, `link`, `parts`).
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic, time
from typing import ClassVar, Final

import orjson

from .fault_schedule import Fault
from .job_emulator import Exchange, JobCall, JobEmulator, RunningJob, after_loss
from .small_images import DrawnImage, digest_of, draw
from .together_responses import HTML, Response

IMAGE_TOKENS: Final[Mapping[str, int]] = {"512": 747, "1K": 1290, "2K": 1680, "4K": 2520}
"""By resolution; 1,290 are those of Gemini 2.5."""

INPUT_USD, TEXT_USD, IMAGE_USD = 0.3e-6, 2.5e-6, 30e-6
"""Of a token of gemini-2.5-flash-image."""

TEXT_TOKENS: Final = 20
_THOUGHTS: Final = 40
_INPUT_IMAGE_TOKENS: Final = 258
_GENERATE: Final = re.compile(r"/v1(?:beta|alpha)?/models/([\w.%-]+):generateContent")
_CHAT: Final = re.compile(r"(?:/api/v1|/v1|/v1beta/openai)/chat/completions")
_MODELS: Final = ("gemini-2.5-flash-image", "gemini-3-pro-image", "gemini-3.1-flash-image", "gemini-2.5-flash")
_SIZES: Final = {"512": 512, "1K": 1024, "2K": 2048, "4K": 4096}
_QUOTA: Final = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, "
    "head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n* Quota exceeded for metric: "
    "generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: {}, model: gemini-2.5-flash-image\n"
    "Please retry in {}s."
)


def error(status: int, word: str, message: str, *details: Mapping[str, object]) -> Response:
    """Return an error: https://ai.google.dev/gemini-api/docs/troubleshooting"""
    fields: dict[str, object] = {"code": status, "message": message, "status": word}
    if details:
        fields["details"] = list(details)
    return Response(status, orjson.dumps({"error": fields}, option=orjson.OPT_INDENT_2))


def _reason(word: str) -> dict[str, object]:
    kind = "type.googleapis.com/google.rpc.ErrorInfo"
    return {"@type": kind, "reason": word, "domain": "googleapis.com"}


def _retry_in(seconds: float) -> dict[str, object]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds:g}s"}


class GeminiEmulator(JobEmulator):
    """Emulator of Gemini: every model is served. The key is Google's header or a bearer token."""

    name = "gemini"
    refusals: ClassVar[Mapping[str, Response]] = {
        "400": error(400, "INVALID_ARGUMENT", "Request contains an invalid argument."),
        "400_field": error(
            400,
            "INVALID_ARGUMENT",
            "Invalid JSON payload received. Unknown name \"imageSize\" at 'generation_config.image_config': Cannot "
            "find field.",
        ),
        "400_key": error(
            400,
            "INVALID_ARGUMENT",
            "API key not valid. Please pass a valid API key.",
            _reason("API_KEY_INVALID"),
        ),
        "400_expired": error(
            400, "INVALID_ARGUMENT", "API key expired. Please renew the API key.", _reason("API_KEY_INVALID")
        ),
        "400_region": error(
            400,
            "FAILED_PRECONDITION",
            "User location is not supported for the API use without a billing account linked.",
        ),
        "400_location": error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."),
        "403": error(403, "PERMISSION_DENIED", "Your API key was reported as leaked. Please use another API key."),
        "403_billing": error(
            403, "PERMISSION_DENIED", "This API method requires billing to be enabled.", _reason("BILLING_DISABLED")
        ),
        "404": error(
            404,
            "NOT_FOUND",
            "models/gemini-0 is not found for API version v1beta, or is not supported for generateContent. Call "
            "ListModels to see the list of available models and their supported methods.",
        ),
        "429": error(429, "RESOURCE_EXHAUSTED", _QUOTA.format(10, 12), _retry_in(12)),
        "429_short": error(429, "RESOURCE_EXHAUSTED", _QUOTA.format(10, 1), _retry_in(1)),
        "429_text": error(429, "RESOURCE_EXHAUSTED", _QUOTA.format(10, 7.5)),
        "429_free": error(429, "RESOURCE_EXHAUSTED", _QUOTA.format(0, 49), _retry_in(49)),
        "429_credits": error(
            429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted. Please go to AI Studio to add credits."
        ),
        "499": error(499, "CANCELLED", "The operation was cancelled."),
        "500": error(500, "INTERNAL", "An internal error has occurred. Please retry."),
        "502": Response(502, b"<html><title>Error 502 (Server Error)!!1</title></html>", HTML),
        "503": error(503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
        "504": error(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
    }

    def new_id(self) -> str:
        return "".join(self.rng.choices("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789_-", k=23))

    def charges(self, end: str, fault: Fault) -> bool:
        """Return whether a call that ends so is charged: a withheld image only if it was made."""
        is_withheld = end == "moderated" or bool(fault.text("blocked", ""))
        return bool(fault.number("charged", 0)) if is_withheld else end != "failed"

    def answer(self, exchange: Exchange) -> Response | None:
        generate, chat = _GENERATE.fullmatch(exchange.path), _CHAT.fullmatch(exchange.path)
        is_paid = bool(generate or chat) and exchange.method == "POST"
        key = exchange.headers.get("x-goog-api-key", "") or exchange.headers.get("Authorization", "").partition(" ")[2]
        if not self.accepts(key.strip()):
            refusal = self.refusals["400_key"] if generate or "beta" in exchange.path else _unauthorized()
            return self.refuse(exchange, refusal) if is_paid else refusal
        if is_paid:
            return self._paid(exchange, key.strip(), generate[1] if generate else None)
        if exchange.method == "GET" and exchange.path.endswith("/models"):
            return _models(in_chat="beta" not in exchange.path)
        return None

    def _paid(self, exchange: Exchange, key: str, model: str | None) -> Response:
        """Return the response to a paid call. model: None in a chat, which names it in the body."""
        fields = exchange.fields() or {}
        call = _chat_call(fields) if model is None else _call(model, fields)
        if not call.prompt:
            return self.refuse(exchange, self.refusals["400"])
        running = self.begin(exchange, key, call)
        return running if isinstance(running, Response) else self._answered(running, in_chat=model is None)

    def _answered(self, running: RunningJob, *, in_chat: bool) -> Response:
        """Return the response to a call, after the time that it takes; its job is over with that."""
        job, fault = running.job, running.fault
        if job.end == "failed":
            answer = self.refusals["500"]
        else:
            usage = self._usage(running)
            body = self._chat(running, usage) if in_chat else self._candidates(running, usage)
            answer = Response(200, orjson.dumps(body, option=0 if in_chat else orjson.OPT_INDENT_2))
            job.collected = not job.answer_lost
        answer = after_loss(running, answer)
        return replace(answer, delay_s=fault.number("job_s", self.options.job_s), job=job)

    @staticmethod
    def _usage(running: RunningJob) -> dict[str, int]:
        """Return the tokens of a call, and set what it costs."""
        call, fault = running.call, running.fault
        drawn = 0 if _has_no_image(running) else IMAGE_TOKENS.get(str(call.body.get("_size")), IMAGE_TOKENS["1K"])
        if running.job.end == "moderated" and running.job.charged:
            drawn = IMAGE_TOKENS["1K"]
        written = TEXT_TOKENS if fault.text("text", "") else 0
        thought = _THOUGHTS if fault.number("thought", 0) else 0
        input_image_tokens = _INPUT_IMAGE_TOKENS * int(str(call.body.get("_inputs") or 0))
        prompt_tokens = 4 + len(call.prompt) // 4
        if "cost" not in fault.options:
            dollars = (
                (prompt_tokens + input_image_tokens) * INPUT_USD + (written + thought) * TEXT_USD + drawn * IMAGE_USD
            )
            running.job.cost_usd = round(dollars, 9)
        return {
            "asked": prompt_tokens,
            "shown": input_image_tokens,
            "drawn": drawn,
            "written": written,
            "thought": thought,
        }

    def _image_of(self, running: RunningJob, index: int) -> DrawnImage:
        return self._image(running.call, digest_of(running.call.prompt, self.seed_of(running), index))

    def _candidates(self, running: RunningJob, usage: Mapping[str, int]) -> dict[str, object]:
        job, fault = running.job, running.fault
        body: dict[str, object] = {
            "usageMetadata": _usage_metadata(usage),
            "modelVersion": running.call.model,
            "responseId": job.id,
        }
        if blocked := fault.text("blocked", ""):
            return {"promptFeedback": {"blockReason": blocked}, **body}
        candidate: dict[str, object] = {"finishReason": "STOP", "index": 0}
        if job.end == "moderated":
            candidate["finishReason"] = fault.text("reason", "IMAGE_SAFETY")
            candidate["finishMessage"] = "Unable to show the generated image."
        elif fault.number("empty", 0):
            candidate["finishReason"] = "NO_IMAGE"
        elif text := fault.text("text", ""):
            candidate["content"] = {"parts": [{"text": text}], "role": "model"}
        else:
            parts = [self._part(running, 0)]
            if fault.number("thought", 0):
                parts.insert(0, {**self._part(running, 7), "thought": True})
            candidate["content"] = {"parts": parts, "role": "model"}
        return {"candidates": [candidate], **body}

    def _part(self, running: RunningJob, index: int) -> dict[str, object]:
        image = self._image_of(running, index)
        return {"inlineData": {"mimeType": image.content_type, "data": b64encode(draw(image)).decode()}}

    def _chat(self, running: RunningJob, usage: Mapping[str, int]) -> dict[str, object]:
        job, fault = running.job, running.fault
        message: dict[str, object] = {"role": "assistant", "content": fault.text("text", "")}
        choice: dict[str, object] = {"index": 0, "finish_reason": "stop", "message": message}
        if job.end == "moderated":
            choice |= {"finish_reason": "content_filter", "native_finish_reason": fault.text("reason", "IMAGE_SAFETY")}
        elif not _has_no_image(running):
            image = self._image_of(running, 0)
            uri = f"data:{image.content_type};base64,{b64encode(draw(image)).decode()}"
            link = running.base_url + self._links.mint(image, None, monotonic())
            match fault.text("form", "images"):
                case "markdown":
                    message["content"] = f"Here is your image:\n\n![image]({uri})\n"
                case "link":
                    message["content"] = f"![image]({link})\n\n[Download]({link})"
                case "parts":
                    message["content"] = [
                        {"type": "text", "text": "Done."},
                        {"type": "image_url", "image_url": {"url": uri}},
                    ]
                case _:
                    message["images"] = [{"type": "image_url", "image_url": {"url": uri}}]
        input_tokens, output_tokens = (
            usage["asked"] + usage["shown"],
            usage["drawn"] + usage["written"] + usage["thought"],
        )
        return {
            "id": f"gen-{job.id}",
            "object": "chat.completion",
            "created": int(time()),
            "model": running.call.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": input_tokens,
                "completion_tokens": output_tokens,
                "total_tokens": input_tokens + output_tokens,
                "completion_tokens_details": {"image_tokens": usage["drawn"], "reasoning_tokens": usage["thought"]},
                "cost": job.cost_usd if job.charged else 0,
            },
        }


def _has_no_image(running: RunningJob) -> bool:
    fault = running.fault
    is_blocked = running.job.end == "moderated" or bool(fault.text("blocked", ""))
    return is_blocked or bool(fault.number("empty", 0) or fault.text("text", ""))


def _usage_metadata(usage: Mapping[str, int]) -> dict[str, object]:
    input_tokens, output_tokens = usage["asked"] + usage["shown"], usage["drawn"] + usage["written"]
    prompt = [{"modality": "TEXT", "tokenCount": usage["asked"]}]
    if usage["shown"]:
        prompt.append({"modality": "IMAGE", "tokenCount": usage["shown"]})
    metadata: dict[str, object] = {
        "promptTokenCount": input_tokens,
        "totalTokenCount": input_tokens + output_tokens + usage["thought"],
        "promptTokensDetails": prompt,
    }
    if output_tokens:
        metadata["candidatesTokenCount"] = output_tokens
    if usage["drawn"]:
        metadata["candidatesTokensDetails"] = [{"modality": "IMAGE", "tokenCount": usage["drawn"]}]
    if usage["thought"]:
        metadata["thoughtsTokenCount"] = usage["thought"]
    return metadata


def _unauthorized() -> Response:
    return Response(401, orjson.dumps({"error": {"message": "No auth credentials found", "code": 401}}))


def _models(*, in_chat: bool) -> Response:
    if in_chat:
        data = [{"id": f"google/{name}", "object": "model", "created": 0} for name in _MODELS]
        return Response(200, orjson.dumps({"object": "list", "data": data}))
    models = [{"name": f"models/{name}", "supportedGenerationMethods": ["generateContent"]} for name in _MODELS]
    return Response(200, orjson.dumps({"models": models}))


def _call(model: str, fields: Mapping[str, object]) -> JobCall:
    """Return the call of a generateContent body, with the resolution and the count of its input images."""
    contents, config = fields.get("contents"), fields.get("generationConfig")
    first = contents[0] if isinstance(contents, list) and contents else None
    parts = first.get("parts") if isinstance(first, dict) else None
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    config = config if isinstance(config, dict) else {}
    shape, seed = config.get("imageConfig"), config.get("seed")
    size = shape.get("imageSize", "1K") if isinstance(shape, dict) else "1K"
    prompt = " ".join(str(part["text"]) for part in parts if "text" in part)
    inputs = sum("inlineData" in part for part in parts)
    return _job_call(prompt, model, {**fields, "_size": size, "_inputs": inputs}, seed)


def _chat_call(fields: Mapping[str, object]) -> JobCall:
    messages, shape = fields.get("messages"), fields.get("image_config")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    prompt = " ".join(str(part.get("text")) for part in parts if part.get("type") == "text")
    inputs = sum(part.get("type") == "image_url" for part in parts)
    size = shape.get("image_size", "1K") if isinstance(shape, dict) else "1K"
    body = {**fields, "_size": size, "_inputs": inputs}
    return _job_call(prompt, str(fields.get("model") or ""), body, fields.get("seed"))


def _job_call(prompt: str, model: str, body: Mapping[str, object], seed: object) -> JobCall:
    side = _SIZES.get(str(body["_size"]), 1024)
    return JobCall(prompt, model, body, 1, seed if isinstance(seed, int) else None, (side, side))
