"""Good response of one call: its id, its images, and their links or bytes."""

from __future__ import annotations

import random
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_letters, digits
from time import monotonic
from typing import Final

from . import emulated_models, gpt_image, small_images, together_responses
from .fault_schedule import Fault
from .image_files import ShortLinks, spoiled_bytes
from .image_request import ImageRequest
from .jobs import Jobs
from .small_images import DrawnImage
from .together_responses import Entry, Response

IMAGE_MODES: Final = ("jpeg", "png", "tiny", "none")

_ALPHABET: Final = ascii_letters + digits
_TINY_SIDE: Final = 8


def new_ids(rng: random.Random) -> tuple[str, str]:
    """Return a request id as in the captures, and the CF-RAY that is a part of it."""
    ray = f"{rng.getrandbits(64):016x}-PDX"
    return f"o{''.join(rng.choices(_ALPHABET, k=6))}-2kFHot-{ray}", ray


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Settings that all generations share. `image` is one of IMAGE_MODES."""

    rng: random.Random
    links: ShortLinks
    image: str
    jobs: Jobs = field(default_factory=Jobs)


@dataclass(frozen=True, slots=True)
class Generation:
    """One request about to be answered. dialect: of the job that it begins, None if it is answered with images."""

    image_request: ImageRequest
    request_id: str
    base_url: str
    studio: ImageSettings
    key: str = ""
    dialect: str | None = None

    def entries(self, *, count: int | None = None, fault: Fault | None = None, same: bool = False) -> list[Entry]:
        """Return `count` images, else as many as requested; an image fault spoils them. same: whether all are equal."""
        seed = self.studio.rng.getrandbits(63) if self.image_request.seed is None else self.image_request.seed
        number = self.image_request.n if count is None else count
        return [self._entry(index, 0 if same else index, seed, fault) for index in range(number)]

    def answer(self, entries: Sequence[Entry] | None = None) -> Response:
        made = self.entries() if entries is None else entries
        if gpt_image.is_for_openai(self.image_request) and all("b64_json" in entry for entry in made):
            return gpt_image.answer(self.image_request, made)
        return together_responses.image_response(self.request_id, self.image_request.model, made)

    def accept(self, fault: Fault) -> Response:
        """Return the acceptance of a job. Raises UnknownFault."""
        return self.studio.jobs.accept(self, fault)

    def _entry(self, index: int, shown: int, seed: int, fault: Fault | None) -> Entry:
        inference_s = 0.3 + self.studio.rng.random()
        spoiled = fault if fault is not None and fault.number("index", index) == index else None
        image = self._image(small_images.digest_of(self.image_request.prompt, seed, shown))
        if self.image_request.wants_base64 or (gpt_image.is_for_openai(self.image_request) and self.dialect is None):
            encoded = b64encode(spoiled_bytes(image, spoiled)).decode()
            return together_responses.base64_entry(index, encoded, inference_s)
        return together_responses.link_entry(index, self.base_url + self._link(image, spoiled), inference_s)

    def _image(self, digest: str) -> DrawnImage:
        mode = self.studio.image
        if mode in ("tiny", "none"):
            return DrawnImage("png", _TINY_SIDE, _TINY_SIDE, digest)
        return DrawnImage(
            self.image_request.output_format or mode, *emulated_models.size_of(self.image_request), digest
        )

    def _link(self, image: DrawnImage, fault: Fault | None) -> str:
        links = self.studio.links
        if self.studio.image == "none":
            return f"/shrt/{links.new_token()}"
        return links.mint(image, fault, monotonic())
