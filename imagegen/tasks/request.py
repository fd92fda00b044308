"""The request of a task: its stored form, its canonical form and the fingerprint."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta, Struct

MAX_IMAGES = 16
UNIT_PIXELS = 512 * 512
MAX_SEED = 2**63 - 1
UPLOAD_PREFIX = "upload:"
UPLOAD_PATTERN = rf"{UPLOAD_PREFIX}[0-9a-f]{{64}}"
"""The id of an uploaded image: its SHA-256."""

_MAX_EXACT = 2.0**53
"""The largest number up to which each whole one has its own float."""

_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Lora(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Adapter weights that a model adds. path: an address or id of the weights; scale: their part."""

    path: str
    scale: float


class GenerationRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """Parameters that change the image, as stored. Required fields have no default, so they are always written.

    `validation.parse` checks the limits; `from_json` checks only `n` again, which decides how many calls are paid for.

    width, height: pixels; computed from aspect_ratio and resolution if those were given.
    variant: 0 for the first image of these parameters; never sent upstream.
    image_url, reference_images, mask: addresses, or `upload:` and the SHA-256 of stored bytes.
    extra: unknown fields; sent upstream unchanged.
    """

    prompt: str
    model: str
    width: int
    height: int
    n: Annotated[int, Meta(ge=1, le=MAX_IMAGES)]
    steps: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    output_format: str | None = None
    image_url: str | None = None
    reference_images: tuple[str, ...] | None = None
    mask: str | None = None
    aspect_ratio: str | None = None
    resolution: str | None = None
    variant: int = 0
    output_compression: int | None = None
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    input_fidelity: str | None = None
    disable_safety_checker: bool | None = None
    prompt_upsampling: bool | None = None
    image_loras: tuple[Lora, ...] | None = None
    extra: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, in snake_case."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @property
    def input_images(self) -> tuple[str, ...]:
        """Return the images to start from, without the mask."""
        others = self.reference_images or ()
        return others if self.image_url is None else (self.image_url, *others)

    @property
    def image_sources(self) -> tuple[str, ...]:
        """Return the input images and the mask."""
        return self.input_images if self.mask is None else (*self.input_images, self.mask)

    @property
    def units(self) -> int:
        """Return the weight of the request for rate limits: its pixels in images of 512 x 512, at least its `n`."""
        return max(self.n, -(-self.n * self.width * self.height // UNIT_PIXELS))

    def to_json(self) -> bytes:
        """Return the stored form, which `from_json` reads."""
        return _encode(self)

    @classmethod
    def from_json(cls, stored_json: bytes) -> Self:
        """Read the output of `to_json`. Raises ValueError for anything else."""
        try:
            return msgspec.json.decode(stored_json, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ValueError(f"no stored request: {error}") from error

    def canonical(self, provider: str, scope: str | None) -> bytes:
        """Return the JSON of everything that changes the image: sorted keys, no nulls, whole numbers as integers.

        The provider is part of it, so that a sandbox image is never served as a real one. `scope` is the client's key
        name if each key has its own tasks.
        """
        return _encode_sorted(self.canonical_fields(provider, scope))

    def canonical_fields(self, provider: str, scope: str | None) -> dict[str, Any]:
        """Return the fields of the canonical form, not sorted."""
        fields = self.to_dict()
        fields["provider"] = provider
        if scope is not None:
            fields["scope"] = scope
        scale = self.guidance_scale
        if isinstance(scale, float) and scale.is_integer():
            fields["guidance_scale"] = int(scale)
        if self.extra:
            fields["extra"] = _whole_numbers(self.extra)
        return fields


def _whole_numbers(value: Any) -> Any:
    """Return a JSON value with `1.0` as `1`, which is the same number."""
    if isinstance(value, dict):
        return {name: _whole_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(part) for part in value]
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT
    return int(value) if is_whole else value


def fingerprint(canonical: bytes, secret: str | None) -> str:
    """Return the task id: the MD5 of the canonical request, or its HMAC if a secret is set. 32 hex digits."""
    if secret:
        return hmac.digest(secret.encode(), canonical, "md5").hex()
    return hashlib.md5(canonical, usedforsecurity=False).hexdigest()


def fingerprints(start: bytes, ends: Iterable[bytes], secret: str | None) -> tuple[str, ...]:
    """Return the fingerprints of canonical requests that begin with the same bytes, which are hashed once."""
    begun = hmac.new(secret.encode(), start, "md5") if secret else hashlib.md5(start, usedforsecurity=False)
    names = []
    for end in ends:
        whole = begun.copy()
        whole.update(end)
        names.append(whole.hexdigest())
    return tuple(names)


def request_digest(canonical: bytes) -> str:
    """Return 32 hex digits of the canonical request's SHA-256, compared on a hit because MD5 has collisions."""
    return hashlib.sha256(canonical).hexdigest()[:32]
