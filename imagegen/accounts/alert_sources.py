"""Sources of alerts: a refused provider key, a store or Redis that can't be used, a dead loop."""

from __future__ import annotations

import asyncio

from imagegen.accounts.alerts import KEY_REFUSED, STORE_UNAVAILABLE, WORKERS_DEAD, Alerts
from imagegen.images.store_health import StoreHealth
from imagegen.redis_client.redis_health import Health

KEY_LIFE_S = 900.0
STORE_LIFE_S = 600.0
"""The same alert is not repeated within this time. Seconds."""

REDIS_OUTAGE_S = 10.0
"""A shorter outage of Redis, as in a failover, is no alert."""


class AlertSources:
    """Callbacks of the parts that alert the operator when they fail."""

    def __init__(self, alerts: Alerts) -> None:
        self._alerts = alerts
        self._redis_check: asyncio.TimerHandle | None = None

    def on_key_refused(self, code: str, setting: str) -> None:
        """Report that the provider refuses the key of a setting, or that its account has no credit."""
        self._alerts.report(
            KEY_REFUSED, f"{setting} {code}", life_s=KEY_LIFE_S, shared=True, setting=setting, code=code
        )

    def on_loop_died(self, name: str) -> None:
        """Report that a loop died: this instance stops."""
        self._alerts.report(WORKERS_DEAD, name, life_s=STORE_LIFE_S, loop=name)

    def watch_store(self, kind: str, health: StoreHealth) -> None:
        """Report each time when images can't be saved any more. kind: of the store, as in IMAGE_STORE."""

        def on_change(writable: bool) -> None:  # noqa: FBT001 - the type of its callers
            if not writable:
                self._alerts.report(STORE_UNAVAILABLE, kind, life_s=STORE_LIFE_S, store=kind, cause=health.cause)

        health.on_change(on_change)

    def watch_redis(self, health: Health) -> None:
        """Report when Redis refuses commands, or does not answer for a while."""

        def report(cause: str) -> None:
            self._alerts.report(STORE_UNAVAILABLE, "queue", life_s=STORE_LIFE_S, store="queue", cause=cause)

        def check() -> None:
            if health.down_since is not None:
                report("Redis does not answer")

        def on_down(refused: bool) -> None:  # noqa: FBT001 - the type of its callers
            if self._redis_check is not None:  # of an outage before, which is over
                self._redis_check.cancel()
            if refused:
                report("Redis refuses commands")
            else:
                self._redis_check = asyncio.get_running_loop().call_later(REDIS_OUTAGE_S, check)

        health.on_down.append(on_down)
