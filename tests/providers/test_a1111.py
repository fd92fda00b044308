"""Tests of calls to a Stable Diffusion web UI: fields, progress, errors."""

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpServer

from imagegen.errors import UpstreamError
from imagegen.providers.a1111 import A1111Provider, fields_of
from imagegen.providers.protocol import Provider
from imagegen.tasks.image import ImageBytes
from tests.emulated_jobs import Recorder
from tests.providers.conftest import MakeCall

PICTURE = b"png bytes"
B64 = base64.b64encode(PICTURE).decode()
DEADLINE_S = 30


@dataclass
class WebUi:
    """Fake web UI: answers a generation on request and shows the given progress."""

    url: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    progress: list[object] = field(default_factory=list)
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Callable[[], web.Response] = lambda: web.json_response({"images": [B64], "parameters": {}, "info": "{}"})

    async def txt2img(self, request: web.Request) -> web.Response:
        self.calls.append(await request.json())
        self.authorizations.append(request.headers.get("Authorization"))
        await self.finish.wait()
        return self.answer()

    async def get_progress(self, request: web.Request) -> web.Response:
        self.queries.append(request.query_string)
        value = self.progress.pop(0) if self.progress else None
        if not self.progress:
            self.finish.set()
        if value == "broken":
            return web.Response(status=500, text="<html>")
        return web.json_response(value)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response([{"title": "x.safetensors [abc]", "model_name": "x", "hash": "abc"}, {"title": "y"}])


@pytest.fixture
async def web_ui(aiohttp_server: AiohttpServer) -> WebUi:
    ui = WebUi()
    app = web.Application()
    app.router.add_post("/sdapi/v1/txt2img", ui.txt2img)
    app.router.add_get("/sdapi/v1/progress", ui.get_progress)
    app.router.add_get("/sdapi/v1/sd-models", ui.models)
    server = await aiohttp_server(app)
    ui.url = str(server.make_url("/"))
    return ui


def a1111(session: aiohttp.ClientSession, ui: WebUi, **more: Any) -> A1111Provider:
    return A1111Provider(session, base_url=ui.url, timeout_s=30, **({"default_model": "m"} | more))


