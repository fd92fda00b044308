"""Provider of image models behind OpenAI's chat/completions, as relays offer Gemini's.

https://openrouter.ai/docs/features/multimodal/image-generation
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.chat_responses import parse_chat, parse_chat_models
from imagegen.providers.gemini_requests import MAX_INPUT_IMAGES, Shapes, shape_fields, shape_warnings, sized_request
from imagegen.providers.http_client import Account, ProviderClient
from imagegen.providers.input_bodies import link_or_data_uri
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs, count_of_models
from imagegen.providers.request_fields import Vocabulary, left_out_warnings
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest

_PATH = "chat/completions"
_CHAT_HOSTS = frozenset({"openrouter.ai"})
"""Hosts that have images only behind a chat."""

VOCABULARY = Vocabulary(
    unknown=frozenset(
        {
            "steps",
            "negative_prompt",
            "guidance_scale",
            "output_format",
            "output_compression",
            "quality",
            "background",
            "moderation",
            "style",
            "input_fidelity",
            "disable_safety_checker",
            "prompt_upsampling",
            "image_loras",
        }
    )
)

_FORBIDDEN = frozenset({"messages", "image_config", "modalities"})
"""Names of `extra` that would change the prompt or the shape past our own fields."""


def is_chat_address(address: str) -> bool:
    """Return whether an address of OpenAI's kind makes its images by a chat: by its path, or by its host."""
    url = URL(address.strip())
    return url.path.rstrip("/").endswith(f"/{_PATH}") or url.host in _CHAT_HOSTS


class ChatImagesProvider(WithoutJobs):
    """Provider of images behind a chat.

    name: of the provider in the settings. base_url: with or without `/chat/completions`.

    shapes_of: aspect ratios and resolutions of a model. A chat answers with one image a call.
    """

    max_images_per_call = 1
    images_inline = True

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        timeout_s: float,
        shapes_of: Callable[[str], Shapes] = lambda _model: Shapes(),
    ) -> None:
        self.name = name
        base = URL(base_url.strip().rstrip("/").removesuffix(_PATH).rstrip("/")).with_user(None)
        if base.path in ("", "/"):
            base = base.with_path("/api/v1" if base.host in _CHAT_HOSTS else "/v1")
        account = Account(f"Bearer {api_key}" if api_key else None, api_key or "")
        self._upstream = ProviderClient(session, base, _PATH, timeout_s, account)
        self._base = base
        self._secret = api_key or ""
        self._shapes_of = shapes_of
        self.own_hosts = self._upstream.own_hosts
        self.base_url: URL | None = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:  # noqa: ARG002 - the table of models has what differs
        return Edits(max_images=MAX_INPUT_IMAGES)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        shapes = self._shapes_of(call.request.model)
        answer = await self._upstream.submit(_PATH, fields_of(call, shapes), observer)
        reply = parse_chat(answer, secret=self._secret, now_s=time.time())
        warnings = (*left_out_warnings(call, VOCABULARY), *shape_warnings(call.request, shapes))
        return replace(reply, images=reply.images[: call.count], warnings=warnings)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sized_request(sent_in_words(request, VOCABULARY), self._shapes_of(request.model))

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_chat_models(await self._upstream.get_json("models"))

    async def check_key(self) -> str:
        if self._base.host in _CHAT_HOSTS:  # its list of models needs no key
            await self._upstream.get_json("key")
            return ""
        return count_of_models(await self.models())


def fields_of(call: Call, shapes: Shapes) -> dict[str, object]:
    """Return the body of a call. Raises UpstreamError for a field of `extra` that has a place outside of it."""
    request = call.request
    extra = {name: value for name, value in (request.extra or {}).items() if name not in call.without}
    if forbidden := _FORBIDDEN & extra.keys():
        detail = f"extra must not contain {min(forbidden)}: use the fields of a request in its place"
        raise UpstreamError("upstream_invalid_request", detail)
    images = [link_or_data_uri(call.input(source)) for source in request.input_images]
    parts = [{"type": "text", "text": request.prompt}]
    content = [*parts, *({"type": "image_url", "image_url": {"url": image}} for image in images)]
    fields: dict[str, object] = {
        "model": request.model,
        "messages": [{"role": "user", "content": content if images else request.prompt}],
        "modalities": ["image", "text"],
    }
    if shape := shape_fields(call, shapes, ratio="aspect_ratio", resolution="image_size"):
        fields["image_config"] = shape
    if call.seed is not None and "seed" not in call.without:
        fields["seed"] = call.seed
    return fields | extra
