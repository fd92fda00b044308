"""Tests of the bodies of edits on `/v1`: forms and JSON become one request, and faults name their field."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import FormData, MultipartWriter
from PIL import Image

from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import data_uri, image_file
from tests.support import over_rows
from tests.web.openai.conftest import Service
from tests.web.openai.edit_calls import EDITOR, MASK, form, post, post_json, received, upload_id

RED, GREEN, BLUE = [image_file(colour) for colour in ("red", "green", "blue")]


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


@over_rows(
    ("images", "field"),
    [
        ({"referenceImages": ["data:,x"] * 9_000}, "referenceImages[0]"),
        ({"images": [{}] * 2_000, "image": [{}] * 2_000}, "image[0]"),
        ({"image": ["https://example.org/a.png"] * 9_000}, "image[0]"),
    ],
)
async def test_an_edit_with_thousands_of_faulty_images_is_a_short_error(
    editing: Service, images: dict[str, Any], field: str
) -> None:
    status, answer = await post_json(editing, **images)
    assert status == 400
    assert field in answer["error"]["message"]
    assert len(json.dumps(answer)) < 10_000
