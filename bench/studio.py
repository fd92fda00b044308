"""The studio in a real Chromium: its first load, and the time from opening it to the first sandbox image."""

from __future__ import annotations

import time
from typing import Any

from bench.browser import chromium
from bench.report import Options, Table, command, spread
from bench.servers import Service

PROMPT = "a lighthouse in a storm"
KEY_DELAY_MS = 60
"""Between two keys of a quick typist."""
FIRST_PAINT_MS = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
LOADED_BYTES = """[...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .filter(({ name }) => !name.includes("/api/")).reduce((sum, entry) => sum + entry.transferSize, 0)"""
IMAGE_IS_DRAWN = "document.querySelector('.images img')?.naturalWidth > 0"


def main(options: Options) -> None:
    paints, images, loads = [], [], []
    with Service() as service, chromium() as browser:
        for number in range(options.runs):
            context = browser.new_context()
            page = context.new_page()
            began_at = time.monotonic()
            page.goto(f"http://127.0.0.1:{service.port}/")
            page.get_by_label("Prompt", exact=True).press_sequentially(f"{PROMPT} {number}", delay=KEY_DELAY_MS)
            page.keyboard.press("Control+Enter")
            _until(page, IMAGE_IS_DRAWN)
            images.append(time.monotonic() - began_at)
            paints.append(page.evaluate(FIRST_PAINT_MS))
            loads.append(page.evaluate(LOADED_BYTES) / 1_000)
            context.close()
    table = Table("The studio in Chromium, on loopback", "what", "goal", "min / median / max")
    table.add("first content on the screen, ms", "1,000", spread(paints))
    table.add("first load with headers, compressed, kB", "150", spread(loads))
    table.add(f"opening to the first image, {len(PROMPT) + 2} keys typed, s", "5", spread(images, ".2f"))
    table.show(command("studio", options))


def _until(page: Any, condition: str) -> None:
    """Wait until an expression is true. The page's policy forbids Playwright to poll it in the page."""
    deadline = time.monotonic() + 30.0
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        time.sleep(0.005)
