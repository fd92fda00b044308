"""Settings in which the instances of one Redis must agree, compared by their greetings."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loguru import logger

from imagegen.queue.notifier import Message, Notifier

LASTING_S = 300.0
"""How long instances may differ before a warning: a deploy that changes a setting is over by then."""

ANSWERED_S = 30.0
"""A living peer answers a greeting within this time. A peer that was killed does not, and does not count."""

DIGEST_CHARS = 4
"""Length of a value's digest in a greeting: enough to show a difference, too short to confirm a guess at a secret."""

MAX_NAMES = 100


class PeerSettings:
    """Check that other instances have the values of this one, with one warning for each setting that differs.

    Args:
        values: returns the values of this instance, by the name of the setting. None is not compared.
        notifier: has the last greeting of each peer.
    """

    def __init__(self, values: Callable[[], Mapping[str, object]], notifier: Notifier) -> None:
        self._values = values
        self._notifier = notifier
        self._check_timer: asyncio.TimerHandle | None = None
        self._greeted_until_s = -math.inf
        self._reported: set[str] = set()

    def greeting(self) -> Mapping[str, Any]:
        """Return the part of a greeting with the values of this instance."""
        return {"settings": self._digests()}

    def differs(self, name: str) -> bool:
        """Return whether a peer has another value of a setting. It is greeted then, and forgotten without an answer."""
        theirs = [greeting.get("settings") for greeting in self._notifier.greetings.values()]
        digests = {values[name] for values in theirs if isinstance(values, dict) and name in values}
        if not digests or digests == {_digest(name, self._values()[name])}:
            return False
        self._notifier.ping_peers()
        return True

    def on_peer(self) -> None:
        """Compare the values with those of a new peer, once a deploy is over."""
        if self._check_timer is None:
            self._check_timer = asyncio.get_running_loop().call_later(LASTING_S, self._check)

    def on_answer(self, message: Message) -> None:
        """Warn of the settings in the answer of a peer that was greeted since one differs."""
        if asyncio.get_running_loop().time() > self._greeted_until_s:
            return
        if new := self._differing([message]):
            self._reported.update(new)
            logger.warning(
                "Another instance of this Redis has another value of {}: give all of them the same, or each service "
                "its own REDIS_PREFIX",
                ", ".join(new),
            )

    def close(self) -> None:
        if self._check_timer is not None:
            self._check_timer.cancel()

    def _check(self) -> None:
        self._check_timer = None
        if self._differing(self._notifier.greetings.values()):
            self._greeted_until_s = asyncio.get_running_loop().time() + ANSWERED_S
            self._notifier.publish("hello")

    def _differing(self, greetings: Iterable[Message]) -> list[str]:
        """Return the settings with another value in some greetings, without those that were reported."""
        own, theirs = self._digests(), [greeting.get("settings") for greeting in greetings]
        differing = {
            name
            for values in theirs
            if isinstance(values, dict) and len(values) <= MAX_NAMES
            for name, digest in values.items()
            if name in own and own[name] != digest
        }
        return sorted(differing - self._reported)

    def _digests(self) -> dict[str, str]:
        return {name: _digest(name, value) for name, value in self._values().items() if value is not None}


def _digest(name: str, value: object) -> str:
    return hashlib.sha256(f"{name}={value!r}".encode()).hexdigest()[:DIGEST_CHARS]
