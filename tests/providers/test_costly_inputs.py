"""Input images that would take a decoder minutes, or hundreds of megabytes."""

from collections.abc import AsyncGenerator, Callable

import aiohttp
import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.a1111 import A1111Provider
from imagegen.providers.protocol import Call, InputImage
from imagegen.providers.sandbox import SandboxProvider
from tests.emulated_jobs import Recorder
from tests.image_bytes import image_file, with_scans
from tests.providers.conftest import MakeCall

IMAGE, MASK = (f"upload:{digit * 64}" for digit in "af")


def input_image(data: bytes) -> InputImage:
    async def read() -> AsyncGenerator[bytes, None]:
        yield data

    return InputImage("image/png", len(data), read)


def edit(make_call: MakeCall, image: bytes, mask: bytes | None = None) -> Call:
    """Return a call with an input image, and a mask."""
    inputs = {IMAGE: input_image(image)} | ({} if mask is None else {MASK: input_image(mask)})
    call = make_call(image_url=IMAGE, mask=None if mask is None else MASK)
    return Call(call.request, call.count, seed=call.seed, without=call.without, inputs=inputs)


COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a progressive JPEG of many scans": (lambda: with_scans(10_000, progressive=True), "scans"),
    "a JPEG of many scans": (lambda: with_scans(10_000), "scans"),
    "a JPEG that is held as a whole": (lambda: with_scans(3, 6_000), "pixels"),
    "a large WebP": (lambda: image_file(kind="WEBP", size=(5_000, 5_000)), "pixels"),
}


@pytest.mark.parametrize("name", COSTLY)
async def test_an_input_image_that_is_costly_to_decode_is_refused(
    make_call: MakeCall, watcher: Recorder, session: aiohttp.ClientSession, name: str
) -> None:
    make_image, reason = COSTLY[name]
    image = make_image()
    webui = A1111Provider(session, base_url="http://127.0.0.1:7860", timeout_s=30)
    for refused in (
        SandboxProvider(0).generate(edit(make_call, image), watcher),
        SandboxProvider(0).generate(edit(make_call, image_file(), image), watcher),
        webui.generate(edit(make_call, image_file(), image), watcher),
    ):
        with pytest.raises(UpstreamError, match=reason) as error:
            await refused
        assert error.value.code == "upstream_invalid_request"
