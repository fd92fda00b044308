"""Tests of normalised values: newlines of other systems, empty form fields, digits."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tests.support import over_rows
from tests.web.conftest import Client

BODY = {"prompt": "a lighthouse\nin a storm", "width": 64, "height": 64}


async def submitted(service: Client, body: dict[str, Any], path: str = "/api/images/generate") -> str:
    response = await service.post(path, json=body)
    assert response.status in (200, 202), await response.text()
    return str((await response.json())["taskId"])


@over_rows("newline", ["\r\n", "\r"])
async def test_newlines_of_every_system_are_one_request(service: Client, newline: str) -> None:
    other = BODY | {"prompt": f"a lighthouse{newline}in a storm{newline}"}
    assert await submitted(service, other) == await submitted(service, BODY)
    negative = {"negativePrompt": "one\ntwo"}
    assert await submitted(service, BODY | {"negativePrompt": f"one{newline}two"}) == await submitted(
        service, BODY | negative
    )


@over_rows(
    "empty",
    [
        {"negativePrompt": ""},
        {"seed": ""},
        {"referenceImages": []},
        {"imageUrl": "", "outputFormat": "", "steps": "", "n": "", "width": ""},
        {"webhook": ""},
    ],
)
async def test_an_empty_form_value_is_absent(service: Client, empty: dict[str, Any]) -> None:
    plain = {"prompt": "a form", "height": 64}
    assert await submitted(service, {**plain, **empty}) == await submitted(service, plain)
    batch = await (await service.post("/api/images/batch", json={"requests": [{**plain, **empty}]})).json()
    assert batch["results"][0]["taskId"] == await submitted(service, plain)


@over_rows(("field", "value"), [("prompt", ""), ("prompt", []), ("model", ""), ("seed", {}), ("n", False), ("n", 0)])
async def test_an_empty_required_value_is_rejected(service: Client, field: str, value: object) -> None:
    response = await service.post("/api/images/generate", json={**BODY, field: value})
    assert response.status == 400
    assert [fault["field"] for fault in (await response.json())["details"]] == [field]


@over_rows("digits", ["٦٤", "６４"])
async def test_digits_are_ascii(service: Client, digits: str) -> None:
    assert (await service.post("/api/images/generate", json=BODY | {"width": digits})).status == 400
    assert (await service.post("/v1/images/generations", json={"prompt": "x", "size": f"{digits}x64"})).status == 400
    assert (await service.post(f"/api/images/generate?wait={quote(digits)}", json=BODY)).status == 400


@over_rows("index", ["٠", "00", "01", "+0", "0.0", " 0"])
async def test_an_index_is_a_plain_ascii_number(service: Client, index: str) -> None:
    done = await (await service.post("/api/images/generate?wait=10", json=BODY)).json()
    assert (await service.get(f"/api/images/{done['taskId']}/0")).status == 200
    assert (await service.get(f"/api/images/{done['taskId']}/{quote(index)}")).status == 404


async def test_an_image_that_a_task_does_not_have_is_not_called_an_unknown_task(service: Client) -> None:
    done = await (await service.post("/api/images/generate?wait=10", json=BODY)).json()
    english = {"Accept-Language": "en"}
    own = await service.get(f"/api/images/{done['taskId']}/9", headers=english)
    unknown = await service.get(f"/api/images/{'0' * 32}/0", headers=english)
    assert (own.status, unknown.status) == (404, 404)
    assert ("index" in (await own.json())["message"], "task" in (await unknown.json())["message"]) == (True, True)


@over_rows("query", ["wait=05", "wait=%D9%A5", "wait=+5", "wait=5.0"])
async def test_a_wait_is_a_plain_ascii_number(service: Client, query: str) -> None:
    assert (await service.get(f"/api/images/{'0' * 32}?{query}")).status == 400


@over_rows(
    ("field", "meant"),
    [
        ("size", "width and height"),
        ("num_inference_steps", "steps"),
        ("num_images", "n"),
        ("promtp", "prompt"),
        ("Negative-Prompt", "negativePrompt"),
    ],
)
async def test_a_field_of_another_api_is_answered_with_ours(service: Client, field: str, meant: str) -> None:
    answer = await (await service.post("/api/images/generate", json={**BODY, field: 1})).json()
    assert [fault["message"].endswith(f"did you mean {meant}?") for fault in answer["details"]] == [True]


async def test_json_that_can_not_be_parsed_is_named_with_its_place(service: Client) -> None:
    json = {"Content-Type": "application/json", "Accept-Language": "en"}
    answer = await (await service.post("/api/images/generate", data=b'{\n  "prompt": "x",\n}', headers=json)).json()
    assert answer["code"] == "invalid_json"
    assert "line 3, column 1" in answer["message"] or "line 2" in answer["message"]


async def test_an_unknown_route_returns_the_address_of_the_documents(service: Client) -> None:
    english = {"Accept-Language": "en"}
    for path, near in [("/api/image/generate", "/api/images/generate"), ("/v1/model", "/v1/models"), ("/x", None)]:
        answer = await (await service.get(path, headers=english)).json()
        error = answer.get("error", answer)
        assert (error["code"], "/docs" in error["message"]) == ("route_not_found", True)
        assert error["message"].endswith(f"Did you mean {near}?") == (near is not None)


@over_rows("charset", ["utf-8", "UTF-8", "utf8"])
async def test_utf8_has_two_names(service: Client, charset: str) -> None:
    headers = {"Content-Type": f"application/json; charset={charset}"}
    assert (await service.post("/api/images/generate", data=b'{"prompt":"x","width":64}', headers=headers)).status < 300


@over_rows("kind", ["application/json; charset=gbk", "application/x-www-form-urlencoded", "text/plain"])
async def test_another_content_type_is_answered_with_the_right_one(service: Client, kind: str) -> None:
    headers = {"Content-Type": kind, "Accept-Language": "en"}
    answer = await service.post("/api/images/generate", data=b'{"prompt":"x"}', headers=headers)
    assert answer.status == 415
    assert "application/json, in UTF-8" in (await answer.json())["message"]
