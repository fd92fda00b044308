"""Tests of which claims of models that are dead here go to other instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.task import Task
from imagegen.worker.circuit_breaker import DEAD_AFTER_S
from imagegen.worker.dead_models import DeadModels
from imagegen.worker.pacing import Pacing
from imagegen.worker.peer_channels import PeerChannels
from imagegen.worker.unserved import OtherInstances
from tests.support import Clock
from tests.worker.conftest import ScriptedProvider, loss, only_route, refused

SERVES = {"serves": {"paid": ["*"]}}


class Others:
    """Other instances by name, with their greetings. handed: tasks and the instances that got them."""

    def __init__(self, **greetings: Mapping[str, Any]) -> None:
        self.handed: list[tuple[str, str]] = []
        self.greeted = 0
        self.seen = OtherInstances(
            lambda: not greetings,
            PeerChannels(lambda: greetings),
            lambda claim, peer: self.handed.append((claim.task.id, peer)),
            greet=self.greet,
        )

    def greet(self) -> None:
        self.greeted += 1


def claim(name: str) -> Claim:
    return Claim(f"{name}-0", Task(name, 1, 1, "", "m", b"", 0.0), Checkpoint("here"))


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def pacing(clock: Clock) -> Pacing:
    return Pacing(only_route(ScriptedProvider()), clock=clock)


def die(pacing: Pacing, error: UpstreamError) -> None:
    for number in range(5):
        if permit := pacing.try_acquire("m"):
            with permit:
                pacing.failed(permit, error, unfinished=f"faulty {number}")


@pytest.mark.parametrize("error", [refused(), loss()], ids=["refused", "loss"])
def test_a_model_is_dead_some_seconds_after_its_upstream_stopped_to_answer_and_until_it_does(
    pacing: Pacing, clock: Clock, error: UpstreamError
) -> None:
    others = Others()
    dead = DeadModels(pacing, others.seen)
    die(pacing, error)
    dead.check(["m"])
    assert (dead.greeting(), others.greeted) == ({}, 0)
    clock.now = DEAD_AFTER_S
    dead.check(["m"])
    dead.check([])
    assert (dead.greeting(), others.greeted, "m" in dead) == ({"dead": ["m"]}, 1, True)
    clock.now = 60.0
    permit = pacing.try_acquire("m")
    assert permit is not None
    pacing.record_success(permit, UpstreamLimits())
    dead.check([])
    assert (dead.greeting(), others.greeted, "m" in dead) == ({}, 2, False)


@pytest.mark.parametrize(
    ("greetings", "handed"),
    [
        ({"b": SERVES, "c": SERVES}, ["c", "b"]),
        ({"b": SERVES, "c": {**SERVES, "dead": ["m"]}}, ["b", "b"]),
        ({"b": SERVES, "c": {**SERVES, "dead": ["*"]}}, ["b", "b"]),
        ({"b": {**SERVES, "dead": ["other"]}}, ["b", "b"]),
        ({"b": {**SERVES, "dead": [["m"], None]}}, ["b", "b"]),
        ({"b": {**SERVES, "dead": "m"}}, ["b", "b"]),
        ({"b": {**SERVES, "dead": ["m"]}}, []),
        ({"b": {"serves": {"paid": ["other"]}}}, []),
        ({"b": {}}, []),
        ({}, []),
    ],
)
def test_a_claim_goes_to_an_instance_at_which_its_model_is_not_dead(
    pacing: Pacing, greetings: dict[str, Any], handed: list[str]
) -> None:
    others = Others(**greetings)
    dead = DeadModels(pacing, others.seen)
    assert [dead.give(claim(name)) for name in "xy"] == [bool(handed)] * 2
    assert others.handed == list(zip("xy", handed, strict=False))


def test_all_models_are_dead_while_images_can_not_be_saved(pacing: Pacing) -> None:
    others = Others()
    dead = DeadModels(pacing, others.seen)
    dead.on_store(False)
    assert (dead.greeting(), others.greeted) == ({"dead": ["*"]}, 1)
    dead.on_store(True)
    assert (dead.greeting(), others.greeted) == ({}, 2)
