"""Calls of the operator's ALERT_WEBHOOK: a signed POST for each alert, repeated a few times."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from loguru import logger

from imagegen.accounts.alerts import Alert, Alerts
from imagegen.metrics import Meter
from imagegen.tasks.webhook import JITTER
from imagegen.worker.webhooks import WebhookSender

RETRY_DELAYS_S = (5.0, 30.0, 120.0)

MAX_DELIVERING = 32
"""Alerts that are sent or repeated at once; others wait, and are dropped if too many do."""


class AlertDispatcher:
    """Dispatcher that sends alerts until each is delivered or given up. `deliver_forever` is the loop to supervise.

    Args:
        address: where they go.
        secret: signs them; None: they are not signed.
    """

    def __init__(
        self,
        alerts: Alerts,
        sender: WebhookSender,
        address: str,
        secret: str | None,
        meter: Meter,
        *,
        delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self._alerts = alerts
        self._sender = sender
        self._address = address
        self._secret = secret
        self._meter = meter
        self._delays_s = delays_s

    async def deliver_forever(self) -> None:
        """Start the delivery of each alert when it comes."""
        free = asyncio.Semaphore(MAX_DELIVERING)
        async with asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                alert = await self._alerts.next()
                delivering = group.create_task(self._deliver(alert), name=f"alert-{alert.type}")
                delivering.add_done_callback(lambda _done: free.release())

    async def drain(self, deadline_s: float) -> None:
        """Wait until each alert was sent once; it is not repeated after that."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._alerts.all_tried()
        except TimeoutError:
            logger.warning("An alert could not be delivered before the end")

    async def _deliver(self, alert: Alert) -> None:
        try:
            delivered = await self._try(alert)
        finally:
            self._alerts.mark_tried()
        for delay_s in self._delays_s:
            if delivered:
                break
            await asyncio.sleep(delay_s * (1 + JITTER * random.random()))  # noqa: S311 - jitter
            delivered = await self._try(alert)
        self._meter.alerts[alert.type, "delivered" if delivered else "failed"] += 1
        if not delivered:
            logger.warning("The alert {} could not be delivered to ALERT_WEBHOOK", alert.type)

    async def _try(self, alert: Alert) -> bool:
        response = await self._sender.post(self._address, alert.message_id, alert.encode(), self._secret)
        return response.status is not None and 200 <= response.status < 300
