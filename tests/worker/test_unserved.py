"""Tasks that no channel of this instance serves: where they go, and when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.channels_file import Channel, ChannelKey, Channels, ModelName
from imagegen.queue.claim import Claim
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import Failed
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.peer_channels import PeerChannels, Served, served_by
from imagegen.worker.unserved import ALONE_S, MAX_HELD_S, PING_PEERS_INTERVAL_S, OtherInstances, UnservedTasks
from tests.support import Clock, over_rows
from tests.worker.conftest import UNPRICED, MakeHarness, WorkerHarness, metered

Taken = tuple[Claim, WorkerHarness]
OLD_VERSION: Mapping[str, Any] = {"kind": "hello"}


def routes_of(*channels: Channel) -> Routes:
    return Routes(
        Channels(channels),
        [Route(each, f"account-{each.name}", metered(), UNPRICED) for each in channels],
        from_file=True,
    )


def paid(name: str, *patterns: str) -> Channel:
    return Channel(name, "fal", (ChannelKey(name, "file"),), tuple(map(ModelName, patterns)))


def greeting(*channels: Channel) -> Mapping[str, Any]:
    return {"kind": "here", **served_by(routes_of(*channels), ())}


class Others:
    """Other instances by name, with their greetings. handed: claims and the instance that got them."""

    def __init__(self, **greetings: Mapping[str, Any]) -> None:
        self.greetings: dict[str, Mapping[str, Any]] = greetings
        self.handed: list[tuple[str, str]] = []
        self.pings = 0

    def seen(self) -> OtherInstances:
        return OtherInstances(
            lambda: not self.greetings,
            PeerChannels(lambda: self.greetings),
            lambda claim, peer: self.handed.append((claim.task.id, peer)),
            self.ping_peers,
        )

    def ping_peers(self) -> None:
        self.pings += 1


@pytest.fixture
async def claim(make_harness: MakeHarness) -> Taken:
    """Return a claim for the model `theirs`, and its harness."""
    harness = make_harness(pool=False)
    return await harness.claim(model="theirs"), harness


def unserved(harness: WorkerHarness, others: Others, clock: Clock, *channels: Channel) -> UnservedTasks:
    routes = routes_of(*(channels or (paid("mine", "mine"),)))
    return UnservedTasks(
        harness.instance.worker_queue, routes, harness.attempts.rules, others.seen(), clock=lambda: clock.now
    )


def test_a_greeting_has_the_models_that_an_instance_serves() -> None:
    drawn, bought = Channel("drawn", "sandbox"), paid("bought", "org/*", "short")
    others = PeerChannels(
        lambda: {"one": greeting(bought), "two": greeting(drawn, bought), "old": OLD_VERSION, "new": {"serves": 5}}
    )
    assert others.serving("org/x", sandbox=False) == ["one", "two"]
    assert others.serving("org/x", sandbox=True) == []
    assert others.serving("other", sandbox=True) == ["two"]
    assert others.serving("other", sandbox=None) == ["two"]
    assert others.with_key("account-bought") == ["one", "two"]


@over_rows(
    ("greetings", "may"),
    [({}, False), ({"a": OLD_VERSION}, True), ({"a": greeting(paid("b", "b"))}, False)],
)
def test_only_an_instance_with_a_list_of_models_certainly_lacks_a_model(
    greetings: Mapping[str, Any], may: bool
) -> None:
    assert PeerChannels(lambda: greetings).may_serve("theirs", sandbox=False) is may
    assert PeerChannels(lambda: greetings, lambda: True).may_serve("theirs", sandbox=False)


def test_an_instance_with_too_many_models_may_serve_any() -> None:
    large = paid("large", *(f"model-{number}" for number in range(2_000)))
    assert PeerChannels(lambda: {"large": greeting(large)}).may_serve("theirs", sandbox=False)


async def test_a_task_goes_to_the_instances_that_serve_it_by_turns(claim: Taken) -> None:
    taken, harness = claim
    serving = greeting(paid("a", "theirs"))
    others = Others(one=serving, two=serving, three=greeting(paid("b", "b")))
    tasks = unserved(harness, others, Clock(taken.task.created_at))
    assert not await tasks.runs_here(taken)
    assert await tasks.leave(taken) is None
    other = replace(taken.task, id="0" * 32)
    taken.task = other
    assert await tasks.leave(taken) is None
    assert {peer for _, peer in others.handed} == {"one", "two"}


async def test_a_task_that_came_back_is_held_while_the_instances_are_checked(claim: Taken) -> None:
    taken, harness = claim
    clock = Clock(taken.task.created_at)
    others = Others(one=greeting(paid("a", "theirs")))
    tasks = unserved(harness, others, clock)
    for step in range(40):
        assert await tasks.leave(taken) is None
        assert (taken.timer is not None) is bool(step % 2)
        if taken.timer:
            taken.timer.cancel()
            taken.timer = None
        clock.now += MAX_HELD_S / 2
    assert len(others.handed) == 20
    assert others.pings == pytest.approx(40 * MAX_HELD_S / 2 / PING_PEERS_INTERVAL_S, abs=1)


async def test_a_task_that_no_instance_serves_fails_after_a_minute(claim: Taken) -> None:
    taken, harness = claim
    clock = Clock(taken.task.created_at)
    others = Others(one=greeting(paid("b", "b")))
    tasks = unserved(harness, others, clock)
    assert await tasks.leave(taken) is None
    assert taken.timer is not None
    taken.timer.cancel()
    clock.now += ALONE_S
    outcome = await tasks.leave(taken)
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "model_not_available"
    assert "no instance has a channel" in outcome.error.detail
    assert others.handed == []


async def test_a_job_goes_to_the_instance_that_has_its_key_and_stays_if_none_has(claim: Taken) -> None:
    taken, harness = claim
    job = AcceptedJob(JobHandle("fal", "job_1", "account-left", channel="pool"), (0,))
    taken.checkpoint = replace(taken.checkpoint, job=job)
    others = Others(one=greeting(paid("left", "anything")), two=greeting(paid("pool", "theirs")))
    tasks = unserved(harness, others, Clock(taken.task.created_at), paid("pool", "theirs"))
    assert not await tasks.runs_here(taken)
    assert await tasks.leave(taken) is None
    assert others.handed == [(taken.task.id, "one")]
    del others.greetings["one"]
    assert await tasks.runs_here(taken)


def test_the_description_of_an_instance_is_read_as_it_was_written() -> None:
    routes = routes_of(paid("a", "x", "y=z"), Channel("drawn", "sandbox"))
    served = PeerChannels(lambda: {"one": dict(served_by(routes, ("fallback",)))})
    assert served.serving("x", sandbox=False) == ["one"]
    assert Served(fallbacks=("f",), drawn=("f",)).serves("any", sandbox=True)
