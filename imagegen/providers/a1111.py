"""Provider of a Stable Diffusion web UI (AUTOMATIC1111, Forge, SD.Next, sd.cpp): `/sdapi/v1`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.http_client import Account, ProviderClient, basic_authorization
from imagegen.providers.input_bodies import Base64Image
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs, count_of_models
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, request_fields, sent_request
from imagegen.tasks.request import GenerationRequest

_TXT2IMG, _IMG2IMG = "sdapi/v1/txt2img", "sdapi/v1/img2img"
_PROGRESS = "sdapi/v1/progress?skip_current_image=true"
_MODELS = "sdapi/v1/sd-models"

VOCABULARY = Vocabulary(
    words={"guidance_scale": "cfg_scale", "n": "batch_size"},
    unknown=frozenset(
        {
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
    ),
)

_RANDOM_SEED = -1


class A1111Provider(WithoutJobs):
    """Provider of one web UI.

    base_url: `http://127.0.0.1:7860`, with `user:password@` where the web UI runs with `--api-auth`.

    default_model: the service's own default, which means the web UI's loaded checkpoint.
    """

    name = "a1111"
    max_concurrent_calls = 1
    """The web UI makes one image at a time, behind a lock; a second call would spend its time limit in that queue."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        base_url: str,
        timeout_s: float,
        default_model: str = "",
        max_images_per_call: int = 4,
        poll_s: float = 1.0,
    ) -> None:
        url = URL(base_url.strip().rstrip("/"))
        self._upstream = ProviderClient(
            session,
            url.with_user(None),
            _TXT2IMG,
            timeout_s,
            Account(basic_authorization(url), url.password or ""),
        )
        self._default_model = default_model
        self._poll_s = poll_s
        self._running = 0
        self.max_images_per_call = max_images_per_call
        self.images_inline = True
        self.own_hosts = self._upstream.own_hosts
        self.base_url = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:  # noqa: ARG002 - the same for every checkpoint
        return Edits(max_images=1, mask=True, links=False)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        fields, path = fields_of(call, self._default_model), _TXT2IMG
        if call.request.image_sources:
            fields, path = fields | await _input_fields(call), _IMG2IMG
        async with self._progress_reported(observer):
            reply = await self._upstream.generate(fields, observer, path)
        return replace(reply, images=reply.images[: call.count], warnings=left_out_warnings(call, VOCABULARY))

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request, VOCABULARY)

    async def models(self) -> tuple[Mapping[str, object], ...]:
        listing = await self._upstream.get_json(_MODELS)
        entries = listing if isinstance(listing, list) else []
        names = [entry.get("model_name") for entry in entries if isinstance(entry, dict)]
        return tuple({"id": name, "type": "image"} for name in names if isinstance(name, str))

    async def check_key(self) -> str:
        return count_of_models(await self.models())

    @asynccontextmanager
    async def _progress_reported(self, observer: CallObserver) -> AsyncIterator[None]:
        self._running += 1
        loop = asyncio.create_task(self._report_progress(observer), name="a1111-progress")
        try:
            yield
        finally:
            self._running -= 1
            loop.cancel()
            await asyncio.wait([loop])
            if not loop.cancelled():
                loop.result()

    async def _report_progress(self, observer: CallObserver) -> None:
        """Report the progress of the web UI's one running job, only while that job must be this call's."""
        reported = 0.0
        while True:
            await asyncio.sleep(self._poll_s)
            with suppress(UpstreamError):
                fraction = _fraction(await self._upstream.get_json(_PROGRESS))
                if self._running == 1 and reported < fraction <= 1:
                    reported = fraction
                    observer.progress(fraction)


def fields_of(call: Call, default_model: str) -> dict[str, object]:
    """Return the fields to send; the sampler, and the checkpoint unless a model was named, stay the web UI's own."""
    fields = {"seed": _RANDOM_SEED, "batch_size": 1} | request_fields(call, VOCABULARY)
    if "seed" in call.without:
        del fields["seed"]
    model = fields.pop("model")
    if model != default_model:
        settings = fields.get("override_settings")
        fields["override_settings"] = (settings if isinstance(settings, dict) else {}) | {"sd_model_checkpoint": model}
    return fields


async def _input_fields(call: Call) -> dict[str, object]:
    """Return the image to start from and the mask, which is white where the image is to be changed."""
    images = [Base64Image(call.input_bytes(source)) for source in call.request.input_images]
    fields: dict[str, object] = {"init_images": images}
    if call.request.mask is not None:
        data = await call.input_bytes(call.request.mask).read_all()
        fields["mask"] = base64.b64encode(await asyncio.to_thread(_white_where_changed, data)).decode()
    return fields


def _white_where_changed(mask: bytes) -> bytes:
    # Pillow costs start time and memory that only those who need it should pay.
    from imagegen.providers.drawing.input_thumbnails import UnreadableInput, white_where_changed  # noqa: PLC0415

    try:
        return white_where_changed(mask)
    except UnreadableInput as error:
        raise UpstreamError("upstream_invalid_request", f"The mask can't be decoded: {error}") from error


def _fraction(progress: object) -> float:
    value = progress.get("progress") if isinstance(progress, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
