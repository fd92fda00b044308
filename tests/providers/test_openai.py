"""Tests of calls to OpenAI-compatible services: the fields of each, and their common responses."""

import base64
from typing import Any

import aiohttp
import aioresponses.core
import pytest
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.openai import Dialect, OpenAICompatibleProvider, dialect_of, fields_of
from imagegen.providers.protocol import Provider
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.emulated_jobs import Recorder
from tests.providers.conftest import MakeCall, ScriptedUpstream
from tests.support import over_rows

KEY = "sk-not-a-real-key"
IMAGE = b"picture bytes"
B64 = base64.b64encode(IMAGE).decode()
EVERYTHING = {
    "width": 1024,
    "height": 768,
    "steps": 8,
    "negative_prompt": "dogs",
    "guidance_scale": 2.5,
    "output_format": "png",
}
PLAIN = {"model": "m", "prompt": "a cat"}


def provider(
    session: aiohttp.ClientSession, base_url: str, api_key: str | None = KEY, **more: Any
) -> OpenAICompatibleProvider:
    return OpenAICompatibleProvider(session, base_url=base_url, api_key=api_key, timeout_s=30, **more)


@over_rows(
    ("base_url", "expected"),
    [
        ("https://api.openai.com/v1", {"size": "1024x768", "output_format": "png"}),
        (
            "https://api.tokenfactory.nebius.com/v1",
            {
                "width": 1024,
                "height": 768,
                "num_inference_steps": 8,
                "negative_prompt": "dogs",
                "guidance_scale": 2.5,
                "seed": 3,
                "response_extension": "png",
                "response_format": "b64_json",
            },
        ),
        ("https://api.x.ai/v1", {"aspect_ratio": "4:3", "resolution": "1k", "response_format": "b64_json"}),
        (
            "https://api.siliconflow.cn/v1",
            {
                "image_size": "1024x768",
                "num_inference_steps": 8,
                "negative_prompt": "dogs",
                "guidance_scale": 2.5,
                "seed": 3,
            },
        ),
        (
            "http://127.0.0.1:8080",
            {
                "prompt": "a cat|dogs",
                "size": "1024x768",
                "step": 8,
                "guidance_scale": 2.5,
                "seed": 3,
                "output_format": "png",
                "response_format": "b64_json",
            },
        ),
        (
            "http://gpu-box:8000/v1",
            {
                "size": "1024x768",
                "num_inference_steps": 8,
                "negative_prompt": "dogs",
                "guidance_scale": 2.5,
                "seed": 3,
                "output_format": "png",
                "response_format": "b64_json",
            },
        ),
        ("http://127.0.0.1:1234", {"size": "1024x768", "output_format": "png", "response_format": "b64_json"}),
        (
            "https://gateway.example.com/v1",
            {
                "size": "1024x768",
                "steps": 8,
                "negative_prompt": "dogs",
                "guidance_scale": 2.5,
                "seed": 3,
                "output_format": "png",
                "response_format": "b64_json",
            },
        ),
    ],
)
def test_each_service_gets_its_own_field_names(make_call: MakeCall, base_url: str, expected: dict[str, Any]) -> None:
    call = make_call(seed=3, **EVERYTHING)
    assert fields_of(call, dialect_of(URL(base_url))) == PLAIN | expected


def test_only_what_the_client_gave_is_sent(make_call: MakeCall) -> None:
    assert fields_of(make_call(), Dialect()) == PLAIN | {"size": "512x512", "response_format": "b64_json"}


def test_a_count_over_one_is_sent_as_n(make_call: MakeCall) -> None:
    assert fields_of(make_call(count=3), Dialect())["n"] == 3


@over_rows(
    ("without", "gone"),
    [
        ("steps", "num_inference_steps"),
        ("seed", "seed"),
        ("negative_prompt", "negative_prompt"),
        ("output_format", "output_format"),
        ("response_format", "response_format"),
        ("width", "size"),
        ("size", "size"),
    ],
)
def test_a_rejected_parameter_is_dropped(make_call: MakeCall, without: str, gone: str) -> None:
    call = make_call(seed=3, without=[without], **EVERYTHING)
    dialect = Dialect(steps_name="num_inference_steps")
    assert fields_of(make_call(seed=3, **EVERYTHING), dialect).keys() - fields_of(call, dialect).keys() == {gone}


def test_a_rejected_negative_prompt_is_not_appended_to_the_prompt(make_call: MakeCall) -> None:
    call = make_call(negative_prompt="dogs", without=["negative_prompt"])
    assert fields_of(call, Dialect(negative_name=None))["prompt"] == "a cat"


@over_rows("model", ["gpt-image-1.5", "openai/gpt-image-2"])
def test_a_gpt_image_model_is_strict_behind_a_gateway(make_call: MakeCall, model: str) -> None:
    fields = fields_of(make_call(seed=3, **EVERYTHING | {"model": model}), Dialect().for_model(model))
    assert fields == {"model": model, "prompt": "a cat", "size": "1024x768", "output_format": "png"}
    assert Dialect().for_model("my-gpt-image") == Dialect()


def test_a_large_size_requests_2k(make_call: MakeCall) -> None:
    fields = fields_of(make_call(width=2048, height=1024), dialect_of(URL("https://api.x.ai/v1")))
    assert (fields["resolution"], fields["aspect_ratio"]) == ("2k", "2:1")


