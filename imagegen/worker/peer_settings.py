"""Settings in which the instances of one Redis must agree, compared by their greetings."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger

LASTING_S = 300.0
"""How long instances may differ before the log has it: a deploy that changes a setting is over by then."""

DIGEST_CHARS = 8
"""Of a value in a greeting: enough to see a difference, too little to find out a secret."""

MAX_NAMES = 100


class PeerSettings:
    """Check that other instances have the values of this one, with one warning for each setting that differs.

    Args:
        values: returns the values of this instance, by the name of the setting. A value None is not compared.
        greetings: returns the last greeting of each peer.
    """

    def __init__(
        self, values: Callable[[], Mapping[str, object]], greetings: Callable[[], Mapping[str, Mapping[str, Any]]]
    ) -> None:
        self._values = values
        self._greetings = greetings
        self._check_timer: asyncio.TimerHandle | None = None
        self._reported: set[str] = set()

    def greeting(self) -> Mapping[str, Any]:
        """Return the part of a greeting with the values of this instance."""
        return {"settings": self._digests()}

    def on_peer(self) -> None:
        """Compare the values with those of a new peer, once a deploy is over."""
        if self._check_timer is None:
            self._check_timer = asyncio.get_running_loop().call_later(LASTING_S, self._check)

    def close(self) -> None:
        if self._check_timer is not None:
            self._check_timer.cancel()

    def _check(self) -> None:
        self._check_timer = None
        own = self._digests()
        theirs = [peer.get("settings") for peer in self._greetings().values()]
        differing = {
            name
            for values in theirs
            if isinstance(values, dict) and len(values) <= MAX_NAMES
            for name, digest in values.items()
            if name in own and own[name] != digest
        }
        if new := sorted(differing - self._reported):
            self._reported |= differing
            logger.warning(
                "Another instance of this Redis has another value of {}: give all of them the same, or each service "
                "its own REDIS_PREFIX",
                ", ".join(new),
            )

    def _digests(self) -> dict[str, str]:
        return {name: _digest(name, value) for name, value in self._values().items() if value is not None}


def _digest(name: str, value: object) -> str:
    return hashlib.sha256(f"{name}={value!r}".encode()).hexdigest()[:DIGEST_CHARS]
