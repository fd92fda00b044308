"""Usage and parameters that the upstream reports, on both APIs and after a restart."""

from __future__ import annotations

import base64
import json
import signal
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import KEY, Service

PARTS = {"model": "gpt-image-2", "size": "1024x1024", "quality": "low", "background": "opaque"}


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    settings = {"PROVIDER": "openai", "OPENAI_API_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": KEY}
    return start_for_module(**settings)


def generate(service: Service, **fields: object) -> dict[str, Any]:
    answer = service.request("POST", "/v1/images/generations", PARTS | fields, timeout_s=30)
    assert answer.status == 200, answer.body
    return answer.json


def test_an_answer_has_the_usage_and_the_parameters_of_the_upstream(service: Service) -> None:
    body = generate(service, prompt="counted")
    assert base64.b64decode(body["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert {name: body[name] for name in ("size", "quality", "background", "output_format")} == {
        "size": "1024x1024",
        "quality": "low",
        "background": "opaque",
        "output_format": "png",
    }
    usage = body["usage"]
    assert usage["output_tokens"] == 272
    assert usage["total_tokens"] == usage["input_tokens"] + 272
    assert usage["input_tokens_details"] == {"text_tokens": usage["input_tokens"], "image_tokens": 0}
    assert service.task(body["id"])["usage"]["output_tokens"] == 272


def test_the_usage_of_several_calls_is_summed(service: Service, upstream: EmulatorProcess) -> None:
    before = upstream.ledger()["total"]
    usage = generate(service, prompt="summed", n=3)["usage"]
    calls = upstream.ledger()["total"] - before
    assert calls == 3
    assert usage["output_tokens"] == 3 * 272
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_the_usage_outlives_a_restart(service: Service) -> None:
    body = generate(service, prompt="kept")
    service.signal(signal.SIGKILL)
    service.wait()
    service.start()
    assert service.task(body["id"])["usage"]["total_tokens"] == body["usage"]["total_tokens"]


def test_an_upstream_without_usage_has_none_in_its_answers(service: Service) -> None:
    body = generate(service, prompt="nothing counted", model="some/model")
    assert not {"usage", "size", "quality", "background", "output_format"} & set(body)
    assert "usage" not in service.task(body["id"])


def test_a_stream_has_the_usage_and_the_quality_of_the_upstream(service: Service) -> None:
    answer = service.request("POST", "/v1/images/generations", PARTS | {"prompt": "streamed", "stream": True})
    (line,) = [line for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    event = json.loads(line.removeprefix("data: "))
    assert (event["type"], event["quality"]) == ("image_generation.completed", "low")
    assert event["usage"]["output_tokens"] == 272