async def test_a_generation_returns_its_images(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    web_ui.finish.set()
    web_ui.answer = lambda: web.json_response({"images": [B64, f"data:image/png;base64,{B64}", B64]})
    reply = await a1111(session, web_ui).generate(make_call(count=2), watcher)
    assert (reply.images, reply.warnings) == ((ImageBytes(PICTURE),) * 2, ())
    assert web_ui.calls == [{"prompt": "a cat", "width": 512, "height": 512, "seed": -1, "batch_size": 2}]
    assert (web_ui.authorizations, watcher.sent_count) == ([None], 1)


def test_client_parameters_are_sent_under_the_web_ui_names(make_call: MakeCall) -> None:
    call = make_call(count=1, seed=7, steps=20, negative_prompt="dogs", guidance_scale=6.5, model="other")
    assert fields_of(call, "m") == {
        "prompt": "a cat",
        "negative_prompt": "dogs",
        "width": 512,
        "height": 512,
        "steps": 20,
        "cfg_scale": 6.5,
        "seed": 7,
        "batch_size": 1,
        "override_settings": {"sd_model_checkpoint": "other"},
    }


def test_a_rejected_parameter_is_dropped(make_call: MakeCall) -> None:
    call = make_call(seed=7, steps=20, guidance_scale=6.5, without=["steps", "guidance_scale", "seed", "width"])
    assert fields_of(call, "m") == {"prompt": "a cat", "batch_size": 1}


async def test_unsupported_parameters_are_reported(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    web_ui.finish.set()
    reply = await a1111(session, web_ui).generate(make_call(output_format="png"), watcher)
    assert reply.warnings == ("output_format is not known to this provider and was left out",)


async def test_progress_is_reported_during_the_call_and_only_rises(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    values = [0, 0.25, 0.1, 0.5, 7, "text", True, None]
    web_ui.progress = [None, "broken", {}, [], *({"progress": value} for value in values), {"progress": 0.9}]
    async with asyncio.timeout(DEADLINE_S):
        await a1111(session, web_ui, poll_s=0.01).generate(make_call(), watcher)
    assert watcher.parts in ([0.25, 0.5, 0.9], [0.25, 0.5])
    assert set(web_ui.queries) == {"skip_current_image=true"}


async def test_progress_of_a_possibly_different_call_is_not_reported(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    web_ui.progress = [{"progress": 0.5}] * 8
    provider = a1111(session, web_ui, poll_s=0.01)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(provider.generate(make_call(), watcher) for _ in range(2)))
    assert (watcher.parts, len(web_ui.calls)) == ([], 2)


async def test_the_polling_ends_with_the_call(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    web_ui.finish.set()
    before = asyncio.all_tasks()
    await a1111(session, web_ui, poll_s=0.01).generate(make_call(), watcher)
    assert not [loop for loop in asyncio.all_tasks() - before if loop.get_name() == "a1111-progress"]


async def test_the_polling_ends_with_a_cancelled_call(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    loop = asyncio.create_task(a1111(session, web_ui, poll_s=0.01).generate(make_call(), watcher))
    async with asyncio.timeout(DEADLINE_S):
        await watcher.on_wire.wait()
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
    assert not [left for left in asyncio.all_tasks() if left.get_name() == "a1111-progress"]


async def test_an_error_of_the_watcher_is_raised(
    session: aiohttp.ClientSession,
    web_ui: WebUi,
    make_call: MakeCall,
    watcher: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_fraction: float) -> None:
        web_ui.finish.set()
        raise ZeroDivisionError

    monkeypatch.setattr(watcher, "progress", fail)
    web_ui.progress = [{"progress": 0.5}] * 100
    with pytest.raises(ZeroDivisionError):
        await a1111(session, web_ui, poll_s=0.01).generate(make_call(), watcher)


@pytest.mark.parametrize(
    ("status", "payload", "code", "detail"),
    [
        (
            500,
            {"error": "OutOfMemoryError", "detail": "", "errors": "CUDA out of memory"},
            "upstream_error",
            "CUDA out of memory",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "steps"], "msg": "too many"}]},
            "upstream_invalid_request",
            "steps: too many",
        ),
        (404, {"detail": "Not Found"}, "upstream_invalid_request", "Not Found"),
        (404, {"detail": "Model not found"}, "model_not_available", "Model not found"),
        (
            401,
            {"detail": "Incorrect username or password"},
            "upstream_auth",
            "The provider does not accept this service's key; the operator of this service must act",
        ),
        (200, {"parameters": {}}, "upstream_bad_response", "HTTP 200, nothing usable in it"),
    ],
)
async def test_a_refusal_has_its_code(
    session: aiohttp.ClientSession,
    web_ui: WebUi,
    make_call: MakeCall,
    watcher: Recorder,
    status: int,
    payload: dict[str, Any],
    code: str,
    detail: str,
) -> None:
    web_ui.finish.set()
    web_ui.answer = lambda: web.json_response(payload, status=status)
    with pytest.raises(UpstreamError) as caught:
        await a1111(session, web_ui).generate(make_call(), watcher)
    assert (caught.value.code, caught.value.detail) == (code, detail)


async def test_the_urls_user_and_password_become_basic_auth(
    session: aiohttp.ClientSession, web_ui: WebUi, make_call: MakeCall, watcher: Recorder
) -> None:
    web_ui.finish.set()
    web_ui.url = web_ui.url.replace("http://", "http://me:p%40ss@")
    provider = a1111(session, web_ui)
    await provider.generate(make_call(), watcher)
    assert web_ui.authorizations == ["Basic " + base64.b64encode(b"me:p@ss").decode()]
    assert "p@ss" not in repr(provider._upstream)


async def test_the_checkpoints_are_listed(session: aiohttp.ClientSession, web_ui: WebUi) -> None:
    assert await a1111(session, web_ui).models() == ({"id": "x", "type": "image"},)


async def test_a1111_implements_the_provider_interface(session: aiohttp.ClientSession, web_ui: WebUi) -> None:
    provider: Provider = a1111(session, web_ui)
    assert (provider.name, provider.max_images_per_call) == ("a1111", 4)
    assert provider.own_hosts == {web_ui.url.removeprefix("http://").rstrip("/")}
    await provider.close()
    assert not session.closed
