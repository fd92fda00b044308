"""Tests of the studio in a real Chromium: other clients of a task, and other tabs of the browser."""

from __future__ import annotations

from tests.browser.conftest import OpenStudio, StudioVisit
from tests.web.conftest import StartService

STRANGER = {"X-Forwarded-For": "203.0.113.1"}


async def other_tab(visit: StudioVisit, address: str = "", script: str = "") -> StudioVisit:
    """Open another tab of the same browser. script: runs before those of the page."""
    other = StudioVisit(await visit.page.context.new_page(), visit.base, visit.problems)
    await other.page.add_init_script(script)
    await other.open(address)
    return other


async def test_a_cancel_that_only_left_shows_it_in_both_languages(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    service = await start_service(trusted_proxy_hops=1)
    visit = await open_studio(service)
    page = visit.page
    task_id = await visit.make("for two [slow:60]")
    await visit.state("processing")
    request = await page.evaluate(KEPT_REQUEST)
    joined = await service.post("/api/images/generate", json=request, headers=STRANGER)
    assert (await joined.json())["taskId"] == task_id
    await page.get_by_role("button", name="切换到中文").click()
    await page.get_by_role("button", name="取消", exact=True).click()
    await page.get_by_text("你已在此取消。其他人也提交了相同的请求").wait_for()
    assert await page.get_by_role("button", name="取消", exact=True).count() == 0
    await page.get_by_role("button", name="Switch to English").click()
    left = page.get_by_text("You cancelled it here. Others submitted the same")
    await left.wait_for()
    assert await page.get_by_role("button", name="Cancel", exact=True).count() == 0
    await page.reload()
    await left.wait_for()
    await service.post(f"/api/images/{task_id}/cancel", headers=STRANGER)
    await visit.state("cancelled")


KEPT_REQUEST = """() => new Promise((resolve) => {
  indexedDB.open("imagegen").onsuccess = ({ target }) => {
    const records = target.result.transaction("tasks").objectStore("tasks").getAll();
    records.onsuccess = () => resolve(records.result[0].request);
  };
})"""


SILENT_OPEN = "IDBFactory.prototype.open = () => ({})"


NO_PAINT = "window.requestAnimationFrame = () => 0"
"""Effects run a tenth of a second after a rendering then, in place of at the next paint."""


async def test_the_studio_shows_a_kept_task_while_the_database_is_silent_and_before_the_first_paint(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    """The record comes from the service, or after the first rendering and before its paint."""
    visit = await open_studio(await start_service())
    task_id = await visit.make("kept in this browser")
    await visit.state("completed")
    for script in (SILENT_OPEN, NO_PAINT):
        other = await other_tab(visit, f"#/task/{task_id}", script)
        await other.state("completed")


async def test_two_tabs_show_the_tasks_of_each_other(start_service: StartService, open_studio: OpenStudio) -> None:
    one = await open_studio(await start_service())
    two = await other_tab(one)
    requests: list[str] = []
    two.page.on("request", lambda request: requests.append(request.url))
    await one.make("seen in both tabs")
    await one.state("completed")
    card = two.page.locator("a.card")
    await card.locator("img").wait_for()
    assert [url for url in requests if "size=" not in url] == [], "only images are read there"
    await card.click()
    await two.state("completed")
    three = await other_tab(one, "#/gallery")
    await three.page.locator("a.card").focus()
    await three.page.keyboard.press("Delete")
    await two.page.go_back()
    await card.wait_for(state="detached")


async def test_a_task_continues_in_the_other_tab_when_its_own_is_closed(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    service = await start_service(worker_concurrency=1)
    await service.post("/api/images/generate", json={"prompt": "before it [slow:60]"})
    blocker = await (await service.post("/api/images/generate", json={"prompt": "before it [slow:60]"})).json()
    visit = await open_studio(service)
    other = await other_tab(visit)
    await other.make("goes on")
    await visit.page.locator("a.card").click()
    await visit.state("pending")
    await other.page.close(run_before_unload=True)
    await service.post(f"/api/images/{blocker['taskId']}/cancel")
    await visit.state("completed")
