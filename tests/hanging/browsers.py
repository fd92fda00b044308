"""Test that never ends, with a browser of its own and one of Playwright: for tests of interrupted runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.orphans import find_browser


async def test_browsers_run(tmp_path: Path) -> None:
    if browser := find_browser():
        from playwright.async_api import async_playwright

        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}")
        await asyncio.create_subprocess_exec(browser, *flags, "--remote-debugging-port=0", "about:blank")
        playwright = await async_playwright().start()
        await playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
    await asyncio.to_thread(Path(os.environ["HANGS"], "browsers").touch)
    await asyncio.Event().wait()
