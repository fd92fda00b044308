"""Variants of a request: other tasks with a seed of their own, which can be made again."""

from __future__ import annotations

import pytest
from emulator_fixtures import EmulatorProcess
from service.running import Service, calls_about, eventually


def sha256s(task: dict) -> list[str]:
    return [entry["sha256"] for entry in task["data"]]


def seeds(task: dict) -> list[int | None]:
    return [entry["seed"] for entry in task["data"]]


def test_a_variant_is_made_again_after_its_result_expired(start_service) -> None:
    service = start_service(RESULT_TTL="2")
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


def test_all_variants_are_kept_beside_each_other(start_service) -> None:
    service = start_service()
    tasks = [service.made(prompt="kept", variant=number) for number in (0, 1, 2)]
    for number, task in enumerate(tasks):
        assert service.get(task["data"][0]["url"]).status == 200
        answer = service.submit(prompt="kept", variant=number)
        assert (answer.json["cached"], answer.json["taskId"]) == (True, task["taskId"])


def test_images_made_afresh_differ_unless_a_seed_was_given(start_service) -> None:
    service = start_service()

    def afresh(**fields: object) -> dict:
        answer = service.request("POST", "/api/images/generate?wait=20", fields, headers={"Cache-Control": "no-cache"})
        assert answer.status == 200
        return answer.json

    seen = [service.made(prompt="afresh"), afresh(prompt="afresh"), afresh(prompt="afresh")]
    assert len({task["taskId"] for task in seen}) == 1
    assert len({sha for task in seen for sha in sha256s(task)}) == 3
    seeded = [service.made(prompt="afresh", seed=5), afresh(prompt="afresh", seed=5)]
    assert sha256s(seeded[0]) == sha256s(seeded[1])


def test_the_seeds_of_a_variant_go_upstream_as_its_entries_say(start_service, upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url)
    task = service.made(prompt="seeds upstream", variant=1, n=6, model="m/any")
    sent = [(call["seed"], call["n"]) for call in calls_about(upstream, "seeds upstream")]
    (first, four), (second, two) = sorted(sent, key=lambda call: call[0])
    assert (four, two, second) == (4, 2, first + 4)
    assert seeds(task) == [first] * 4 + [second] * 2
    two_of_them = service.made(prompt="seeds upstream", variant=1, n=2, model="m/any")
    assert seeds(two_of_them) == [first] * 2


def test_a_variant_with_more_images_keeps_those_that_it_has(start_service, upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url)
    two = service.made(prompt="more of it", variant=1, n=2, model="m/any")
    four = service.made(prompt="more of it", variant=1, n=4, model="m/any")
    (first, _) = seeds(two)
    assert first is not None
    assert seeds(four) == [first, first, first + 2, first + 2]
    assert sha256s(four)[:2] == sha256s(two)
    assert service.submit(prompt="more of it", variant=1, n=3, model="m/any").json["cached"]
    assert [call["n"] for call in calls_about(upstream, "more of it")] == [2, 2]


def test_equal_calls_of_the_openai_api_send_other_seeds(start_service, upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url)
    for _ in range(3):
        body = {"prompt": "equal calls", "model": "m/any"}
        assert service.request("POST", "/v1/images/generations", body).status == 200
    sent = [call["seed"] for call in calls_about(upstream, "equal calls")]
    assert sent[0] is None
    assert len(set(sent)) == 3


@pytest.mark.parametrize("model", ["gpt-image-2", "openai/gpt-image-2"])
def test_a_model_that_is_known_to_take_no_seed_gets_none(start_service, model: str) -> None:
    with EmulatorProcess("--image", "png") as upstream:
        service: Service = start_service(
            PROVIDER="openai", OPENAI_API_URL=f"{upstream.url}/v1", OPENAI_API_KEY="k" * 20, MODEL_RULES="off"
        )
        task = service.made(prompt="no seed", variant=1, model=model)
        assert [call.get("seed") for call in calls_about(upstream, "no seed")] == [None]
        assert (seeds(task), task.get("warnings")) == ([None], None)


def test_a_model_that_refuses_a_seed_gets_none_from_then_on(start_service) -> None:
    with EmulatorProcess("--image", "png") as upstream:
        service = start_service(PROVIDER="openai", OPENAI_API_URL=f"{upstream.url}/v1", OPENAI_API_KEY="k" * 20)
        upstream.script({"fault": "refused_field", "parameter": "seed", "times": 1})
        tasks = [service.made(prompt="refusing", variant=number, model="m/strict") for number in (1, 2)]
        sent = [call.get("seed") for call in calls_about(upstream, "refusing")]
        assert sent[0] is not None
        assert sent[1:] == [None, None]
        assert [(seeds(task), task.get("warnings")) for task in tasks] == [([None], None)] * 2
