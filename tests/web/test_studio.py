"""Tests of the studio as it is served, and of its modules that need no page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import pytest

from imagegen.providers.model_table import load_table
from imagegen.providers.prices import estimate
from imagegen.tasks.cost import MICRO_USD
from imagegen.tasks.request import GenerationRequest
from imagegen.web.api.models import price_view
from imagegen.web.ops.static_files import STATIC, accepts_gzip
from tests.support import over_rows
from tests.web.conftest import Client

FOLDER = STATIC / "studio"
MODULE_TESTS = Path(__file__).parent / "studio" / "modules.test.mjs"
OF_OTHERS = ("preact.js", "hooks.js", "htm.js", "uplot.js", "uplot.css")
OURS = sorted(path for path in FOLDER.glob("*.js") if path.name not in OF_OTHERS)
PAGES = ("/", "/board")

MAX_FIRST_LOAD_BYTES = 150_000
IMMUTABLE = "public, max-age=31536000, immutable"
FORBIDDEN = re.compile(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function")

SIZES = ((512, 512), (1024, 1024), (1024, 1536), (1344, 768), (1920, 1080), (2048, 2048), (4096, 4096), (64, 64))
PRICED = """
import { readFileSync } from "node:fs";
const { estimate } = await import(process.argv[1]);
const cases = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([price, request]) => estimate(price, request))));
"""

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")


def named_files(page: str) -> list[str]:
    return re.findall(r'(?:href|src)="(assets/[^"]+)"', page)


@over_rows("path", PAGES)
async def test_the_page_allows_nothing_inline_and_no_other_host(service: Client, path: str) -> None:
    response = await service.get(path)
    page, policy = await response.text(), response.headers["Content-Security-Policy"]
    assert (response.status, response.content_type) == (200, "text/html")
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert not re.search(r"unsafe|https?:|\*", policy)
    assert response.headers["X-Frame-Options"] == "DENY"
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|://", page)
    assert "$ASSETS" not in page


def test_no_file_of_ours_names_another_host_or_makes_markup_of_text() -> None:
    for path in (*OURS, *(path for path in FOLDER.glob("*.css") if path.name not in OF_OTHERS)):
        code = re.sub(r"^\s*//.*$", "", path.read_text(), flags=re.MULTILINE)
        assert not re.search(
            r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", code
        ), path
        assert "@import" not in code


@over_rows("path", PAGES)
async def test_the_first_load_is_small_and_each_file_is_kept_for_ever(service: Client, path: str) -> None:
    session: aiohttp.ClientSession = service.session
    first = await session.get(service.make_url(path), headers={"Accept-Encoding": "gzip"}, auto_decompress=False)
    size = len(await first.read())
    names = named_files(await (await service.get(path)).text())
    assert len(names) == len(set(names)) >= 15
    for name in names:
        response = await session.get(
            service.make_url(f"/{name}"), headers={"Accept-Encoding": "gzip"}, auto_decompress=False
        )
        assert (response.status, response.headers["Cache-Control"]) == (200, "public, max-age=31536000, immutable"), (
            name
        )
        assert response.headers["Vary"] == "Accept-Encoding"
        size += len(await response.read())
    assert size <= MAX_FIRST_LOAD_BYTES


@over_rows("path", PAGES)
async def test_every_module_that_is_loaded_is_named_in_the_page(service: Client, path: str) -> None:
    page = await (await service.get(path)).text()
    named = set(named_files(page))
    loaded = [module for module in OURS if any(name.endswith(f"/{module.name}") for name in named)]
    assert loaded
    for module in loaded:
        address = next(name for name in named if name.endswith(f"/{module.name}"))
        for relative in re.findall(r'from "(\./[\w-]+\.js)"', module.read_text()):
            assert urljoin(address, relative) in named


async def test_a_file_is_sent_again_only_if_it_changed(service: Client) -> None:
    (script,) = (name for name in named_files(await (await service.get("/")).text()) if name.endswith("app.js"))
    for path in ("/", f"/{script}"):
        for encoding in ("gzip", "identity"):
            headers = {"Accept-Encoding": encoding}
            first = await service.get(path, headers=headers)
            assert first.headers.get("Content-Encoding", "identity") == encoding
            again = await service.get(path, headers=headers | {"If-None-Match": first.headers["ETag"]})
            assert (again.status, await again.read()) == (304, b"")
    assert (await service.get("/")).headers["Cache-Control"] == "no-cache"


async def test_the_page_of_another_version_gets_files_that_it_does_not_keep(service: Client) -> None:
    response = await service.get("/assets/000000000000/app.js")
    assert (response.status, response.headers["Cache-Control"]) == (200, "no-cache")
    assert await response.text() == (FOLDER / "app.js").read_text()


@over_rows("name", ["index.html", "nothing.js", "..%2Fdocs%2Fdocs.js", "%2e%2e%2f%2e%2e%2fapp.py"])
async def test_a_file_that_no_page_loads_is_a_404(service: Client, name: str) -> None:
    assert (await service.get(f"/assets/000000000000/{name}")).status == 404


async def test_the_licences_of_other_projects_are_sent_with_their_versions(service: Client) -> None:
    text = await (await service.get("/assets/0/licenses.txt")).text()
    for part in ("preact 11.2.0", "htm 3.1.1", "The MIT License (MIT)", "Apache License"):
        assert part in text


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip, deflate, br", True),
        ("br;q=1, GZIP;q=0.5", True),
        ("*", True),
        ("", False),
        ("br", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
    ],
)
def test_gzip_is_sent_to_those_who_take_it(header: str, *, accepted: bool) -> None:
    assert accepts_gzip(header) == accepted


@needs_node
def test_the_modules_pass_their_own_tests() -> None:
    done = subprocess.run(
        ["node", "--test", str(MODULE_TESTS)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


@needs_node
def test_the_price_beside_a_model_is_the_servers_estimate() -> None:
    rows = [row for provider in ("together", "openai") for row in load_table(provider).rows if row.price]
    cases, expected = [], []
    for row in rows:
        for width, height in SIZES:
            for more in ({}, {"n": 3}, {"steps": 41}, {"quality": "low"}, {"quality": "auto"}):
                price = row.price
                assert price is not None
                request = GenerationRequest(prompt="a", model=row.id, width=width, height=height, **{"n": 1} | more)
                cases.append((price_view(price), {"width": width, "height": height, **more}))
                expected.append(estimate(price, request))
    done = subprocess.run(
        ["node", "--input-type=module", "-e", PRICED, "--", (FOLDER / "price.js").as_uri()],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = [None if dollars is None else round(dollars * MICRO_USD) for dollars in json.loads(done.stdout)]
    assert seen == expected
    assert sum(price is not None for price in seen) > len(seen) / 2
