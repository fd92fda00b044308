"""Webhooks: what a client may register, a delivery as a value, and when a delivery is tried again.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv6Address
from itertools import islice
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from yarl import URL

from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import printable, rfc3339
from imagegen.tasks.field_faults import fault_text, faults_of, unknown_field

MAX_WEBHOOKS = 20
"""Of one client in a task."""

MAX_ALL_WEBHOOKS = 200
"""Of all clients in a task."""

MAX_URL_CHARS = 2_000
MAX_EVENTS = 3
MAX_FIELDS = 20
"""Fields of one `webhook` that are looked at; more than it has are faults anyway."""
RETRY_DELAYS_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
MAX_RETRY_AFTER_S = 3600.0
JITTER = 0.2
"""A delay is longer than its plan by at most this factor, never shorter."""

CheckHost = Callable[[str, int], None]
"""Raises OSError for a host that is refused without DNS."""

_HOST_NAME = re.compile(r"(?=.{1,254}\Z)([^.]{1,63}\.)*[^.]{1,63}\.?")
"""A name within the limits of DNS: https://www.rfc-editor.org/rfc/rfc1035#section-2.3.4"""

_GONE = 410
_BACKPRESSURE_STATUSES = (429, 503)


class DeliveryStatus(StrEnum):
    """Status of the delivery to one webhook; `delivered` and `failed` are final."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


def _secret(text: str) -> str:
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise PydanticCustomError("secret", "must be whsec_ and the base64 of 24 to 64 bytes")
    return text


def _event(value: object) -> object:
    return f"image.{value}" if value in ("completed", "failed", "cancelled") else value


Event = Annotated[Literal["image.completed", "image.failed", "image.cancelled"], BeforeValidator(_event)]


def _check_event_count(value: object) -> object:
    """Count a list before pydantic looks into it, which makes a fault of each entry."""
    if isinstance(value, list) and len(value) > MAX_EVENTS:
        raise PydanticCustomError("too_many", f"must have at most {MAX_EVENTS} entries")
    return value


class WebhookFields(BaseModel):
    """Fields that a client sends as `webhook`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARS, description="Where to POST, by https.")]
    events: (
        Annotated[
            tuple[Event, ...],
            Field(min_length=1, max_length=MAX_EVENTS, description="Ends to report; all if absent."),
            BeforeValidator(_check_event_count),
        ]
        | None
    ) = None
    secret: (
        Annotated[
            str,
            AfterValidator(_secret),
            Field(
                max_length=100,
                description="For the signature: `whsec_` and the base64 of 24 to 64 bytes.",
                json_schema_extra={"pattern": "^whsec_[A-Za-z0-9+/]+={0,2}$"},
            ),
        ]
        | None
    ) = None


@dataclass(frozen=True, slots=True)
class Webhook:
    """A receiver of a task's end. events: empty for all; link_base_url: of the links in the payload.

    owner: names the client that registered it; empty if unknown.
    """

    url: str
    link_base_url: str
    events: tuple[str, ...] = ()
    secret: str | None = field(default=None, repr=False)
    owner: str = ""

    @classmethod
    def parse(
        cls,
        sent: object,
        base: str,
        check_host: CheckHost | None,
        *,
        check_own: CheckHost | None = None,
        owner: str = "",
    ) -> Self:
        """Read a client's `webhook`. Raises InvalidRequest that names `webhook.url` and the like.

        check_host: None lifts it, and the need for https. check_own: refuses this service itself.
        """
        if not isinstance(sent, Mapping):
            raise InvalidRequest(details=[FieldError("webhook", "must be an object with a url")])
        try:
            fields = WebhookFields.model_validate(dict(islice(sent.items(), MAX_FIELDS)))
        except ValidationError as error:
            raise InvalidRequest(details=[_field_error(fault) for fault in faults_of(error)]) from error
        try:
            url = parse_url(fields.url, check_host)
            if check_own is not None:
                _check(check_own, url)
        except ValueError as error:
            raise InvalidRequest(details=[FieldError("webhook.url", str(error))]) from error
        return cls(fields.url, base, tuple(dict.fromkeys(fields.events or ())), fields.secret, owner)

    def subscribes_to(self, state: str) -> bool:
        """Return whether it receives this end."""
        return not self.events or event_type(state) in self.events


