"""Calls of webhooks: one signed POST a try, to public addresses only, fair by destination (see `destinations`)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractResolver
from loguru import logger
from msgspec import Struct, field
from msgspec.structs import replace
from standardwebhooks import Webhook as Signer

from imagegen import __version__
from imagegen.formats import certificate_fault, parse_digits, parse_http_date
from imagegen.proxies import Proxies, ProxyConnector
from imagegen.queue.outbox import Outbox
from imagegen.ssrf import blocked_cause, check_host, guarded_connector
from imagegen.tasks.task import Task
from imagegen.tasks.webhook import (
    RETRY_DELAYS_S,
    CheckHost,
    Delivery,
    DeliveryStatus,
    Webhook,
    after_attempt,
    destination_of,
    event_body,
    message_id,
    parse_url,
)
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.worker.destinations import MAX_CONCURRENT, SLOW_S, Destinations, Try

if TYPE_CHECKING:
    from loguru import Logger

TIMEOUT_S = 10.0
MAX_RESPONSE_BYTES = 4_096
MAX_HEAD_BYTES, MAX_HEADERS = 2**16, 1_024
"""Of each header's value, and of their number: a large cookie does not make a delivered webhook a failed one."""

_TOO_MANY = 429

DueDelivery = tuple[Task, Delivery]

PayloadFactory = Callable[[Task, Webhook], Mapping[str, Any]]
"""The GET body of a task, with links for this webhook."""


class ReceiverResponse(Struct, frozen=True):
    """Response of a receiver.

    status: None if there was no response. refused: whether the address may not be called.
    """

    status: int | None
    retry_after_s: float | None = None
    refused: bool = False

    @property
    def failed(self) -> bool:
        """Whether the receiver is in trouble."""
        return not self.refused and (self.status is None or self.status >= 500 or self.status == _TOO_MANY)


