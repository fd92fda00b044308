"""Chromium of the system, as the benchmarks and the script of the screenshots use it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.servers import ROOT

FONTS = ROOT / "imagegen/providers/drawing/fonts"
"""The fonts of the sandbox, of which one has Chinese characters."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a headless Chromium with the sandbox's fonts. Raises SystemExit without one, or without Playwright."""
    binary = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415 - it is a package of the tests
    except ImportError:
        raise SystemExit("this needs Playwright: pip install playwright") from None
    if binary is None:
        raise SystemExit("this needs Chromium: apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory(prefix="imagegen-fonts-") as folder, sync_playwright() as playwright:
        (Path(folder) / "fonts").symlink_to(FONTS)
        browser = playwright.chromium.launch(
            executable_path=binary, args=["--no-sandbox"], env={**os.environ, "XDG_DATA_HOME": folder}
        )
        yield browser
        browser.close()
