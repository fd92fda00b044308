"""Family of a request: the requests that differ from it only in `n`, so that their images fit each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from imagegen.tasks.call_plan import variant_seed
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import MAX_IMAGES, MAX_SEED, GenerationRequest, fingerprints, request_digest
from imagegen.tasks.task import Task

_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class RequestFamily(Struct, frozen=True, gc=False):
    """A request, and what else its canonical form and its fingerprint depend on."""

    request: GenerationRequest
    provider: str
    scope: str | None
    secret: str | None

    def __repr__(self) -> str:
        return f"RequestFamily({self.request!r})"

    def sibling_ids(self) -> tuple[str, ...]:
        """Return the task ids of the same request with every other `n`."""
        before, after = self._around_n()
        ends = [b"%d%b" % (n, after) for n in range(1, MAX_IMAGES + 1) if n != self.request.n]
        return fingerprints(before, ends, self.secret)

    def digest(self, n: int) -> str:
        """Return the digest of the request with another `n`."""
        return request_digest(replace(self.request, n=n).canonical(self.provider, self.scope))

    def _around_n(self) -> tuple[bytes, bytes]:
        """Return the canonical request before and after the value of `n`, which is never its first or last field."""
        fields = self.request.canonical_fields(self.provider, self.scope)
        before = {name: value for name, value in fields.items() if name < "n"}
        after = {name: value for name, value in fields.items() if name > "n"}
        return _encode_sorted(before)[:-1] + b',"n":', b"," + _encode_sorted(after)[1:]


class ReusedImages(Struct, frozen=True, gc=False):
    """Images that a new task has before its first call, and the warnings of the task that made them."""

    images: tuple[StoredImage, ...] = ()
    warnings: tuple[str, ...] = ()


ReuseImages = Callable[[str, RequestFamily, Sequence[Task]], Awaitable[ReusedImages]]
"""Stores images of finished tasks for the task of an id too. Raises StoreUnavailable, QueueUnavailable."""

CountReusable = Callable[[RequestFamily, Sequence[Task]], Awaitable[int]]
"""Returns how many images of finished tasks another task could have. Raises StoreUnavailable."""


def reusable_images(family: RequestFamily, finished: Task) -> list[tuple[int | None, StoredImage]]:
    """Return the images of a finished task that a request with another `n` may have too, each with its place.

    Without a seed an image stays at its own place; an image beyond `n` fits at any free place: None. With a seed an
    image fits only if the same seed would be sent for its place: the first seed and the place of the first image of its
    call. It is not if the image was requested again.
    """
    request, first_seed = family.request, _first_seed(family, finished)
    if first_seed is None:
        own = [(image.index, image) for image in finished.images if image.index < request.n]
        return [*own, *((None, image) for image in finished.images if image.index >= request.n)]
    fitting: list[tuple[int | None, StoredImage]] = []
    first_index, sent_seed = -1, None
    for image in finished.images:
        if first_index < 0 or image.seed != sent_seed:
            first_index, sent_seed = image.index, image.seed
        if image.index < request.n and sent_seed == (first_seed + first_index) % (MAX_SEED + 1):
            fitting.append((image.index, image))
    return fitting


def _first_seed(family: RequestFamily, finished: Task) -> int | None:
    """Return the seed of the first image; a variant has a separate one, unless the model took none."""
    request = family.request
    if request.seed is not None or not request.variant or all(image.seed is None for image in finished.images):
        return request.seed
    return variant_seed(request, family.provider)
