"""Tests of the checks against a model's limits at submit: refused for free, and sent if MODEL_RULES is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatedUpstream
from tests.web.conftest import Client, StartService

BFL = "black-forest-labs/"
IMAGE = "https://images.example/cat.png"
Row = tuple[str, dict[str, Any], str, str, str]
"""Model, fields, the field that is refused, its rule, and the nearest value."""

TOGETHER: list[Row] = [
    (f"{BFL}FLUX.1-schnell", {"width": 1024, "height": 1272}, "height", "multiples of 16", "1024x1264"),
    (f"{BFL}FLUX.1-schnell", {"width": 1024, "height": 1808}, "height", "64 to 1792", "1024x1792"),
    (f"{BFL}FLUX.1-schnell", {"steps": 13}, "steps", "at most 12", "12"),
    (f"{BFL}FLUX.1-schnell", {"imageUrl": IMAGE}, "imageUrl", "no input images", "absent"),
    (f"{BFL}FLUX.1-schnell-Free", {"steps": 5}, "steps", "at most 4", "4"),
    (f"{BFL}FLUX.1-dev", {"width": 1808, "height": 1024}, "width", "64 to 1792", "1792x1024"),
    (f"{BFL}FLUX.1-krea-dev", {"steps": 51}, "steps", "at most 50", "50"),
    (f"{BFL}FLUX.1.1-pro", {"width": 1472, "height": 1024}, "width", "256 to 1440", "1440x1024"),
    (f"{BFL}FLUX.1.1-pro", {"steps": 1}, "steps", "takes no steps", "absent"),
    (f"{BFL}FLUX.1-kontext-pro", {"imageUrl": IMAGE, "referenceImages": [IMAGE]}, "referenceImages", "at most 1", "1"),
    (f"{BFL}FLUX.1-kontext-max", {"steps": 51}, "steps", "at most 50", "50"),
    (f"{BFL}FLUX.2-dev", {"width": 1928, "height": 1024}, "width", "1 to 1920", "1920x1024"),
    (f"{BFL}FLUX.2-flex", {"steps": 51}, "steps", "at most 50", "50"),
    (f"{BFL}FLUX.2-pro", {"width": 1024, "height": 1032}, "height", "multiples of 16", "1024x1024"),
    (f"{BFL}FLUX.2-max", {"background": "transparent"}, "background", "no such images", "opaque"),
    ("openai/gpt-image-2", {"width": 3856, "height": 2160}, "width", "1 to 3840", "3840x2160"),
    ("openai/gpt-image-1.5", {"width": 1536, "height": 1040}, "height", "1536x1024", "1536x1024"),
    ("google/flash-image-2.5", {"width": 1344, "height": 776}, "height", "1344x768", "1344x768"),
    ("google/gemini-3-pro-image", {"width": 4096, "height": 4088}, "height", "4096x4096", "4096x4096"),
    ("google/flash-image-3.1", {"steps": 1}, "steps", "takes no steps", "absent"),
    ("google/flash-image-3.1-lite", {"background": "transparent"}, "background", "no such images", "opaque"),
    ("google/imagen-4.0-preview", {"referenceImages": [IMAGE]}, "referenceImages", "no input images", "absent"),
    ("google/imagen-4.0-fast", {"imageUrl": IMAGE}, "imageUrl", "no input images", "absent"),
    ("google/imagen-4.0-ultra", {"steps": 1}, "steps", "takes no steps", "absent"),
    ("ByteDance/Seedream-5.0-lite", {"steps": 51}, "steps", "at most 50", "50"),
    ("ByteDance-Seed/Seedream-4.0", {"steps": 51}, "steps", "at most 50", "50"),
    ("ByteDance-Seed/Seedream-3.0", {"imageUrl": IMAGE, "mask": IMAGE}, "mask", "takes no mask", "absent"),
    ("Qwen/Qwen-Image-2.0", {"steps": 1}, "steps", "takes no steps", "absent"),
    ("Qwen/Qwen-Image-2.0-Pro", {"steps": 1}, "steps", "takes no steps", "absent"),
    ("Qwen/Qwen-Image", {"steps": 51}, "steps", "at most 50", "50"),
    ("Wan-AI/Wan2.6-image", {"steps": 51}, "steps", "at most 50", "50"),
    ("ideogram/ideogram-4.0", {"steps": 51}, "steps", "at most 50", "50"),
    ("ideogram/ideogram-3.0", {"steps": 51}, "steps", "at most 50", "50"),
    ("prunaai/p-image-ideogram", {"steps": 51}, "steps", "at most 50", "50"),
    ("RunDiffusion/Juggernaut-pro-flux", {"steps": 51}, "steps", "at most 50", "50"),
    ("Rundiffusion/Juggernaut-Lightning-Flux", {"steps": 51}, "steps", "at most 50", "50"),
    ("stabilityai/stable-diffusion-xl-base-1.0", {"steps": 51}, "steps", "at most 50", "50"),
    ("stabilityai/stable-diffusion-3-medium", {"steps": 51}, "steps", "at most 50", "50"),
    ("HiDream-ai/HiDream-I1-Fast", {"steps": 51}, "steps", "at most 50", "50"),
    ("Lykon/DreamShaper", {"steps": 51}, "steps", "at most 50", "50"),
]
OPENAI: list[Row] = [
    ("gpt-image-2", {"size": "3856x2160"}, "size", "1 to 3840", "3840x2160"),
    ("gpt-image-2", {"size": "1024x1032"}, "size", "multiples of 16", "1024x1024"),
    ("gpt-image-2", {"size": "512x512"}, "size", "at least 655360 pixels", "816x816"),
    ("gpt-image-2", {"size": "4096x1024"}, "size", "at most 3 times", "3072x1024"),
    ("openai/gpt-image-2", {"seed": 1}, "seed", "takes no seed", "absent"),
    ("azure/gpt-image-2-2026-04-21", {"background": "transparent"}, "background", "no such images", "opaque"),
    ("gpt-image-2", {"quality": "xhigh"}, "quality", "low, medium, high, auto", "high"),
    ("gpt-image-2.5-flare", {"quality": "hd"}, "quality", "low, medium, high, xhigh, max, auto", "high"),
    ("gpt-image-2.5-sunburst", {"size": "2048x512"}, "size", "at most 3 times", "1536x512"),
    ("gpt-image-2.6-flare", {"num_inference_steps": 4}, "num_inference_steps", "takes no steps", "absent"),
    ("gpt-image-2.6-sunburst", {"seed": 0}, "seed", "takes no seed", "absent"),
    ("gpt-image-1.5", {"size": "1024x1792"}, "size", "1024x1536", "1024x1536"),
    ("gpt-image-1-mini", {"quality": "ultra"}, "quality", "low, medium, high, auto", "high"),
    ("gpt-image-1", {"width": 1536, "height": 1040}, "height", "1536x1024", "1536x1024"),
    ("chatgpt-image-latest", {"seed": 1}, "seed", "takes no seed", "absent"),
]


@pytest.fixture
def start_openai(start_service: StartService, upstream: EmulatedUpstream) -> StartService:
    return partial(start_service, provider="openai", openai_api_url=upstream.url, openai_api_key="any", max_attempts=1)


async def details_of(client: Client, path: str, body: dict[str, Any]) -> list[dict[str, str]]:
    response = await client.post(path, json=body)
    answer = await response.json()
    assert response.status == 400, (body, answer)
    if path.startswith("/v1"):
        return [{"field": answer["error"]["param"], "message": answer["error"]["message"]}]
    assert answer["code"] == "invalid_request"
    return list(answer["details"])


def check(details: list[dict[str, str]], row: Row) -> None:
    model, _, field, rule, near = row
    assert [detail["field"] for detail in details] == [field], row
    message = details[0]["message"]
    assert rule in message, row
    assert message.endswith(near) or f"must be {near}" in message, row
    assert model.rpartition("/")[2].removesuffix("-2026-04-21") in message


def test_enough_rows_are_tried() -> None:
    assert len({model for model, *_ in TOGETHER + OPENAI}) >= 45


async def test_each_models_nearest_wrong_value_is_a_400_without_a_call(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    for row in TOGETHER:
        check(await details_of(service, "/api/images/generate", {"prompt": "a cat", "model": row[0], **row[1]}), row)
    assert upstream.ledger.total == 0


async def test_a_batch_refuses_only_the_wrong_entries(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    good = {"prompt": "a cat", "model": TOGETHER[0][0]}
    entries = [good, *({"prompt": "a cat", "model": row[0], **row[1]} for row in TOGETHER[:5])]
    response = await service.post("/api/images/batch", json={"requests": entries})
    results = (await response.json())["results"]
    assert [result["statusCode"] for result in results] == [202, 400, 400, 400, 400, 400]
    assert results[1]["details"][0]["field"] == "requests[1].height"


async def test_v1_names_the_clients_field(start_openai: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_openai()
    for row in OPENAI:
        check(await details_of(service, "/v1/images/generations", {"prompt": "a cat", "model": row[0], **row[1]}), row)
    assert upstream.ledger.total == 0


async def test_v1_names_a_size_once(start_openai: StartService) -> None:
    service = await start_openai()
    body = {"prompt": "a cat", "model": "gpt-image-2", "size": "512x512"}
    (detail,) = await details_of(service, "/v1/images/generations", body)
    rule = "the area is at least 655360 pixels"
    assert detail["message"] == f"size: is not possible for gpt-image-2: {rule}; the nearest size is 816x816"


async def test_a_snake_case_field_is_named_as_it_was_sent(start_paid: StartService) -> None:
    service = await start_paid()
    body = {"prompt": "a cat", "model": f"{BFL}FLUX.1-schnell", "image_url": IMAGE, "steps": 13}
    details = await details_of(service, "/api/images/generate", body)
    assert [detail["field"] for detail in details] == ["steps", "image_url"]


async def test_without_rules_every_value_is_sent(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid(model_rules=False, max_attempts=1)
    sent = [(model, fields) for model, fields, *_ in TOGETHER if fields.keys().isdisjoint(("background", "mask"))]
    for number, (model, fields) in enumerate(sent):
        body = {"prompt": f"cat {number}", "model": model, **fields}
        response = await service.post("/api/images/generate?wait=10", json=body)
        assert response.status == 200, await response.text()
        received = upstream.ledger.matching(f"cat {number}")[0].body
        assert all(value in received.values() or [value] in received.values() for value in fields.values())


async def test_without_rules_an_openai_model_is_sent_any_size(
    start_openai: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_openai(model_rules=False)
    for number, size in enumerate(("3856x2160", "1024x1032", "512x512")):
        body = {"prompt": f"cat {number}", "model": "gpt-image-2", "size": size}
        await service.post("/v1/images/generations", json=body)
        assert upstream.ledger.matching(f"cat {number}")[0].body["size"] == size


@pytest.mark.parametrize(
    ("model", "fields", "size"),
    [
        (f"{BFL}FLUX.1-schnell", {}, (512, 512)),
        ("google/flash-image-2.5", {}, (1024, 1024)),
        ("google/flash-image-2.5", {"width": 1024}, (1024, 1024)),
        ("google/flash-image-2.5", {"height": 768}, (1344, 768)),
        ("openai/gpt-image-1.5", {"aspectRatio": "3:2"}, (1536, 1024)),
        ("openai/gpt-image-2", {}, (816, 816)),
        ("openai/gpt-image-2", {"width": 1024}, (1024, 1024)),
        (f"{BFL}FLUX.1.1-pro", {"aspectRatio": "3:2"}, (1248, 832)),
    ],
)
async def test_a_size_that_nobody_gave_is_the_models_nearest(
    start_paid: StartService, upstream: EmulatedUpstream, model: str, fields: dict[str, Any], size: tuple[int, int]
) -> None:
    service = await start_paid()
    await service.post("/api/images/generate?wait=10", json={"prompt": "a cat", "model": model, **fields})
    sent = upstream.ledger.calls[0].body
    assert (sent["width"], sent["height"]) == size


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"aspectRatio": "4:1"}, "aspectRatio"),
        ({"aspectRatio": "1:1", "resolution": "4K"}, "resolution"),
        ({"width": 1024, "height": 1032}, "height"),
        ({"width": 1032}, "width"),
    ],
)
async def test_what_the_client_gave_is_never_changed(
    start_paid: StartService, fields: dict[str, Any], field: str
) -> None:
    service = await start_paid()
    body = {"prompt": "a cat", "model": "google/flash-image-2.5", **fields}
    details = await details_of(service, "/api/images/generate", body)
    assert [detail["field"] for detail in details] == [field]


async def test_v1_without_a_size_is_1024_or_the_models_nearest(
    start_openai: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_openai()
    await service.post("/v1/images/generations", json={"prompt": "a cat", "model": "gpt-image-1.5"})
    await service.post("/v1/images/generations", json={"prompt": "a dog", "model": "gpt-image-1.5", "size": "auto"})
    assert [call.body["size"] for call in upstream.ledger.calls] == ["1024x1024", "1024x1024"]


async def test_an_alias_has_the_limits_of_its_model(start_paid: StartService) -> None:
    service = await start_paid(model_aliases={"fast": f"{BFL}FLUX.1-schnell"})
    details = await details_of(service, "/api/images/generate", {"prompt": "a cat", "model": "fast", "steps": 13})
    assert details[0]["field"] == "steps"


async def test_an_unlisted_model_and_the_sandbox_have_no_limits(start_paid: StartService, service: Client) -> None:
    body = {"prompt": "a cat", "model": f"{BFL}FLUX.1-schnell", "steps": 13, "width": 1000}
    assert (await service.post("/api/images/generate", json=body)).status == 202
    paid = await start_paid()
    assert (await paid.post("/api/images/generate", json=body | {"model": "unlisted"})).status == 202


async def test_own_rows_are_checked_too(
    start_service: StartService, tmp_path: Path, models_file: Callable[[str], Path]
) -> None:
    path = models_file('{ id = "mine", prompt_max = 5, qualities = ["draft"], ratios = ["1:1", "16:9"] }')
    service = await start_service(models_file=path)
    body = {"prompt": "a long one", "model": "mine", "quality": "drafts", "aspectRatio": "21:9"}
    details = await details_of(service, "/api/images/generate", body)
    assert [detail["field"] for detail in details] == ["aspectRatio", "prompt", "quality"]
    assert "the nearest is 16:9" in details[0]["message"]
    assert "at most 5 characters" in details[1]["message"]
    assert "the nearest is draft" in details[2]["message"]


async def test_more_images_than_a_call_takes_are_split_without_a_refused_call(
    start_paid: StartService, upstream: EmulatedUpstream, models_file: Callable[[str], Path]
) -> None:
    service = await start_paid(models_file=models_file('{ id = "single", max_n = 1 }'))
    body = {"prompt": "a cat", "model": "single", "n": 3}
    await service.post("/api/images/generate?wait=10", json=body)
    assert [call.n for call in upstream.ledger.calls] == [1, 1, 1]


async def test_a_task_has_a_warning_of_its_models_end(
    start_service: StartService, models_file: Callable[[str], Path]
) -> None:
    path = models_file('{ id = "old", ends = 2020-01-31, successor = "new" }')
    service = await start_service(models_file=path)
    notice = "old ended on 2020-01-31; its successor is new"
    submitted = await (await service.post("/api/images/generate", json={"prompt": "a cat", "model": "old"})).json()
    assert submitted["warnings"] == [notice]
    finished = await (await service.get(f"/api/images/{submitted['taskId']}?wait=10")).json()
    assert (finished["status"], finished["warnings"]) == ("completed", [notice])
    hit = await service.post("/api/images/generate?wait=1", json={"prompt": "a cat", "model": "old"})
    assert (await hit.json())["warnings"] == [notice]
    openai = await service.post("/v1/images/generations", json={"prompt": "a dog", "model": "old"})
    assert (await openai.json())["warnings"] == [notice]
    events = await (await service.get(f"/api/images/{submitted['taskId']}/events")).text()
    assert json.loads(events.partition("data: ")[2].splitlines()[0])["warnings"] == [notice]


@pytest.fixture
def models_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file with these rows."""

    def write(*rows: str) -> Path:
        path = tmp_path / "models.toml"
        path.write_text(f"models = [{', '.join(rows)}]")
        return path

    return write
