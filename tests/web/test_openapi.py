"""Tests that the OpenAPI document matches the routes and responses, and that its page loads no other host."""

from __future__ import annotations

import asyncio
import copy
import re
import socket
import tracemalloc
from typing import Any
from urllib.parse import urljoin

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as SchemaError
from openapi_spec_validator import validate

from imagegen.app import create_app
from imagegen.settings import Settings
from imagegen.web.openai.error_responses import FAILED_STATUS
from imagegen.web.openapi.builder import build
from imagegen.web.routes import ROUTES, build_document
from tests.support import ADMIN_TOKEN, AS_ADMIN, over_rows

Client = TestClient[web.Request, web.Application]

METHODS = {"get", "post", "put", "patch", "delete"}
BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


def without_parameter_names(path: str) -> str:
    """Return a path without the names of its parameters."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def closed(part: Any) -> Any:
    """Return the schema with unnamed fields forbidden."""
    if isinstance(part, list):
        return [closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    shut = {name: closed(each) for name, each in part.items()}
    if isinstance(part.get("properties"), dict) and "$ref" not in part and part.get("type") == "object":
        shut.setdefault("additionalProperties", False)
    return shut


class Described:
    """OpenAPI document that responses are checked against."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.schemas = {"components": closed(document["components"])}
        self.checked: set[tuple[str, str, int]] = set()

    def resolve(self, part: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in part:
            return part
        found: Any = self.document
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return dict(found)

    def check_value(self, schema: dict[str, Any], value: object) -> None:
        Draft202012Validator({**closed(copy.deepcopy(schema)), **self.schemas}).validate(value)

    async def check(self, response: Any, template: str) -> None:
        """Assert that status, content type, our headers and the body are documented."""
        method = response.method.lower()
        entry = self.document["paths"][template][method]
        assert str(response.status) in entry["responses"], f"{method} {template} answers {response.status}"
        answer = self.resolve(entry["responses"][str(response.status)])
        assert "X-Request-Id" in response.headers
        own = {name for name in response.headers if name in self.document["components"]["headers"]}
        assert own - {"Cache-Control"} <= set(answer["headers"]), f"{method} {template} {response.status}"
        self.checked.add((method, template, response.status))
        body = await response.read()
        if "content" not in answer:
            assert body == b""
            return
        content = answer["content"][response.content_type]
        if response.content_type == "application/json":
            self.check_value(content["schema"], orjson.loads(body))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(orjson.loads(orjson.dumps(build_document())))


@pytest.fixture
def described(document: dict[str, Any]) -> Described:
    return Described(document)


def every_example(document: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
    """Return each example with its schema."""
    found: list[tuple[dict[str, Any], Any]] = []

    def look(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("examples"), dict):
                found.extend((part["schema"], element["value"]) for element in part["examples"].values())
            for each in part.values():
                look(each)

    for section in ("paths", "webhooks", "components"):
        look(document[section])
    return found


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_route_is_documented_and_nothing_else(document: dict[str, Any]) -> None:
    routed = {
        (route.method.lower(), without_parameter_names(route.resource.canonical))
        for route in create_app(Settings(admin_token=ADMIN_TOKEN)).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {
        (method, without_parameter_names(path))
        for path, item in document["paths"].items()
        for method in METHODS & item.keys()
    }
    assert documented == routed
    assert len(ROUTES) == len(documented)


def test_every_example_matches_its_schema(document: dict[str, Any], described: Described) -> None:
    examples = every_example(document)
    assert len(examples) > 50
    for schema, value in examples:
        described.check_value(schema, value)


def test_every_parameter_has_an_example_that_it_takes(document: dict[str, Any], described: Described) -> None:
    for parameter in document["components"]["parameters"].values():
        described.check_value(parameter["schema"], parameter["example"])


def every_property(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the properties of all named types and of all forms, each with its name for people."""
    found = [
        (f"{name}.{key}", schema)
        for name, component in document["components"]["schemas"].items()
        for key, schema in component.get("properties", {}).items()
    ]
    for path, item in document["paths"].items():
        for entry in item.values():
            for media in entry.get("requestBody", {}).get("content", {}).values():
                found += [(f"{path} {key}", schema) for key, schema in media["schema"].get("properties", {}).items()]
    return found


def test_every_property_has_a_description(document: dict[str, Any], described: Described) -> None:
    missing = [
        name
        for name, schema in every_property(document)
        if not (schema.get("description") or described.resolve(schema).get("description"))
    ]
    assert not missing, "add Field(description=...), or a line to DESCRIPTIONS of openapi/properties.py"


def test_every_property_has_an_example_that_it_takes(document: dict[str, Any], described: Described) -> None:
    missing, wrong = [], []
    for name, schema in every_property(document):
        if "examples" not in schema and schema.get("format") != "binary":
            missing.append(name)
        for example in schema.get("examples", ()):
            try:
                described.check_value(schema, example)
            except SchemaError:
                wrong.append(f"{name}: {example}")
    assert not missing, "add it to an example of its operation, Field(examples=[...]), or to EXAMPLES"
    assert not wrong


def test_every_operation_with_json_has_an_example_of_it(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, entry in item.items():
            contents = [entry.get("requestBody", {}).get("content", {})]
            contents += [each.get("content", {}) for status, each in entry["responses"].items() if status[0] == "2"]
            for content in contents:
                media = content.get("application/json")
                assert media is None or media.get("examples") or path == "/openapi.json", f"{method} {path}"


def test_every_operation_names_its_security(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"].keys()
    for item in document["paths"].values():
        for entry in item.values():
            assert {name for choice in entry["security"] for name in choice} <= schemes
    assert document["paths"]["/api/health"]["get"]["security"] == []


def test_every_route_has_a_unique_name_a_described_tag_and_a_success(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    entries = [entry for item in document["paths"].values() for entry in item.values()]
    assert len({entry["operationId"] for entry in entries}) == len(entries)
    for entry in entries:
        assert set(entry["tags"]) <= tags
        assert entry["summary"]
        assert any(status[0] in "23" for status in entry["responses"]) or entry["summary"].startswith("Refuse ")
        assert {"400", "417", "431", "500"} <= entry["responses"].keys()


def test_links_lead_to_operations_and_to_their_parameters(document: dict[str, Any], described: Described) -> None:
    entries = {entry["operationId"]: entry for item in document["paths"].values() for entry in item.values()}
    links = [
        link
        for entry in entries.values()
        for answer in entry["responses"].values()
        for link in answer.get("links", {}).values()
    ]
    assert links
    for link in links:
        names = {described.resolve(element)["name"] for element in entries[link["operationId"]]["parameters"]}
        assert link["parameters"].keys() <= names


def test_every_status_of_a_failed_task_is_documented_on_v1(document: dict[str, Any]) -> None:
    statuses = document["paths"]["/v1/images/generations"]["post"]["responses"]
    assert {str(status) for status in FAILED_STATUS.values()} | {"409", "502"} <= statuses.keys()


@pytest.mark.parametrize("route", ["generations", "generations/async", "edits", "edits/async"])
def test_each_generation_on_v1_has_the_errors_of_its_input_images(document: dict[str, Any], route: str) -> None:
    responses = document["paths"][f"/v1/images/{route}"]["post"]["responses"]
    for status, code in [("400", "upload_not_found"), ("400", "image_too_large"), ("415", "unsupported_image")]:
        assert code in responses[status]["$ref"].split(".")


def test_numeric_limits_are_json_schema_keywords(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["GenerationBody"]["properties"]
    width = fields["width"]
    assert (width["minimum"], width["maximum"], width["multipleOf"], width["default"]) == (64, 8192, 8, 512)
    assert fields["steps"]["type"] == ["integer", "null"]
    assert b'"ge"' not in orjson.dumps(document)


ADDRESSES = [
    "https://h.example/a.png?x=1#y",
    "http://h:8443/a",
    "https://h:65535",
    "https://u:pw@a_b/a",
    "http://1.2.3.4:1",
]


@over_rows("address", ADDRESSES)
def test_addresses_of_images_in_ascii_match_the_document(document: dict[str, Any], address: str) -> None:
    pattern = document["components"]["schemas"]["GenerationBody"]["properties"]["imageUrl"]["pattern"]
    assert re.search(pattern, address)


@pytest.mark.parametrize(
    "text", ["client that cancels a task leaves it", "MD5", "`sequence`", "never by a timer", "paid for once"]
)
def test_special_cases_are_described_first(document: dict[str, Any], text: str) -> None:
    assert text in document["info"]["description"]


async def test_task_responses_match_the_document(service: Client, described: Described) -> None:
    async def post(path: str, template: str, json: object = None, **headers: str) -> Any:
        response = await service.post(path, json=json, headers=headers)
        await described.check(response, template)
        return response

    async def get(path: str, template: str, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await service.get(path, headers=named, allow_redirects=False)
        await described.check(response, template)
        return response

    generate, task, image = "/api/images/generate", "/api/images/{taskId}", "/api/images/{taskId}/{index}"
    task_id = (await (await post(generate, generate, BODY)).json())["taskId"]
    await post(f"{generate}?wait=30", generate, BODY, Prefer="wait=30")
    await post(generate, generate, BODY)
    await post(generate, generate, {"prompt": 7, "promt": "x"})
    await post("/api/images/batch", "/api/images/batch", {"requests": [BODY, {"prompt": ""}, 7]})
    here = f"/api/images/{task_id}"
    etag = (await get(here, task)).headers["ETag"]
    await get(here, task, If_None_Match=etag)
    await get(f"{here}?wait=x", task)
    await get(f"{here}/events", "/api/images/{taskId}/events")
    await get(f"{here}/events", "/api/images/{taskId}/events", Last_Event_ID=etag.strip('"'))
    await get(f"/api/events?tasks={task_id},{'0' * 32}", "/api/events")
    await get("/api/events", "/api/events")
    await get(f"{here}/0", image)
    await get(f"{here}/0", image, Range="bytes=0-9")
    await get(f"{here}/0", image, Range="bytes=99999999-")
    await get(f"{here}/0?v=0", image)
    await get(f"{here}/7", image)
    await get(f"/api/images/{'0' * 32}", task)
    await post(f"{here}/retry", "/api/images/{taskId}/retry")
    await post(f"{here}/cancel", "/api/images/{taskId}/cancel")
    await described.check(await service.delete(here), task)
    assert len(described.checked) == 20


async def test_responses_for_a_cancelled_task_match_the_document(start_service: Any, described: Described) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    submitted = await (await service.post("/api/images/generate", json=BODY)).json()
    here = f"/api/images/{submitted['taskId']}"
    await described.check(await service.get(here), "/api/images/{taskId}")
    await described.check(await service.delete(here), "/api/images/{taskId}")
    await described.check(await service.post(f"{here}/retry"), "/api/images/{taskId}/retry")
    assert {status for _, _, status in described.checked} == {200, 202}


async def test_operator_responses_match_the_document(start_service: Any, described: Described) -> None:
    service = await start_service()
    await service.post("/api/images/generate?wait=30", json=BODY)
    for path in ("/api/images", "/api/stats", "/api/usage", "/metrics"):
        await described.check(await service.get(path, headers=AS_ADMIN), path)
        await described.check(await service.get(path), path)
    for path in ("/api/health", "/healthz", "/readyz", "/openapi.json", "/docs"):
        await described.check(await service.get(path), path)
    await described.check(await service.get("/"), "/")
    await described.check(await service.get("/assets/0/app.js"), "/assets/{version}/{file}")
    await described.check(await service.get("/assets/0/nothing.js"), "/assets/{version}/{file}")
    await described.check(await service.get("/docs/docs.css"), "/docs/{file}")
    await described.check(await service.get("/docs/nothing.js"), "/docs/{file}")
    assert len(described.checked) == 18


@pytest.mark.parametrize("base", ["/v1", "", "/v1/v1"])
async def test_sdk_responses_match_the_document(service: Client, described: Described, base: str) -> None:
    path, body = f"{base}/images/generations", {"prompt": "a lighthouse", "size": "64x64"}
    await described.check(await service.post(path, json=body), path)
    await described.check(await service.post(path, json=body | {"response_format": "b64_json"}), path)
    await described.check(await service.post(path, json=body | {"stream": True}), path)
    await described.check(await service.post(path, json={"prompt": ""}), path)
    await described.check(await service.post(path, data=b"x"), path)
    later = {"Prefer": "respond-async"}
    await described.check(await service.post(path, json=body | {"prompt": "later"}, headers=later), path)
    models = f"{base}/models"
    listed = await service.get(models)
    await described.check(listed, models)
    await described.check(await service.get(models, headers={"User-Agent": "Together/v1 Python"}), models)
    model = (await listed.json())["data"][0]["id"]
    await described.check(await service.get(f"{models}/{model}"), f"{models}/{{modelId}}")
    await described.check(await service.get(f"{models}/none"), f"{models}/{{modelId}}")
    assert {status for _, _, status in described.checked} == {200, 202, 400, 404, 415}


async def test_a_rate_limit_response_matches_the_document(start_service: Any, described: Described) -> None:
    service = await start_service(rate_limit_max=1, image_rate_limit_max=1)
    for _ in range(2):
        await described.check(await service.post("/api/images/generate", json=BODY), "/api/images/generate")
    await described.check(await service.post("/v1/images/generations", json=BODY), "/v1/images/generations")
    assert [status for _, _, status in sorted(described.checked)] == [202, 429, 429]
    for path in ("/openapi.json", "/docs", "/docs/docs.js", "/", "/api/health"):
        response = await service.get(path)
        assert response.status == 200
        assert "RateLimit" not in response.headers


async def test_the_document_has_the_servers_address(service: Client) -> None:
    at = str(service.make_url("/")).rstrip("/")
    served = await (await service.get("/openapi.json")).json()
    assert served == orjson.loads(orjson.dumps(build_document(at)))
    assert [server["url"] for server in served["servers"]] == [at]
    elsewhere = await (await service.get("/openapi.json", headers={"Host": "127.0.0.1:9"})).json()
    assert [server["url"] for server in elsewhere["servers"]] == ["http://127.0.0.1:9"]


async def test_the_document_is_sent_again_only_if_it_changed(service: Client) -> None:
    first = await service.get("/openapi.json")
    again = await service.get("/openapi.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, await again.read()) == (304, b"")


async def test_the_document_is_built_once_for_all_who_request_it_at_the_same_moment(
    start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def count_and_build(*args: Any) -> Any:
        built.append(args)
        return build(*args)

    monkeypatch.setattr("imagegen.web.routes.build", count_and_build)
    service = await start_service()
    headers = {"Accept-Encoding": "gzip"}
    documents = await asyncio.gather(
        *(service.get("/openapi.json", headers=headers | {"Host": f"h{number}"}) for number in range(20))
    )
    for number, response in enumerate(documents):
        assert response.headers["Content-Encoding"] == "gzip"
        assert (await response.json())["servers"] == [{"url": f"http://h{number}"}]
    assert len({response.headers["ETag"] for response in documents}) == 20
    assert len(built) == 1


async def test_the_page_loads_no_other_host_and_has_nothing_inline(service: Client) -> None:
    page = await service.get("/docs")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    seen, todo = {"/docs": await page.text()}, {"/docs"}
    while todo:
        text = seen[path := todo.pop()]
        assert "://" not in text
        for relative in re.findall(r'["\']((?:docs|\.)/[\w.]+)["\']', text):
            name = urljoin(path, relative)
            if name not in seen:
                response = await service.get(name)
                assert response.status == 200
                seen[name] = await response.text()
                todo.add(name)
    assert len(seen) >= 5
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", seen["/docs"])
    assert not any("innerHTML" in text for text in seen.values())


async def test_the_documents_server_is_the_public_address(start_service: Any) -> None:
    service = await start_service(public_url="https://h/imagegen")
    document = await (await service.get("/openapi.json")).json()
    assert document["servers"] == [{"url": "https://h/imagegen"}]


@over_rows("name", ["nothing.js", "..%2F__init__.py", "%2e%2e%2f%2e%2e%2fapp.py"])
async def test_a_file_that_is_not_the_pages_is_a_404(service: Client, name: str) -> None:
    assert (await service.get(f"/docs/{name}")).status == 404


async def test_clients_that_do_not_read_the_document_share_its_bytes(service: Client) -> None:
    url = service.make_url("/openapi.json")
    size = len(await (await service.get("/openapi.json", headers={"Accept-Encoding": "identity"})).read())
    clients, loop = [socket.socket() for _ in range(40)], asyncio.get_running_loop()
    tracemalloc.start()
    try:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (url.host, url.port))
            client.send(b"GET /openapi.json HTTP/1.1\r\nHost: %b\r\n\r\n" % url.authority.encode())
            await loop.sock_recv(client, 100)
        assert tracemalloc.get_traced_memory()[0] < 10 * size
    finally:
        tracemalloc.stop()
        for client in clients:
            client.close()
