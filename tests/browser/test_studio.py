"""Tests of the studio in a real Chromium: what a person does, sees and hears from it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import ADMIN_TOKEN, eventually

from imagegen.app import METER
from tests.browser.conftest import OpenPage, Visit
from tests.web.conftest import Client, StartService

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> \u202eevil \U0001f408'
KEY = "ig_" + "k" * 43
PHONE = {"width": 360, "height": 740}
SHOWN_PROGRESS = """() => [
  document.querySelectorAll(".images img").length,
  document.querySelector("[data-state=completed]") ? 100 : Math.min(99, document.querySelector("progress")?.value ?? 0),
]"""


class StudioVisit(Visit):
    """The studio, as a person uses it."""

    async def make(self, prompt: str) -> str:
        """Submit a prompt by the keyboard; return the id of its task."""
        await self.page.get_by_label("Prompt", exact=True).fill(prompt)
        await self.page.keyboard.press("Control+Enter")
        await self.page.wait_for_url(re.compile(r"#/task/[0-9a-f]{32}$"))
        return str(self.page.url).rpartition("/")[2]

    async def state(self, state: str) -> None:
        """Wait until the open task has a state."""
        await self.page.locator(f'.status strong[data-state="{state}"]').wait_for()

    async def shown_images(self) -> int:
        """Return how many images of the open task are drawn."""
        return int(await self.page.locator(".images img").evaluate_all("all => all.filter(i => i.naturalWidth).length"))


OpenStudio = Callable[..., Awaitable[StudioVisit]]


@pytest.fixture
def open_studio(open_page: OpenPage) -> OpenStudio:
    """Open the studio of a service, as `open_page` does."""

    async def visit(service: Client, address: str = "", **options: Any) -> StudioVisit:
        opened = await open_page(service, address, **options)
        return StudioVisit(opened.page, opened.base, opened.problems)

    return visit


def png(width: int = 96, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


async def test_an_image_is_made_within_five_seconds_of_opening_the_page(
    service: Client, open_studio: OpenStudio
) -> None:
    begun = asyncio.get_running_loop().time()
    visit = await open_studio(service)
    await visit.make("a lighthouse at dusk")
    await visit.state("completed")
    await eventually(visit.shown_images)
    assert asyncio.get_running_loop().time() - begun < 5


async def test_images_come_one_by_one_with_rising_progress(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_service(sandbox_delay_s=0.4))
    await visit.page.get_by_label("Images", exact=True).fill("3")
    await visit.make("three lighthouses")
    seen: list[tuple[int, float]] = []
    while not seen or seen[-1][1] < 100:
        seen.append(tuple(await visit.page.evaluate(SHOWN_PROGRESS)))
    assert seen == sorted(seen)
    assert {count for count, _ in seen} >= {0, 1}
    assert await visit.page.locator(".images img").count() == 3


async def test_a_reload_in_the_middle_shows_the_task_again_and_loses_nothing(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    service = await start_service(sandbox_delay_s=1.5)
    visit = await open_studio(service)
    await visit.make("a slow lighthouse")
    await visit.state("processing")
    await visit.page.reload()
    await visit.state("completed")
    await eventually(visit.shown_images)
    assert await visit.page.locator("h2 bdi").inner_text() == "a slow lighthouse"
    requests = service.app[METER].requests.items()
    assert sum(histogram.count for labels, histogram in requests if "/api/images/generate" in labels) == 1


async def test_a_task_is_cancelled_and_tried_again(start_service: StartService, open_studio: OpenStudio) -> None:
    visit = await open_studio(await start_service(sandbox_delay_s=2.0))
    await visit.make("never mind")
    await visit.page.get_by_role("button", name="Cancel").click()
    await visit.state("cancelled")
    await visit.page.get_by_role("button", name="Try again").click()
    await visit.state("completed")


async def test_the_back_button_and_links_lead_to_every_state(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service)
    task = await visit.make("a lighthouse")
    await visit.state("completed")
    await visit.page.get_by_role("link", name="Open image 1").click()
    await visit.page.locator("dialog[open] img").wait_for()
    await visit.page.keyboard.press("Escape")
    await visit.page.locator("dialog").wait_for(state="detached")
    await visit.page.get_by_role("link", name="Gallery").click()
    await visit.page.locator("a.card").wait_for()
    await visit.page.go_back()
    await visit.state("completed")
    other = await open_studio(service, f"#/task/{task}")
    await other.state("completed")
    await eventually(other.shown_images)


async def test_a_limit_counts_down(start_service: StartService, open_studio: OpenStudio) -> None:
    service = await start_service(image_rate_limit_max=1, rate_limit_window_s=4.0)
    visit = await open_studio(service)
    await visit.make("the first")
    await visit.page.get_by_label("Prompt", exact=True).fill("the second")
    await visit.page.keyboard.press("Control+Enter")
    button = visit.page.locator("button[type=submit]")
    await visit.page.get_by_role("button", name=re.compile(r"Again in \d+ s")).wait_for()
    assert await button.is_disabled()
    await visit.page.get_by_role("button", name="Make", exact=True).wait_for()
    await visit.make("the second")
    await visit.state("completed")


async def test_a_fault_stands_at_its_field_and_gets_the_focus(
    start_paid: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_paid())
    await visit.page.get_by_label("Size", exact=True).select_option("own")
    await visit.page.get_by_label("Width", exact=True).fill("8000")
    await visit.page.get_by_label("Prompt", exact=True).fill("a lighthouse")
    await visit.page.keyboard.press("Control+Enter")
    fault = visit.page.locator("#size-fault")
    await fault.wait_for()
    assert "1792" in await fault.inner_text()
    assert await visit.page.evaluate("document.activeElement.id") == "size"


def uploaded(folder: Path, upload_id: str) -> Image.Image:
    """Return the image of an upload."""
    digest = upload_id.removeprefix("upload:")
    bodies = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return Image.open(io.BytesIO(next(body for body in bodies if hashlib.sha256(body).hexdigest() == digest)))


async def test_an_edit_sends_the_image_and_the_painted_mask(
    service: Client, open_studio: OpenStudio, tmp_path: Path
) -> None:
    visit = await open_studio(service)
    sent: list[dict[str, Any]] = []
    visit.page.on(
        "request",
        lambda request: sent.append(request.post_data_json) if request.url.endswith("/api/images/generate") else None,
    )
    await visit.page.get_by_label("Model", exact=True).select_option("sandbox")
    await visit.page.locator("input[type=file]").set_input_files(
        {"name": "teal.png", "mimeType": "image/png", "buffer": png()}
    )
    await visit.page.get_by_role("button", name="Paint a mask").click()
    canvas = visit.page.locator("dialog canvas")
    box = await canvas.bounding_box()
    await visit.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    await visit.page.mouse.down()
    await visit.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=5)
    await visit.page.mouse.up()
    await visit.page.get_by_role("button", name="Use the mask").click()
    await visit.page.locator("dialog").wait_for(state="detached")
    await visit.make("the same in gold")
    await visit.state("completed")
    assert sent[0]["imageUrl"].startswith("upload:")
    assert sent[0]["mask"].startswith("upload:")
    mask = uploaded(tmp_path, sent[0]["mask"])
    assert (mask.size, mask.mode) == ((96, 64), "RGBA")
    assert (mask.getpixel((36, 32))[3], mask.getpixel((90, 4))[3]) == (0, 255)


async def test_a_result_leads_on(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service)
    first = await visit.make("a lighthouse")
    await visit.state("completed")
    async with visit.page.expect_download() as download:
        await visit.page.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"a-lighthouse-1\.(png|jpg|webp)", (await download.value).suggested_filename)
    await visit.page.get_by_role("button", name="Another variant").click()
    await visit.until("first => !location.hash.endsWith(first)", first)
    await visit.state("completed")
    await visit.page.get_by_role("button", name="Same again with changes").click()
    assert await visit.page.get_by_label("Prompt", exact=True).input_value() == "a lighthouse"
    await visit.page.go_back()
    await visit.page.get_by_role("button", name="Edit this one").click()
    await visit.page.locator(".thumbnails img").wait_for()
    await visit.page.go_back()
    await visit.page.get_by_role("button", name="Python").click()
    assert '"prompt": "a lighthouse"' in await visit.page.locator("pre").inner_text()


@pytest.mark.parametrize("prompt", [HOSTILE, "x" * 32_000], ids=["markup", "long"])
async def test_a_hostile_prompt_is_text_everywhere(service: Client, open_studio: OpenStudio, prompt: str) -> None:
    visit = await open_studio(service)
    await visit.make(prompt)
    await visit.state("completed")
    await eventually(visit.shown_images)
    assert await visit.page.locator("h2 bdi").text_content() == prompt
    for address in ("#/gallery", "#/"):
        await visit.open(address)
        caption = visit.page.locator("bdi.caption")
        await caption.wait_for()
        assert await caption.text_content() == prompt
    assert await visit.page.locator("img:not([src])").count() == 0
    assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_the_gallery_scrolls_over_five_hundred_tasks_and_finds_one(
    service: Client, open_studio: OpenStudio
) -> None:
    bodies = [{"prompt": f"lighthouse {number}", "width": 64, "height": 64} for number in range(500)]
    for start in range(0, 500, 50):
        await service.post("/api/images/batch", json={"requests": bodies[start : start + 50]})
    visit = await open_studio(service, "#/key")
    await visit.page.get_by_label("Key", exact=True).fill(ADMIN_TOKEN)
    await visit.page.get_by_role("button", name="Use the key").click()
    await visit.open("#/gallery?all=1")
    cards = visit.page.locator("a.card")
    await cards.first.wait_for()
    while await cards.count() < 500:
        count = await cards.count()
        await visit.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await visit.until("count => document.querySelectorAll('a.card').length > count", count)
    assert len(set(await cards.evaluate_all("all => all.map(card => card.href)"))) == 500


async def test_the_gallery_is_used_by_the_keyboard_alone(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service)
    for number in range(3):
        await visit.make(f"lighthouse {number}")
        await visit.state("completed")
        await visit.open("#/")
    await visit.open("#/gallery")
    await visit.page.locator("a.card").first.focus()
    await visit.page.keyboard.press("ArrowRight")
    await visit.page.keyboard.press("p")
    await visit.page.locator(".pinned").wait_for()
    assert await visit.page.locator("a.card bdi").first.text_content() == "lighthouse 1"
    await visit.page.locator("a.card").first.focus()
    await visit.page.keyboard.press("End")
    await visit.page.keyboard.press("Delete")
    await visit.until("document.querySelectorAll('a.card').length === 2")
    await visit.page.get_by_role("button", name="Undo").press("Enter")
    await visit.page.get_by_label("Search by prompt").fill("2")
    await visit.page.wait_for_url(re.compile("q=2"))
    await visit.until("document.querySelectorAll('a.card').length === 1")
    await visit.page.locator("a.card").focus()
    await visit.page.keyboard.press("Enter")
    await visit.state("completed")


async def test_a_service_with_keys_asks_for_one_and_the_tab_keeps_it(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_service(api_keys={"web": hashlib.sha256(KEY.encode()).hexdigest()}))
    field_ = visit.page.get_by_label("Key", exact=True)
    await field_.fill("ig_wrong")
    await visit.page.get_by_role("button", name="Use the key").click()
    await visit.page.get_by_text("The key was refused.").wait_for()
    await field_.fill(KEY)
    await visit.page.get_by_role("button", name="Use the key").click()
    await visit.page.locator("dialog").wait_for(state="detached")
    await visit.make("a lighthouse with a key")
    await visit.state("completed")
    await eventually(visit.shown_images)
    await visit.page.reload()
    await visit.state("completed")
    assert KEY not in visit.page.url
    assert await visit.page.evaluate("JSON.stringify(localStorage)") == "{}"


async def test_the_page_stays_live_over_a_restart_of_the_service(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    before = await start_service(sandbox_delay_s=3.0, drain_s=0.1)
    port = before.server.port
    visit = await open_studio(before)
    await visit.make("a lighthouse over a restart")
    await visit.state("processing")
    await before.close()
    await visit.page.get_by_text("No connection: trying again").wait_for()
    await start_service(port=port, sandbox_delay_s=0.02)
    await visit.state("completed")
    assert await visit.page.locator(".images img").count() == 1


@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_page_fits_its_window_in_both_languages(
    service: Client, open_studio: OpenStudio, viewport: dict[str, int], scheme: str
) -> None:
    visit = await open_studio(service, viewport=viewport, color_scheme=scheme)
    task = await visit.make("a lighthouse")
    await visit.state("completed")
    for language in ("en", "zh"):
        for address in (
            "#/",
            f"#/task/{task}",
            f"#/task/{task}/0",
            "#/gallery",
            f"#/compare/{task}.0/{task}.0",
            "#/help",
        ):
            await visit.open(address)
            assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
            assert await visit.page.evaluate("document.documentElement.lang") == language
        await visit.open("#/")
        await visit.page.locator("header button[lang]").click()
    dark = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")


async def test_another_language_of_the_browser_is_used(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service, locale="zh-CN")
    await visit.page.get_by_label("提示词", exact=True).wait_for()
    await visit.page.keyboard.press("Control+Enter")
    assert await visit.page.evaluate("document.documentElement.lang") == "zh"
    await visit.page.get_by_text("请输入提示词。").wait_for()
