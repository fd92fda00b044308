"""Fixtures of the tests in a real Chromium: one browser for all, and pages that may have no problems.

All tests here share one event loop, since a browser belongs to the loop that started it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.emulator_fixtures import EmulatedUpstream
from tests.orphans import find_browser
from tests.ports import free_port
from tests.quick_drawing import draw_quickly
from tests.support import eventually
from tests.web.conftest import Client, StartService, open_services

HERE = Path(__file__).parent
BROWSER = find_browser()
FLAGS = ("--no-sandbox", "--disable-gpu", "--process-per-site", "--renderer-process-limit=1")
"""The pages of a context share one renderer, since a new one costs as much CPU as a visit."""

TIMEOUT_MS = 40_000
TASK_ADDRESS = re.compile(r"#/task/[0-9a-f]{32}$")
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}

REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => {
  reportViolation(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`);
});
"""

FOCUSED_LABEL = """() => {
  const element = document.activeElement;
  return element.getAttribute("aria-label") || element.labels?.[0]?.textContent.trim() || element.textContent.trim();
}"""

FIND_FAULTS = """async () => {
  const behind = new Map(), looks = new Set();
  for (const element of document.querySelectorAll("*")) {
    const style = getComputedStyle(element);
    const own = [style.position, style.opacity, style.backgroundColor, style.backgroundImage].join();
    behind.set(element, `${behind.get(element.parentElement) ?? ""} ${own}`);
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!hasText || !element.checkVisibility({ visibilityProperty: true })) continue;
    const isDisabled = element.matches(":disabled, :disabled *");
    const look = [behind.get(element), style.color, style.fontSize, style.fontWeight, isDisabled].join();
    element.toggleAttribute("data-same-look", looks.has(look));
    looks.add(look);
  }
  axe.configure({ rules: [{ id: "color-contrast", selector: ":not([data-same-look])" }] });
  const part = document.querySelector("dialog[open]") ?? document;
  const { violations } = await axe.run(part, { resultTypes: ["violations"], selectors: false });
  const faults = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
  return faults.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html} ${node.failureSummary}`));
}"""
"""Checks the contrast of one text of each look, since it takes axe-core a millisecond and more for each."""

OpenPage = Callable[..., Awaitable["Visit"]]
OpenStudio = Callable[..., Awaitable["StudioVisit"]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.timeout(120))


@dataclass
class Visit:
    """One page of a service in a browser of its own.

    problems: what no page may cause: errors, violations of its policy, requests to other hosts.
    """

    page: Any
    base: str
    problems: list[str] = field(default_factory=list)

    async def open(self, address: str = "") -> None:
        """Open an address of the service, without the slash in front of it."""
        await self.page.goto(f"{self.base}/{address}")
        await self.page.locator("header.top").wait_for()

    async def until(self, condition: str, value: object = None) -> None:
        """Wait until an expression is true. The page's policy forbids Playwright to poll it in the page."""
        try:
            await eventually(lambda: self.page.evaluate(condition, value), within_s=40)
        except AssertionError as error:
            alerts = await self.page.get_by_role("alert").all_text_contents()
            raise AssertionError(f"{error}; the page's alerts: {alerts}") from None

    async def fits_its_window(self) -> bool:
        """Return whether nothing is beyond the right edge."""
        return bool(await self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    async def tab_to(self, name: str) -> None:
        """Press Tab until an element with this label has the focus."""
        for _ in range(60):
            await self.page.keyboard.press("Tab")
            if await self.page.evaluate(FOCUSED_LABEL) == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    async def accessibility_faults(self) -> list[str]:
        """Return what axe-core finds in the page, or in its dialog, without what it calls minor or moderate."""
        from axe_playwright_python.async_playwright import Axe

        if await self.page.evaluate("typeof axe") == "undefined":
            await self.page.evaluate(Axe().axe_script)
        return list(await self.page.evaluate(FIND_FAULTS))


class StudioVisit(Visit):
    """The studio, as a person uses it."""

    async def make(self, prompt: str) -> str:
        """Submit a prompt by the keyboard, for a task that the page does not show yet; return the id of the task."""
        before = self.page.url
        await self.page.get_by_label("Prompt", exact=True).fill(prompt)
        await self.page.keyboard.press("Control+Enter")
        await self.page.wait_for_url(lambda url: url != before and TASK_ADDRESS.search(url) is not None)
        return str(self.page.url).rpartition("/")[2]

    async def state(self, state: str) -> None:
        """Wait until the open task has a state."""
        await self.page.locator(f'.status strong[data-state="{state}"]').wait_for()

    async def shown_images(self) -> int:
        """Return how many images of the open task are drawn."""
        return int(await self.page.locator(".images img").evaluate_all("all => all.filter(i => i.naturalWidth).length"))


@dataclass(eq=False)
class Tab:
    """Page in a context of its own, which one visit uses at a time.

    kind: language of its context, and whether a test sets the time there; visit: the present one, or the last.
    """

    page: Any
    kind: tuple[str, bool]
    visit: Visit = field(default_factory=lambda: Visit(None, "about:blank"))

    async def watch(self) -> None:
        """Collect the problems of all pages of the context."""
        context = self.page.context
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.visit.problems.append(f"error: {error.error}"))
        await context.expose_binding(
            "reportViolation", lambda _source, violation: self.visit.problems.append(f"policy: {violation}")
        )
        await context.add_init_script(REPORT_VIOLATIONS)

    def _on_console(self, message: Any) -> None:
        # A response with an error status is a line of the console, and no problem of the page.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.visit.problems.append(f"console: {message.text}")


