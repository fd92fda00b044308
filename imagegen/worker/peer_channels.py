"""Models that the channels of other instances serve, and the keys of their jobs, by the greetings of the instances."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from msgspec import Struct

from imagegen.channels_file import SANDBOX
from imagegen.queue.claim import Claim
from imagegen.worker.call_routes import Routes

MAX_ANNOUNCED = 1_000
"""Patterns and keys of one instance; with more it announces nothing, and may serve any model."""


class Served(Struct, frozen=True, omit_defaults=True):
    """Models and keys of one instance.

    paid, drawn: patterns of models of its paid channels, and of those of the sandbox.
    fallbacks: models that it calls if no channel serves a requested one. keys: accounts of its keys.
    """

    paid: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()

    def serves(self, model: str, *, sandbox: bool | None) -> bool:
        """Return whether it may run a task. sandbox: whether the sandbox is to draw it, None if that is unknown."""
        return any(self._has_channel(name, sandbox=sandbox) for name in (model, *self.fallbacks))

    def _has_channel(self, model: str, *, sandbox: bool | None) -> bool:
        is_paid = _matches(model, self.paid)
        is_drawn = not is_paid and _matches(model, self.drawn)
        return is_paid or is_drawn if sandbox is None else is_drawn if sandbox else is_paid


def served_by(routes: Routes, fallback_models: Iterable[str]) -> Mapping[str, Any]:
    """Return the part of a greeting that describes the channels of this instance."""
    patterns: dict[bool, list[str]] = {True: [], False: []}
    for channel in routes.channels.all:
        patterns[channel.provider == SANDBOX] += [name.pattern for name in channel.models]
    accounts = frozenset(route.account for route in routes.all if route.account)
    served = Served(tuple(patterns[False]), tuple(patterns[True]), tuple(fallback_models), accounts)
    if sum(map(len, (served.paid, served.drawn, served.fallbacks, served.keys))) > MAX_ANNOUNCED:
        return {}
    return {"serves": msgspec.to_builtins(served)}


class PeerChannels:
    """Other instances as places for tasks that this one can't run.

    Args:
        greetings: returns the last greeting of each peer, None for peers that did not greet.
        is_silent: returns whether peers may exist that this instance does not see.
    """

    def __init__(
        self,
        greetings: Callable[[], Mapping[str, Mapping[str, Any] | None]] = dict,
        is_silent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._greetings = greetings
        self._is_silent = is_silent
        self._read: dict[str, tuple[Mapping[str, Any] | None, Served | None]] = {}

    def serving(self, model: str, *, sandbox: bool | None) -> list[str]:
        """Return the instances that certainly serve a task."""
        peers = self._served_by_peer().items()
        return [name for name, served in peers if served and served.serves(model, sandbox=sandbox)]

    def with_key(self, account: str) -> list[str]:
        """Return the instances that have a key."""
        return [name for name, served in self._served_by_peer().items() if served and account in served.keys]

    def dead_at(self, peer: str) -> frozenset[str]:
        """Return the models that get no images through an instance, by its last greeting."""
        dead = (self._greetings().get(peer) or {}).get("dead")
        return frozenset(filter(lambda name: isinstance(name, str), dead)) if isinstance(dead, list) else frozenset()

    def may_serve(self, model: str, *, sandbox: bool | None) -> bool:
        """Return whether another instance may serve a task; one of an earlier version may serve any."""
        peers = self._served_by_peer().values()
        return self._is_silent() or any(served is None or served.serves(model, sandbox=sandbox) for served in peers)

    def _served_by_peer(self) -> Mapping[str, Served | None]:
        greetings = self._greetings()
        for name in self._read.keys() - greetings.keys():
            del self._read[name]
        for name, greeting in greetings.items():
            if name not in self._read or self._read[name][0] is not greeting:
                self._read[name] = greeting, _parse(greeting)
        return {name: served for name, (_, served) in self._read.items()}


def able_peers(peers: PeerChannels, claim: Claim) -> list[str]:
    """Return the other instances that can run a claim: those with the key of its job if it has one."""
    if job := claim.checkpoint.job:
        return peers.with_key(job.handle.account)
    return peers.serving(claim.task.model, sandbox=claim.task.sandbox)


def _parse(greeting: Mapping[str, Any] | None) -> Served | None:
    """Return what a greeting announces; None if that is nothing, or can't be read."""
    try:
        return msgspec.convert((greeting or {})["serves"], Served)
    except (KeyError, msgspec.ValidationError):
        return None


def _matches(model: str, patterns: Collection[str]) -> bool:
    return any(pattern in ("*", model) or fnmatchcase(model, pattern) for pattern in patterns)
