"""Choice of channels and keys, by hand-set clocks."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from imagegen.channels_file import Channel, ChannelKey, Channels, ModelName, parse_channels, read_channels
from imagegen.errors import UpstreamError
from imagegen.providers.response_parser import error_from_response
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.worker.call_routes import PAID_IDENTITY, Route, Routes
from imagegen.worker.channel_report import ChannelReport
from imagegen.worker.failover import error_for_client, without_tried
from imagegen.worker.judge import Judge
from imagegen.worker.key_health import NO_MODEL_S, OUT_S, PROBE_S
from imagegen.worker.permits import Choice
from imagegen.worker.router import Router
from tests.support import Clock
from tests.worker.conftest import UNPRICED, metered, no_model
from tests.worker.routed_calls import ends, router, taken

EXAMPLE = Path(__file__).resolve().parents[2] / "channels.example.toml"
LIMIT = UpstreamError("upstream_rate_limited", "429", retryable=True, status=429, retry_after_s=60)
LIMIT_WITHOUT_TIME = UpstreamError("upstream_rate_limited", "429", retryable=True, status=429)
SHORT_LIMIT = UpstreamError("upstream_rate_limited", "429", retryable=True, status=429, retry_after_s=1)
NO_KEY = UpstreamError("upstream_auth", "401", status=401)
FORBIDDEN = UpstreamError("upstream_auth", "403", status=403)


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


def judge_of(made: Router, clock: Clock) -> Judge:
    """Return a judge that is asked for causes alone, which depend on neither the claim nor its limits."""
    unused: Any = None
    return Judge(unused, unused, made, clock)


def test_a_key_that_was_never_accepted_has_one_call_at_once(clock: Clock) -> None:
    made = router(clock)
    assert len({taken(made).route.account for _ in range(3)}) == 3
    assert made.try_acquire("m") is None
    clock.now += 2.0
    assert made.try_acquire("m") is not None


def test_a_limited_key_is_probed_once_in_five_seconds_and_comes_back(clock: Clock) -> None:
    made = router(clock)
    accounts = [ends(made, permit, LIMIT if n == 0 else None) for n, permit in enumerate([taken(made) for _ in "abc"])]
    limited, probes = accounts[0], []
    for _ in range(1200):
        clock.now += 0.1
        permit = taken(made)
        if permit.route.account == limited:
            probes.append(clock.now)
        ends(made, permit, SHORT_LIMIT if permit.route.account == limited and len(probes) < 2 else None)
    assert probes[0] == pytest.approx(160.0, abs=0.2)
    assert probes[1] - probes[0] >= 5


def test_a_task_that_alone_meets_a_rate_limit_makes_no_key_rest(clock: Clock) -> None:
    made = router(clock)
    for _ in "abc":
        ends(made, taken(made), SHORT_LIMIT)
    clock.now += PROBE_S
    assert [ends(made, taken(made)) for _ in "abc"]
    for _ in range(2):
        ends(made, taken(made), SHORT_LIMIT)
        clock.now += 0.1
        assert len({ends(made, taken(made)) for _ in "abc"}) == 3
    assert made.limited_tasks.own_limits("task") == 2


def test_the_last_key_is_probed_half_a_second_after_a_rate_limit_without_a_time(clock: Clock) -> None:
    made = router(clock, Channel("pool", "together", (ChannelKey("a", "file"),)))
    began_at, probes = clock.now, []
    while clock.now < began_at + 20.0:
        if permit := made.try_acquire("m"):
            ends(made, permit, LIMIT_WITHOUT_TIME)
            probes.append(clock.now)
        clock.now += 0.25
    assert [after - before for before, after in pairwise(probes)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_job_that_is_accepted_ends_the_rest_of_its_key(clock: Clock) -> None:
    made = router(clock, Channel("pool", "together", (ChannelKey("a", "file"),)))
    ends(made, taken(made), SHORT_LIMIT)
    clock.now += PROBE_S
    running = taken(made)
    assert made.try_acquire("m") is None
    running.accepted()
    assert made.try_acquire("m")
    running.close()
    running.accepted()


def test_a_refused_key_gets_no_further_call_while_others_work(clock: Clock) -> None:
    made = router(clock)
    refused = ends(made, taken(made), NO_KEY)
    calls = Counter(ends(made, taken(made)) for _ in range(200))
    assert refused not in calls
    clock.now += 301
    assert refused in {ends(made, taken(made)) for _ in range(3)}


def test_tasks_fail_at_once_while_all_keys_are_refused_but_for_probes(clock: Clock) -> None:
    made = router(clock)
    for _ in "abc":
        ends(made, taken(made), NO_KEY)
    assert made.try_acquire("m") is None
    refusal = made.refusal("m")
    assert refusal is not None
    assert refusal.code == "upstream_auth"
    clock.now += 5.1
    assert made.refusal("m") is None
    ends(made, taken(made))
    assert made.capacity("m") > 0


def test_refusals_without_a_reason_keep_no_call_from_the_last_keys(clock: Clock) -> None:
    made = router(clock)
    unexplained = UpstreamError("upstream_auth", "403", status=403, unexplained=True)
    for _ in range(12):
        ends(made, taken(made), unexplained)
    clock.now += 2.0
    permits = [taken(made) for _ in range(6)]
    assert made.refusal("m") is None
    assert {ends(made, permit) for permit in permits}
    assert made.try_acquire("m") is not None


def test_a_job_of_a_refused_key_counts_as_paid_though_another_key_works(clock: Clock) -> None:
    made = router(clock)
    judge = judge_of(made, clock)
    turn, lost = taken(made), UpstreamError("upstream_auth", "401", retryable=True, ambiguous=True, status=401)
    assert judge.cause(turn, lost) is lost
    made.failed(turn, LIMIT, unfinished="task")
    assert judge.cause(turn, LIMIT).ambiguous is False


@pytest.mark.parametrize(("refused", "others"), [(2, []), (3, ["pool-a", "pool-c"])])
def test_a_job_of_a_refused_key_is_polled_with_the_other_keys(clock: Clock, refused: int, others: list[str]) -> None:
    spare = Channel("spare", "together", (ChannelKey("b", "file"),))
    pool = Channel("pool", "together", tuple(ChannelKey(name, "file") for name in "abc"))
    polls = FailedPolls(count=9, useless=refused)
    route = router(clock, spare, pool).routes.of_job(
        JobHandle("together", "1", account="pool-b", channel="pool", failed_polls=polls)
    )
    assert (route.account, [other.account for other in route.others]) == ("pool-b", others)


def test_a_forbidden_model_costs_no_other_model_its_key(clock: Clock) -> None:
    made = router(clock)
    for _ in "abc":
        ends(made, taken(made, "gated"), FORBIDDEN)
    assert made.refusal("gated") is not None
    assert made.refusal("m") is None
    assert len({taken(made).route.account for _ in range(3)}) == 3


def test_channels_share_by_weight_and_a_lower_priority_waits(clock: Clock) -> None:
    keys = (ChannelKey("k", "file"),)
    made = router(
        clock,
        Channel("three", "together", keys, weight=3, priority=1),
        Channel("one", "together", keys, weight=1, priority=1),
        Channel("spare", "together", keys),
    )
    calls = Counter(ends(made, taken(made)) for _ in range(40))
    assert calls == {"three-k": 30, "one-k": 10}
    for _ in range(2):
        ends(made, taken(made), NO_KEY)
    assert ends(made, taken(made)) == "spare-k"


def test_a_full_channel_keeps_its_calls_and_a_tried_one_is_left(clock: Clock) -> None:
    keys = (ChannelKey("k", "file"),)
    made = router(
        clock, Channel("full", "together", keys, priority=1, concurrency=1), Channel("spare", "together", keys)
    )
    running = taken(made)
    assert made.try_acquire("m") is None
    assert made.blocked("m") is not None
    assert made.resting("m") is None
    rest = Choice(channels=frozenset({"full"}))
    assert made.has_other("m", rest)
    assert taken(made, "m", rest).route.channel.name == "spare"
    running.close()
    assert taken(made, "m", Choice(only="full")).route.channel.name == "full"


def test_a_model_has_room_for_the_calls_that_its_preferred_channels_take_and_is_in_no_trouble(clock: Clock) -> None:
    keys = (ChannelKey("k", "file"),)
    full = Channel("full", "together", keys, priority=1, concurrency=2)
    made = router(clock, full, Channel("spare", "together", keys))
    assert made.capacity("m") == 2
    ends(made, taken(made))
    running = [taken(made) for _ in range(2)]
    assert (made.capacity("m"), made.is_on_trial("m")) == (0, False)
    running[0].close()
    assert made.capacity("m") == 1
    for _ in range(2):
        ends(made, taken(made), UpstreamError("upstream_error", "no connection", retryable=True))
    assert made.capacity("m") == math.inf
    paced = router(clock, Channel("paced", "together", keys, rate_per_min=6))
    ends(paced, taken(paced))
    assert (paced.capacity("m"), paced.opens_in_s("m"), paced.is_on_trial("m")) == (0, 10.0, False)
    clock.now += 10.0
    assert paced.capacity("m") == 1


def test_ids_depend_on_the_sandbox_and_not_on_the_channel(clock: Clock) -> None:
    del clock
    text = """
    [[channels]]
    name = "s"
    provider = "sandbox"
    [[channels]]
    name = "p"
    provider = "openai"
    base_url = "http://x"
    models = ["paid", "short=org/long", "in/*=out/*"]
    """
    channels = Channels(parse_channels(text, {}))
    each = [Route(channel, "", metered(), UNPRICED) for channel in channels.all]
    routes = Routes(channels, each, from_file=True)
    assert [routes.identity(model) for model in ("paid", "drawn")] == [PAID_IDENTITY, "sandbox"]
    assert [channel.name for channel in channels.serving("paid")] == ["p"]
    assert [channels.all[1].sent_name(model) for model in ("short", "in/x", "other")] == ["org/long", "out/x", None]
    assert routes.serves("paid", sandbox=True) is False
    assert routes.serves("drawn", sandbox=None)


def test_the_example_file_is_valid() -> None:
    environ = {"TOGETHER_API_KEY": "a" * 20, "TOGETHER_API_KEY_2": "b" * 20, "FAL_KEY": "c" * 20}
    channels = Channels(read_channels(EXAMPLE, environ))
    assert [channel.name for channel in channels.serving("flux")] == ["together", "fal"]


def test_the_report_names_the_next_call_of_a_channel_with_refused_keys(clock: Clock) -> None:
    pool = Channel("pool", "together", tuple(ChannelKey(name, "file") for name in "ab"), (ModelName("m"),))
    other = Channel("other", "together", (ChannelKey("c", "file"),), (ModelName("n"),))
    made = router(clock, pool, other)
    report = ChannelReport(made.routes, made, clock=clock, wall=lambda: clock.now)
    ends(made, taken(made), NO_KEY)
    assert report.channels()[0].state == "healthy"
    assert {key.until for key in report.channels()[0].keys} == {None, clock.now + OUT_S}
    ends(made, taken(made), NO_KEY)
    assert (report.channels()[0].state, report.channels()[0].until) == ("out", clock.now + PROBE_S)
    assert [each.state for each in report.channels()] == ["out", "healthy"]


def test_a_channel_without_a_model_gets_its_calls_again_after_some_minutes_or_if_all_lack_it(clock: Clock) -> None:
    first = Channel("first", "together", (ChannelKey("a", "file"),), priority=5)
    second = Channel("second", "together", (ChannelKey("b", "file"),))
    made = router(clock, first, second)
    assert ends(made, taken(made), no_model()) == "first-a"
    assert [ends(made, taken(made)) for _ in range(3)] == ["second-b"] * 3
    assert ends(made, taken(made, "other")) == "first-a"
    clock.now += NO_MODEL_S
    assert ends(made, taken(made), no_model()) == "first-a"
    assert ends(made, taken(made), no_model()) == "second-b"
    assert ends(made, taken(made)) == "first-a"


def test_a_channel_that_just_made_an_image_of_a_model_keeps_its_calls_though_it_lacks_it_for_one_task(
    clock: Clock,
) -> None:
    first = Channel("first", "together", (ChannelKey("a", "file"),), priority=5)
    second = Channel("second", "together", (ChannelKey("b", "file"),))
    made = router(clock, first, second)
    assert ends(made, taken(made)) == "first-a"
    assert ends(made, taken(made), no_model()) == "first-a"
    assert ends(made, taken(made)) == "first-a"
    tried = Choice(channels=frozenset({"first"}))
    assert made.has_other("m", tried)
    assert ends(made, taken(made, choice=tried), no_model()) == "second-b"
    assert not made.recovers("m", Choice(channels=frozenset({"second"}))), "the task ends, both were asked"
    clock.now += NO_MODEL_S - 1
    assert ends(made, taken(made), no_model()) == "first-a"
    clock.now += 1
    assert ends(made, taken(made)) == "second-b"


def test_a_task_waits_for_a_limited_channel_if_the_one_tried_after_it_lacks_the_model(clock: Clock) -> None:
    limited = Channel("limited", "together", (ChannelKey("a", "file"),), priority=5)
    lacking = Channel("lacking", "together", (ChannelKey("b", "file"),))
    made = router(clock, limited, lacking)
    judge = judge_of(made, clock)
    assert ends(made, taken(made), LIMIT) == "limited-a"
    rest = Choice(keys=frozenset({"limited-a"}))
    permit = taken(made, choice=rest)
    assert judge.cause(permit, no_model(), Choice(channels=frozenset({"lacking"}))).code == "upstream_rate_limited"
    assert ends(made, permit, no_model()) == "lacking-b"
    assert not made.has_other("m", rest)
    assert not made.recovers("m", rest)


def test_another_key_of_a_channel_gets_the_calls_of_a_model_that_one_account_lacks(clock: Clock) -> None:
    first = Channel("first", "together", (ChannelKey("a", "file"), ChannelKey("b", "file")), priority=5)
    second = Channel("second", "together", (ChannelKey("c", "file"),))
    made = router(clock, first, second)
    permit = taken(made)
    rest = without_tried(Choice(), permit, no_model(), has_job=False)
    assert rest is not None
    assert made.has_other("m", rest)
    assert ends(made, permit, no_model()) == "first-a"
    assert ends(made, taken(made, choice=rest)) == "first-b"
    assert [ends(made, taken(made)) for _ in range(3)] == ["first-b"] * 3
    assert ends(made, taken(made, "other")) == "first-a"
    assert ends(made, taken(made), NO_KEY) == "first-b"
    assert ends(made, taken(made)) == "second-c", "a key that lacks the model is no substitute"


def test_another_channel_with_the_same_key_gets_a_call_of_a_model_by_its_other_name(clock: Clock) -> None:
    old = Channel("old", "together", (ChannelKey("a", "file"),), priority=5)
    new = Channel("new", "together", (ChannelKey("a", "file"),))
    routes = [Route(channel, "same", metered(), UNPRICED, channel.keys[0]) for channel in (old, new)]
    made = Router(Routes(Channels((old, new)), routes, from_file=True), clock=clock, wall=lambda: clock.now)
    permit = taken(made)
    rest = without_tried(Choice(), permit, no_model(), has_job=False)
    assert rest is not None
    assert made.has_other("m", rest)
    assert taken(made, choice=rest).route.channel is new
    refused = without_tried(Choice(), permit, NO_KEY, has_job=False)
    assert refused is not None
    assert not made.has_other("m", refused), "its account is refused at each channel"


@pytest.mark.parametrize("status", [400, 403, 451])
def test_a_refusal_that_is_no_401_keeps_a_key_from_one_model_first(clock: Clock, status: int) -> None:
    made = router(clock, Channel("only", "together", (ChannelKey("a", "file"),)))
    refusal = UpstreamError("upstream_auth", "must be verified", status=status)
    ends(made, taken(made, "gated"), refusal)
    assert made.refusal("gated") is refusal
    assert ends(made, taken(made)) == "only-a"


def test_refusals_with_words_about_their_models_or_prompts_keep_a_key_for_other_models(clock: Clock) -> None:
    texts = {
        "dear": (403, "Your organization must be verified to use the model `gpt-image-1`."),
        "free": (429, "Quota exceeded for metric: content_free_tier_requests, limit: 0. Please retry in 4s."),
        "billed": (400, "Imagen API is only accessible to billed users at this time."),
    }
    made = router(clock)
    for model, (status, text) in texts.items():
        refusal = error_from_response(status, {}, json.dumps({"error": {"message": text}}).encode())
        assert refusal.code in ("upstream_auth", "upstream_billing")
        while made.refusal(model) is None:
            ends(made, taken(made, model), refusal)
    assert len({taken(made).route.account for _ in range(3)}) == 3


def test_a_client_reads_a_cause_for_the_operator_and_else_the_first_refusal() -> None:
    def error(code: str, name: str, **fields: Any) -> UpstreamError:
        return UpstreamError(code, name, status=400, **fields)

    credit, key = error("upstream_billing", "credit"), error("upstream_auth", "key")
    missing, gone = error("model_not_available", "missing"), error("model_not_available", "gone")
    page = error("upstream_invalid_request", "page", of_channel=True)
    prompt, overload = error("upstream_invalid_request", "prompt"), error("upstream_overloaded", "", retryable=True)
    for refusals, last, expected in (
        ([missing, page], gone, missing),
        ([page], missing, missing),
        ([key, missing], page, key),
        ([missing, key], credit, credit),
        ([credit], prompt, prompt),
        ([credit], overload, overload),
        ([overload], key, key),
    ):
        assert error_for_client(refusals, last) is expected


@pytest.mark.parametrize("code", ["model_not_available", "upstream_auth", "upstream_billing"])
def test_a_resumed_job_that_ended_by_a_refusal_may_be_made_by_another_channel_but_not_one_that_may_run(
    clock: Clock, code: str
) -> None:
    channels = [Channel(name, "together", (ChannelKey("a", "file"),)) for name in ("first", "second")]
    judge = judge_of(router(clock, *channels), clock)
    for is_open in (False, True):
        error = UpstreamError(code, "refused", status=404, ambiguous=is_open)
        judge.allow_other_key("first", "first-a", "m", error)
        assert error.retryable is not is_open
    alone = judge_of(router(clock, channels[0]), clock)
    error = UpstreamError(code, "refused", status=404)
    alone.allow_other_key("first", "first-a", "m", error)
    assert not error.retryable
