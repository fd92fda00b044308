"""Tests of GET /api/models: limits, prices and ends as published, null where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagegen.providers.model_table import load_table
from tests.emulator_fixtures import EmulatedUpstream
from tests.web.conftest import Client, StartService

SCHNELL = "black-forest-labs/FLUX.1-schnell"
UNKNOWN = {
    "sizes": None,
    "maxPixels": None,
    "multipleOf": None,
    "maxN": None,
    "steps": {"default": None, "max": None},
    "seed": None,
    "edit": None,
    "maxInputImages": None,
    "mask": None,
    "transparent": None,
    "qualities": None,
    "promptMax": None,
}


async def models_of(client: Client) -> dict[str, dict[str, Any]]:
    response = await client.get("/api/models")
    body = await response.json()
    assert (response.status, body["success"]) == (200, True)
    views = {view["id"]: view for view in body["models"]}
    assert len(views) == len(body["models"])
    return views


async def test_a_models_limits_and_price_are_shown(start_paid: StartService) -> None:
    models = await models_of(await start_paid())
    assert {row.id for row in load_table("together").rows} <= models.keys()
    assert models[SCHNELL] == {
        "id": SCHNELL,
        "provider": "together",
        "channel": "together",
        "capabilities": {
            "sizes": None,
            "maxPixels": 1792**2,
            "multipleOf": 16,
            "maxN": 4,
            "steps": {"default": 4, "max": 12},
            "seed": True,
            "edit": False,
            "maxInputImages": 0,
            "mask": False,
            "transparent": False,
            "qualities": None,
            "promptMax": None,
        },
        "price": {
            "currency": "USD",
            "perMegapixel": {"first": 0.0027, "more": 0.0027, "roundUp": False},
            "defaultSteps": 4,
            "certainty": "copies",
        },
        "endsAt": None,
        "successor": None,
    }
    assert models["google/flash-image-2.5"]["capabilities"]["sizes"][0] == "1024x1024"
    assert models["google/flash-image-2.5"]["capabilities"]["steps"] == {"default": None, "max": 0}
    assert models["google/gemini-3-pro-image"]["price"]["byResolution"] == {"1K": 0.134, "2K": 0.134, "4K": 0.24}


async def test_an_end_and_a_successor_are_shown(start_service: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_service(provider="openai", openai_api_url=upstream.url, openai_api_key="any")
    model = (await models_of(service))["gpt-image-1.5"]
    assert (model["endsAt"], model["successor"]) == ("2026-12-01", "gpt-image-2.6-flare")
    assert model["price"]["byQualitySize"]["high"]["1024x1024"] == 0.133
    assert model["price"]["perMillionTokens"] == {"textIn": 5, "imageIn": 8, "imageOut": 32}


async def test_an_unlisted_model_has_nulls_and_an_alias_the_limits_of_its_model(start_paid: StartService) -> None:
    service = await start_paid(default_model="mine", model_aliases={"fast": SCHNELL})
    models = await models_of(service)
    assert models["mine"] == {
        "id": "mine",
        "provider": "together",
        "channel": "together",
        "capabilities": UNKNOWN,
        "price": None,
        "endsAt": None,
        "successor": None,
    }
    assert models["fast"] == models[SCHNELL] | {"id": "fast"}


async def test_the_sandbox_shows_limits_and_that_its_images_are_free(service: Client) -> None:
    models = await models_of(service)
    assert models[SCHNELL]["capabilities"]["multipleOf"] == 16
    assert {model["provider"] for model in models.values()} == {"sandbox"}
    free = {"currency": "USD", "perImage": 0.0, "certainty": None}
    assert all(model["price"] == free for model in models.values())


async def test_own_rows_are_shown(start_service: StartService, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('models = [{ id = "mine", max_n = 2, price = { per_image = 0.5 } }]')
    model = (await models_of(await start_service(models_file=path)))["mine"]
    assert model["capabilities"] == UNKNOWN | {"maxN": 2}
    assert model["price"] == {"currency": "USD", "perImage": 0.5, "certainty": None}


async def test_the_list_needs_no_upstream(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    await upstream.stop()
    assert SCHNELL in await models_of(service)


async def test_the_default_model_is_named(start_paid: StartService) -> None:
    body = await (await (await start_paid(default_model="own/model")).get("/api/models")).json()
    assert body["defaultModel"] == "own/model"
    assert "own/model" in {view["id"] for view in body["models"]}
