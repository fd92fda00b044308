"""Tests of the studio's pages in a real Chromium: gallery, windows, languages, themes, hostile texts, accessibility."""

from __future__ import annotations

import re

from tests.browser.conftest import DESK, PHONE, OpenStudio, StudioVisit
from tests.support import ADMIN_TOKEN, eventually
from tests.web.conftest import Client

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> \u202eevil \U0001f408'
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
WHITE = "rgb(255, 255, 255)"

COPY_RECORD = """async (count) => {
  const done = (request) => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = reject;
  });
  const store = (await done(indexedDB.open("imagegen"))).transaction("tasks", "readwrite").objectStore("tasks");
  const [record] = await done(store.getAll());
  for (let number = 0; number < count; number++) {
    const request = { ...record.request, prompt: `number ${number}` };
    await done(store.put({ ...record, request, id: number.toString(16).padStart(32, "0") }));
  }
}"""


async def test_a_hostile_prompt_is_text_everywhere(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service, viewport=PHONE)
    page = visit.page
    for prompt in (HOSTILE, "x" * 32_000):
        task = await visit.make(prompt)
        await visit.state("completed")
        await eventually(visit.shown_images)
        assert await page.locator("h2 bdi").text_content() == prompt
        await page.get_by_text("Details", exact=True).click()
        assert prompt in await page.locator("dd bdi").all_text_contents()
        for address in ("#/gallery", f"#/compare/{task}.0/{task}.0", f"#/gallery/{task}", "#/"):
            await visit.open(address)
            caption = page.locator("main .content bdi").first
            await caption.wait_for()
            assert await caption.text_content() == prompt
            assert await visit.fits_its_window(), address
    assert await page.locator("img[src=x]").count() == 0
    assert await page.evaluate("window.hacked") is None


async def test_the_gallery_of_all_clients_scrolls_over_five_hundred_tasks(
    service: Client, open_studio: OpenStudio
) -> None:
    prompts = [f"lighthouse {number}{' [fail:content_policy]' * (number < 470)}" for number in range(500)]
    bodies = [{"prompt": prompt, "width": 64, "height": 64} for prompt in prompts]
    for start in range(0, 500, 50):
        await service.post("/api/images/batch", json={"requests": bodies[start : start + 50]})
    visit = await open_studio(service, "#/key")
    await visit.page.get_by_label("Key", exact=True).fill(ADMIN_TOKEN)
    await visit.page.get_by_role("button", name="Use the key").click()
    await visit.open("#/gallery?all=1")
    await scroll_to(visit, 500)


async def test_a_page_of_the_list_that_did_not_come_is_asked_for_again(
    service: Client, open_studio: OpenStudio
) -> None:
    bodies = [{"prompt": f"lighthouse {number} [fail:content_policy]"} for number in range(90)]
    for start in range(0, 90, 45):
        await service.post("/api/images/batch", json={"requests": bodies[start : start + 45]})
    visit = await open_studio(service, "#/key")
    await visit.page.get_by_label("Key", exact=True).fill(ADMIN_TOKEN)
    await visit.page.get_by_role("button", name="Use the key").click()
    await visit.page.route(re.compile("[?&]cursor="), lambda route: route.fulfill(status=503), times=1)
    await visit.open("#/gallery?all=1")
    await visit.until(
        "() => { scrollTo(0, document.body.scrollHeight); return document.querySelector('main [role=alert]'); }"
    )
    await visit.page.get_by_role("alert").get_by_role("button", name="Try again").click()
    await scroll_to(visit, 90)
    assert await visit.page.get_by_role("alert").count() == 0


async def scroll_to(visit: StudioVisit, count: int) -> None:
    """Scroll the gallery until it has this many cards, each once."""
    cards = visit.page.locator("a.card")
    await cards.first.wait_for()
    await visit.until(
        """count => {
          scrollTo(0, document.body.scrollHeight);
          return document.querySelectorAll("a.card").length >= count;
        }""",
        count,
    )
    assert len(set(await cards.evaluate_all("all => all.map(card => card.href)"))) == count


async def test_the_gallery_of_this_browser_scrolls_over_five_hundred_tasks_and_finds_one(
    service: Client, open_studio: OpenStudio
) -> None:
    visit = await open_studio(service)
    await visit.make("a lighthouse that is copied")
    await visit.state("completed")
    await visit.page.evaluate(COPY_RECORD, 499)
    await visit.open("#/gallery")
    await visit.page.reload()
    await scroll_to(visit, 500)
    await visit.page.get_by_label("Search by prompt").fill("number 321")
    await visit.until("document.querySelectorAll('a.card').length === 1")
    await visit.until("document.querySelector('a.card img').naturalWidth > 0")


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


