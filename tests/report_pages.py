"""A report in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'firstorder-attacks[dev]'"
    )
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """The report in a tab, and everything that went over the network or wrong."""

    def __init__(self, browser: Any, folder: Path, page: str = "report.html", **options: Any) -> None:
        self.address = (folder / page).as_uri()
        self.tab = browser.new_page(**options)
        self.requests: list[str] = []
        self.mistakes: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.mistakes.append(message.text))
        self.tab.on("pageerror", lambda error: self.mistakes.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.mistakes.append(dialog.message), dialog.dismiss()))
        self.tab.goto(self.address)

    def rows(self) -> list[list[str]]:
        """The text of the cells of the visible rows of all attacks."""
        script = "rows => rows.filter(row => !row.hidden).map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        found: list[list[str]] = self.tab.locator("#results tbody tr").evaluate_all(script)
        return found

    def sorted(self, header: Any, direction: str) -> None:
        """Wait until the header says so."""
        self.tab.wait_for_function("([th, d]) => th.ariaSort === d", arg=[header.element_handle(), direction])

    def column(self, index: int) -> list[float]:
        return [float(row[index]) for row in self.rows()]

    def color(self, selector: str, key: str = "color") -> tuple[int, ...]:
        text = self.tab.locator(selector).first.evaluate(f"element => getComputedStyle(element)['{key}']")
        return tuple(int(float(number)) for number in re.findall(r"[\d.]+", text)[:3])

    def narrow(self) -> tuple[list[int], float]:
        """The widths that the page takes, and the smallest text in its figures, in pixels."""
        widths: list[int] = self.tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        sizes: list[float] = self.tab.evaluate(
            """() => [...document.querySelectorAll(".plot svg")].flatMap((svg) => {
                const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
                return scale ? [...svg.querySelectorAll("text")].map((text) =>
                    scale * parseFloat(getComputedStyle(text).fontSize)) : [];
            })"""
        )
        return widths, min(sizes, default=9.0)
