"""Fields of a request through the running service: each is sent, makes a task of its own, and may be refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about

PAIRS: dict[str, list[Any]] = {
    "quality": ["low", "high"],
    "background": ["opaque", "transparent"],
    "outputCompression": [40, 90],
    "moderation": ["auto", "low"],
    "style": ["vivid", "natural"],
    "inputFidelity": ["low", "high"],
    "disableSafetyChecker": [True, False],
    "promptUpsampling": [True, False],
    "extra": [{"x_style": 1}, {"x_style": 2}],
}


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, V1_REUSE="always", MODEL_RULES="off", WORKER_CONCURRENCY="20")


def snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def on_v1(service: Service, **fields: object) -> None:
    answer = service.request("POST", "/v1/images/generations", fields)
    assert answer.status == 200, answer.body


@pytest.mark.parametrize("name", PAIRS)
def test_two_values_of_a_field_are_two_tasks_and_each_is_sent(
    service: Service, upstream: EmulatorProcess, name: str
) -> None:
    fields: list[dict[str, Any]] = [{"prompt": f"api, {name}", "model": "m/any", name: value} for value in PAIRS[name]]
    ids = [service.made(**body)["taskId"] for body in fields]
    assert ids[0] != ids[1]
    assert [service.submit(**body).status for body in fields] == [200, 200]
    sent = [call["body"] for call in calls_about(upstream, f"api, {name}")]
    if name == "extra":
        assert [body["x_style"] for body in sent] == [1, 2]
    else:
        assert [body[snake(name)] for body in sent] == PAIRS[name]


@pytest.mark.parametrize("name", [*PAIRS, "frame_images", "made_up"])
def test_two_values_of_a_field_are_two_tasks_on_v1(service: Service, upstream: EmulatorProcess, name: str) -> None:
    values = PAIRS.get(name, [[{"a": 1}], [{"a": 2}]])
    named = [value if name == "extra" else {snake(name): value} for value in values]
    for fields in [*named, *named]:
        on_v1(service, model="m/any", prompt=f"v1, {name}", user="a", **fields)
        on_v1(service, model="m/any", prompt=f"v1, {name}", user="b", metadata={"a": "b"}, store=True, **fields)
    sent = [call["body"] for call in calls_about(upstream, f"v1, {name}")]
    assert [{key: body[key] for key in fields} for body, fields in zip(sent, named, strict=True)] == named
    assert not {"user", "metadata", "store"} & sent[0].keys()


def test_one_request_has_one_id_however_it_is_spelled(service: Service) -> None:
    spellings: list[dict[str, Any]] = [
        {"width": 1024, "height": 1024},
        {"width": "1024", "height": 1024.0, "steps": None, "negativePrompt": "", "referenceImages": []},
        {"aspectRatio": "1:1"},
        {"aspect_ratio": "4:4", "resolution": "1K", "extra": {}},
        {"resolution": "1K", "seed": -1, "n": 1},
    ]
    ids = {service.accepted(prompt="one id", **fields) for fields in spellings}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (
            {"error": {"message": "Unknown parameter: 'x_style'.", "param": "x_style", "code": "unknown_parameter"}},
            ["x_style"],
        ),
        (
            {
                "detail": [
                    {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
                    for name in ("x_style", "quality")
                ]
            },
            ["x_style", "quality"],
        ),
        ({"error": "Argument not supported: quality"}, ["quality"]),
    ],
)
def test_a_refused_field_is_left_out_with_a_warning(
    service: Service, upstream: EmulatorProcess, body: dict[str, Any], refused: list[str]
) -> None:
    prompt = f"refused {len(str(body))}"
    upstream.script({"fault": "status", "status": 422, "body": body, "match": prompt})
    task = service.made(prompt=prompt, quality="high", extra={"x_style": 1})
    assert [warning.split()[0] for warning in task["warnings"]] == refused
    first, second = (call["body"] for call in calls_about(upstream, prompt))
    assert first.keys() - second.keys() == set(refused)


def test_a_refused_field_that_was_not_sent_fails_the_task(service: Service, upstream: EmulatorProcess) -> None:
    prompt = "not sent {{fault:400_unsupported parameter=quality}}"
    task = service.finished(service.accepted(prompt=prompt))
    assert task["error"] == {"code": "upstream_invalid_request", "retryable": False}
    assert len(calls_about(upstream, "not sent")) == 1


def test_gpt_image_gets_its_options_in_its_own_words(start_service: StartService, upstream: EmulatorProcess) -> None:
    service: Service = start_service(
        PROVIDER="openai", OPENAI_API_URL=f"{upstream.url}/v1", OPENAI_API_KEY="k" * 20, MODEL_RULES="off"
    )
    options = {"quality": "high", "background": "opaque", "moderation": "low"}
    order = options | {"model": "gpt-image-2", "outputFormat": "webp", "outputCompression": 80, "aspectRatio": "3:2"}
    task = service.made(prompt="gpt image", steps=4, extra={"x_style": 1}, **order)
    assert {warning.split()[0] for warning in task["warnings"]} == {"steps", "x_style"}
    first, second = (call["body"] for call in calls_about(upstream, "gpt image"))
    expected = options | {"output_format": "webp", "output_compression": 80, "size": "1248x832"}
    assert second == expected | {"model": "gpt-image-2", "prompt": "gpt image"}
    assert first == second | {"x_style": 1}