async def test_every_page_fits_its_window_and_has_no_serious_fault_of_accessibility(
    service: Client, open_studio: OpenStudio
) -> None:
    visit = await open_studio(service)
    page = visit.page
    task = await visit.make("a lighthouse of every page")
    await visit.state("completed")
    await eventually(visit.shown_images)
    pages = {
        f"#/task/{task}": ".images img",
        f"#/task/{task}/0": "dialog[open]",
        "#/gallery": ".gallery",
        f"#/compare/{task}.0/{task}.0": "figure",
        "#/help": "dialog[open]",
        "#/": "main.make a.card",
    }
    for viewport, scheme in ((PHONE, "light"), (DESK, "dark")):
        await page.set_viewport_size(viewport)
        await page.emulate_media(color_scheme=scheme)
        assert (await page.evaluate(BACKGROUND) == WHITE) == (scheme == "light")
        for address, content in pages.items():
            await visit.open(address)
            await page.locator(content).first.wait_for()
            assert await visit.fits_its_window(), address
            assert await visit.accessibility_faults() == [], address
    for is_light in (True, False):
        await page.get_by_role("button", name="Light or dark").click()
        assert (await page.evaluate(BACKGROUND) == WHITE) == is_light
        assert await visit.accessibility_faults() == []


async def test_faults_and_live_states_have_no_serious_fault_of_accessibility(
    service: Client, open_studio: OpenStudio
) -> None:
    visit = await open_studio(service)
    await visit.page.get_by_label("Prompt", exact=True).focus()
    await visit.page.keyboard.press("Control+Enter")
    await visit.page.get_by_text("Write a prompt.").wait_for()
    assert await visit.accessibility_faults() == []
    await visit.make("[slow:30]")
    await visit.state("processing")
    assert await visit.accessibility_faults() == []
    await visit.page.get_by_role("button", name="Cancel").click()
    await visit.make("[fail:content_policy]")
    await visit.state("failed")
    await visit.page.get_by_text("Change the prompt or the images.").wait_for()
    assert await visit.accessibility_faults() == []
    await visit.open("#/mask")
    await visit.page.locator("dialog[open]").wait_for()
    assert await visit.accessibility_faults() == []


async def test_the_language_of_the_browser_is_used_and_can_be_changed(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service, locale="zh-CN", viewport=PHONE)
    await visit.page.get_by_label("提示词", exact=True).focus()
    await visit.page.keyboard.press("Control+Enter")
    await visit.page.get_by_text("请输入提示词。").wait_for()
    assert await visit.page.evaluate("document.documentElement.lang") == "zh"
    assert await visit.fits_its_window()
    await visit.page.get_by_role("button", name="Switch to English").click()
    await visit.page.get_by_label("Prompt", exact=True).wait_for()
    await visit.page.reload()
    await visit.page.get_by_label("Prompt", exact=True).wait_for()
    assert await visit.page.evaluate("document.documentElement.lang") == "en"


async def test_an_image_is_made_and_kept_by_the_keyboard_alone(service: Client, open_studio: OpenStudio) -> None:
    visit = await open_studio(service)
    keyboard = visit.page.keyboard
    await visit.page.get_by_label("Prompt", exact=True).wait_for()
    await visit.tab_to("Prompt")
    await keyboard.type("a lighthouse")
    await visit.tab_to("Images")
    await keyboard.press("ArrowUp")
    await visit.tab_to("Generate")
    await keyboard.press("Enter")
    await visit.state("completed")
    assert await visit.page.locator(".images img").count() == 2
    await visit.tab_to("Open image 2")
    await keyboard.press("Enter")
    await visit.page.locator('dialog[open] img[alt^="Image 2"]').wait_for()
    await keyboard.press("Escape")
    await visit.page.locator("dialog").wait_for(state="detached")
    await visit.tab_to("Compare")
    await keyboard.press("Enter")
    await visit.page.get_by_text("Choose a second image").wait_for()
    await visit.tab_to("Compare with the chosen image")
    await keyboard.press("Enter")
    await visit.page.get_by_text("Two images side by side").wait_for()
    await visit.until("document.querySelectorAll('figure img').length === 2")
    await keyboard.press("Escape")
    await visit.page.locator("a.card").wait_for()