async def test_dropped_parameters_are_reported(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://api.openai.com/v1/images/generations", payload={"created": 1, "data": [{"b64_json": B64}]})
    call = make_call(seed=3, without=["negative_prompt"], **EVERYTHING | {"model": "gpt-image-1.5"})
    reply = await provider(session, "http://api.openai.com/v1").generate(call, watcher)
    assert reply.images == (ImageBytes(IMAGE),)
    assert reply.warnings == tuple(
        f"{name} is not known to this provider and was left out" for name in ("guidance_scale", "steps")
    )


async def test_a_size_replaced_by_an_aspect_ratio_is_reported(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://api.x.ai/v1/images/generations", payload={"data": [{"url": "https://imgen.x.ai/a.jpg"}]})
    reply = await provider(session, "http://api.x.ai").generate(make_call(), watcher)
    assert reply.images == (ImageLink("https://imgen.x.ai/a.jpg"),)
    assert reply.warnings == ("this provider takes an aspect ratio instead of a size: 1:1 was requested",)


async def test_siliconflows_images_list_is_read(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    payload = {"images": [{"url": "https://sf.example/a.png"}], "timings": {"inference": 1.2}, "seed": 5}
    upstream.post("http://api.siliconflow.cn/v1/images/generations", payload=payload)
    reply = await provider(session, "http://api.siliconflow.cn/v1").generate(make_call(), watcher)
    assert (reply.images, reply.warnings) == ((ImageLink("https://sf.example/a.png"),), ())


async def test_a_custom_dialect_can_be_configured(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://api.example.com/v1/images/generations", payload={"data": [B64, B64]})
    dialect = Dialect(size_style="width_height", response_format="url", max_images_per_call=6)
    own = provider(session, "http://api.example.com", dialect=dialect)
    reply = await own.generate(make_call(), watcher)
    assert (reply.images, own.max_images_per_call) == ((ImageBytes(IMAGE),), 6)
    assert not own.images_inline
    assert upstream.request.fields == PLAIN | {"width": 512, "height": 512, "response_format": "url"}


@pytest.mark.parametrize(("api_key", "sent"), [(KEY, f"Bearer {KEY}"), (None, None), ("", None)])
async def test_the_key_is_sent_only_if_configured(
    session: aiohttp.ClientSession,
    upstream: ScriptedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    api_key: str | None,
    sent: str | None,
) -> None:
    upstream.post("http://gpu-box:11434/v1/images/generations", payload={"data": []})
    await provider(session, "http://gpu-box:11434/", api_key).generate(make_call(), watcher)
    assert upstream.request.headers.get("Authorization") == sent


async def test_user_and_password_become_basic_auth_and_are_in_no_link(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://gpu-box:11434/v1/images/generations", payload={"data": []})
    own = provider(session, "http://me:p%40ss@gpu-box:11434", None)
    await own.generate(make_call(), watcher)
    assert upstream.request.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert own.own_hosts == {"gpu-box:11434"}


async def test_a_base_path_is_preserved(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://api.deepinfra.com/v1/openai/images/generations", payload={"data": []})
    await provider(session, "http://api.deepinfra.com/v1/openai/").generate(make_call(), watcher)
    assert upstream.request.fields["response_format"] == "b64_json"


@pytest.mark.parametrize(
    ("status", "answer", "code", "refused"),
    [
        (
            400,
            {"error": {"message": "Unknown parameter: 'steps'.", "param": "steps"}},
            "upstream_invalid_request",
            ("steps",),
        ),
        (400, {"error": {"message": "Your request was rejected by the safety system."}}, "content_policy", ()),
        (
            404,
            {"error": {"message": "The model does not exist", "code": "model_not_found"}},
            "model_not_available",
            (),
        ),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, "upstream_invalid_request", ()),
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}, "upstream_auth", ()),
    ],
)
async def test_a_refusal_has_its_code_and_no_key(
    session: aiohttp.ClientSession,
    upstream: ScriptedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    status: int,
    answer: dict[str, Any],
    code: str,
    refused: tuple[str, ...],
) -> None:
    upstream.post("http://api.openai.com/v1/images/generations", status=status, payload=answer)
    with pytest.raises(UpstreamError) as caught:
        await provider(session, "http://api.openai.com/v1").generate(make_call(), watcher)
    assert (caught.value.code, caught.value.refused) == (code, refused)
    assert KEY not in caught.value.detail


async def test_models_are_listed_with_and_without_a_type(
    session: aiohttp.ClientSession, mocked: aioresponses.aioresponses
) -> None:
    models = [{"id": "gpt-image-1.5", "object": "model"}, {"id": "m", "type": "image"}, {"id": "c", "type": "chat"}]
    mocked.get("http://api.openai.com/v1/models", payload={"object": "list", "data": models})
    assert [model["id"] for model in await provider(session, "http://api.openai.com/v1").models()] == [
        "gpt-image-1.5",
        "m",
    ]


async def test_openai_implements_the_provider_interface(session: aiohttp.ClientSession) -> None:
    openai: Provider = provider(session, "http://api.openai.com/v1")
    assert (openai.name, openai.max_images_per_call, openai.own_hosts) == ("openai", 10, frozenset({"api.openai.com"}))
    assert openai.images_inline
    assert provider(session, "http://u:p@127.0.0.1:8080").own_hosts == {"127.0.0.1:8080"}
    await openai.close()
    assert not session.closed
