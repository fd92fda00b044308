"""Tests of edits on `/v1`: what is sent upstream, how the images are returned, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest
from PIL import Image

from imagegen.app import CONNECTION, QUEUE
from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import data_uri, image_file
from tests.web.openai.conftest import Serve, Service
from tests.web.openai.edit_calls import MASK, form, post, post_json, received, upload_id

RED, GREEN, BLUE = [image_file(colour) for colour in ("red", "green", "blue")]


@pytest.mark.parametrize("path", ["/v1/images/edits", "/images/edits", "/v1/v1/images/edits"])
async def test_an_edit_sends_the_whole_file_upstream_and_returns_images(
    editing: Service, emulator: EmulatedUpstream, path: str
) -> None:
    status, body = await post(editing, form(("image", RED), output_format="png", n="1"), path)
    assert status == 200, body
    assert len(body["data"]) == 1
    assert received(emulator) == [("image", upload_id(RED))]
    (paid,) = emulator.ledger.paid
    assert (paid.path, paid.body["output_format"], paid.prompt) == ("/v1/images/edits", "png", "a cat")


@pytest.mark.parametrize("name", ["image[]", "image", "images", "image[0]"])
async def test_several_files_and_a_mask_arrive_in_order(
    editing: Service, emulator: EmulatedUpstream, name: str
) -> None:
    status, body = await post(editing, form((name, RED), (name, GREEN), ("mask", MASK), (name, BLUE)))
    assert status == 200, body
    images = [("image[]", upload_id(file)) for file in (RED, GREEN, BLUE)]
    assert received(emulator) == [*images, ("mask", upload_id(MASK))]


async def test_a_streamed_edit_has_the_events_of_edits(editing: Service) -> None:
    response = await editing.request("POST", "/v1/images/edits", data=form(("image", RED), stream="true"))
    text = await response.text()
    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert "event: image_edit.completed" in text
    assert '"type":"image_edit.completed"' in text


async def test_an_edit_may_be_polled_for(editing: Service, emulator: EmulatedUpstream) -> None:
    status, body = await post(editing, form(("image", RED)), "/v1/images/edits/async")
    assert (status, body["object"]) == (202, "image.generation.task")
    await emulator.ledger.wait_for(lambda ledger: ledger.paid)
    async with asyncio.timeout(60):
        while body["status"] == "processing":
            response = await editing.request("GET", f"/v1/images/tasks/{body['id']}?wait=5")
            body = await response.json()
    assert body["status"] == "completed"
    assert received(emulator) == [("image", upload_id(RED))]


async def test_an_edit_may_be_accepted_without_waiting(editing: Service, emulator: EmulatedUpstream) -> None:
    emulator.script("hang")
    status, body = await post(editing, form(("image", RED)), Prefer="respond-async")
    assert (status, body["object"]) == (202, "image.task")


async def test_a_linked_image_that_cannot_be_fetched_fails_the_task_at_no_cost(
    editing: Service, emulator: EmulatedUpstream
) -> None:
    for link in ("http://10.0.0.1/a.png", "http://127.0.0.1:1/a.png", f"{emulator.url}/shrt/unknown"):
        status, body = await post_json(editing, images=[link])
        assert (status, body["error"]["code"]) == (400, "upstream_invalid_request"), body
        assert "link" in body["error"]["message"]
    assert emulator.ledger.total == 0


async def test_an_image_linked_on_the_providers_host_is_fetched_and_sent(
    editing: Service, emulator: EmulatedUpstream
) -> None:
    _, generated = await post(editing, form(("image", RED), response_format="url"))
    image = await editing.fetch_image(generated["data"][0]["url"])
    assert image
    link = await _link_of(emulator)
    status, body = await post_json(editing, images=[link])
    assert status == 200, body
    assert len(emulator.ledger.paid[-1].inputs) == 1


async def _link_of(emulator: EmulatedUpstream) -> str:
    import aiohttp

    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{emulator.url}/v1/images/generations",
            json={"prompt": "x", "model": "m"},
            headers={"Authorization": "Bearer k"},
        ) as response,
    ):
        return str((await response.json())["data"][0]["url"])


async def test_the_files_of_an_edit_are_larger_than_other_bodies_may_be(
    editing: Service, emulator: EmulatedUpstream
) -> None:
    file = io.BytesIO()
    Image.effect_noise((1600, 1600), 90).save(file, "PNG")
    assert len(file.getvalue()) > 2**20
    status, body = await post(editing, form(("image", file.getvalue())))
    assert status == 200, body
    assert received(emulator) == [("image", upload_id(file.getvalue()))]


async def test_a_file_over_the_limit_is_refused(serve: Serve, emulator: EmulatedUpstream) -> None:
    service = await serve(
        provider="openai", openai_api_url=f"{emulator.url}/v1", openai_api_key="k", upload_max_bytes=2_000
    )
    file = image_file(size=(64, 64)) + b"x" * 3_000
    status, body = await post(service, form(("image", file)))
    assert (status, body["error"]["code"]) == (413, "body_too_large")


async def test_the_entry_of_an_edit_is_small(editing: Service, emulator: EmulatedUpstream) -> None:
    emulator.script("hang")
    noise = io.BytesIO()
    Image.effect_noise((600, 400), 90).save(noise, "PNG")
    assert len(noise.getvalue()) > 100_000
    files = [noise.getvalue(), RED, GREEN]
    data = form(*[("image[]", file) for file in files], ("mask", MASK))
    status, _ = await post(editing, data, Prefer="respond-async")
    assert status == 202
    commands, keys = editing.app[CONNECTION].commands, editing.app[QUEUE].keys
    entries: Any = await commands.xrange(keys.stream)
    ((_, entry),) = entries
    assert all(upload_id(file) in repr(entry) for file in (*files, MASK))
    assert len(repr(entry)) < 2_048


@pytest.mark.parametrize(
    ("settings", "model", "images", "param", "words"),
    [
        ({"provider": "together"}, "black-forest-labs/FLUX.1-schnell", 1, "image", "takes no input images"),
        ({"provider": "together"}, "black-forest-labs/FLUX.1-kontext-pro", 2, "image", "at most 1 input images"),
        ({"provider": "together", "masked": True}, "some/model", 1, "mask", "takes no mask"),
        ({"provider": "openai", "nebius": True}, "flux-dev", 1, "image", "takes no input images for flux-dev"),
        ({"provider": "a1111"}, "m", 2, "image", "at most 1"),
    ],
)
async def test_an_edit_that_provider_or_model_cannot_make_is_refused_at_submit(
    serve: Serve, emulator: EmulatedUpstream, settings: dict[str, Any], model: str, images: int, param: str, words: str
) -> None:
    addresses = {
        "together": {"together_api_url": emulator.url, "together_api_key": "k"},
        "openai": {"openai_api_url": "https://api.studio.nebius.com/v1", "openai_api_key": "k"},
        "a1111": {"a1111_url": emulator.url},
    }
    service = await serve(provider=settings["provider"], **addresses[settings["provider"]])
    parts = [("image", RED), ("image", GREEN)][:images] + [("mask", MASK)] * settings.get("masked", False)
    status, body = await post(service, form(*parts, model=model, size="1024x1024"))
    assert (status, body["error"]["param"]) == (400, param), body
    assert words in body["error"]["message"]
    assert emulator.ledger.total == 0


async def test_an_input_image_that_the_provider_cannot_take_is_refused_on_api_too(
    serve: Serve, emulator: EmulatedUpstream
) -> None:
    service = await serve(provider="a1111", a1111_url=emulator.url)
    body = {"prompt": "x", "imageUrl": "https://x.example/a.png", "referenceImages": ["https://x.example/b.png"]}
    response = await service.request("POST", "/api/images/generate", json=body)
    (detail,) = (await response.json())["details"]
    assert (response.status, detail["field"]) == (400, "referenceImages")
    response = await service.request(
        "POST", "/api/images/generate", json={"prompt": "x", "mask": "https://x.example/a"}
    )
    (detail,) = (await response.json())["details"]
    assert (response.status, detail["field"]) == (400, "mask")


async def test_a_web_ui_gets_the_image_and_the_mask_of_an_edit(serve: Serve, emulator: EmulatedUpstream) -> None:
    service = await serve(provider="a1111", a1111_url=emulator.url)
    status, body = await post(service, form(("image", RED), ("mask", MASK), response_format="b64_json"))
    assert status == 200, body
    assert Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).format == "PNG"
    (paid,) = emulator.ledger.paid
    assert (paid.path, [file.field for file in paid.inputs]) == ("/sdapi/v1/img2img", ["init_images", "mask"])
    assert f"upload:{paid.inputs[0].sha256}" == upload_id(RED)


async def test_together_gets_an_upload_as_a_data_uri(serve: Serve, emulator: EmulatedUpstream) -> None:
    service = await serve(together_api_url=emulator.url, together_api_key="k")
    status, body = await post(service, form(("image", RED), model="black-forest-labs/FLUX.1-kontext-pro"))
    assert status == 200, body
    (paid,) = emulator.ledger.paid
    assert paid.body["image_url"] == data_uri(RED)


async def test_the_sandbox_draws_an_edit(serve: Serve) -> None:
    service = await serve(provider="sandbox")
    status, body = await post(service, form(("image", RED), ("mask", MASK), response_format="b64_json", size="512x512"))
    assert status == 200, body
    drawn = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert drawn.size == (512, 512)
