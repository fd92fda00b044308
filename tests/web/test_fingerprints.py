"""Property tests: two bodies are one task exactly if every provider would be sent the same for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as some
from msgspec.structs import replace
from yarl import URL

from imagegen.providers import (
    a1111,
    bfl_requests,
    chat_images,
    dashscope_requests,
    fal_requests,
    gemini_requests,
    openai,
    replicate_requests,
    siliconflow,
    together,
)
from imagegen.providers.gemini import shapes_of
from imagegen.providers.model_table import load_table
from imagegen.providers.protocol import Call
from imagegen.providers.request_fields import Vocabulary, request_fields, sent_request
from imagegen.settings import PROVIDERS as SETTING_PROVIDERS
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.submission import TaskIdentity
from imagegen.tasks.validation import parse
from imagegen.web.openai import fields as v1
from tests.support import examples

MODELS = [
    "m",
    "gpt-image-2",
    "black-forest-labs/FLUX.1-kontext-pro",
    "google/flash-image-2.5",
    "a/flux-schnell",
    "a/nano-banana-2",
    "flux-2-flex",
    "flux-kontext-pro",
    "wan2.6-t2i",
    "gemini-2.5-flash-image",
    "gemini-3-pro-image",
    "Kwai-Kolors/Kolors",
    "Qwen/Qwen-Image",
    "Qwen/Qwen-Image-Edit",
]
KNOWN: dict[str, list[Any]] = {
    "model": MODELS,
    "steps": [4, 20],
    "seed": [7, 8],
    "negative_prompt": ["a dog", "fog"],
    "guidance_scale": [2, 2.0, "2", 3.5],
    "output_format": ["png", "webp"],
    "output_compression": [50, 80],
    "quality": ["low", "high"],
    "background": ["opaque", "transparent"],
    "moderation": ["low", "auto"],
    "style": ["vivid", "natural"],
    "input_fidelity": ["low", "high"],
    "disable_safety_checker": [True, False],
    "prompt_upsampling": [True, False],
    "image_loras": [[{"path": "a", "scale": 1}], [{"path": "a", "scale": 1.0}], [{"path": "b", "scale": 1}]],
    "n": [1, 2, "2"],
    "variant": [0, 1],
}
SHAPES = [
    {},
    {"width": 512, "height": 512},
    {"width": 1024, "height": 1024},
    {"width": "1024", "height": 1024.0},
    {"width": 1360, "height": 768},
    {"width": 1000, "height": 1000},
    {"aspect_ratio": "1:1"},
    {"aspect_ratio": "2:2"},
    {"aspect_ratio": "16:9"},
    {"aspect_ratio": "16:9", "resolution": "2K"},
    {"resolution": "1K"},
    {"resolution": "1k"},
    {"resolution": "2K"},
]
UNKNOWN: dict[str, list[Any]] = {
    "x_style": [1, 1.0, 2],
    "cfg_scale": [2, 3],
    "nested": [{"a": 1, "b": [1]}, {"b": [1]}],
}
BODIES = some.builds(
    lambda prompt, shape, fields, extra: ({"prompt": prompt} | shape | fields, extra),
    some.sampled_from(["a cat", " a cat\n", "a dog"]),
    some.sampled_from(SHAPES),
    some.fixed_dictionaries({}, optional={name: some.sampled_from(values) for name, values in KNOWN.items()}),
    some.fixed_dictionaries({}, optional={name: some.sampled_from(values) for name, values in UNKNOWN.items()}),
)

Build = Callable[[Call], dict[str, object]]
Reduce = Callable[[GenerationRequest], GenerationRequest]


NO_CALLS: Any = None
"""In place of the session of a provider that makes no call."""


def of_dialect(base: str) -> tuple[Build, Reduce]:
    provider = openai.OpenAICompatibleProvider(NO_CALLS, base_url=base, api_key="k", timeout_s=1)
    dialect = openai.dialect_of(URL(base))
    return lambda call: openai.fields_of(call, dialect.for_model(call.request.model)), provider.sent_request


def of_gemini() -> tuple[Build, Reduce]:
    shapes = shapes_of(load_table("gemini"))

    def build(call: Call) -> dict[str, object]:
        request = call.request
        fields = gemini_requests.fields_of(call, shapes(request.model))
        return fields | {"model": request.model}

    return build, lambda request: gemini_requests.sent_request(request, shapes(request.model))


def of_chat() -> tuple[Build, Reduce]:
    shapes = shapes_of(load_table("gemini"))
    chat = chat_images.ChatImagesProvider(
        NO_CALLS,
        name="gemini",
        base_url="https://relay.example/v1",
        api_key="k",
        timeout_s=1,
        shapes_of=shapes,
    )
    return lambda call: chat_images.fields_of(call, shapes(call.request.model)), chat.sent_request


PROVIDERS: dict[str, tuple[Build, Reduce]] = {
    "together": (
        lambda call: together.fields_of(call, "url"),
        lambda request: sent_request(request, together.VOCABULARY),
    ),
    "a1111": (lambda call: a1111.fields_of(call, "m"), lambda request: sent_request(request, a1111.VOCABULARY)),
    "sandbox": (
        lambda call: request_fields(call, Vocabulary()),
        lambda request: sent_request(request, Vocabulary()),
    ),
    "openai": of_dialect("https://api.openai.com/v1"),
    "xai": of_dialect("https://api.x.ai/v1"),
    "openai at siliconflow": of_dialect("https://api.siliconflow.cn/v1"),
    "gemini": of_gemini(),
    "chat": of_chat(),
    "siliconflow": (lambda call: siliconflow.fields_of(replace(call, count=1)), siliconflow.sent_request),
    "nebius": of_dialect("https://api.studio.nebius.com/v1"),
    "sd.cpp": of_dialect("http://127.0.0.1:1234/v1"),
    "vllm": of_dialect("http://127.0.0.1:8000/v1"),
    "localai": of_dialect("http://127.0.0.1:8080/v1"),
    "relay": of_dialect("https://relay.example/v1"),
    "fal": (lambda call: fal_requests.fields_of(call) | {"model": call.request.model}, fal_requests.sent_request),
    "replicate": (
        lambda call: replicate_requests.input_of(call) | {"model": call.request.model},
        replicate_requests.sent_request,
    ),
    "bfl": (lambda call: bfl_requests.fields_of(call) | {"model": call.request.model}, bfl_requests.sent_request),
    "dashscope": (dashscope_requests.fields_of, dashscope_requests.sent_request),
}


def test_each_provider_is_in_the_table() -> None:
    assert set(SETTING_PROVIDERS) <= set(PROVIDERS)


def on_api(body: Mapping[str, Any], extra: Mapping[str, Any]) -> GenerationRequest:
    return parse({**body, "extra": extra}, default_model="m", aliases={})


def on_v1(body: Mapping[str, Any], extra: Mapping[str, Any]) -> GenerationRequest:
    return v1.parse({**body, **extra}, default_model="m", aliases={}).request


@settings(max_examples=examples(100), deadline=None)
@given(
    BODIES,
    BODIES | some.none(),
    some.lists(some.sampled_from([*KNOWN, *UNKNOWN]), max_size=2),
    some.booleans(),
    some.booleans(),
)
def test_two_bodies_are_one_task_exactly_if_they_are_sent_alike(
    first: tuple[dict[str, Any], dict[str, Any]],
    second: tuple[dict[str, Any], dict[str, Any]] | None,
    removed: list[str],
    first_on_v1: bool,
    second_on_v1: bool,
) -> None:
    body, extra = second or tuple(
        {name: value for name, value in part.items() if name not in removed} for part in first
    )
    requests = [(on_v1 if first_on_v1 else on_api)(*first), (on_v1 if second_on_v1 else on_api)(body, extra)]
    for provider, (build, reduce) in PROVIDERS.items():
        identity = TaskIdentity(provider, "m", {}, None, sent_request=reduce)
        ids = [identity.submission(request, None).task_id for request in requests]
        sent = [(build(Call(request, request.n, 0, request.seed)), request.variant, request.n) for request in requests]
        assert (ids[0] == ids[1]) == (sent[0] == sent[1]), provider
