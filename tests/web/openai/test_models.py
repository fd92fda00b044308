"""Tests of GET /v1/models: both shapes, the default model, and caching of the upstream's list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from imagegen.errors import UpstreamError
from imagegen.web.model_list import FRESH_S, RETRY_S, ListedModel, ModelListCache
from imagegen.web.openai.models import entry_of
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import over_rows
from tests.web.openai.conftest import Serve, Service

DEFAULT = "black-forest-labs/FLUX.1-schnell"
PATHS = ("/v1/models", "/models", "/v1/v1/models")


class FakeUpstream:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self.error: UpstreamError | None = None
        self.models: tuple[Mapping[str, object], ...] = ({"id": "one/model", "created": 5, "organization": "One"},)

    async def list(self) -> tuple[Mapping[str, object], ...]:
        self.calls += 1
        if self.error:
            raise self.error
        return self.models


@pytest.fixture
def fake() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def catalogue(fake: FakeUpstream) -> ModelListCache:
    return ModelListCache(clock=lambda: fake.now)


@over_rows("path", PATHS)
async def test_openais_clients_get_an_object(service: Service, path: str) -> None:
    body = await (await service.request("GET", path, headers={"User-Agent": "OpenAI/Python 3.54.0"})).json()
    assert (body["object"], DEFAULT in {entry["id"] for entry in body["data"]}) == ("list", True)
    for entry in body["data"]:
        assert set(entry) == {"id", "object", "created", "owned_by", "type"}


@over_rows("agent", ["Together/Python 2.42.0", "AsyncTogether/Python 3.1.1"])
@over_rows("path", PATHS)
async def test_togethers_clients_get_an_array(service: Service, path: str, agent: str) -> None:
    body = await (await service.request("GET", path, headers={"User-Agent": agent})).json()
    assert DEFAULT in {entry["id"] for entry in body}
    assert {entry["type"] for entry in body} == {"image"}


async def test_the_upstreams_models_are_listed(service: Service) -> None:
    body = await (await service.request("GET", "/v1/models")).json()
    assert len(body["data"]) > 1


async def test_one_model_is_found_by_its_id(service: Service) -> None:
    for path in (f"/v1/models/{DEFAULT}", f"/v1/models/{DEFAULT.replace('/', '%2F')}"):
        assert (await (await service.request("GET", path)).json())["id"] == DEFAULT
    for unknown in ("no/such", "two%0Alines", "%0A"):
        missing = await service.request("GET", f"/v1/models/{unknown}")
        assert (missing.status, (await missing.json())["error"]["code"]) == (404, "model_not_found")


async def test_the_list_does_not_fail_with_the_upstream(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve()
    await upstream.stop()
    answer = await service.request("GET", "/v1/models")
    ids = [entry["id"] for entry in (await answer.json())["data"]]
    assert (answer.status, ids[0]) == (200, DEFAULT)
    assert len(ids) == len(set(ids)) > 20


def test_an_entry_fits_both_clients() -> None:
    listed = {"id": "one/model", "created": 5, "organization": "One", "context_length": 7}
    assert entry_of(ListedModel("one/model", listed, None, ended=False)) == {
        "id": "one/model",
        "object": "model",
        "created": 5,
        "owned_by": "One",
        "type": "image",
    }
    odd = entry_of(ListedModel("two/model", {"id": "two/model", "created": "yesterday"}, None, ended=False))
    assert (odd["created"], odd["owned_by"]) == (0, "two")


async def test_models_of_the_table_and_aliases_are_listed_and_found(serve: Serve) -> None:
    service = await serve(model_aliases={"dall-e-3": DEFAULT}, fallback_models=("my/fallback",), default_model="mine")
    body = await (await service.request("GET", "/v1/models")).json()
    ids = [entry["id"] for entry in body["data"]]
    assert ids[0] == "mine"
    assert {"dall-e-3", "my/fallback", "black-forest-labs/FLUX.2-max", DEFAULT} <= set(ids)
    for name in ("dall-e-3", "black-forest-labs/FLUX.2-max", "mine"):
        found = await service.request("GET", f"/v1/models/{name}")
        assert (found.status, (await found.json())["id"]) == (200, name)


async def test_a_model_that_has_ended_is_not_offered_on_v1(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('models = [{ id = "gone", ends = 2020-01-31 }, { id = "here", ends = 2999-01-31 }]')
    service = await serve(models_file=path)
    ids = {entry["id"] for entry in (await (await service.request("GET", "/v1/models")).json())["data"]}
    assert "here" in ids
    assert "gone" not in ids
    assert "gone" in {model["id"] for model in (await (await service.request("GET", "/api/models")).json())["models"]}


async def test_the_upstream_list_is_cached(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    for fake.now in (0.0, 1.0, FRESH_S - 1):
        await catalogue.entries(fake.list)
    assert fake.calls == 1
    fake.now = FRESH_S
    await catalogue.entries(fake.list)
    assert fake.calls == 2


async def test_the_last_list_is_served_during_an_outage(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    known = await catalogue.entries(fake.list)
    fake.now, fake.error = FRESH_S, UpstreamError("upstream_error", "away")
    assert await catalogue.entries(fake.list) == known
    fake.now += RETRY_S - 1
    assert await catalogue.entries(fake.list) == known
    assert fake.calls == 2
    fake.now, fake.error, fake.models = fake.now + 1, None, ({"id": "new"},)
    assert [entry["id"] for entry in await catalogue.entries(fake.list)] == ["new"]
