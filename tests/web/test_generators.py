"""Tests that tools understand the OpenAPI document: a linter, generators of clients, and Postman's import."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.npm_packages import ROOT, installed_packages
from tests.web.conftest import Client

TOOLS = ROOT / "tests" / "npm" / "openapi"
PNG = b"\x89PNG\r\n\x1a\n"
LINT_WARNINGS = {"operation-2xx-response"}  # `/v1/images/variations` has no success

PYTHON_CLIENT = """
import pathlib, sys
from image_client import Client
from image_client.api.follow import get_image, get_task
from image_client.api.submit import generate, upload
from image_client.models import GenerationBody, UploadFilesBody
from image_client.types import File

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
submitted = generate.sync(client=client, body=GenerationBody(prompt="a lighthouse", width=64, height=64), wait=30)
task = get_task.sync(submitted.task_id, client=client, wait=30)
assert task.status == "completed", task
image = get_image.sync(submitted.task_id, 0, client=client)
pathlib.Path(sys.argv[2]).write_bytes(image.payload.read())
file = File(payload=open(sys.argv[2], "rb"), file_name="image.png", mime_type="image/png")
assert upload.sync(client=client, body=UploadFilesBody(file=file)).upload_id.startswith("upload:")
"""

pytestmark = pytest.mark.timeout(400)  # the first run has to install the packages


async def run(*command: object, cwd: Path) -> str:
    """Return what a program prints on stdout. Raises AssertionError with all of it if it fails."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, f"{output.decode()[-2000:]}\n{errors.decode()[-2000:]}"
    return output.decode()


@pytest.fixture
async def document(service: Client, tmp_path: Path) -> Path:
    """Write the served document into a file."""
    file = tmp_path / "openapi.json"
    file.write_bytes(await (await service.get("/openapi.json")).read())
    return file


def base_of(service: Client) -> str:
    return str(service.make_url("/")).rstrip("/")


@pytest.mark.skipif(importlib.util.find_spec("openapi_python_client") is None, reason="needs openapi-python-client")
async def test_a_generated_python_client_makes_saves_and_uploads_an_image(
    service: Client, document: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text("post_hooks: []\n")
    options = ("--path", document, "--config", "config.yml", "--meta", "none", "--output-path", "image_client")
    await run(sys.executable, "-m", "openapi_python_client", "generate", *options, cwd=tmp_path)
    (tmp_path / "call.py").write_text(PYTHON_CLIENT)
    await run(sys.executable, "call.py", base_of(service), "image.png", cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes().startswith(PNG)


async def test_a_client_typed_by_openapi_typescript_makes_an_image_and_saves_it(
    service: Client, document: Path, tmp_path: Path
) -> None:
    place = installed_packages(TOOLS)
    tools = place / "node_modules" / ".bin"
    schema = ("-o", "schema.d.ts", "--default-non-nullable=false")
    await run(tools / "openapi-typescript", document, *schema, cwd=place)
    options = ("--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom", "--skipLibCheck")
    await run(tools / "tsc", "client.ts", *options, "--outDir", "made", cwd=place)
    await run("node", "save.mjs", base_of(service), tmp_path / "image.png", cwd=place)
    assert (tmp_path / "image.png").read_bytes().startswith(PNG)


async def test_redocly_finds_no_error(document: Path) -> None:
    place = installed_packages(TOOLS)
    report = await run(
        place / "node_modules" / ".bin" / "redocly",
        "lint",
        document,
        "--format=json",
        "--max-problems=1000",
        cwd=place,
    )
    found: list[dict[str, Any]] = json.loads(report)["problems"]
    assert [problem["message"] for problem in found if problem["severity"] == "error"] == []
    assert {problem["ruleId"] for problem in found} <= LINT_WARNINGS


async def test_the_requests_of_a_postman_collection_are_real_ones(service: Client, document: Path) -> None:
    place = installed_packages(TOOLS)
    collection = json.loads(await run("node", "postman.mjs", document, cwd=place))
    assert {variable["key"]: variable["value"] for variable in collection["variables"]}["baseUrl"] == base_of(service)
    bodies = {
        request["path"]: request["body"]["raw"]
        for request in collection["requests"]
        if "raw" in (request.get("body") or {})
    }
    assert len(bodies) >= 10
    for path, body in bodies.items():
        assert not {"", "string"}.intersection(map(str, json.loads(body).values())), path
        assert "<" not in body, path
        if "/admin/" not in path:  # a key that is made there would be needed by the other requests
            response = await service.post(path, data=body, headers={"Content-Type": "application/json"})
            assert response.status < 300, f"{path} {body} {await response.text()}"
    assert all(request["auth"] == "bearer" for request in collection["requests"] if "/api/images" in request["path"])
