"""State of channels and keys for operators, from the routes and their pacing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from yarl import URL

from imagegen.channels_file import Channel
from imagegen.providers.channel_counts import ChannelStatus, KeyStatus
from imagegen.tasks.task import WaitReason
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.key_health import PROBE_S
from imagegen.worker.pacing import Pacing
from imagegen.worker.permits import PermitLine
from imagegen.worker.router import Router

MIN_SHOWN_CHARS = 16
"""Length of a key from which on its last four characters are shown."""

_Rest = tuple[str, float, str] | None
"""State, monotonic time of the next call, and error code."""


class ChannelReport:
    """Report of all channels. clock: monotonic, of the pacing; wall: Unix time."""

    def __init__(
        self,
        routes: Routes,
        permits: PermitLine,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._routes = routes
        self._permits = permits
        self._clock = clock
        self._wall = wall

    def channels(self) -> list[ChannelStatus]:
        """Return the state of each channel, in the order of the file."""
        return [self._channel(channel) for channel in self._routes.channels.all]

    def _channel(self, channel: Channel) -> ChannelStatus:
        rests = {route: self._key_rest(channel, route) for route in self._routes.of_channel(channel)}
        rest = self._breaker_rest(channel)
        if all(rests.values()):
            resting = [key_rest for key_rest in rests.values() if key_rest]
            cooling = [key_rest for key_rest in resting if key_rest[0] == "cooling"]
            first = min(cooling or resting, key=lambda key_rest: key_rest[1])
            rest = ("resting" if cooling else "out", *first[1:])
        return ChannelStatus(
            channel.name,
            channel.provider,
            channel.priority,
            channel.weight,
            tuple(map(str, channel.models)),
            URL(channel.base_url).host_port_subcomponent if channel.base_url else None,
            rest[0] if rest else "healthy",
            self._unix(rest),
            rest[2] if rest else None,
            channel.concurrency,
            channel.rate_per_min,
            tuple(self._key(route, rest) for route, rest in rests.items()),
        )

    def _key(self, route: Route, rest: _Rest) -> KeyStatus:
        secret = route.key.secret
        return KeyStatus(
            route.account[:8],
            route.key.source,
            secret[-4:] if len(secret) >= MIN_SHOWN_CHARS else "",
            rest[0] if rest else "healthy",
            self._unix(rest),
            rest[2] if rest else None,
            route.counts,
        )

    def _key_rest(self, channel: Channel, route: Route) -> _Rest:
        if isinstance(self._permits, Router):
            trouble = self._permits.lanes[channel.name].keys[route].trouble()
            if trouble is None:
                return None
            return trouble.state, trouble.next_at(alone=self._is_alone(self._permits, channel)), trouble.error.code
        if (code := route.provider.refusal) is not None:
            return "out", self._clock(), code
        rest = self._breaker_rest(channel)
        return ("cooling", *rest[1:]) if rest and rest[2] == WaitReason.UPSTREAM_RATE_LIMITED else None

    @staticmethod
    def _is_alone(router: Router, channel: Channel) -> bool:
        """Return whether no healthy key of the channel, or of another one for its models, takes the calls."""
        lanes = [
            lane
            for lane in router.lanes.values()
            if any(lane.channel.sent_name(name.pattern) is not None for name in channel.models)
        ]
        return not any(key.trouble() is None for lane in lanes for key in lane.keys.values())

    def _breaker_rest(self, channel: Channel) -> _Rest:
        lane = self._permits.lanes[channel.name] if isinstance(self._permits, Router) else None
        pacing = lane.pacing if lane else self._permits
        rest = pacing.longest_rest() if isinstance(pacing, Pacing) else None
        if lane and not rest and lane.answers.silent_model(self._clock()) is not None:
            return "resting", math.inf, "upstream_timeout"
        return rest and ("resting", rest[0], str(rest[1]))

    def _unix(self, rest: _Rest) -> float | None:
        if rest is None:
            return None
        wait_s = PROBE_S if rest[1] == math.inf else max(rest[1] - self._clock(), 0.0)
        return self._wall() + wait_s
