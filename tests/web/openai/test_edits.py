"""Tests of edits on `/v1`: forms and JSON become one request; bad ones name the field and cost nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import FormData, MultipartWriter
from PIL import Image

from imagegen.app import CONNECTION, QUEUE
from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import data_uri, image_file
from tests.support import over_rows
from tests.web.openai.conftest import Serve, Service

EDITOR = "an-edit-model"
SIZE = {"size": "64x64"}

RED, GREEN, BLUE = [image_file(colour) for colour in ("red", "green", "blue")]
MASK = image_file((0, 0, 0, 0), mode="RGBA")


def upload_id(data: bytes) -> str:
    return f"upload:{hashlib.sha256(data).hexdigest()}"


def form(*parts: tuple[str, bytes | str], **fields: str) -> FormData:
    """Return a form; bytes are files."""
    data = FormData(default_to_multipart=True)
    for name, value in parts:
        if isinstance(value, bytes):
            data.add_field(name, io.BytesIO(value), filename=f"{name}.png", content_type="image/png")
        else:
            data.add_field(name, value)
    for name, value in ({"prompt": "a cat", "model": EDITOR} | SIZE | fields).items():
        data.add_field(name, value)
    return data


@pytest.fixture
async def editing(serve: Serve, emulator: EmulatedUpstream) -> Service:
    """Start a service in front of an upstream that takes edits as OpenAI does."""
    return await serve(provider="openai", openai_api_url=f"{emulator.url}/v1", openai_api_key="k", max_attempts=1)


async def post(
    service: Service, data: FormData | MultipartWriter, path: str = "/v1/images/edits", **headers: str
) -> tuple[int, Any]:
    response = await service.request("POST", path, data=data, headers=headers)
    return response.status, await response.json()


async def post_json(service: Service, **body: Any) -> tuple[int, Any]:
    body = {"prompt": "a cat", "model": EDITOR} | SIZE | body
    data, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
    response = await service.request("POST", "/v1/images/edits", data=data, headers=headers)
    return response.status, await response.json()


def received(emulator: EmulatedUpstream) -> list[tuple[str, str]]:
    (paid,) = emulator.ledger.paid
    return [(file.field, f"upload:{file.sha256}") for file in paid.inputs]


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


@pytest.mark.parametrize(
    "images",
    [
        {"images": [{"file_id": "RED"}, {"file_id": "GREEN"}], "mask": {"file_id": "MASK"}},
        {"images": ["RED", {"image_url": "GREEN"}], "mask": "MASK"},
        {"image": ["RED", "GREEN"], "mask": {"image_url": {"url": "MASK"}}},
        {"image": "RED", "reference_images": ["GREEN"], "mask": {"image_url": "MASK"}},
        {"image_url": "RED", "referenceImages": ["GREEN"], "mask": "MASK"},
    ],
)
async def test_json_names_uploads_in_every_usual_way(
    editing: Service, emulator: EmulatedUpstream, images: dict[str, Any]
) -> None:
    for file in (RED, GREEN, MASK):
        await editing.request("POST", "/api/uploads", data=file, headers={"Content-Type": "image/png"})
    names = {"RED": upload_id(RED), "GREEN": upload_id(GREEN), "MASK": upload_id(MASK)}
    body = json.dumps(images)
    for name, value in names.items():
        body = body.replace(name, value)
    status, answer = await post_json(editing, **json.loads(body))
    assert status == 200, answer
    assert received(emulator) == [
        ("image[]", upload_id(RED)),
        ("image[]", upload_id(GREEN)),
        ("mask", upload_id(MASK)),
    ]


async def test_a_form_and_json_with_the_same_image_are_one_request(
    editing: Service, emulator: EmulatedUpstream
) -> None:
    status, first = await post(editing, form(("image", RED), seed="7", n="1"))
    assert status == 200, first
    status, again = await post_json(editing, images=[{"file_id": upload_id(RED)}], seed=7)
    assert (status, again["id"]) == (200, first["id"])
    assert emulator.ledger.paid_total == 1


@pytest.mark.parametrize(
    ("changed", "value"),
    [("prompt", "a dog"), ("quality", "low"), ("background", "opaque"), ("input_fidelity", "high"), ("x_style", "1")],
)
async def test_each_other_field_of_a_form_makes_another_request(
    editing: Service, emulator: EmulatedUpstream, changed: str, value: str
) -> None:
    _, first = await post(editing, form(("image", RED)))
    _, second = await post(editing, form(("image", RED), **{changed: value}))
    assert first["id"] != second["id"]
    assert str(emulator.ledger.paid[1].body[changed]) == value


@pytest.mark.parametrize("size", [(24, 16), (700, 700)])
async def test_one_image_as_file_upload_or_data_uri_is_one_request(
    editing: Service, emulator: EmulatedUpstream, size: tuple[int, int]
) -> None:
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(file, "PNG")
    image = file.getvalue()
    uri = data_uri(image)
    _, first = await post(editing, form(("image", image), seed="7"))
    for images in (
        {"image": uri},
        {"images": [{"image_url": uri}]},
        {"images": [uri]},
        {"image": {"image_url": {"url": uri}}},
        {"image_url": uri},
        {"images": [{"file_id": upload_id(image)}]},
    ):
        status, again = await post_json(editing, seed=7, **images)
        assert (status, again.get("id")) == (200, first["id"]), again
    body = {"prompt": "a cat", "model": EDITOR, "width": 64, "height": 64, "seed": 7, "imageUrl": uri}
    data, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
    response = await editing.request("POST", "/api/images/generate", data=data, headers=headers)
    assert (await response.json())["taskId"] == first["id"]
    assert emulator.ledger.paid_total == 1


async def test_another_image_is_another_request(editing: Service) -> None:
    ids = {(await post(editing, form(("image", file), seed="1")))[1]["id"] for file in (RED, GREEN)}
    assert len(ids) == 2


async def test_fields_of_a_form_are_numbers_booleans_and_objects(editing: Service, emulator: EmulatedUpstream) -> None:
    status, body = await post(
        editing,
        form(("image", RED), n="2", output_compression="80", extra='{"x_depth": 2}', x_on="true", user="u"),
    )
    assert status == 200, body
    assert len(body["data"]) == 2
    sent = emulator.ledger.paid[0].body
    assert (str(sent["x_depth"]), sent["x_on"], "user" in sent) == ("2", "true", False)


async def test_empty_optional_files_of_a_browser_form_are_absent(editing: Service, emulator: EmulatedUpstream) -> None:
    data = form(("image", RED))
    data.add_field("mask", b"", filename="", content_type="application/octet-stream")
    assert (await post(editing, data))[0] == 200
    assert received(emulator) == [("image", upload_id(RED))]


@pytest.mark.parametrize("image", [RED, b"\xff" * 200_000], ids=["small", "large"])
async def test_a_file_without_a_file_name_is_refused_as_one(
    editing: Service, emulator: EmulatedUpstream, image: bytes
) -> None:
    writer = MultipartWriter("form-data")
    writer.append(image).set_content_disposition("form-data", name="image")
    del writer._parts[0][0].headers["Content-Type"]
    status, body = await post(editing, writer)
    assert (status, body["error"]["param"]) == (400, "image")
    assert "must be a file, sent with a file name, or the address of an image" in body["error"]["message"]
    assert not emulator.ledger.paid


@pytest.mark.parametrize("name", ["image", "image_url", "imageUrl", "reference_images[]"])
async def test_a_link_may_stand_in_a_form(editing: Service, emulator: EmulatedUpstream, name: str) -> None:
    await editing.request("POST", "/api/uploads", data=RED, headers={"Content-Type": "image/png"})
    assert (await post(editing, form((name, upload_id(RED)), ("image", GREEN))))[0] == 200
    assert received(emulator) == [("image[]", upload_id(RED)), ("image[]", upload_id(GREEN))]


UNKNOWN = f"upload:{'0' * 64}"
GIF = image_file(kind="GIF")


@over_rows(
    ("data", "status", "code", "param"),
    [
        (form, 400, "invalid_request", "image"),
        (lambda: form(("image", RED), prompt=""), 400, "invalid_request", "prompt"),
        (lambda: form(("image", GIF)), 415, "unsupported_image", "image"),
        (lambda: form(("image[]", RED), ("image[]", RED[:-20])), 415, "unsupported_image", "image[]"),
        (lambda: form(("image", RED), ("mask", b"<svg/>")), 415, "unsupported_image", "mask"),
        (lambda: form(("image", b"")), 415, "unsupported_image", "image"),
        (lambda: form(("image", RED), n="0"), 400, "invalid_request", "n"),
        (lambda: form(("image", RED), size="1x"), 400, "invalid_request", "size"),
        (lambda: form(("image", RED), stream="maybe"), 400, "invalid_request", "stream"),
        (lambda: form(("image", "C:\\a.png")), 400, "invalid_request", "image"),
        (lambda: form(("image", RED), ("mask", MASK), ("mask", MASK)), 400, "invalid_request", "mask"),
        (lambda: form(*[("image[]", RED)] * 17), 400, "invalid_request", "image[]"),
        (lambda: form(("image", RED), ("quality", "low"), ("quality", "high")), 400, "invalid_request", "quality"),
        (lambda: form(("image", RED), x="y" * 200_000), 400, "invalid_request", "x"),
        (lambda: form(("image", RED), ("photo", GREEN)), 400, "invalid_request", "photo"),
        (lambda: form(("image", RED), *[(f"x{i}", "1") for i in range(90)]), 400, "invalid_request", "body"),
    ],
)
async def test_a_bad_form_names_its_field_and_costs_nothing(
    editing: Service, emulator: EmulatedUpstream, data: Callable[[], FormData], status: int, code: str, param: str
) -> None:
    answered, body = await post(editing, data())
    assert (answered, body["error"]["code"], body["error"]["param"]) == (status, code, param), body
    assert emulator.ledger.total == 0


@over_rows(
    ("images", "param"),
    [
        ({}, "image"),
        ({"images": []}, "image"),
        ({"images": [{"image_url": 1}]}, "images[0].image_url"),
        ({"images": [{"file_id": "file-abc"}]}, "images[0].file_id"),
        ({"images": [{"image_url": "ftp://x"}]}, "images[0].image_url"),
        ({"images": [{}]}, "images[0]"),
        ({"images": [{"image_url": "https://x.example/a.png", "file_id": UNKNOWN}]}, "images[0]"),
        ({"image": 5}, "image"),
        ({"images": ["https://x.example/a.png"], "mask": ["a"]}, "mask"),
        ({"images": ["https://x.example/a.png"] * 17}, "images[0]"),
        ({"images": ["https://x.example/a.png", {"file_id": UNKNOWN}]}, "images[1].file_id"),
        ({"image": "https://x.example/a.png", "mask": {"image_url": data_uri(GIF, "gif")}}, "mask.image_url"),
        ({"images": ["https://x.example/a.png", data_uri(RED[:-9])]}, "images[1]"),
    ],
)
async def test_a_bad_json_edit_names_its_field_and_costs_nothing(
    editing: Service, emulator: EmulatedUpstream, images: dict[str, Any], param: str
) -> None:
    status, body = await post_json(editing, **images)
    assert status in (400, 415)
    assert body["error"]["param"] == param, body
    assert emulator.ledger.total == 0


async def test_a_faulty_image_is_not_called_missing_too(editing: Service) -> None:
    _, body = await post_json(editing, images=[{"file_id": "file-abc"}])
    assert "is required" not in body["error"]["message"]


async def test_variations_are_refused(editing: Service) -> None:
    response = await editing.request("POST", "/v1/images/variations", data=form(("image", RED)))
    body = await response.json()
    assert (response.status, body["error"]["code"]) == (400, "unsupported")
    assert response.headers["x-should-retry"] == "false"


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
    async with asyncio.timeout(10):
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


async def test_a_form_without_a_boundary_is_refused(editing: Service) -> None:
    response = await editing.request(
        "POST", "/v1/images/edits", data=b"x", headers={"Content-Type": "multipart/form-data"}
    )
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "bad_request")
    assert "multipart form" in error["message"]


async def test_a_body_that_is_neither_form_nor_json_is_told_of_both(editing: Service) -> None:
    response = await editing.request("POST", "/v1/images/edits", data={"prompt": "a fox"})
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (415, "unsupported_media_type")
    assert "multipart/form-data" in error["message"]
    assert "application/json" in error["message"]


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
