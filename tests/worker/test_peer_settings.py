"""Tests of the comparison of settings among the instances of one Redis."""

from __future__ import annotations

import time

import pytest

from imagegen.queue import notifier
from imagegen.worker import peer_settings
from imagegen.worker.peer_settings import PeerSettings
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, logged


def greeting_with(instance: Instance, **values: object) -> PeerSettings:
    """Let an instance greet with the values of its settings."""
    settings = PeerSettings(lambda: values, instance.notifier)
    instance.notifier.greeting = settings.greeting
    instance.notifier.handlers["here"] = settings.on_answer
    return settings


async def test_an_instance_that_was_killed_does_not_differ(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_settings, "LASTING_S", 0.0)
    one, killed, other = (make_instance(start=False) for _ in range(3))
    settings = greeting_with(one, DEFAULT_MODEL="m", IMAGE_STORE="s3")
    greeting_with(killed, DEFAULT_MODEL="former", IMAGE_STORE="s3")
    greeting_with(other, DEFAULT_MODEL="m", IMAGE_STORE="redis")
    for instance in (one, killed, other):
        instance.start()
    await eventually(lambda: len(one.notifier.greetings) == 2)
    await killed.crash()
    await killed.notifier.flush()
    peers, asked_at = one.notifier.peers, time.monotonic()
    other.notifier.publish("hello")
    await eventually(lambda: peers[other.notifier.instance] > asked_at)  # what the killed one sent came before
    with logged("WARNING", "{message}") as lines:
        settings.on_peer()
        await eventually(lambda: lines)
    assert ["another value of IMAGE_STORE:" in line for line in lines] == [True]


async def test_a_peer_with_another_value_counts_until_it_is_gone(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "SILENT_S", 0.2)
    one, other = make_instance(start=False), make_instance(start=False)
    settings = greeting_with(one, IMAGE_STORE="disk", DEFAULT_MODEL="m")
    greeting_with(other, IMAGE_STORE="s3", DEFAULT_MODEL="m")
    assert not settings.differs("IMAGE_STORE")
    one.start()
    other.start()
    await eventually(lambda: settings.differs("IMAGE_STORE"))
    assert not settings.differs("DEFAULT_MODEL")
    await other.crash()
    await eventually(lambda: not settings.differs("IMAGE_STORE"))


async def test_a_greeting_does_not_confirm_a_guess_at_a_secret(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    greetings = {str(greeting_with(instance, SECRET=f"guess {number}").greeting()) for number in range(100_000)}
    assert len(greetings) <= 65_536
