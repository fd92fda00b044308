"""Emulator of Together's image endpoint: its routes, and the order in which a call is judged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import monotonic, time
from typing import Final

import orjson
from aiohttp import hdrs, web

from . import delivery, emulated_models, faults, together_responses
from .base_emulator import ListeningEmulator
from .call_ledger import CallLedger, EmulatedCall
from .fault_schedule import UNREAD, Fault, FaultSchedule, UnknownFault
from .generation import Generation, ImageSettings, new_ids
from .image_files import ShortLinks
from .image_request import BadBody, ImageRequest, parse, parse_webui, request_of
from .input_files import BadForm, read_form
from .rate_limit import TokenBucket
from .together_responses import Response

_GENERATION_PATHS: Final[Mapping[str, str | None]] = {
    "/v1/images/generations": None,
    "/images/generations": None,
    "/v1/images/generations/async": "sub2api",
    "/v1/async/images/generations": "bifrost",
}
"""Routes of generations, with the dialect of the jobs that they begin."""

_EDIT_PATHS: Final[Mapping[str, str | None]] = {
    "/v1/images/edits": None,
    "/images/edits": None,
    "/v1/images/edits/async": "sub2api",
    "/v1/async/images/edits": "bifrost",
}
_WEBUI_PATHS: Final = frozenset(("/sdapi/v1/txt2img", "/sdapi/v1/img2img"))
_PAID_PATHS: Final = _GENERATION_PATHS.keys() | _EDIT_PATHS.keys() | _WEBUI_PATHS
_MODEL_PATHS: Final = frozenset(("/v1/models", "/models"))
_MAX_BODY_BYTES: Final = 20 * 1024 * 1024
_MAX_EDIT_BYTES: Final = 32 * 20 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """Behaviour of an emulator without a script or a fault in the prompt.

    port: 0 takes a free one; key: the only key accepted, else any; image: one of generation.IMAGE_MODES;
    fault: what every call gets, or a share `fail_rate` (0 to 1) of them; seed: makes chance repeatable;
    revived: vanished models that are served all the same; dialect: one of jobs.DIALECTS, if each call begins a job.
    """

    host: str = "127.0.0.1"
    port: int = 0
    delay_s: float = 0.0
    fault: str | None = None
    fail_rate: float = 1.0
    seed: int | None = None
    rate_per_minute: float | None = None
    image: str = "jpeg"
    key: str | None = None
    link_ttl_s: float = 3600.0
    revived: tuple[str, ...] = ()
    dialect: str | None = None


class Emulator(ListeningEmulator):
    """Emulator of Together's image endpoint, of OpenAI's, or of a relay's."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options = options or Options()
        super().__init__(options.host, options.port)
        rng = random.Random(options.seed)
        self.ledger = CallLedger()
        self._rng = rng
        self._links = ShortLinks(rng, options.link_ttl_s)
        self._studio = ImageSettings(rng, self._links, options.image)
        self._pace = TokenBucket(options.rate_per_minute)
        self._script = FaultSchedule(faults.check, random.Random(options.seed))
        self._script.set_default(options.fault, options.fail_rate, monotonic())

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if path in _PAID_PATHS and request.method == hdrs.METH_POST:
            return await self._generate(request, path)
        if path.startswith(("/shrt/", "/imgproxy/")):
            agent = request.headers.get(hdrs.USER_AGENT, "")
            return await self._answer(request, self._links.answer(path, _base_url(request), agent, monotonic()))
        if request.method == hdrs.METH_GET and (response := self._get(request, path)):
            return await self._answer(request, response)
        if path.startswith("/_emulator/"):
            return await self._answer(request, await self._operate(request, path))
        return await self._answer(request, together_responses.error("404_path", ""))

    async def _generate(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        request_id, ray = new_ids(self._rng)
        answer = self._refusal_unread(request, request_id, path)
        if answer is not None:
            call = EmulatedCall(time(), answer.outcome, paid=False)
        else:
            answer, call = await self._judge(request, path, request_id)
        call.path = path
        if answer.status != 429 and "x-ratelimit-limit" not in answer.headers:
            answer = answer.with_headers(self._pace.headers())
        self.ledger.opened(call)
        headers = {
            "x-request-id": request_id,
            "CF-RAY": ray,
            "x-together-traceid": f"{self._rng.getrandbits(128):032x}",
        }
        return await self._answer(request, answer.with_headers(headers), call)

    def _refusal_unread(self, request: web.BaseRequest, request_id: str, path: str) -> Response | None:
        """Return a refusal that does not depend on the body, None if there is none. A web UI has no keys."""
        if path not in _WEBUI_PATHS and not self._has_key(request):
            return together_responses.error("401", request_id)
        max_bytes = _MAX_BODY_BYTES if path in _GENERATION_PATHS else _MAX_EDIT_BYTES
        if (request.content_length or 0) > max_bytes:
            return together_responses.error("413", request_id)
        fault = self._script.take_unread(monotonic())
        return None if fault is None else Response(0, b"", delivery=fault.name)

    async def _judge(self, request: web.BaseRequest, path: str, request_id: str) -> tuple[Response, EmulatedCall]:
        try:
            image_request = await _read(request, path)
        except (BadBody, BadForm) as failure:
            return together_responses.invalid(str(failure), request_id), EmulatedCall(time(), 400, paid=False)
        try:
            answer = self._decide(
                Generation(
                    image_request, request_id, _base_url(request), self._studio, _key(request), self._dialect(path)
                )
            )
            if path in _WEBUI_PATHS:
                answer = together_responses.as_webui(answer)
        except UnknownFault as failure:
            answer = together_responses.invalid(f"emulator: {failure}", request_id)
        return answer, _call_of(image_request, answer)

    def _decide(self, generation: Generation) -> Response:
        """Return the response of the script, the prompt's marker, the rate limit or the model, else a good one."""
        fault = self._script.take(generation.image_request.prompt, monotonic())
        answer = self._decide_unscripted(generation) if fault is None else faults.plan(generation, fault)
        delay_s = self.options.delay_s if fault is None else fault.number("delay_s", self.options.delay_s)
        held = fault is not None and bool(fault.number("held", 0))
        return replace(answer, delay_s=delay_s, held=held) if delay_s or held else answer

    def _decide_unscripted(self, generation: Generation) -> Response:
        image_request, pace = generation.image_request, self._pace
        if not pace.admit(monotonic()):
            options = {"rate": pace.per_minute, "reset": pace.reset_s(), "headers": pace.headers()}
            return faults.plan(generation, Fault("429_model", options))
        if refusal := emulated_models.refusal(image_request, generation.request_id, self.options.revived):
            return refusal
        return generation.accept(Fault("job")) if generation.dialect else generation.answer()

    def _get(self, request: web.BaseRequest, path: str) -> Response | None:
        """Return the response to a poll, a list of models, or a look at the progress; None for other paths."""
        if path == "/sdapi/v1/progress":
            return Response(200, b'{"progress":0}')
        if path in _MODEL_PATHS:
            return self._list_models(request)
        return self._studio.jobs.answer(path, _key(request), request.headers)

    def _dialect(self, path: str) -> str | None:
        """Return the dialect of the job that a call begins; None if it is answered with images."""
        by_route = _GENERATION_PATHS.get(path) or _EDIT_PATHS.get(path)
        return by_route or (None if path in _WEBUI_PATHS else self.options.dialect)

    async def _answer(
        self, request: web.BaseRequest, answer: Response, call: EmulatedCall | None = None
    ) -> web.StreamResponse:
        is_connected = False
        try:
            if answer.held:
                await self._hold()
            if answer.delay_s:
                await asyncio.sleep(answer.delay_s)
            is_connected = delivery.is_there(request)
            return await delivery.deliver(request, answer)
        except asyncio.CancelledError:
            is_connected = False
            raise
        except ConnectionError:
            is_connected = False
            return web.Response()
        finally:
            if call is not None:
                self.ledger.closed(call, client_there=is_connected)

    def _list_models(self, request: web.BaseRequest) -> Response:
        if not self._has_key(request):
            return together_responses.error("401", "")
        served = [
            name
            for name in emulated_models.KNOWN
            if name not in emulated_models.RETIRED or name in self.options.revived
        ]
        # Return a bare array, as the `together` package up to 2.x needs it.
        return Response(
            200, orjson.dumps([{"id": name, "object": "model", "created": 0, "type": "image"} for name in served])
        )

    async def _operate(self, request: web.BaseRequest, path: str) -> Response:
        match (request.method, path.removeprefix("/_emulator/")):
            case ("GET", "ledger"):
                return Response(200, self.ledger.to_json(request.query.get("prompt", "")))
            case ("DELETE", "ledger"):
                self.ledger.clear()
            case ("GET", "script"):
                return Response(200, orjson.dumps(self._script.pending(monotonic())))
            case ("DELETE", "script"):
                self.clear_script()
            case ("POST", "script"):
                return self._add_steps(await request.content.read())
            case ("POST", "expire"):
                self.expire_links()
            case ("POST", "release"):
                self.release()
            case ("GET", "faults"):
                return Response(200, orjson.dumps(faults.names()))
            case _:
                return together_responses.error("404_path", "")
        return Response(204, b"")

    def _add_steps(self, raw: bytes) -> Response:
        try:
            sent = orjson.loads(raw)
            self.script(sent if isinstance(sent, list) else [sent])
        except (orjson.JSONDecodeError, UnknownFault) as failure:
            return together_responses.invalid(f"emulator: {failure}", "")
        return Response(204, b"")

    def _has_key(self, request: web.BaseRequest) -> bool:
        key = _key(request)
        return bool(key) and self.options.key in (None, key)


def _key(request: web.BaseRequest) -> str:
    """Return the bearer key of a request, empty if it has none."""
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def _read(request: web.BaseRequest, path: str) -> ImageRequest:
    """Return the request of a call. Raises BadBody, BadForm."""
    if path in _EDIT_PATHS and request.content_type == "multipart/form-data":
        fields, files = await read_form(request)
        return request_of(fields, files, as_base64=fields.get("response_format") != "url")
    raw = await request.content.read()
    return parse_webui(raw) if path in _WEBUI_PATHS else parse(raw)


def _base_url(request: web.BaseRequest) -> str:
    return f"http://{request.headers.get(hdrs.HOST, 'localhost')}"


def _call_of(image_request: ImageRequest, answer: Response) -> EmulatedCall:
    refused = answer.delivery == UNREAD or (answer.delivery == "plain" and 400 <= answer.status < 500)
    return EmulatedCall(
        received_at=time(),
        outcome=answer.outcome,
        paid=answer.job.charged if answer.job else not refused,
        body_hash=image_request.body_hash,
        prompt=image_request.prompt,
        model=image_request.model,
        n=image_request.n,
        seed=image_request.seed,
        body=image_request.body,
        inputs=image_request.inputs,
        job=answer.job,
    )
