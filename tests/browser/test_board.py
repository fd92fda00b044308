"""Tests of the board in a browser: two instances, pause and resume, the tasks' actions, and 50 changes a second."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from imagegen.app import QUEUE
from tests.browser.conftest import PHONE, OpenPage, Visit
from tests.emulator_fixtures import EmulatedUpstream
from tests.ports import free_port
from tests.support import ADMIN_TOKEN, AS_ADMIN, eventually
from tests.web.conftest import Client, StartService, wait_until_discovered

HOSTILE = '<img src=x onerror="document.title=1"> \u202eabc ' + "x" * 31_900 + " 🖼"
MAX_TASK_S = 0.05
LOOP_S = 0.010
"""Time of LOOP on a machine on which no task of the board takes MAX_TASK_S by the clock."""

LOOP = """() => {
  const times = [];
  for (let run = 0; run < 9; run++) {
    const begun = performance.now();
    for (let step = 0, value = 0; step < 2e6; step++) value = (value * 31 + step) % 1000003;
    times.push(performance.now() - begun);
  }
  return Math.min(...times) / 1000;
}"""


async def submit(client: Client, *prompts: str) -> list[str]:
    answers = await asyncio.gather(
        *(client.post("/api/images/generate", json={"prompt": prompt, "width": 64, "height": 64}) for prompt in prompts)
    )
    return [(await answer.json())["taskId"] for answer in answers]


async def finished(client: Client, task_id: str) -> str:
    return str((await (await client.get(f"/api/images/{task_id}?wait=20")).json())["status"])


async def enter(visit: Visit) -> None:
    """Type the admin token and wait for the first tiles."""
    await visit.page.get_by_label("Admin token").fill(ADMIN_TOKEN)
    await visit.page.get_by_role("button", name="Open the board").click()
    await visit.page.locator(".tiles").wait_for()


def row(visit: Visit, task_id: str) -> Any:
    return visit.page.locator(f"#task-{task_id}")


def tile(visit: Visit, name: str) -> Any:
    return visit.page.locator(".tiles > div").filter(has_text=name).locator("strong")


async def shows(locator: Any, text: str) -> bool:
    return text in " ".join(await locator.all_inner_texts())


def badge(visit: Visit, text: str) -> Callable[[], Any]:
    return lambda: shows(visit.page.locator(".badges"), text)


async def test_the_operator_pauses_two_instances_cancels_and_retries(
    start_paid: StartService, upstream: EmulatedUpstream, open_page: OpenPage
) -> None:
    one, two = await start_paid(), await start_paid()
    await wait_until_discovered(one, two)
    upstream.script("400")
    (failed,) = await submit(one, "refused")
    assert await finished(one, failed) == "failed"

    visit = await open_page(one, "board")
    await visit.page.get_by_label("Admin token").fill("a-wrong-token-of-somebody")
    await visit.page.get_by_role("button", name="Open the board").click()
    await visit.page.get_by_text("The token was refused.").wait_for()
    await enter(visit)
    await eventually(lambda: shows(tile(visit, "Instances"), "2"))

    await visit.page.get_by_role("button", name="Pause").click()
    await eventually(badge(visit, "Claiming is paused since"))
    await eventually(lambda: two.app[QUEUE].dispatcher.paused)
    here, elsewhere = [*await submit(one, HOSTILE), *await submit(two, "elsewhere")]
    await row(visit, here).wait_for()
    await row(visit, elsewhere).wait_for()
    shown = await row(visit, here).locator("bdi").inner_text()
    assert shown.startswith('<img src=x onerror="document.title=1">')
    assert await visit.page.locator("#app img").count() == 0
    assert await visit.page.title() == "Board · imagegen"

    await row(visit, elsewhere).get_by_role("button", name="Cancel").click()
    await eventually(lambda: shows(row(visit, elsewhere).locator(".state"), "Cancelled"))
    await row(visit, failed).get_by_role("button", name="Retry").click()
    await eventually(lambda: shows(row(visit, failed).locator(".state"), "Waiting"))
    await visit.page.get_by_role("button", name="Resume").click()
    assert await finished(one, failed) == "completed"
    assert await finished(two, elsewhere) == "cancelled"
    await eventually(lambda: shows(row(visit, failed).locator(".state"), "Done"))
    await visit.page.get_by_role("button", name="Failed").click()
    await visit.page.get_by_text("No tasks.").wait_for()


def cpu_times_s(trace: bytes) -> list[float]:
    """Return the CPU times of the page's tasks on its main thread: other programs on this machine do not count."""
    events = json.loads(trace)["traceEvents"]
    named = [event for event in events if event["name"] == "thread_name"]
    pages = {(event["pid"], event["tid"]) for event in named if event["args"]["name"] == "CrRendererMain"}
    tasks = (event for event in events if event["name"].endswith("RunTask") and (event["pid"], event["tid"]) in pages)
    return [task.get("tdur", 0) / 1e6 for task in tasks]


