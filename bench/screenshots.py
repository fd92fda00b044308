"""Write the READMEs' screenshots into docs/screenshots: `python -m bench.screenshots`. They show sandbox images."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from bench.browser import chromium
from bench.servers import ADMIN_TOKEN, ROOT, Service, until

FOLDER = ROOT / "docs/screenshots"
WINDOW = {"width": 1200, "height": 760}
MAX_BYTES = 300_000
"""Of all together."""

PROMPTS = (
    "a fox in the snow",
    "paper boats on a quiet river",
    "a greenhouse on the moon",
    "an owl reading by candlelight",
    "a tram in the rain at night",
    "mountains made of folded paper",
    "a market under the sea",
    "a city of bridges at dawn",
)
SHOWN_PROMPT = "a lighthouse in a storm, oil on canvas"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with Service(SANDBOX_DELAY="0.3") as service, chromium() as browser:
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport=WINDOW, color_scheme=scheme, locale="en-US")
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{service.port}/")
            for prompt in PROMPTS:
                make(page, prompt, 1)
            make(page, SHOWN_PROMPT, 2)
            save(page, f"studio-{scheme}")
            page.get_by_role("link", name="Gallery").click()
            page.locator("a.card").nth(len(PROMPTS)).wait_for()
            save(page, f"gallery-{scheme}")
            page.goto(f"http://127.0.0.1:{service.port}/board#token={ADMIN_TOKEN}")
            page.locator(".tiles").wait_for()
            save(page, f"board-{scheme}")
            context.close()
    sizes = {path.name: path.stat().st_size for path in sorted(FOLDER.glob("*.webp"))}
    print(sizes)
    if sum(sizes.values()) > MAX_BYTES:
        raise SystemExit(f"together they have more than {MAX_BYTES} bytes")


def make(page: Any, prompt: str, count: int) -> None:
    page.get_by_label("Images", exact=True).fill(str(count))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name=prompt).wait_for()
    page.locator('[data-state="completed"]').wait_for()


def save(page: Any, name: str) -> None:
    """Save the window once all its images are drawn."""
    page.locator("body").click(position={"x": 1, "y": 1})
    until(lambda: page.evaluate("[...document.images].every((image) => image.complete)"), 10.0)
    shot = Image.open(io.BytesIO(page.screenshot()))
    shot.convert("RGB").save(FOLDER / f"{name}.webp", quality=75, method=6)


if __name__ == "__main__":
    main()
