"""Provider without network and key: it draws the prompt's words onto a generated image.

The same prompt, seed, index, size and format give the same bytes; without a seed, images that are generated
again (`Cache-Control: no-cache`) differ from the earlier ones. The drawing is in `drawing/`.

Words in a prompt that let a developer try the rarer ways, here only:

    [slow:5]                      the image takes 5 seconds (at most 600)
    [fail:content_policy]         every call fails with this task error code (docs/api.md)
    [fail:upstream_error:2]       the first two calls fail, the third draws

`upstream_rate_limited` fails once where no number is given: waiting out a 429 is no attempt, so it would never end.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs
from imagegen.providers.request_fields import Vocabulary, sent_request
from imagegen.tasks.image import ImageBytes

if TYPE_CHECKING:
    from imagegen.providers.drawing.input_thumbnails import InputThumbnails
    from imagegen.providers.drawing.render import Drawing

_MAX_SLOW_S = 600.0
_MAX_REMEMBERED = 1_000
_SLOW = re.compile(r"\[slow:([0-9]{1,4}(?:\.[0-9]{1,3})?)\]")
_FAIL = re.compile(r"\[fail:([a-z_]{1,40})(?::([0-9]{1,4}))?\]")

_STATUSES: Mapping[str, int | None] = {
    "content_policy": 422,
    "upstream_invalid_request": 400,
    "upstream_auth": 401,
    "upstream_billing": 402,
    "model_not_available": 404,
    "upstream_rate_limited": 429,
    "upstream_overloaded": 503,
    "upstream_error": 500,
    "upstream_timeout": None,
    "upstream_bad_response": 200,
}
_RETRYABLE = {"upstream_rate_limited", "upstream_overloaded", "upstream_error", "upstream_timeout"}


class SandboxProvider(WithoutJobs):
    """Provider that draws each image in about `delay_s` seconds, never on the event loop."""

    name = "sandbox"
    max_images_per_call = 1
    images_inline = True
    own_hosts: frozenset[str] = frozenset()
    base_url = None
    sent_request = staticmethod(partial(sent_request, vocabulary=Vocabulary()))
    """Its size is in pixels."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._failures: OrderedDict[tuple[str, int | None, int], int] = OrderedDict()

    def edits(self, model: str) -> Edits | None:  # noqa: ARG002 - it draws every model
        return Edits(mask=True, links=False)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        """Draw the call's images one after the other. Raises UpstreamError if the prompt requests it."""
        inputs = await _inputs(call) if call.request.image_sources else None
        observer.sent()
        delay_s = _slow_s(call.request.prompt, self._delay_s)
        error = self._failure(call)
        if error is not None:
            await asyncio.sleep(delay_s)
            raise error
        images = [await _draw(call, nth, delay_s, observer, inputs) for nth in range(call.count)]
        return Reply(images=tuple(images))

    async def models(self) -> tuple[Mapping[str, object], ...]:
        """Return one entry; every other model id is drawn too."""
        return ({"id": "sandbox", "object": "model", "type": "image", "display_name": "imagegen sandbox"},)

    async def check_key(self) -> None:
        """Return None: there is no key."""

    def _failure(self, call: Call) -> UpstreamError | None:
        """Return the error that the prompt requests, for as many calls as it requests."""
        match = _FAIL.search(call.request.prompt)
        error = _error(match.group(1)) if match else None
        if match is None or error is None:
            return None
        times = int(match.group(2)) if match.group(2) else 1 if error.code == "upstream_rate_limited" else None
        key = (call.request.prompt, call.seed, call.first_index)
        failed = self._failures.pop(key, 0)
        if times is not None and failed >= times:
            return None
        self._failures[key] = failed + 1
        if len(self._failures) > _MAX_REMEMBERED:
            self._failures.popitem(last=False)
        return error


async def _draw(
    call: Call, nth: int, delay_s: float, observer: CallObserver, inputs: InputThumbnails | None
) -> ImageBytes:
    """Draw one image in four steps, spread over `delay_s`; each is reported when it is done."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()

    async def rest(share: float) -> None:
        await asyncio.sleep(max(0.0, started_s + delay_s * share - loop.time()))

    def done(part: float) -> None:
        observer.progress((nth + part) / call.count)

    picture = await asyncio.to_thread(_image, call, nth)
    await rest(0.2)
    await asyncio.to_thread(picture.paint)
    done(0.4)
    await rest(0.5)
    await asyncio.to_thread(picture.blur_card)
    done(0.6)
    await rest(0.75)
    await asyncio.to_thread(picture.write_words)
    if inputs is not None:
        await asyncio.to_thread(picture.show_inputs, inputs)
    done(0.8)
    await rest(1.0)
    data = await asyncio.to_thread(picture.encode)
    done(1.0)
    return ImageBytes(data)


def _image(call: Call, nth: int) -> Drawing:
    # Pillow costs start time and memory that only those who draw should pay.
    from imagegen.providers.drawing.render import Drawing, DrawingSpec  # noqa: PLC0415

    request = call.request
    return Drawing(
        DrawingSpec(
            prompt=request.prompt,
            seed=None if call.seed is None else call.seed + nth,
            index=call.first_index + nth,
            repeat=call.repeat if call.seed is None else 0,
            width=request.width,
            height=request.height,
            output_format=request.output_format or "png",
        )
    )


async def _inputs(call: Call) -> InputThumbnails:
    """Read the input images and the mask, one after the other. Raises UpstreamError if one can't be decoded."""
    from imagegen.providers.drawing.input_thumbnails import InputThumbnails, UnreadableInput, thumbnail  # noqa: PLC0415 - as above

    request = call.request
    try:
        small = [
            await asyncio.to_thread(thumbnail, await call.input_bytes(source).read_all())
            for source in request.image_sources
        ]
    except UnreadableInput as error:
        raise UpstreamError("upstream_invalid_request", f"An input image can't be decoded: {error}") from error
    return InputThumbnails(small) if request.mask is None else InputThumbnails(small[:-1], small[-1])


def _slow_s(prompt: str, usual_s: float) -> float:
    match = _SLOW.search(prompt)
    return min(float(match.group(1)), _MAX_SLOW_S) if match else usual_s


def _error(code: str) -> UpstreamError | None:
    """Return the error of this code, as retryable as the real one; None if unknown."""
    if code not in _STATUSES:
        return None
    return UpstreamError(
        code,
        f"The prompt asked the sandbox to fail with {code}",
        retryable=code in _RETRYABLE,
        ambiguous=code == "upstream_timeout",
        retry_after_s=2.0 if code == "upstream_rate_limited" else None,
        status=_STATUSES[code],
    )
