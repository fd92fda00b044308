"""Tests of the studio in a real Chromium: a person makes, follows, changes and keeps images."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from imagegen.app import METER
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.ratelimit.stores import MemoryRateLimitStore
from tests.browser.conftest import OpenStudio
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually
from tests.web.conftest import Client, StartService

KEY = "ig_" + "k" * 43
HOUR_S = 3600.0

WATCH_PROGRESS = """() => {
  globalThis.shownProgress = [];
  const find = (selector) => document.querySelector(selector);
  const progress = () => (find("[data-state=completed]") ? 100 : Math.min(99, find("progress")?.value ?? 0));
  const shown = () => [document.querySelectorAll(".images img").length, progress()];
  const changes = { subtree: true, childList: true, attributes: true };
  new MutationObserver(() => globalThis.shownProgress.push(shown())).observe(document.getElementById("app"), changes);
}"""

WATCH_FAULT = """() => {
  globalThis.focusAtFault = new Promise((resolve) => {
    const look = () => document.getElementById("size-fault") && resolve(document.activeElement.id);
    new MutationObserver(look).observe(document.getElementById("app"), { subtree: true, childList: true });
  });
}"""

GIVE_FILE = """([event, field, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "teal.png", { type: "image/png" }));
  const options = { [field]: data, bubbles: true, cancelable: true };
  const type = event === "DragEvent" ? "drop" : "paste";
  document.querySelector("textarea").dispatchEvent(new window[event](type, options));
}"""


def png(width: int = 96, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


async def test_images_come_one_by_one_with_rising_progress(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_service(sandbox_delay_s=0.4))
    await visit.page.get_by_label("Images", exact=True).fill("3")
    await visit.page.evaluate(WATCH_PROGRESS)
    await visit.make("three lighthouses")
    await visit.state("completed")
    seen = await visit.page.evaluate("shownProgress")
    assert seen == sorted(seen)
    assert seen[0] == [0, 0]
    assert {count for count, _ in seen} >= {0, 1}
    assert seen[-1][1] == 100
    assert await visit.page.locator(".images img").count() == 3


async def test_a_reload_in_the_middle_shows_the_task_again_and_loses_nothing(
    start_paid: StartService, upstream: EmulatedUpstream, open_studio: OpenStudio
) -> None:
    service = await start_paid()
    visit = await open_studio(service)
    await visit.make("a slow lighthouse {{fault:ok held=1}}")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 1)
    await visit.state("processing")
    await visit.page.reload()
    await visit.state("processing")
    upstream.release()
    await visit.state("completed")
    await eventually(visit.shown_images)
    assert await visit.page.locator("h2 bdi").inner_text() == "a slow lighthouse {{fault:ok held=1}}"
    requests = service.app[METER].requests.items()
    assert sum(histogram.count for labels, histogram in requests if "/api/images/generate" in labels) == 1


async def test_a_task_is_cancelled_and_tried_again(start_paid: StartService, open_studio: OpenStudio) -> None:
    visit = await open_studio(await start_paid())
    await visit.make("never mind {{fault:hang times=1}}")
    await visit.page.get_by_role("button", name="Cancel").click()
    await visit.state("cancelled")
    await visit.page.get_by_role("button", name="Try again").click()
    await visit.state("completed")


async def test_the_back_button_and_links_lead_to_every_state(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service)
    page = visit.page
    await page.get_by_label("Images", exact=True).fill("2")
    task = await visit.make("two lighthouses")
    await visit.state("completed")
    await page.get_by_role("link", name="Open image 1").click()
    await page.locator('dialog[open] img[alt^="Image 1"]').wait_for()
    await page.keyboard.press("ArrowRight")
    await page.locator('dialog[open] img[alt^="Image 2"]').wait_for()
    assert page.url.endswith(f"#/task/{task}/1")
    await page.keyboard.press("Escape")
    await page.locator("dialog").wait_for(state="detached")
    await page.get_by_role("link", name="Gallery").click()
    await page.locator("a.card").wait_for()
    await page.go_back()
    await visit.state("completed")
    other = await open_studio(service, f"#/task/{task}/1")
    await other.page.locator('dialog[open] img[alt="Image 2"]').wait_for()
    await other.page.keyboard.press("Escape")
    await eventually(other.shown_images)


async def let_the_limit_end(service: Client, page: Any) -> None:
    """Let the hour of a limit be over, for the service and for the page."""
    service.app[RATE_LIMITS].use(MemoryRateLimitStore())
    await page.clock.fast_forward(HOUR_S * 1000)


async def test_a_limit_counts_down(start_service: StartService, open_studio: OpenStudio) -> None:
    service = await start_service(image_rate_limit_max=1, rate_limit_window_s=HOUR_S)
    visit = await open_studio(service, has_clock=True)
    await visit.make("the first")
    await visit.page.get_by_label("Prompt", exact=True).fill("the second")
    await visit.page.keyboard.press("Control+Enter")
    button = visit.page.locator("button[type=submit]")
    await visit.page.get_by_role("button", name=re.compile(r"Again in \d+ s")).wait_for()
    assert await button.is_disabled()
    shown = await button.inner_text()
    await visit.until("shown => document.querySelector('button[type=submit]').innerText !== shown", shown)
    await let_the_limit_end(service, visit.page)
    await visit.page.get_by_role("button", name="Generate", exact=True).wait_for()
    await visit.make("the second")
    await visit.state("completed")


async def test_a_limited_event_stream_is_no_lost_connection(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    service = await start_service(rate_limit_max=30, rate_limit_window_s=HOUR_S, sandbox_delay_s=0.3)
    visit = await open_studio(service, has_clock=True)
    await visit.make("one read of the models, one submit, one stream")
    await visit.state("completed")
    await visit.page.reload()
    await visit.state("completed")
    await visit.page.wait_for_load_state("networkidle")
    while (await service.get(f"/api/images/{'0' * 32}")).headers["X-RateLimit-Remaining"] != "1":
        pass  # leaves the page one request
    await visit.make("the last request, so that no stream is left")
    await visit.page.get_by_text(re.compile(r"progress is shown again in \d+ s")).wait_for()
    assert await visit.page.get_by_text("No connection").count() == 0
    await let_the_limit_end(service, visit.page)
    await visit.state("completed")
    assert await visit.page.get_by_text("progress is shown again").count() == 0


async def test_a_fault_is_shown_at_its_field_and_gets_the_focus(
    start_paid: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_paid())
    await visit.page.get_by_label("Prompt", exact=True).fill("a lighthouse")
    await visit.page.get_by_label("Size", exact=True).select_option("own")
    await visit.page.get_by_label("Width", exact=True).fill("8000")
    await visit.page.evaluate(WATCH_FAULT)
    await visit.page.keyboard.press("Control+Enter")  # with the focus still in the field
    assert await visit.page.evaluate("focusAtFault") == "size"
    assert "1792" in await visit.page.locator("#size-fault").inner_text()


def uploaded(folder: Path, upload_id: str) -> Image.Image:
    """Return the image of an upload."""
    digest = upload_id.removeprefix("upload:")
    bodies = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return Image.open(io.BytesIO(next(body for body in bodies if hashlib.sha256(body).hexdigest() == digest)))


async def paint_by_mouse(page: Any) -> None:
    box = await page.locator("dialog canvas").bounding_box()
    await page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=5)
    await page.mouse.up()


async def paint_by_keyboard(page: Any) -> None:
    """The brush is in the middle; it paints as it moves to the left, and the last step is undone."""
    await page.locator("dialog canvas").focus()
    await page.keyboard.press("Space")
    for key in ("Shift+ArrowLeft",) * 7 + ("ArrowDown", "Space", "Control+z"):
        await page.keyboard.press(key)


async def choose(page: Any) -> None:
    file = {"name": "teal.png", "mimeType": "image/png", "buffer": png()}
    await page.locator("input[type=file]").set_input_files(file)


async def drop(page: Any) -> None:
    await page.evaluate(GIVE_FILE, ["DragEvent", "dataTransfer", list(png())])


async def paste(page: Any) -> None:
    await page.evaluate(GIVE_FILE, ["ClipboardEvent", "clipboardData", list(png())])


async def test_an_edit_sends_the_chosen_dropped_or_pasted_image_and_the_painted_mask(
    service: Client, open_studio: OpenStudio, tmp_path: Path
) -> None:
    visit = await open_studio(service)
    page = visit.page
    for give, paint in ((choose, paint_by_mouse), (drop, paint_by_keyboard), (paste, None)):
        await page.get_by_label("Model", exact=True).select_option("sandbox")
        await give(page)
        await page.locator(".thumbnails img").wait_for()
        if paint:
            await page.get_by_role("button", name="Paint a mask").click()
            await paint(page)
            await page.get_by_role("button", name="Use the mask").click()
            await page.locator("dialog").wait_for(state="detached")
        async with page.expect_request("**/api/images/generate") as submitted:
            await visit.make(f"the same in gold, {give.__name__}")
        await visit.state("completed")
        sent = (await submitted.value).post_data_json
        assert sent["imageUrl"] == f"upload:{hashlib.sha256(png()).hexdigest()}"
        if paint:
            mask = uploaded(tmp_path, sent["mask"])
            assert (mask.size, mask.mode) == ((96, 64), "RGBA")
            painted = [mask.getchannel("A").getpixel(place) == 0 for place in ((36, 32), (48, 32), (90, 4), (48, 40))]
            assert painted == [True, True, False, False]
        await page.get_by_role("button", name="Clear the form").click()
        await visit.open("#/")


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


async def test_a_request_is_copied_as_a_program_that_gets_the_same_task(
    service: Client, open_studio: OpenStudio
) -> None:
    visit = await open_studio(service)
    await visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    task = await visit.make('it\'s \\ "quoted" $(id) `id` \u202e\U0001f408')
    await visit.state("completed")
    commands = {"curl": ["bash", "-c"], "Python": [sys.executable, "-c"], "JavaScript": ["node", "-e"]}
    for language, command in commands.items():
        await visit.page.get_by_role("button", name=language, exact=True).click()
        await visit.page.get_by_text(f"Copied: {language}").wait_for()
        program = await visit.page.evaluate("navigator.clipboard.readText()")
        assert "\u202e" not in program
        if shutil.which("node" if language == "JavaScript" else "curl") is None:
            continue
        if language == "JavaScript":
            program = f"(async () => {{ {program} }})()"
        run = await asyncio.to_thread(
            subprocess.run, [*command, program], capture_output=True, text=True, timeout=60, check=True
        )
        assert f"/api/images/{task}/0" in run.stdout, language


async def test_a_service_with_keys_requests_one_and_the_tab_keeps_it(
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
    before = await start_service(sandbox_delay_s=60.0, drain_s=0.1)
    port = before.server.port
    visit = await open_studio(before)
    await visit.make("the first over a restart")
    await visit.make("the second over a restart")
    await visit.state("processing")
    await before.close()
    await visit.page.get_by_text("No connection: trying again").wait_for()
    await start_service(port=port, sandbox_delay_s=0.02)
    await visit.state("completed")
    assert await visit.page.get_by_text("No connection").count() == 0
    assert await visit.page.locator(".images li").count() == 1
    await visit.open("#/gallery")
    await visit.until("document.querySelectorAll('a.card img').length === 2")
    assert await visit.page.locator("a.card").count() == 2
