"""Makes the pictures of the demo in `docs/images`: `python docs/screenshots.py [NAME ...]`.

It needs `pip install '.[demo]' playwright` and Chromium, and takes some minutes, because the
embedded models compute what the pictures show.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from aps_jax.cli.demo.command import launch

IMAGES = Path(__file__).parent / "images"
#: Milliseconds that a run may take.
PATIENCE = 900_000


def wait(page: Any, tab: str) -> None:
    """Until a run has ended and its result is seen."""
    page.locator(f"#{tab}-status").get_by_text("done after").wait_for(timeout=PATIENCE)
    page.locator(f"#{tab}-slider img").first.wait_for()
    page.wait_for_timeout(2000)


def draw(page: Any, tab: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws a thick line between two places, each (x, y) as shares of the canvas's sides."""
    canvas = page.locator(f"#{tab}-editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=12)
    page.mouse.up()
    page.wait_for_timeout(1000)


def restore(page: Any) -> None:
    """The first tab after a run with what it offers at first."""
    page.locator("#restore-go").click()
    wait(page, "restore")


def edit(page: Any) -> None:
    """The second tab after eyeglasses were drawn into the bundled face."""
    page.get_by_role("tab", name="Edit a face").click()
    page.wait_for_timeout(5000)
    # Over the eyes of the bundled face.
    draw(page, "edit", (0.32, 0.46), (0.66, 0.46))
    page.locator("#edit-words input").fill("eyeglasses")
    page.get_by_role("option", name="eyeglasses", exact=True).click()
    page.keyboard.press("Escape")
    page.locator("#edit-go").click()
    wait(page, "edit")


PICTURES = {"demo_restore": restore, "demo_edit": edit}


def main() -> int:
    """Writes the pictures, or only those that are named."""
    named = sys.argv[1:] or list(PICTURES)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        demo = launch(Path(folder))
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in named:
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.goto(demo.local_url)
            page.get_by_role("button", name="Restore", exact=True).wait_for()
            PICTURES[name](page)
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=IMAGES / f"{name}.png")
            page.close()
        browser.close()
        demo.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
