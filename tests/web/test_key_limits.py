"""Tests of the limits of an API key: its rates, models, sizes and fallback models."""

from __future__ import annotations

from typing import Any

from tests.web.api_keys import bearer, make_key
from tests.web.conftest import Client, StartService

BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


async def test_limits_count_by_key_and_a_keys_own_take_the_place_of_the_defaults(start_service: StartService) -> None:
    client = await start_service(rate_limit_max=4, image_rate_limit_max=2, sandbox_delay_s=0.0)
    secrets = {
        name: await make_key(client, name=name, **limits)
        for name, limits in {
            "plain": {},
            "other": {},
            "slow": {"rate": 1},
            "fast": {"rate": 100, "imagesRate": 3},
        }.items()
    }

    async def passed(name: str, *, generating: bool = False) -> int:
        statuses = []
        for number in range(6):
            if generating:
                body = BODY | {"prompt": f"{name} {number}"}
                answer = await client.post("/api/images/generate", json=body, headers=bearer(secrets[name]))
            else:
                answer = await client.get("/api/models", headers=bearer(secrets[name]))
            statuses.append(answer.status)
            assert answer.status in (200, 202, 429)
        return len([status for status in statuses if status != 429])

    assert [await passed(name) for name in ("plain", "other", "slow", "fast")] == [4, 4, 1, 6]
    assert [await passed(name, generating=True) for name in ("plain", "fast")] == [0, 3]


async def test_a_key_may_have_limits_where_all_others_have_none(service: Client) -> None:
    slow = bearer(await make_key(service, name="slow", rate=2, imagesRate=1))
    free = bearer(await make_key(service, name="free"))
    answers = [await service.get("/api/models", headers=slow) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[0].headers["X-RateLimit-Limit"] == "2"
    assert {(await service.get("/api/models", headers=free)).status for _ in range(5)} == {200}


async def test_a_model_or_size_outside_of_the_keys_is_not_allowed(start_service: StartService) -> None:
    client = await start_service(model_aliases={"cheap": "gpt-image-1", "flux-alias": "other"}, sandbox_delay_s=0.0)
    limited = bearer(await make_key(client, name="limited", models=["flux*", "other"], maxMegapixels=0.25))
    free = bearer(await make_key(client, name="free"))
    cases: list[tuple[dict[str, Any], int, list[str]]] = [
        ({"model": "flux-1"}, 202, []),
        ({"model": "flux-alias"}, 202, []),
        ({"model": "cheap"}, 403, ["model"]),
        ({}, 403, ["model"]),
        ({"model": "flux-1", "width": 1024, "height": 512}, 403, ["width", "height"]),
        (
            {"model": "gpt-image-1", "resolution": "2K", "width": None, "height": None},
            403,
            ["model", "width", "height"],
        ),
    ]
    for fields, status, names in cases:
        body = {**BODY, **fields}
        await client.post("/api/images/generate", json=body, headers=free)
        # The same bytes of another key are no way around it.
        answer = await client.post("/api/images/generate", json=body, headers=limited)
        assert answer.status == status, fields
        view = await answer.json()
        assert [each["field"] for each in view.get("details", [])] == names
        assert view.get("code", "not_allowed") == "not_allowed"
        batch = await client.post("/api/images/batch", json={"requests": [body]}, headers=limited)
        (entry,) = (await batch.json())["results"]
        assert entry["statusCode"] in ((403,) if status == 403 else (200, 202))
    v1 = await client.post("/v1/images/generations", json={"prompt": "a", "model": "flux-1"}, headers=limited)
    error = (await v1.json())["error"]
    assert (v1.status, error["code"], error["type"], error["param"]) == (
        403,
        "not_allowed",
        "permission_error",
        "size",
    )


async def test_a_fallback_model_outside_of_the_keys_is_never_called(start_paid: StartService, upstream: Any) -> None:
    client = await start_paid(fallback_models=("forbidden", "black-forest-labs/FLUX.1-schnell"))
    headers = bearer(await make_key(client, name="limited", models=["black-forest-labs/*"]))
    body = BODY | {"model": "black-forest-labs/FLUX.1-schnell-Free"}
    done = await (await client.post("/api/images/generate?wait=20", json=body, headers=headers)).json()
    assert done["status"] == "completed", done
    assert [call.body["model"] for call in upstream.ledger.calls] == [
        "black-forest-labs/FLUX.1-schnell-Free",
        "black-forest-labs/FLUX.1-schnell",
    ]
