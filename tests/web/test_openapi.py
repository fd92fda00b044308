"""The document says what the routes are, and its page asks nobody else."""

from __future__ import annotations

import re

import pytest
from openapi_spec_validator import validate

from imagegen.app import create_app
from imagegen.settings import Settings

METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture
async def document(service) -> dict:
    response = await service.get("/openapi.json")
    assert response.status == 200
    return await response.json()


async def test_the_document_is_valid_openapi(document: dict) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


async def test_every_route_is_documented_and_nothing_else(document: dict) -> None:
    def shape(path: str) -> str:
        return re.sub(r"\{[^}]*\}", "{}", path)

    routed = {
        (route.method.lower(), shape(route.resource.canonical))
        for route in create_app(Settings()).router.routes()
        if route.method not in ("HEAD", "OPTIONS") and route.resource is not None
    }
    documented = {
        (method, shape(path)) for path, item in document["paths"].items() for method in METHODS if method in item
    }
    assert documented == routed


async def test_the_page_asks_no_other_host(service) -> None:
    page = await service.get("/docs")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    text = await page.text()
    files = re.findall(r'(?:src|href)="(/docs/[^"]+)"', text)
    assert files
    for file in files:
        body = await (await service.get(file)).text()
        assert "://" not in body
    assert "://" not in text


async def test_the_root_leads_to_the_page(service) -> None:
    response = await service.get("/", allow_redirects=False)
    assert (response.status, response.headers["Location"]) == (302, "/docs")


async def test_an_unknown_file_of_the_page_is_a_404(service) -> None:
    assert (await service.get("/docs/nothing.js")).status == 404