@asynccontextmanager
async def webhook_session(
    *, private: bool, resolver: AbstractResolver | None = None, proxy: str | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session for webhooks: no cookies, public addresses only unless `private`, and no proxy but `proxy`."""
    proxies = Proxies(proxy, proxy)
    if private:
        connector: aiohttp.TCPConnector = ProxyConnector(
            proxies, limit=MAX_CONCURRENT, use_dns_cache=False, resolver=resolver
        )
    else:
        connector = guarded_connector(inner=resolver, limit=MAX_CONCURRENT, proxies=proxies)
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        read_bufsize=MAX_RESPONSE_BYTES,
        max_field_size=MAX_HEAD_BYTES,
        max_headers=MAX_HEADERS,
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    ) as session:
        yield session


class WebhookSender(Struct, frozen=True):
    """Sender of single webhooks.

    signing: of webhooks without a secret of their own. allow_private: see `webhook_session`.
    check_own: raises OSError for a host that is this service itself.
    """

    session: aiohttp.ClientSession
    body_of: PayloadFactory
    signing: OperatorSecret = field(default_factory=OperatorSecret)
    allow_private: bool = False
    check_own: CheckHost | None = None
    timeout_s: float = TIMEOUT_S
    clock: Callable[[], float] = time.time

    async def send(self, task: Task, delivery: Delivery) -> ReceiverResponse:
        """Make one try; never raise for what a receiver does."""
        log, webhook = logger.bind(taskId=task.id), delivery.webhook
        try:
            secret = webhook.secret or self.signing.for_url(parse_url(webhook.url, None))
            body = event_body(task.state, task.finished_at or 0.0, self.body_of(_without_webhooks(task), webhook))
        except ValueError as error:
            log.info("A webhook was not reached: {}", _reason(error))
            return ReceiverResponse(None, refused=True)
        except Exception:
            log.exception("A webhook could not be sent")
            return ReceiverResponse(None)
        return await self.post(webhook.url, message_id(task.id, task.epoch, delivery.number), body, secret, log)

    async def post(
        self, address: str, message: str, body: bytes, secret: str | None, log: Logger = logger
    ) -> ReceiverResponse:
        """Send a message once, signed if there is a secret. message: its id."""
        try:
            url = parse_url(address, None if self.allow_private else check_host)
            if self.check_own is not None:
                self.check_own(url.raw_host or "", url.port or 0)
            headers = self._headers(message, body, secret)
            async with (
                asyncio.timeout(self.timeout_s),
                self.session.post(url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                return ReceiverResponse(
                    response.status, _retry_after_s(response.headers.get("Retry-After"), self.clock())
                )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.info("A webhook was not reached: {}", _reason(error))
            return ReceiverResponse(None, refused=type(error) is ValueError or blocked_cause(error) is not None)
        except Exception:
            log.exception("A webhook could not be sent")
        return ReceiverResponse(None)

    def _headers(self, message: str, body: bytes, secret: str | None) -> dict[str, str]:
        """Return the headers of a message, signed if there is a secret.

        https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md#webhook-headers
        """
        now = int(self.clock())
        headers = {
            "User-Agent": f"imagegen/{__version__}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "webhook-id": message,
            "webhook-timestamp": str(now),
        }
        if secret:
            signed_at = datetime.fromtimestamp(now, UTC)
            headers["webhook-signature"] = Signer(secret).sign(message, signed_at, body.decode())
        return headers


class WebhookDispatcher:
    """Dispatcher of deliveries until each is done. `deliver_forever` is the loop to supervise.

    clock: in which due times of deliveries are. Once received, they wait by the event loop's clock, which never jumps.
    """

    def __init__(
        self,
        outbox: Outbox,
        sender: WebhookSender,
        *,
        delays_s: Sequence[float] = RETRY_DELAYS_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._sender = sender
        self._delays_s = delays_s
        self._clock = clock
        self._destinations = Destinations[DueDelivery]()
        self._changed = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()

    async def deliver_forever(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._receive(), name="webhooks-receive")
            try:
                while True:
                    self._changed.clear()
                    while running := self._destinations.start(loop.time()):
                        started = group.create_task(self._run(running), name=f"webhook-{running.item[0].id}")
                        self._under_way.add(started)
                        started.add_done_callback(self._under_way.discard)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._destinations.wait_s(loop.time())):
                            await self._changed.wait()
            finally:
                receiving.cancel()

    async def drain(self, deadline_s: float) -> None:
        """Wait for the tries that are under way; later ones are made after the next start."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=deadline_s)

    async def _receive(self) -> None:
        """Queue what the outbox returns."""
        loop = asyncio.get_running_loop()
        while True:
            task, delivery = await self._outbox.next()
            now = self._clock()
            wait_s = (delivery.due_at or min(task.finished_at or 0.0, now)) - now
            due_at = loop.time() + wait_s
            self._destinations.add(destination_of(delivery.webhook.url), due_at, (task, delivery), loop.time())
            self._changed.set()

    async def _run(self, running: Try[DueDelivery]) -> None:
        """Make one try, and record its outcome."""
        task, delivery = running.item
        log, loop = logger.bind(taskId=task.id), asyncio.get_running_loop()
        began, response, took_s = loop.time(), ReceiverResponse(None), 0.0
        slow = loop.call_later(SLOW_S, self._slow_down, running)
        try:
            response = await self._sender.send(task, delivery)
            took_s = loop.time() - began
            slow.cancel()
            await self._record(task, delivery, response)
        except Exception:
            log.exception("A webhook is left to the next start")
        finally:
            slow.cancel()
            self._destinations.end(
                running, loop.time(), took_s=took_s, failed=response.failed, retry_after_s=response.retry_after_s
            )
            self._changed.set()

    def _slow_down(self, running: Try[DueDelivery]) -> None:
        self._destinations.slow_down(running, asyncio.get_running_loop().time())
        self._changed.set()

    async def _record(self, task: Task, delivery: Delivery, response: ReceiverResponse) -> None:
        after = after_attempt(
            delivery,
            response.status,
            response.retry_after_s,
            now=self._clock(),
            random=random.random,
            delays_s=self._delays_s,
        )
        await self._outbox.record_attempt(task, after)
        if after.status is DeliveryStatus.FAILED:
            logger.bind(taskId=task.id).warning("A webhook at {} failed for good", _host_of(delivery))


def _without_webhooks(task: Task) -> Task:
    """Return the task without its webhooks: a receiver must not learn of others, and each try sends the same."""
    return replace(task, deliveries=())


def _host_of(delivery: Delivery) -> str:
    try:
        return parse_url(delivery.webhook.url, None).authority
    except ValueError:
        return ""


def _reason(error: Exception) -> str:
    """Return why a receiver was not called, without the address, which may hold a secret."""
    if fault := certificate_fault(error):
        return f"TLS certificate refused ({fault})"
    return str(blocked_cause(error) or (error if type(error) is ValueError else type(error).__name__))


def _retry_after_s(value: str | None, now: float) -> float | None:
    """Return the seconds of a header, which may be a date: https://www.rfc-editor.org/rfc/rfc9110.html#name-retry-after"""
    seconds = parse_digits(value or "")
    if seconds is not None:
        return float(seconds)
    until = parse_http_date(value)
    return None if until is None else max(until - now, 0.0)
