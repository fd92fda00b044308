"""Models that get no answers through this instance, and may get some through others, as while its proxy is down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

from imagegen.queue.claim import Claim
from imagegen.worker.peer_channels import able_peers
from imagegen.worker.permits import PermitLine
from imagegen.worker.unserved import OtherInstances

MAX_ANNOUNCED = 100

ALL = "*"
"""Stands for all models in a greeting."""


class DeadModels:
    """Dead models of this instance, which its greetings announce, and the peers at which a model is not dead.

    A model stays dead until a probe of its upstream is answered here. All are dead while images can't be saved.
    """

    def __init__(self, permits: PermitLine, others: OtherInstances) -> None:
        self._permits = permits
        self.others = others
        self._names: frozenset[str] = frozenset()
        self._can_save = True
        self._turn = 0

    def __contains__(self, model: str) -> bool:
        return model in self._names

    def check(self, models: Iterable[str]) -> None:
        """Look which of some models, and of those that were dead before, are dead now; announce a change."""
        seen = dict.fromkeys(chain(self._names, models))
        names = frozenset(islice(filter(self._permits.is_dead, seen), MAX_ANNOUNCED))
        if names != self._names:
            self._names = names
            self.others.greet()

    def on_store(self, writable: bool) -> None:  # noqa: FBT001 - a listener of StoreHealth
        """Announce that images can't be saved here, or can again."""
        self._can_save = writable
        self.others.greet()

    def greeting(self) -> Mapping[str, Any]:
        """Return the part of a greeting that names them."""
        names = sorted(self._names) if self._can_save else [ALL]
        return {"dead": names} if names else {}

    def give(self, claim: Claim) -> bool:
        """Give a claim to an instance at which its model is not dead. Return False if there is none."""
        channels, model = self.others.channels, claim.task.model
        able = [peer for peer in able_peers(channels, claim) if not {model, ALL} & channels.dead_at(peer)]
        if not able:
            return False
        self._turn += 1
        self.others.hand_over(claim, able[self._turn % len(able)])
        return True
