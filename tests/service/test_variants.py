"""Variants of a request: other tasks with a seed of their own, which can be made again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually


@pytest.fixture(scope="module")
def sandbox(start_for_module: StartService) -> Service:
    return start_for_module(REDIS_PREFIX="sandbox")


@pytest.fixture(scope="module")
def together(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, REDIS_PREFIX="together")


@pytest.fixture(scope="module")
def openai(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    settings = {"PROVIDER": "openai", "OPENAI_API_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": "k" * 20}
    return start_for_module(REDIS_PREFIX="openai", MODEL_RULES="off", **settings)


def sha256s(task: dict[str, Any]) -> list[str]:
    return [entry["sha256"] for entry in task["data"]]


def seeds(task: dict[str, Any]) -> list[int | None]:
    return [entry["seed"] for entry in task["data"]]


def test_a_variant_is_made_again_after_its_result_expired(start_service: StartService) -> None:
    service = start_service(RESULT_TTL="6")
    first = [service.made(prompt="a fox", variant=number) for number in (0, 1, 2)]
    assert len({task["taskId"] for task in first}) == 3
    assert len({sha for task in first for sha in sha256s(task)}) == 3
    plain, *varied = map(seeds, first)
    assert plain == [None]
    assert len({seed for (seed,) in varied}) == 2
    assert all(seed is not None and 0 < seed < 2**31 for (seed,) in varied)
    eventually(lambda: service.get(f"/api/images/{first[2]['taskId']}").status == 404)
    again = [service.made(prompt="a fox", variant=number) for number in (0, 1, 2)]
    assert [(task["taskId"], sha256s(task), seeds(task)) for task in again] == [
        (task["taskId"], sha256s(task), seeds(task)) for task in first
    ]


def test_all_variants_are_kept_beside_each_other(sandbox: Service) -> None:
    tasks = [sandbox.made(prompt="kept", variant=number) for number in (0, 1, 2)]
    for number, task in enumerate(tasks):
        assert sandbox.get(task["data"][0]["url"]).status == 200
        answer = sandbox.submit(prompt="kept", variant=number)
        assert (answer.json["cached"], answer.json["taskId"]) == (True, task["taskId"])


def test_images_made_afresh_differ_unless_a_seed_was_given(sandbox: Service) -> None:
    def afresh(**fields: object) -> dict[str, Any]:
        answer = sandbox.request("POST", "/api/images/generate?wait=20", fields, headers={"Cache-Control": "no-cache"})
        assert answer.status == 200
        return answer.json

    seen = [sandbox.made(prompt="afresh"), afresh(prompt="afresh"), afresh(prompt="afresh")]
    assert len({task["taskId"] for task in seen}) == 1
    assert len({sha for task in seen for sha in sha256s(task)}) == 3
    seeded = [sandbox.made(prompt="afresh", seed=5), afresh(prompt="afresh", seed=5)]
    assert sha256s(seeded[0]) == sha256s(seeded[1])


def test_the_seeds_of_a_variant_go_upstream_as_its_entries_say(together: Service, upstream: EmulatorProcess) -> None:
    task = together.made(prompt="seeds upstream", variant=1, n=6, model="m/any")
    sent = [(call["seed"], call["n"]) for call in calls_about(upstream, "seeds upstream")]
    (first, four), (second, two) = sorted(sent, key=lambda call: call[0])
    assert (four, two, second) == (4, 2, first + 4)
    assert seeds(task) == [first] * 4 + [second] * 2
    two_of_them = together.made(prompt="seeds upstream", variant=1, n=2, model="m/any")
    assert seeds(two_of_them) == [first] * 2


def test_a_variant_with_more_images_keeps_those_that_it_has(together: Service, upstream: EmulatorProcess) -> None:
    two = together.made(prompt="more of it", variant=1, n=2, model="m/any")
    four = together.made(prompt="more of it", variant=1, n=4, model="m/any")
    (first, _) = seeds(two)
    assert first is not None
    assert seeds(four) == [first, first, first + 2, first + 2]
    assert sha256s(four)[:2] == sha256s(two)
    assert together.submit(prompt="more of it", variant=1, n=3, model="m/any").json["cached"]
    assert [call["n"] for call in calls_about(upstream, "more of it")] == [2, 2]


def test_equal_calls_of_the_openai_api_send_other_seeds(together: Service, upstream: EmulatorProcess) -> None:
    for _ in range(3):
        body = {"prompt": "equal calls", "model": "m/any"}
        assert together.request("POST", "/v1/images/generations", body).status == 200
    sent = [call["seed"] for call in calls_about(upstream, "equal calls")]
    assert sent[0] is None
    assert len(set(sent)) == 3


@pytest.mark.parametrize("model", ["gpt-image-2", "openai/gpt-image-2"])
def test_a_model_that_is_known_to_take_no_seed_gets_none(
    openai: Service, upstream: EmulatorProcess, model: str
) -> None:
    task = openai.made(prompt=f"no seed of {model}", variant=1, model=model)
    assert [call.get("seed") for call in calls_about(upstream, f"no seed of {model}")] == [None]
    assert (seeds(task), task.get("warnings")) == ([None], None)


def test_a_model_that_refuses_a_seed_gets_none_from_then_on(openai: Service, upstream: EmulatorProcess) -> None:
    upstream.script({"fault": "refused_field", "parameter": "seed", "times": 1})
    tasks = [openai.made(prompt="refusing", variant=number, model="m/strict") for number in (1, 2)]
    sent = [call.get("seed") for call in calls_about(upstream, "refusing")]
    assert sent[0] is not None
    assert sent[1:] == [None, None]
    assert [(seeds(task), task.get("warnings")) for task in tasks] == [([None], None)] * 2
