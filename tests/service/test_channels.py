"""Channels through the running service: key pools, failover, prices, and tasks that other instances must run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.service.running import eventually, run_to_its_end
from tests.service.scripted_channels import (
    GOOD,
    LIMITED,
    REVOKED,
    SCHNELL,
    Reply,
    Start,
    Upstream,
    all_done,
    channel,
    channels_of,
    error,
    serving,
    write,
)

NO_MODEL = error(404, "Unable to access model X.")
PAGE_404: Reply = (404, {"Content-Type": "text/html"}, b"<html><head><title>404 Not Found</title></head></html>")


def test_a_pool_with_a_revoked_and_a_limited_key_fails_no_task(start_service: Start, tmp_path: Path) -> None:
    replies = {REVOKED: error(401, "Invalid API key"), LIMITED: error(429, "slow down", Retry_After="60")}
    upstream = Upstream(replies, delay_s=0.02)
    file = write(tmp_path / "c.toml", channel("pool", upstream.url, REVOKED, LIMITED, "env:GOOD_KEY"))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file, GOOD_KEY=GOOD)
        tasks = all_done(service, 80)
        assert {task["status"] for task in tasks} == {"completed"}
        assert {task["channel"] for task in tasks} == {"pool"}
        assert len(upstream.times(REVOKED)) == 1
        assert all(later - earlier >= 5 for earlier, later in pairwise(upstream.times(LIMITED)))
        assert len(upstream.times(GOOD)) == 80
        keys = {key["state"]: key for key in channels_of(service)["pool"]["keys"]}
        assert set(keys) == {"healthy", "cooling", "out"}
        assert (keys["healthy"]["source"], keys["out"]["source"]) == ("env:GOOD_KEY", "file")
        assert keys["out"]["errors"] == {"upstream_auth": 1}
        charged = sum(task["cost"]["charged"] for task in tasks)
        assert charged > 0
        assert keys["healthy"]["spentUsd"] == pytest.approx(charged)
        assert service.log.count("refuses the key") == 1
        shown = service.get_as_admin("/api/channels").body.decode() + service.log
        assert not [key for key in (GOOD, REVOKED, LIMITED) if key in shown]


def test_a_dead_channel_passes_its_tasks_on_and_nothing_is_paid_twice(start_service: Start, tmp_path: Path) -> None:
    upstream, dead = Upstream(), f"http://127.0.0.1:{free_port()}"
    first, second = channel("dead", dead, GOOD, priority=5), channel("alive", upstream.url, GOOD)
    with serving(upstream):
        service = start_service(CHANNELS_FILE=write(tmp_path / "c.toml", first, second), allowed=("can't be reached",))
        service.completed(service.accepted(prompt="the first one"), within_s=20)
        tasks = all_done(service, 39)
        assert {(task["status"], task["channel"], task["attempts"]) for task in tasks} == {("completed", "alive", 1)}
        assert len(upstream.calls) == 40
        assert channels_of(service)["dead"]["state"] == "resting"
        assert "The upstream can't be reached (no connection); it is probed" in service.log


def test_a_call_with_a_lost_answer_never_goes_to_another_channel(start_service: Start, tmp_path: Path) -> None:
    silent, other = Upstream(silent=True), Upstream()
    file = write(
        tmp_path / "c.toml",
        channel("silent", silent.url, GOOD, priority=5),
        channel("other", other.url, GOOD),
    )
    with serving(silent, other):
        service = start_service(CHANNELS_FILE=file, UPSTREAM_TIMEOUT="0.5")
        task = service.finished(service.accepted(prompt="lost"))
        assert (task["status"], task["error"]["code"], task["channel"]) == ("failed", "upstream_timeout", "silent")
        eventually(lambda: len(silent.calls) >= 2)  # its thread may read a call after the end of the task
        assert (len(silent.calls), len(other.calls)) == (2, 0)
        spent = channels_of(service)["silent"]["spentUsd"]
        assert spent == pytest.approx(task["cost"]["charged"])
        assert spent > 0


@pytest.mark.parametrize(
    ("reply", "passes_on"),
    [
        (error(500), True),
        (error(503), True),
        (error(429, Retry_After="30"), True),
        (error(402, "insufficient credits"), True),
        (error(403, "Invalid API key"), True),
        (error(404, "Unable to access model"), True),
        (PAGE_404, True),
        (error(451, "not available in your country"), True),
        (error(400, "Your organization must be verified to use the model"), True),
        (error(504), False),
        (error(400, "prompt is wrong"), False),
        (error(400, "blocked by our content filter"), False),
    ],
    ids=["500", "503", "429", "402", "403", "404", "no route", "451", "verified", "504", "400", "policy"],
)
def test_only_a_call_that_was_certainly_not_paid_goes_to_another_channel(
    reply: Reply, passes_on: bool, start_service: Start, tmp_path: Path
) -> None:
    first, second = Upstream({GOOD: reply}), Upstream()
    file = write(
        tmp_path / "c.toml", channel("first", first.url, GOOD, priority=5), channel("second", second.url, GOOD)
    )
    with serving(first, second):
        service = start_service(CHANNELS_FILE=file)
        task = service.finished(service.accepted(prompt="one"))
        assert (task["status"] == "completed", task["channel"]) == (passes_on, "second" if passes_on else "first")
        assert len(second.calls) == passes_on


def test_a_call_passes_all_accounts_and_addresses_that_refuse_it_and_is_paid_once(
    start_service: Start, tmp_path: Path
) -> None:
    """If the last one refuses it too, the task fails with what the operator can mend."""
    unverified = error(403, "Your organization must be verified to use the model")
    pool, relay, last = Upstream({REVOKED: unverified, LIMITED: NO_MODEL}), Upstream({GOOD: PAGE_404}), Upstream()
    file = write(
        tmp_path / "c.toml",
        channel("pool", pool.url, REVOKED, LIMITED, priority=9),
        channel("relay", relay.url, GOOD, priority=5),
        channel("last", last.url, GOOD),
    )
    with serving(pool, relay, last):
        service = start_service(CHANNELS_FILE=file)
        tasks = [service.made(prompt=f"image {number}") for number in range(3)]
        assert {(task["channel"], task["attempts"]) for task in tasks} == {("last", 1)}
        assert (len(pool.calls), len(relay.calls), len(last.calls)) == (2, 1, 3)
        assert [task.get("possiblyBilledTwice") for task in tasks] == [None] * 3
        last.replies[GOOD] = error(404, "Unable to access model X.")
        other = {"model": "black-forest-labs/FLUX.1-dev"}
        failed = service.finished(service.accepted(prompt="none serves it", **other))
        assert (failed["status"], failed["error"]["code"]) == ("failed", "upstream_auth")
        assert (len(pool.calls), len(relay.calls), len(last.calls)) == (4, 2, 4)
        assert service.log.count("Channel relay answered a call with 404") == 1


def test_a_prompt_that_is_refused_without_a_reason_stops_no_other_prompt(start_service: Start, tmp_path: Path) -> None:
    upstream = Upstream()
    upstream.of_prompts["refused"] = error(403, "Forbidden")
    file = write(tmp_path / "c.toml", channel("pool", upstream.url, GOOD, REVOKED))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file)
        for number in range(3):
            refused = service.finished(service.accepted(prompt=f"refused {number}"))
            assert (refused["status"], refused["error"]["code"]) == ("failed", "upstream_auth")
            service.made(prompt=f"fine {number}")
        assert len(upstream.calls) <= 3 * 2 + 3


def test_prompts_that_all_keys_refuse_without_a_reason_stop_no_other_prompts(
    start_service: Start, tmp_path: Path
) -> None:
    upstream = Upstream()
    upstream.of_prompts["DROP TABLE"] = error(403, "Forbidden")
    file = write(tmp_path / "c.toml", channel("pool", upstream.url, GOOD, REVOKED))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file)
        for number in range(6):
            refused = service.finished(service.accepted(prompt=f"DROP TABLE {number}"))
            assert refused["error"]["code"] == "upstream_auth"
        good = [service.accepted(prompt=f"image {number}") for number in range(6)]
        assert {service.finished(task_id)["status"] for task_id in good} == {"completed"}


def test_a_model_that_one_channel_lacks_waits_for_another_that_is_limited(start_service: Start, tmp_path: Path) -> None:
    """The one that lacks it is not requested again meanwhile."""
    lacking, limited = Upstream({GOOD: NO_MODEL}), Upstream({GOOD: error(429, "slow down", Retry_After="1")})
    file = write(
        tmp_path / "c.toml",
        channel("lacking", lacking.url, GOOD, priority=5),
        channel("limited", limited.url, GOOD),
    )
    with serving(lacking, limited):
        service = start_service(CHANNELS_FILE=file)
        task_id = service.accepted(prompt="only one has it")
        eventually(lambda: len(limited.calls) > 2)
        limited.replies.clear()
        task = service.completed(task_id)
        assert (task["channel"], task["attempts"], len(lacking.calls)) == ("limited", 1, 1)
        limited.replies[GOOD] = NO_MODEL
        task = service.finished(service.accepted(prompt="none has it"))
        assert task["error"]["code"] == "model_not_available"


def test_a_task_without_a_key_for_its_call_is_not_recorded_as_paid_twice(start_service: Start, tmp_path: Path) -> None:
    upstream = Upstream({key: error(401, "Invalid API key") for key in (REVOKED, GOOD)})
    with serving(upstream):
        service = start_service(CHANNELS_FILE=write(tmp_path / "c.toml", channel("pool", upstream.url, REVOKED, GOOD)))
        tasks = all_done(service, 2)
        assert [task["error"]["code"] for task in tasks] == ["upstream_auth"] * 2
        assert (len(upstream.calls), [task.get("possiblyBilledTwice") for task in tasks]) == (2, [None, None])


def test_a_model_without_a_channel_is_refused_and_models_name_their_channel(
    start_service: Start, tmp_path: Path
) -> None:
    upstream = Upstream()
    file = write(tmp_path / "c.toml", channel("only", upstream.url, GOOD, models=[f"short={SCHNELL}"]))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file)
        refused = service.submit(prompt="a", model="unknown")
        assert (refused.error, refused.json["details"][0]["field"]) == ((400, "invalid_request"), "model")
        (model,) = service.get("/api/models").json["models"]
        assert (model["id"], model["channel"], model["provider"]) == ("short", "only", "together")
        task = service.made(prompt="a")
        assert (task["model"], task["cost"]["charged"] > 0, upstream.calls[0][1]) == ("short", True, SCHNELL)


def test_faults_of_the_file_stop_the_start_and_no_key_is_shown(tmp_path: Path) -> None:
    fields = {"name": "a", "provider": "together", "keys": [GOOD, "env:NOT_SET"], "weight_s": 2, "priority": "high"}
    file = write(tmp_path / "c.toml", fields, {"provider": "openai", "keys": [GOOD], "rate": "often"})
    ended = run_to_its_end(tmp_path / "run", CHANNELS_FILE=file)
    assert ended.returncode == 2
    for part in (
        f"CHANNELS_FILE: {file}: [[channels]] number 1 ('a'): 'weight_s' is no key of a channel: did you mean weight?",
        "number 1 ('a'): keys: number 2 is env:NOT_SET, and the variable NOT_SET is not set",
        "number 1 ('a'): priority: must be a whole number",
        "[[channels]] number 2: name is missing",
        "[[channels]] number 2: base_url is missing",
        "[[channels]] number 2: rate: 'often' is not allowed",
    ):
        assert part in ended.stderr
    assert GOOD not in ended.stderr
