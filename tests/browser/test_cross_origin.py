"""Tests in a real Chromium: pages of an allowed and of another origin call the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from imagegen.app import METER
from tests.web.conftest import Client, StartService

BROWSER_S = 60.0

PAGE = """<!doctype html><script>
const api = new URLSearchParams(location.search).get("api"), json = {"Content-Type": "application/json"};
const seen = {};
const tried = async (name, action) => {
  try { seen[name] = await action(); } catch (error) { seen[name] = error.name; }
};
const loaded = source => new Promise(resolve => {
  const image = new Image();
  image.crossOrigin = "anonymous";
  image.onload = () => resolve("loaded"); image.onerror = () => resolve("refused");
  image.src = source;
});
const streamed = path => new Promise(resolve => {
  const source = new EventSource(path);
  source.addEventListener("completed", event => { source.close(); resolve(JSON.parse(event.data).status); });
  source.onerror = () => { source.close(); resolve("refused"); };
});
const post = (prompt, headers) => fetch(api + "/api/images/generate?wait=10",
  {method: "POST", headers, body: JSON.stringify({prompt})});
(async () => {
  const task = TASK;
  await tried("read", async () => (await fetch(api + task.path)).status);
  await tried("header", async () => (await fetch(api + task.path)).headers.get("ETag") !== null);
  await tried("missing", async () => (await fetch(api + "/api/images/none")).status);
  await tried("preflight", async () =>
    (await post("by page", {...json, "Idempotency-Key": origin, "x-stainless-os": "x"})).status);
  await tried("form", async () => (await fetch(api + task.path + "/retry", {method: "POST", mode: "no-cors"})).type);
  await tried("admin", async () => (await fetch(api + "/api/stats")).status);
  await tried("stream", () => streamed(api + task.path + "/events"));
  await tried("image", () => loaded(api + task.image));
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


class Pages:
    """Server of a page on its own origin, which is sent what the page has seen."""

    def __init__(self) -> None:
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_post("/seen", self._seen)
        self.server = TestServer(app)
        self.task = ""
        self.seen: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    @property
    def origin(self) -> str:
        return str(self.server.make_url("/")).rstrip("/")

    async def visit(self, browser: Any, api: str) -> dict[str, Any]:
        """Open the page in the browser; return what it has seen."""
        page = await browser.new_page()
        await page.goto(f"{self.origin}/?api={api}")
        seen = await asyncio.wait_for(self.seen, BROWSER_S)
        await page.close()
        return seen

    async def _page(self, _request: web.Request) -> web.Response:
        return web.Response(text=PAGE.replace("TASK", self.task), content_type="text/html")

    async def _seen(self, request: web.Request) -> web.Response:
        self.seen.set_result(await request.json())
        return web.Response()


@pytest_asyncio.fixture(loop_scope="session")
async def pages() -> AsyncIterator[Pages]:
    pages = Pages()
    async with pages.server:
        yield pages


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_browser_lets_an_allowed_page_use_everything_and_another_nothing(
    start_service: StartService, pages: Pages, browser: Any, *, is_allowed: bool
) -> None:
    client: Client = await start_service(cors_origins=(pages.origin if is_allowed else "https://shop.example",))
    task = await (await client.post("/api/images/generate?wait=10", json={"prompt": "a lighthouse"})).json()
    image = task["data"][0]["url"].partition("/api")[2]
    pages.task = f'{{path: "/api/images/{task["taskId"]}", image: "/api{image}"}}'
    seen = await pages.visit(browser, str(client.make_url("/")).rstrip("/"))
    refused = "TypeError"
    assert seen == {
        "read": 200 if is_allowed else refused,
        "header": True if is_allowed else refused,
        "missing": 404 if is_allowed else refused,
        "preflight": 200 if is_allowed else refused,
        "form": "opaque",
        "admin": refused,
        "stream": "completed" if is_allowed else "refused",
        "image": "loaded" if is_allowed else "refused",
    }
    statuses = {status for _, _, status in client.app[METER].requests}
    assert (409 in statuses, 403 in statuses) == (is_allowed, not is_allowed)