def parse_url(text: str, check_host: CheckHost | None) -> URL:
    """Parse an address, kept as written. Raises ValueError with the fault."""
    if not text.isprintable() or any(c in text for c in " \\#"):
        raise ValueError("must not contain spaces, backslashes, fragments or control characters")
    try:
        url = URL(text, encoded=text.isascii())
        port = url.port
    except ValueError as error:
        raise ValueError("is not a valid address") from error
    if url.scheme != "https" and (url.scheme != "http" or check_host is not None):
        raise ValueError("must be an https address" if check_host else "must be an http or https address")
    if "@" in url.raw_authority:
        raise ValueError("must not carry a user name or password")
    if not url.raw_host or not port:
        raise ValueError("has no valid host or port")
    if not (_is_ipv6(url.raw_host) if "[" in url.raw_authority else _HOST_NAME.fullmatch(url.raw_host)):
        raise ValueError("has no valid host")
    if check_host is not None:
        _check(check_host, url)
    return url


def _check(check_host: CheckHost, url: URL) -> None:
    try:
        check_host(url.raw_host or "", url.port or 0)
    except OSError as error:
        raise ValueError(f"is refused: {error}") from error


def destination_of(url: str) -> str:
    """Return what shares one receiver: scheme, host, port and the path's first segment; empty for a bad address."""
    try:
        parsed = parse_url(url, None)
    except ValueError:
        return ""
    segment = parsed.raw_path.split("/", 2)[1] if parsed.raw_path.startswith("/") else ""
    return f"{parsed.scheme}://{(parsed.raw_host or '').rstrip('.')}:{parsed.port}/{segment}"


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def _field_error(fault: ErrorDetails) -> FieldError:
    name, *rest = fault["loc"] or ("",)
    where = f"webhook.{str(name)[:60]}" + "".join(f"[{part}]" for part in rest if isinstance(part, int))
    is_unknown = fault["type"] == "extra_forbidden"
    return FieldError(
        printable(where), unknown_field(str(name), WebhookFields.model_fields) if is_unknown else fault_text(fault)
    )


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook of one epoch of a task, and how far its delivery is.

    number: unique in the epoch, from 0; with task and epoch it makes the `webhook-id`.
    added_after_finish: it came when the task was finished.
    last_status: of the last try, None if there was no response; due_at: Unix time of the next try.
    """

    webhook: Webhook
    number: int
    status: DeliveryStatus = DeliveryStatus.PENDING
    attempts: int = 0
    last_status: int | None = None
    due_at: float | None = None
    added_after_finish: bool = False

    @property
    def pending(self) -> bool:
        return self.status is DeliveryStatus.PENDING

    def stored(self) -> dict[str, Any]:
        """Return the fields that are set, which `restore` reads."""
        webhook = self.webhook
        fields = {
            "n": self.number,
            "url": webhook.url,
            "base": webhook.link_base_url,
            "events": webhook.events,
            "secret": webhook.secret,
            "by": webhook.owner,
            "status": None if self.pending else self.status,
            "attempts": self.attempts,
            "last": self.last_status,
            "due": self.due_at,
            "late": self.added_after_finish,
        }
        return {name: value for name, value in fields.items() if value}

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> Self:
        """Read the output of `stored`. Raises KeyError, ValueError or TypeError for anything else."""
        return cls(
            Webhook(
                stored["url"],
                stored.get("base", ""),
                tuple(stored.get("events", ())),
                stored.get("secret"),
                stored.get("by", ""),
            ),
            stored.get("n", 0),
            DeliveryStatus(stored.get("status", DeliveryStatus.PENDING)),
            stored.get("attempts", 0),
            stored.get("last"),
            stored.get("due"),
            stored.get("late", False),
        )


def initial_deliveries(webhooks: Iterable[Webhook]) -> tuple[Delivery, ...]:
    """Return the deliveries of a submit."""
    return tuple(Delivery(webhook, number) for number, webhook in enumerate(webhooks))


def with_added_webhooks(
    deliveries: Sequence[Delivery], webhooks: Sequence[Webhook], ended: str | None
) -> tuple[Delivery, ...]:
    """Add the webhooks of a submit to a task's deliveries; finished ones go first. Raises InvalidRequest at the limit.

    ended: the state of a finished task.
    """
    first = max((delivery.number for delivery in deliveries), default=-1) + 1
    owners = {webhook.owner for webhook in webhooks}
    own = [delivery for delivery in deliveries if delivery.webhook.owner in owners]
    forgotten = _forgotten(own, len(webhooks), MAX_WEBHOOKS, ended)
    after_own_limit = [delivery for delivery in deliveries if delivery.number not in forgotten]
    forgotten |= _forgotten(after_own_limit, len(webhooks), MAX_ALL_WEBHOOKS, ended)
    remaining = (delivery for delivery in after_own_limit if delivery.number not in forgotten)
    return (
        *remaining,
        *(Delivery(webhook, first + i, added_after_finish=ended is not None) for i, webhook in enumerate(webhooks)),
    )


def _forgotten(deliveries: Sequence[Delivery], added: int, most: int, ended: str | None) -> set[int]:
    """Return the numbers of finished deliveries to remove for new ones. Raises InvalidRequest at the limit."""
    over = len(deliveries) + added - most
    finished = [
        delivery
        for delivery in deliveries
        if not delivery.pending or (ended and not delivery.webhook.subscribes_to(ended))
    ]
    if over > len(finished):
        raise InvalidRequest(details=[FieldError("webhook", f"this task has {most} webhooks, which is the most")])
    return {delivery.number for delivery in finished[: max(over, 0)]}


def merge_deliveries(deliveries: Iterable[Delivery], added: Iterable[Delivery]) -> tuple[Delivery, ...]:
    """Merge by number; the delivery with more progress wins."""
    furthest: dict[int, Delivery] = {}
    for delivery in (*deliveries, *added):
        other = furthest.get(delivery.number)
        if other is None or _progress_key(delivery) > _progress_key(other):
            furthest[delivery.number] = delivery
    return tuple(furthest[number] for number in sorted(furthest))


def _progress_key(delivery: Delivery) -> tuple[bool, int]:
    return not delivery.pending, delivery.attempts


def after_attempt(
    delivery: Delivery,
    status: int | None,
    retry_after_s: float | None,
    *,
    now: float,
    random: Callable[[], float],
    delays_s: Sequence[float] = RETRY_DELAYS_S,
) -> Delivery:
    """Return the delivery after a try. status: of the response, None if there was none."""
    attempts = delivery.attempts + 1
    delivery = replace(delivery, attempts=attempts, last_status=status, due_at=None)
    if status is not None and 200 <= status < 300:
        return replace(delivery, status=DeliveryStatus.DELIVERED)
    if status == _GONE or attempts > len(delays_s):
        return replace(delivery, status=DeliveryStatus.FAILED)
    delay_s = delays_s[attempts - 1] * (1 + JITTER * random())
    if retry_after_s is not None and status in _BACKPRESSURE_STATUSES:
        delay_s = max(delay_s, min(retry_after_s, MAX_RETRY_AFTER_S))
    return replace(delivery, due_at=now + delay_s)


def message_id(task_id: str, generation: int, number: int) -> str:
    """Return the `webhook-id`: the same for each try, on each instance, after each restart."""
    return f"msg_{task_id}_{generation}_{number}"


def event_type(state: str) -> str:
    return f"image.{state}"


def event_body(state: str, finished_at: float, view: Mapping[str, Any]) -> bytes:
    """Return the body that is signed and sent; `view` is the GET body of the task."""
    return orjson.dumps({"type": event_type(state), "timestamp": rfc3339(finished_at), "data": view})
