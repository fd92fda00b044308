"""Calls of a router, by hand-set clocks."""

from __future__ import annotations

from imagegen.channels_file import Channel, ChannelKey, Channels
from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.permits import Choice, Permit
from imagegen.worker.router import Router
from tests.support import Clock
from tests.worker.conftest import UNPRICED, metered


def router(clock: Clock, *channels: Channel) -> Router:
    """Return a router of channels; each key is its own account."""
    listed = channels or (Channel("pool", "together", tuple(ChannelKey(name, "file") for name in "abc")),)
    routes = [
        Route(channel, f"{channel.name}-{key.secret}", metered(), UNPRICED, key)
        for channel in listed
        for key in channel.keys
    ]
    return Router(Routes(Channels(listed), routes, from_file=True), clock=clock, wall=lambda: clock.now)


def taken(made: Router, model: str = "m", choice: Choice = Choice()) -> Permit:  # noqa: B008 - immutable
    permit = made.try_acquire(model, choice)
    assert permit is not None
    return permit


def ends(made: Router, permit: Permit, error: UpstreamError | None = None) -> str:
    """End the call of a permit; return its account."""
    if error is None:
        made.record_success(permit, UpstreamLimits())
    else:
        made.failed(permit, error, unfinished="task")
    permit.close()
    return permit.route.account