async def test_two_hundred_tasks_at_fifty_changes_a_second_make_no_long_task(
    start_service: StartService, open_page: OpenPage, browser: Any
) -> None:
    service = await start_service(worker_concurrency=25, sandbox_delay_s=0.8, max_queue=1000)
    visit = await open_page(service, "board")
    await enter(visit)
    await visit.page.locator(".plots canvas").nth(8).wait_for()
    slowness = max(1.0, await visit.page.evaluate(LOOP) / LOOP_S)
    await browser.start_tracing(page=visit.page, categories=["devtools.timeline", "toplevel"])
    await submit(service, *(f"{n}" for n in range(200)))
    await visit.until("document.querySelectorAll('tbody tr').length >= 200")
    done = service.app[QUEUE].connection.meter.finished_by_state
    await eventually(lambda: done()["completed"] >= 200, within_s=90)
    times_s = cpu_times_s(await browser.stop_tracing())
    assert len(times_s) > 100
    *_, third, _, _ = sorted(times_s)  # a host that takes the processor from its guest adds to two at most
    assert third <= MAX_TASK_S * slowness


async def test_the_page_survives_a_restart_and_a_reload(start_service: StartService, open_page: OpenPage) -> None:
    port = free_port()
    service = await start_service(port=port)
    visit = await open_page(service, "board")
    await enter(visit)
    await service.close()
    await eventually(badge(visit, "No connection"), within_s=30)
    service = await start_service(port=port)
    (task_id,) = await submit(service, "after the restart")
    await eventually(badge(visit, "Live"), within_s=30)
    await eventually(lambda: shows(row(visit, task_id).locator(".state"), "Done"))
    assert await row(visit, task_id).count() == 1
    await visit.page.reload()
    await visit.page.locator(".tiles").wait_for()  # the token is in the tab's session storage


async def test_the_link_of_the_log_opens_the_board_and_leaves_no_token_in_the_address(
    service: Client, open_page: OpenPage
) -> None:
    visit = await open_page(service, f"board#token={ADMIN_TOKEN}")
    await visit.page.locator(".tiles").wait_for()
    assert visit.page.url == f"{visit.base}/board"
    assert await visit.page.evaluate("Object.keys(localStorage).length") == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="light"),
        pytest.param({"locale": "zh-CN", "viewport": PHONE, "color_scheme": "dark"}, id="dark, Chinese on a phone"),
    ],
)
async def test_the_board_is_accessible_and_fits(service: Client, open_page: OpenPage, options: dict[str, Any]) -> None:
    (task_id,) = await submit(service, "a lighthouse")
    await finished(service, task_id)
    await service.post("/api/admin/pause", headers=AS_ADMIN)
    await submit(service, "waits")
    visit = await open_page(service, "board", **options)
    assert await visit.accessibility_faults() == []
    await visit.page.locator("#token").fill(ADMIN_TOKEN)
    await visit.page.locator("#token").press("Enter")
    await visit.page.locator(".plots canvas").nth(8).wait_for()
    await visit.page.locator("tbody tr").nth(1).wait_for()
    assert await visit.accessibility_faults() == []
    assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if options.get("locale") == "zh-CN":
        assert await visit.page.locator("main h2").first.inner_text() == "看板"
