"""Tests of GET /v1/models: both shapes, the default model, and caching of the upstream's list."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from emulator_fixtures import EmulatedUpstream

from imagegen.errors import UpstreamError
from imagegen.web.openai.models import FRESH_S, RETRY_S, ModelListCache
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


@pytest.mark.parametrize("path", PATHS)
async def test_openais_clients_get_an_object(service: Service, path: str) -> None:
    body = await (await service.request("GET", path, headers={"User-Agent": "OpenAI/Python 3.54.0"})).json()
    assert (body["object"], DEFAULT in {entry["id"] for entry in body["data"]}) == ("list", True)
    for entry in body["data"]:
        assert set(entry) == {"id", "object", "created", "owned_by", "type"}


@pytest.mark.parametrize("agent", ["Together/Python 2.42.0", "AsyncTogether/Python 3.1.1"])
@pytest.mark.parametrize("path", PATHS)
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
    missing = await service.request("GET", "/v1/models/no/such")
    assert (missing.status, (await missing.json())["error"]["code"]) == (404, "model_not_found")


async def test_the_list_does_not_fail_with_the_upstream(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve()
    await upstream.stop()
    answer = await service.request("GET", "/v1/models")
    assert (answer.status, [entry["id"] for entry in (await answer.json())["data"]]) == (200, [DEFAULT])


async def test_an_entry_fits_both_clients(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    fake.models += ({"id": "two/model", "created": "yesterday"},)
    assert await catalogue.entries(fake.list, "two/model") == [
        {"id": "one/model", "object": "model", "created": 5, "owned_by": "One", "type": "image"},
        {"id": "two/model", "object": "model", "created": 0, "owned_by": "two", "type": "image"},
    ]


async def test_the_default_model_is_always_there(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    assert [entry["id"] for entry in await catalogue.entries(fake.list, "mine")] == ["mine", "one/model"]


async def test_the_upstream_list_is_cached(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    for fake.now in (0.0, 1.0, FRESH_S - 1):
        await catalogue.entries(fake.list, "mine")
    assert fake.calls == 1
    fake.now = FRESH_S
    await catalogue.entries(fake.list, "mine")
    assert fake.calls == 2


async def test_the_last_list_is_served_during_an_outage(catalogue: ModelListCache, fake: FakeUpstream) -> None:
    known = await catalogue.entries(fake.list, "mine")
    fake.now, fake.error = FRESH_S, UpstreamError("upstream_error", "away")
    assert await catalogue.entries(fake.list, "mine") == known
    fake.now += RETRY_S - 1
    assert await catalogue.entries(fake.list, "mine") == known
    assert fake.calls == 2
    fake.now, fake.error, fake.models = fake.now + 1, None, ({"id": "new"},)
    assert [entry["id"] for entry in await catalogue.entries(fake.list, "new")] == ["new"]
