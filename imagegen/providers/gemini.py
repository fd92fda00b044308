"""Provider of Gemini's image models: https://ai.google.dev/gemini-api/docs/image-generation"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.providers.chat_images import ChatImagesProvider, is_chat_address
from imagegen.providers.gemini_requests import EDITS, Shapes, fields_of, path_of, sent_request, warnings_of
from imagegen.providers.gemini_responses import parse_generation, parse_model_list
from imagegen.providers.http_client import Account, ProviderClient
from imagegen.providers.model_rules import ModelTable
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs, count_of_models
from imagegen.tasks.request import GenerationRequest

_VERSION = re.compile(r"v[0-9]+(?:(?:alpha|beta)[0-9]*)?")
_GOOGLE = "googleapis.com"

ShapesOf = Callable[[str], Shapes]


def shapes_of(table: ModelTable) -> ShapesOf:
    """Return a function from a model to its aspect ratios and resolutions, by the table."""

    def shapes(model: str) -> Shapes:
        row = table.find(model)
        usual = Shapes(resolutions=row.resolutions if row else None)
        return replace(usual, ratios=row.ratios) if row and row.ratios else usual

    return shapes


def create_gemini(
    session: aiohttp.ClientSession, *, api_key: str, timeout_s: float, base_url: str, shapes_of: ShapesOf
) -> GeminiProvider | ChatImagesProvider:
    """Return the provider for an address: of Google's own API, or of a relay that has Gemini behind a chat.

    A base `/v1` of another host than Google is OpenAI's, as relays name theirs; so is Google's `/v1beta/openai`.
    """
    url = URL(base_url.strip().rstrip("/"))
    is_google = url.host is not None and url.host.endswith(_GOOGLE)
    if is_chat_address(base_url) or url.name == "openai" or (url.name == "v1" and not is_google):
        return ChatImagesProvider(
            session,
            name=GeminiProvider.name,
            base_url=base_url,
            api_key=api_key,
            timeout_s=timeout_s,
            shapes_of=shapes_of,
        )
    return GeminiProvider(session, api_key=api_key, timeout_s=timeout_s, base_url=base_url, shapes_of=shapes_of)


class GeminiProvider(WithoutJobs):
    """Provider of Gemini's own API.

    base_url: with or without the version (`/v1beta`). shapes_of: aspect ratios and resolutions of a model.

    Its API has no count: each call makes one image.
    """

    name = "gemini"
    max_images_per_call = 1
    images_inline = True

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        api_key: str,
        timeout_s: float,
        base_url: str,
        shapes_of: ShapesOf = lambda _model: Shapes(),
    ) -> None:
        base = URL(base_url.strip().rstrip("/")).with_user(None)
        if not _VERSION.fullmatch(base.name):
            base /= "v1beta"
        account = Account(secret=api_key, headers=(("x-goog-api-key", api_key),))
        self._upstream = ProviderClient(session, base, "", timeout_s, account)
        self._secret = api_key
        self._shapes_of = shapes_of
        self.own_hosts = self._upstream.own_hosts
        self.base_url: URL | None = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:  # noqa: ARG002 - the table of models has what differs
        return EDITS

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        shapes = self._shapes_of(call.request.model)
        path, fields = path_of(call.request.model), fields_of(call, shapes)
        answer = await self._upstream.submit(path, fields, observer)
        reply = parse_generation(answer, secret=self._secret, now_s=time.time())
        return replace(reply, images=reply.images[: call.count], warnings=warnings_of(call, shapes))

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request, self._shapes_of(request.model))

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_model_list(await self._upstream.get_json("models?pageSize=1000"))

    async def check_key(self) -> str:
        return count_of_models(await self.models())
