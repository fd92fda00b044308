"""Tests of input images of submitted requests: `data:` URIs, uploads, and what is stored of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from PIL import Image

from imagegen.app import CONNECTION, QUEUE, UPLOADS
from imagegen.tasks import submission
from tests.image_bytes import data_uri, encoded, image_file
from tests.support import eventually, over_rows
from tests.web.conftest import Client

PROMPT = {"prompt": "in autumn", "width": 64, "height": 64}


def noise(megabytes: float) -> bytes:
    """Return a PNG of about this size."""
    side = int((megabytes * 1e6 / 3) ** 0.5)
    return encoded(Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)), compress_level=0)


async def upload(client: Client, data: bytes) -> str:
    return str((await (await client.post("/api/uploads", data=io.BytesIO(data))).json())["uploadId"])


async def submit(client: Client, route: str = "/api/images/generate", **fields: Any) -> tuple[int, dict[str, Any]]:
    response = await post_json(client, route, PROMPT | fields)
    return response.status, await response.json()


async def post_json(client: Client, route: str, body: object, **headers: str) -> Any:
    named = {"Content-Type": "application/json", "Prefer": "respond-async"} | headers
    return await client.post(route, data=io.BytesIO(json.dumps(body).encode()), headers=named)


async def stored_values(client: Client) -> dict[str, bytes]:
    """Return the keys of tasks and images with what is in them."""
    commands, keys = client.app[CONNECTION].commands, client.app[QUEUE].keys
    names: Any = await commands.keys(f"{{{keys.prefix}}}:*")
    not_of_tasks = (keys.stream, keys.server)
    values: dict[str, Any] = {
        key: await commands.dump(key) for name in names if (key := name.decode()) not in not_of_tasks
    }
    entries: Any = await commands.xrange(keys.stream)
    return values | {f"entry {id_!r}": repr(fields).encode() for id_, fields in entries}


@over_rows("megabytes", [0.001, 0.02, 0.3, 2.0])
async def test_an_image_is_one_request_by_upload_and_by_data_uri(service: Client, megabytes: float) -> None:
    data = noise(megabytes)
    first, by_uri = await submit(service, imageUrl=data_uri(data))
    second, by_upload = await submit(service, imageUrl=await upload(service, data))
    again, by_another = await submit(service, image_url=data_uri(data + b"behind the image"))
    assert first == 202
    assert {second, again} <= {200, 202}
    assert by_uri["taskId"] == by_upload["taskId"] == by_another["taskId"]
    _, other = await submit(service, imageUrl=data_uri(image_file("red")))
    assert other["taskId"] != by_uri["taskId"]


@over_rows("route", ["/api/images/generate", "/v1/images/generations/async"])
async def test_the_first_input_image_is_one_request_in_either_field(service: Client, route: str) -> None:
    first, second = await upload(service, image_file("red")), await upload(service, image_file("blue"))
    fields: list[dict[str, Any]] = [
        {"imageUrl": first, "referenceImages": [second]},
        {"referenceImages": [first, second]},
        {"imageUrl": second, "referenceImages": [first]},
        {"imageUrl": first},
        {"referenceImages": [first]},
        {"referenceImages": [first], "mask": second},
    ]
    shown = [(await submit(service, route, seed=1, **each))[1] for each in fields]
    ids = [each.get("taskId") or each["task_id"] for each in shown]
    assert (ids[0], ids[3]) == (ids[1], ids[4])
    assert len(set(ids)) == 4


async def test_a_task_of_a_version_in_which_the_field_of_an_input_image_counted_is_still_joined(
    start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(sandbox_delay_s=0.3)
    images = [await upload(service, image_file("red")), await upload(service, image_file("blue"))]
    with monkeypatch.context() as former:
        former.setattr(submission, "_with_first_image", lambda request: request)
        _, made = await submit(service, referenceImages=images)
    _, running = await submit(service, referenceImages=images)
    await service.get(f"/api/images/{made['taskId']}?wait=20")
    _, completed = await submit(service, referenceImages=images)
    assert (running["taskId"], running["coalesced"]) == (made["taskId"], True)
    assert (completed["taskId"], completed["cached"]) == (made["taskId"], True)
    _, of_this_version = await submit(service, imageUrl=images[0], referenceImages=images[1:])
    assert of_this_version["taskId"] != made["taskId"]


@over_rows("field", ["imageUrl", "mask"])
async def test_every_part_of_a_request_counts_by_its_bytes(service: Client, field: str) -> None:
    ids = set()
    for data in (image_file("red"), image_file("blue")):
        fields = {"imageUrl": data_uri(image_file()), field: data_uri(data)}
        ids.add((await submit(service, **fields))[1]["taskId"])
    assert len(ids) == 2


async def test_no_bytes_of_an_image_are_in_redis(start_service: Any) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    data = noise(0.3)
    images = [data_uri(noise(0.1)) for _ in range(4)]
    status, _ = await submit(service, imageUrl=data_uri(data), referenceImages=images, mask=data_uri(noise(0.2)))
    assert status == 202
    stored = await stored_values(service)
    assert max(map(len, stored.values())) < 2_048, {key: len(value) for key, value in stored.items()}
    assert sum(":upload:" in key for key in stored) == 6


@over_rows("megabytes", [0.01, 1.5])
@over_rows("route", ["/api/images/batch", "/v1/images/generations"])
async def test_the_other_routes_take_data_uris_too(service: Client, route: str, megabytes: float) -> None:
    data = noise(megabytes)
    entry = PROMPT | {"image_url": data_uri(data), "reference_images": [data_uri(image_file("red"))]}
    body = {"requests": [entry, entry]} if route.endswith("batch") else entry
    response = await post_json(service, route, body)
    shown = await response.json()
    if route.endswith("batch"):
        assert [result["statusCode"] for result in shown["results"]] == [202, 202], shown
    else:
        assert response.status == 202, shown
    for each in (data, image_file("red")):
        assert await service.app[UPLOADS].find(f"upload:{hashlib.sha256(each).hexdigest()}")


UNKNOWN = f"upload:{'0' * 64}"


@over_rows(
    ("fields", "named"),
    [
        ({"imageUrl": UNKNOWN}, "imageUrl"),
        ({"mask": UNKNOWN}, "mask"),
        ({"referenceImages": ["https://a.example/a.png", UNKNOWN]}, "referenceImages[1]"),
    ],
)
async def test_an_unknown_upload_is_refused_by_its_field_before_anything_is_written(
    service: Client, fields: dict[str, Any], named: str
) -> None:
    before = await stored_values(service)
    status, shown = await submit(service, **{"imageUrl": data_uri(image_file())} | fields)
    assert (status, shown["code"]) == (400, "upload_not_found")
    assert [detail["field"] for detail in shown["details"]] == [named]
    assert await stored_values(service) == before


async def test_an_unknown_upload_is_named_on_the_other_routes(service: Client) -> None:
    response = await service.post(
        "/api/images/batch",
        json={"requests": [PROMPT, PROMPT | {"imageUrl": "https://a.example/a.png", "mask": UNKNOWN}]},
    )
    results = (await response.json())["results"]
    assert [result["statusCode"] for result in results] == [202, 400]
    assert (results[1]["code"], results[1]["details"][0]["field"]) == ("upload_not_found", "requests[1].mask")
    status, shown = await submit(service, "/v1/images/generations", reference_images=[UNKNOWN])
    assert (status, shown["error"]["code"], shown["error"]["param"]) == (
        400,
        "upload_not_found",
        "reference_images[0]",
    )


@over_rows(
    ("text", "status", "code"),
    [
        (data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "unsupported_image"),
        (data_uri(image_file()[:-4]), 415, "unsupported_image"),
        ("data:image/png;base64,!!!!", 415, "unsupported_image"),
        ("data:image/png;base64,", 415, "unsupported_image"),
        ("data:image/svg+xml;utf8,<svg/>", 415, "unsupported_image"),
        ("data:image/png", 415, "unsupported_image"),
        (data_uri(noise(1.2)[:-4]), 415, "unsupported_image"),
        ("data:image/png;base64," + "!" * 2_000_000, 415, "unsupported_image"),
    ],
)
async def test_a_data_uri_that_is_no_image_is_refused_by_its_field(
    service: Client, text: str, status: int, code: str
) -> None:
    before = await stored_values(service)
    seen, shown = await submit(service, imageUrl="https://a.example/a.png", referenceImages=[text])
    assert (seen, shown["code"]) == (status, code)
    assert [detail["field"] for detail in shown["details"]] == ["referenceImages[0]"]
    assert await stored_values(service) == before


async def test_an_expired_upload_is_refused_unless_its_task_is_there(
    start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(upload_ttl_s=60.0)
    image = await upload(service, image_file())
    status, first = await submit(service, imageUrl=image)
    assert status == 202
    await service.get(f"/api/images/{first['taskId']}?wait=10")
    uploads = service.app[UPLOADS]
    clock = uploads._clock
    assert await uploads.find(image)
    monkeypatch.setattr(uploads, "_clock", lambda: clock() + 61.0)
    assert await uploads.find(image) is None
    status, again = await submit(service, imageUrl=image)
    assert (status, again["taskId"]) == (200, first["taskId"])
    status, refused = await submit(service, imageUrl=image, seed=1)
    assert (status, refused["code"]) == (400, "upload_not_found")


async def test_an_idempotency_key_holds_for_a_body_with_an_image(service: Client) -> None:
    bodies = [PROMPT | {"imageUrl": data_uri(data)} for data in (noise(1.5), noise(1.5))]
    answers = [
        await post_json(service, "/api/images/generate", body, **{"Idempotency-Key": "a-key"})
        for body in (bodies[0], bodies[0], bodies[1])
    ]
    assert answers[0].status == 202
    assert (await answers[0].json())["taskId"] == (await answers[1].json())["taskId"]
    assert answers[2].status == 422


@over_rows("field", ["prompt", "model", "style"])
async def test_an_image_in_another_field_is_refused(service: Client, field: str) -> None:
    status, shown = await submit(service, **{field: data_uri(noise(1.5))})
    assert (status, shown["code"]) == (413, "body_too_large")
    status, shown = await submit(service, imageUrl=data_uri(noise(1.5)), **{field: data_uri(noise(0.1))})
    assert (status, shown["code"]) == (400, "invalid_request")
    assert [detail["field"] for detail in shown["details"]] == [field]


async def test_a_large_body_is_read_by_its_declared_length_or_in_chunks(start_service: Any) -> None:
    service = await start_service(upload_max_bytes=1_000_000)
    body = json.dumps(PROMPT | {"imageUrl": data_uri(noise(0.9))}).encode()
    assert len(body) > 2**20

    async def chunked() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 50_000):
            yield body[at : at + 50_000]

    headers = {"Content-Type": "application/json"}
    declared = await service.post("/api/images/generate", data=io.BytesIO(body), headers=headers)
    streamed = await service.post("/api/images/generate", data=chunked(), headers=headers)
    assert (declared.status, (await declared.json())["taskId"]) == (202, (await streamed.json())["taskId"])
    too_large = await service.post("/api/images/generate", data=io.BytesIO(body * 3), headers=headers)
    assert (too_large.status, (await too_large.json())["code"]) == (413, "body_too_large")
    one_image = json.dumps(PROMPT | {"imageUrl": data_uri(noise(1.3))}).encode()
    refused = await service.post("/api/images/generate", data=io.BytesIO(one_image), headers=headers)
    assert (refused.status, (await refused.json())["code"]) == (413, "body_too_large")


async def test_nothing_is_left_in_the_spool(service: Client) -> None:
    for fields in (
        {"imageUrl": data_uri(noise(1.5))},
        {"imageUrl": data_uri(noise(1.5)), "width": 7},
        {"mask": data_uri(noise(0.5))},
    ):
        await submit(service, **fields)
    spool = service.app[UPLOADS]._store.spool_folder
    assert spool
    await eventually(lambda: [path.name for path in spool.iterdir()] == ["lock"])


async def test_a_retry_needs_the_uploads_of_its_task(start_service: Any) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    image = await upload(service, image_file())
    _, task = await submit(service, imageUrl=image)
    path = f"/api/images/{task['taskId']}"
    await service.post(f"{path}/cancel")
    assert (await service.post(f"{path}/retry")).status == 202
    await service.post(f"{path}/cancel")
    store = service.app[UPLOADS]._store
    for file in (store.spool_folder.parent.parent / "images").rglob("*0-*.png"):
        file.unlink()
    refused = await service.post(f"{path}/retry")
    assert (refused.status, (await refused.json())["code"]) == (400, "upload_not_found")
