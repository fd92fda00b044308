"""Receiver's side of webhooks: https://www.standardwebhooks.com"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import Struct

from imagegen.client.exceptions import WebhookRejected
from imagegen.client.results import ImageTask

TOLERANCE_S = 300.0

_PREFIX = "whsec_"
_NEEDED = ("webhook-id", "webhook-timestamp", "webhook-signature")


class _Body(Struct, frozen=True):
    type: str
    timestamp: datetime
    data: ImageTask


class WebhookEvent(Struct, frozen=True):
    """Verified webhook.

    id: the same on every try of a delivery, so that a receiver can skip repeats.
    type: `image.completed`, `image.failed` or `image.cancelled`.
    """

    id: str
    type: str
    timestamp: datetime
    task: ImageTask


class WebhookVerifier:
    """Verifier of webhooks that are signed with a secret.

    Args:
        secret: `whsec_` and base64; several while one replaces another.
        clock: Unix time.
    """

    def __init__(self, secret: str | Sequence[str], *, clock: Callable[[], float] = time.time) -> None:
        secrets = [secret] if isinstance(secret, str) else list(secret)
        if not secrets:
            raise ValueError("a secret is needed")
        self._keys = [_key_of(text) for text in secrets]
        self._clock = clock

    def verify(self, body: bytes, headers: Mapping[str, str]) -> WebhookEvent:
        """Return the webhook of a request. body: its bytes as they came. Raises WebhookRejected."""
        by_name = {name.lower(): value for name, value in headers.items()}
        try:
            event_id, sent_at, signatures = (by_name[name] for name in _NEEDED)
        except KeyError as error:
            raise WebhookRejected(f"the header {error.args[0]} is missing") from error
        if not sent_at.isascii() or not sent_at.isdecimal() or abs(self._clock() - int(sent_at[:12])) > TOLERANCE_S:
            raise WebhookRejected("the webhook is too old, or the clocks differ by more than 5 minutes")
        signed = f"{event_id}.{sent_at}.".encode() + body
        if not self._is_signed(signed, signatures):
            raise WebhookRejected("no signature is valid for the secret")
        try:
            parsed = msgspec.json.decode(body, type=_Body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WebhookRejected("the body is no webhook of an image task") from error
        return WebhookEvent(event_id, parsed.type, parsed.timestamp, parsed.data)

    def _is_signed(self, signed: bytes, signatures: str) -> bool:
        expected = [hmac.new(key, signed, hashlib.sha256).digest() for key in self._keys]
        for text in signatures.split(" "):
            version, _, encoded = text.partition(",")
            try:
                signature = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                continue
            if version == "v1" and any(hmac.compare_digest(signature, valid) for valid in expected):
                return True
        return False


def _key_of(secret: str) -> bytes:
    encoded = secret.removeprefix(_PREFIX)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the secret must be whsec_ and base64") from error
    if not key:
        raise ValueError("the secret is empty")
    return key
