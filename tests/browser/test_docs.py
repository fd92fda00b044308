"""Tests of the documentation's page in a real Chromium: calls, their programs, the search, the key, accessibility."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from imagegen.web.routes import build_document
from tests.browser.conftest import PHONE, OpenPage, Visit
from tests.image_bytes import image_file
from tests.support import ADMIN_TOKEN
from tests.web.conftest import Client, StartService

HOSTILE = '<img src=x onerror="window.hacked=1">\'"`$(id) \u202eevil'
FILES = {"curl": "call.sh", "Python": "call.py", "JavaScript": "call.mjs"}
PROGRAMS = {"curl": "sh", "Python": sys.executable, "JavaScript": "node"}


async def open_route(visit: Visit, name: str) -> Any:
    """Open a route by its operationId; return its part of the page."""
    route = visit.page.locator(f"#{name}")
    await visit.page.evaluate("name => { location.hash = name; }", name)
    await route.locator("form").wait_for()
    return route


async def send(route: Any) -> None:
    await route.get_by_role("button", name="Send").click()
    await route.locator(".answer .status").wait_for()


async def run(program: str, text: str, folder: Path, key: str) -> str:
    """Run a program of the page; return what it prints."""
    if shutil.which(PROGRAMS[program]) is None:
        return ""
    file = folder / FILES[program]
    file.write_text(text)
    process = await asyncio.create_subprocess_exec(
        PROGRAMS[program],
        str(file),
        cwd=folder,
        env={**os.environ, "IMAGEGEN_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_a_submit_shows_its_image_and_fills_its_id_into_other_calls(service: Client, open_page: OpenPage) -> None:
    visit = await open_page(service, "docs")
    generate = await open_route(visit, "generate")
    assert "What to draw." in await generate.inner_text()  # the fields of the body are open
    await generate.get_by_role("textbox", name="Body").fill(
        json.dumps({"prompt": HOSTILE, "width": 64, "height": 64, "n": 2})
    )
    await send(generate)
    await visit.until(
        "[...document.querySelectorAll('#generate .answer img')].filter(i => i.naturalWidth).length === 2"
    )
    task_id = json.loads(await generate.locator(".answer > .code pre").inner_text())["taskId"]
    await generate.get_by_role("link", name="getTask").click()
    read = visit.page.locator("#getTask")
    await read.locator("form").wait_for()
    assert await read.get_by_label("taskId").input_value() == task_id
    await send(read)
    await visit.until("document.querySelectorAll('#getTask .answer img').length === 2")
    image = await open_route(visit, "getImage")
    await send(image)
    await visit.until("document.querySelector('#getImage .answer img')?.naturalWidth === 64")
    follow = await open_route(visit, "followTask")
    await send(follow)
    await follow.get_by_text("event: completed").wait_for()
    assert await visit.page.evaluate("window.hacked") is None
    assert await visit.accessibility_faults() == []


async def test_programs_of_the_page_run_as_they_are(
    start_service: StartService, open_page: OpenPage, tmp_path: Path
) -> None:
    key = "secret-of-the-shop-0123456789"
    service = await start_service(api_keys={"shop": hashlib.sha256(key.encode()).hexdigest()})
    visit = await open_page(service, "docs")
    page = visit.page
    generate = await open_route(visit, "generate")
    await generate.get_by_role("textbox", name="Body").fill(json.dumps({"prompt": HOSTILE, "width": 64, "height": 64}))
    await send(generate)
    assert await generate.locator(".answer .status").inner_text() == "401"
    await page.get_by_label("API key or admin token").fill(key)
    await send(generate)
    await visit.until("document.querySelector('#generate .answer img')?.naturalWidth === 64")
    read = await open_route(visit, "getTask")
    task_id = await read.get_by_label("taskId").input_value()
    image = await open_route(visit, "getImage")
    for program in FILES:
        for route in (generate, image):
            await route.get_by_role("button", name=program, exact=True).click()
            text = await route.locator("> .code pre").inner_text()
            assert key not in text
            printed = await run(program, text, tmp_path, key)
            assert route is image or not printed or task_id in printed
        file = tmp_path / "image.png"
        assert shutil.which(PROGRAMS[program]) is None or file.read_bytes().startswith(b"\x89PNG")
        file.unlink(missing_ok=True)
    await page.reload()  # the key is of the tab
    assert await page.get_by_label("API key or admin token").input_value() == key


async def test_a_search_finds_a_field_by_a_word_of_its_description(service: Client, open_page: OpenPage) -> None:
    visit = await open_page(service, "docs")
    page, search = visit.page, visit.page.get_by_label("Search")
    await search.fill("another variant task")
    hit = page.locator("#contents a.hit:visible", has_text="variant").first
    await hit.click()
    row = page.locator('#generate [data-field="variant"].marked')
    await row.wait_for()
    assert "Another variant of the same request is another task." in await row.inner_text()
    assert not await page.locator("#getHealth").is_visible()
    await search.fill("no such words")
    await page.get_by_text("Nothing has these words.").wait_for()
    await search.fill("")
    await page.locator("#getHealth").wait_for()


async def test_every_route_opens_on_a_phone_in_both_languages(
    service: Client, open_page: OpenPage, tmp_path: Path
) -> None:
    (tmp_path / "image.png").write_bytes(image_file("red"))
    visit = await open_page(service, "docs", viewport=PHONE, locale="zh-CN", color_scheme="dark")
    page = visit.page
    await page.get_by_label("API 密钥或管理员令牌").fill(ADMIN_TOKEN)
    upload = await open_route(visit, "upload")
    await upload.locator("input[type=file]").set_input_files(str(tmp_path / "image.png"))
    await upload.get_by_role("button", name="发送").click()
    await upload.get_by_text("uploadId").first.wait_for()
    assert await visit.accessibility_faults() == []
    stats = await open_route(visit, "getStats")
    await stats.get_by_role("button", name="发送").click()
    await stats.get_by_text("maxmemoryPolicy").first.wait_for()
    names = [entry["operationId"] for item in build_document()["paths"].values() for entry in item.values()]
    await page.evaluate("for (const route of document.querySelectorAll('details.route')) route.open = true")
    await visit.until("names => names.every(name => document.querySelector(`#${name} form`))", names)
    assert await visit.fits_its_window()
    await page.get_by_role("button", name="Switch to English").click()
    await page.get_by_label("API key or admin token").wait_for()
