"""A headless Chromium, for tests of pages."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Under which systems have it; otherwise the one of ``playwright install chromium``."""
DESKTOP = 1280, 900
PHONE = 360, 740


def browser_lacks() -> str | None:
    """Return what is missing, or nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "needs playwright: pip install '.[dev]'"
    from playwright.sync_api import Error

    try:
        with chromium():
            return None
    except Error as error:
        return f"needs Chromium: apt-get install chromium ({str(error).splitlines()[0]})"


@contextmanager
def chromium() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page in a window of some size, with everything that it logged or asked for."""

    def __init__(self, browser: "Browser", path: Path, size: tuple[int, int] = DESKTOP) -> None:
        self.page: Page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.logged: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.logged.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.logged.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def colours(self, canvas: str) -> int:
        """Return how many different colours a canvas shows."""
        script = """id => { const canvas = document.getElementById(id);
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(data.buffer)).size; }"""
        found = self.page.evaluate(script, canvas)
        assert isinstance(found, int)
        return found
