"""Tests of the studio in a real Chromium: other clients of a task, and other tabs of the browser."""

from __future__ import annotations

import pytest

from tests.browser.conftest import OpenStudio, StudioVisit
from tests.web.conftest import StartService

STRANGER = {"X-Forwarded-For": "203.0.113.1"}
LEFT = {
    "en-US": ("Cancel", "You cancelled it here. Others submitted the same"),
    "zh-CN": ("取消", "你已在此取消。其他人也提交了相同的请求"),
}


async def other_tab(visit: StudioVisit, address: str = "", script: str = "") -> StudioVisit:
    """Open another tab of the same browser. script: runs before those of the page."""
    other = StudioVisit(await visit.page.context.new_page(), visit.base, visit.problems)
    await other.page.add_init_script(script)
    await other.open(address)
    return other


@pytest.mark.parametrize("locale", LEFT)
async def test_a_cancel_that_only_left_shows_it(
    start_service: StartService, open_studio: OpenStudio, locale: str
) -> None:
    service = await start_service(trusted_proxy_hops=1)
    button, text = LEFT[locale]
    visit = await open_studio(service, locale=locale)
    await visit.page.locator("textarea").first.fill("for two [slow:60]")
    await visit.page.keyboard.press("Control+Enter")
    await visit.state("processing")
    task_id = visit.page.url.rpartition("/")[2]
    request = await visit.page.evaluate(KEPT_REQUEST)
    joined = await service.post("/api/images/generate", json=request, headers=STRANGER)
    assert (await joined.json())["taskId"] == task_id
    await visit.page.get_by_role("button", name=button, exact=True).click()
    await visit.page.get_by_text(text).wait_for()
    assert await visit.page.get_by_role("button", name=button, exact=True).count() == 0
    await visit.page.reload()
    await visit.page.get_by_text(text).wait_for()
    await service.post(f"/api/images/{task_id}/cancel", headers=STRANGER)
    await visit.state("cancelled")


KEPT_REQUEST = """() => new Promise((resolve) => {
  indexedDB.open("imagegen").onsuccess = ({ target }) => {
    const records = target.result.transaction("tasks").objectStore("tasks").getAll();
    records.onsuccess = () => resolve(records.result[0].request);
  };
})"""


SILENT_OPEN = "IDBFactory.prototype.open = () => ({})"


async def test_the_studio_goes_on_while_the_database_of_the_browser_does_not_open(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_service())
    task_id = await visit.make("kept in a silent database")
    await visit.state("completed")
    other = await other_tab(visit, f"#/task/{task_id}", SILENT_OPEN)
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


NO_PAINT = "window.requestAnimationFrame = () => 0"
"""Effects run a tenth of a second after a rendering then, in place of at the next paint."""


async def test_a_change_between_the_first_rendering_and_its_paint_is_shown(
    start_service: StartService, open_studio: OpenStudio
) -> None:
    visit = await open_studio(await start_service())
    task_id = await visit.make("kept in this browser")
    await visit.state("completed")
    other = await other_tab(visit, f"#/task/{task_id}", NO_PAINT)
    await other.state("completed")