class Tabs:
    """Tabs of the browser. One that was given back is used again without its storage, at half the cost."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._free: list[Tab] = []

    async def take(self, *, locale: str, has_clock: bool, viewport: dict[str, int], color_scheme: str) -> Tab:
        """Return a tab of this look. has_clock: whether the test sets the time of the page."""
        kind = (locale, has_clock)
        tab = next((tab for tab in self._free if tab.kind == kind), None)
        if tab:
            self._free.remove(tab)
        else:
            # Without animations, each frame of which is drawn by the processor.
            context = await self._browser.new_context(locale=locale, reduced_motion="reduce")
            context.set_default_timeout(TIMEOUT_MS)
            if has_clock:
                await context.clock.install()
            tab = Tab(await context.new_page(), kind)
            await tab.watch()
        await tab.page.set_viewport_size(viewport)
        await tab.page.emulate_media(color_scheme=color_scheme)
        return tab

    async def give_back(self, tab: Tab) -> None:
        """End the visit of a tab, with the other pages that it has opened, and delete what it has stored."""
        context = tab.page.context
        for page in context.pages:
            if page is not tab.page:
                await page.close()
        await tab.page.evaluate("sessionStorage.clear(); Storage.prototype.setItem = () => {}")  # drafts are saved late
        await tab.page.goto("about:blank")
        session = await context.new_cdp_session(tab.page)
        await session.send("Storage.clearDataForOrigin", {"origin": tab.visit.base, "storageTypes": "all"})
        await session.detach()
        await context.clear_cookies()
        await context.clear_permissions()
        self._free.append(tab)


class Elsewhere:
    """Proxy of the browser for all but loopback addresses, which refuses and records the requests to other hosts."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    async def refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append((await reader.readline()).decode())
        writer.close()


@pytest.fixture(scope="module", autouse=True)
def _quick_drawings() -> Iterator[None]:
    with draw_quickly():
        yield


@pytest.fixture(scope="session")
def elsewhere() -> Elsewhere:
    """Return the proxy of the browser."""
    return Elsewhere()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(elsewhere: Elsewhere) -> AsyncIterator[Any]:
    """Start the browser. Skips the test without one; CI must have one."""
    api = pytest.importorskip("playwright.async_api", reason="needs Playwright")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    async with await asyncio.start_server(elsewhere.refuse, "127.0.0.1") as proxy, api.async_playwright() as playwright:
        port = proxy.sockets[0].getsockname()[1]
        flags = [*FLAGS, f"--proxy-server=127.0.0.1:{port}"]
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tabs(browser: Any) -> AsyncIterator[Tabs]:
    """Return the tabs of the browser."""
    yield Tabs(browser)


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(tabs: Tabs, elsewhere: Elsewhere) -> AsyncIterator[OpenPage]:
    """Open a page of a service: `await open_page(service, "board", viewport=PHONE)`. No page may have problems.

    Each page has its own cookies and storage. With `has_clock`, the test sets the time of the page.
    """
    opened: list[Tab] = []

    async def visit(
        service: Client,
        address: str = "",
        *,
        locale: str = "en-US",
        has_clock: bool = False,
        viewport: dict[str, int] = DESK,
        color_scheme: str = "light",
    ) -> Visit:
        tab = await tabs.take(locale=locale, has_clock=has_clock, viewport=viewport, color_scheme=color_scheme)
        tab.visit = Visit(tab.page, str(service.make_url("/")).rstrip("/"))
        opened.append(tab)
        await tab.visit.open(address)
        return tab.visit

    yield visit
    visits = [tab.visit for tab in opened]
    for tab in opened:
        await tabs.give_back(tab)
    requests, elsewhere.requests = elsewhere.requests, []
    assert [*requests, *(problem for visit in visits for problem in visit.problems)] == []


@pytest.fixture
def open_studio(open_page: OpenPage) -> OpenStudio:
    """Open the studio of a service, as `open_page` does."""

    async def visit(service: Client, address: str = "", **options: Any) -> StudioVisit:
        opened = await open_page(service, address, **options)
        return StudioVisit(opened.page, opened.base, opened.problems)

    return visit


@pytest.fixture(scope="session")
def first_port() -> int:
    """Return the port of each test's first service: the browser reads and compiles the scripts of one origin once.

    It keeps images too, so a test that waits for an image to be drawn has a prompt that no other test has.
    """
    return free_port()


@pytest_asyncio.fixture(loop_scope="session")
async def start_service(redis_url: str, prefix: str, tmp_path: Path, first_port: int) -> AsyncIterator[StartService]:
    """Start services as `start_service` of the web tests does, on the event loop of the browser."""
    ports = iter([first_port])
    async with open_services(redis_url, prefix, tmp_path) as start:

        async def start_at(*, port: int | None = None, **overrides: Any) -> Client:
            return await start(port=port or next(ports, None), **overrides)

        yield start_at


@pytest_asyncio.fixture(loop_scope="session")
async def service(start_service: StartService) -> Client:
    """Start one service with the defaults of `start_service`."""
    return await start_service()


@pytest_asyncio.fixture(loop_scope="session")
async def upstream() -> AsyncIterator[EmulatedUpstream]:
    """Start the emulator of Together; its ledger records paid calls."""
    async with EmulatedUpstream() as upstream:
        yield upstream


@pytest.fixture
def start_paid(start_service: StartService, upstream: EmulatedUpstream) -> StartService:
    """Start services with `upstream` instead of the sandbox."""
    return partial(
        start_service, provider="together", together_api_key="any", together_api_url=upstream.url, max_attempts=2
    )
