"""The pages of transfer, curves, the demonstration, and comparisons: one design, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation_runs import facts, make
from firstorder.evaluation.bench import report as bench
from firstorder.evaluation.reporting import (
    bars,
    comparison_page,
    curve,
    demo,
    demo_outcomes,
    diagnosis_page,
    drawing,
    transfer_report,
)
from firstorder.evaluation.runs.diagnosis import Finding, Verdict
from report_pages import Opened
from test_benchmark import FOUND

VERDICTS: tuple[Verdict, ...] = ("ok", "warning", "left out")
ODD = "<script>alert(1)</script>"


def curves(folder: Path) -> Path:
    random = np.random.default_rng(0)
    runs = [
        curve.Norms(model=ODD, attack=attack, steps=steps, norm=random.gamma(3, 1 / steps, 40))
        for attack in ("ddn", "anu")
        for steps in (10, 100)
    ]
    curve.write(runs, folder)
    return folder / "curve.html"


def speed(folder: Path) -> Path:
    bench.write(FOUND, folder)
    return folder / "bench.html"


def demonstration(folder: Path) -> Path:
    found = facts([ODD], ["PGD-40", "FGSM"], [0.1], [0], 12)
    found["specification"] |= {"budget": 40, "pictures": 5}
    found["left out"] = []
    found["data"]["name"] = "MNIST"
    demo.write([demo_outcomes.outcome(make(folder / "run", found, pictures=5))], folder / "out")
    return folder / "out" / "report.html"


def transfer(folder: Path) -> Path:
    found = facts([ODD, "b"], ["PGD-40", "FGSM"], [0.1], [0], 30, transfer=True)
    found["specification"] |= {"models": [{"model": name, "name": ""} for name in (ODD, "b")], "targets": [ODD, "b"]}
    found["data"]["name"] = "MNIST"
    transfer_report.write(make(folder / "run", found), folder / "out")
    return folder / "out" / "transfer.html"


def comparison(folder: Path) -> Path:
    runs = {
        name: make(folder / name, facts([ODD, "b"], attacks, [0.1, 0.3], [0], 30))
        for name, attacks in (("one", ["PGD-40", "FGSM"]), ("two", ["PGD-40"]))
    }
    return comparison_page.write(runs, folder / "out")[0]


def diagnosis(folder: Path) -> Path:
    said = {"figure": "0.31 of 25 images, and a figure that is long", "meaning": "what it means, " * 12}
    found = [
        Finding(check=f"{check} {ODD}", remedy="do " * 40 if verdict == "warning" else "", verdict=verdict, **said)
        for check in ("gradients", "forwards")
        for verdict in VERDICTS
    ]
    return diagnosis_page.write(found, folder, model=ODD, facts={"model": ODD, "command": "x " * 100})[0]


def test_the_checks_of_a_diagnosis_are_read_without_scrolling(browser: Any, tmp_path: Path) -> None:
    page = diagnosis(tmp_path)
    shown = Opened(browser, page.parent, page.name, viewport={"width": 360, "height": 740})
    widths = shown.tab.locator(".diagnosis").evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert widths[0] <= widths[1]
    red = shown.color(".diagnosis .warning td:nth-child(2)")
    assert red not in (shown.color(".diagnosis .ok td:nth-child(2)"), shown.color("body"))
    assert shown.tab.locator("#summary .notice li").count() == 2
    shown.tab.set_viewport_size({"width": 1280, "height": 740})
    lines = """cells => cells.map(cell => {
        const all = new Range();
        all.selectNodeContents(cell);
        return all.getClientRects().length;
    })"""
    assert set(shown.tab.locator(".diagnosis td:nth-child(2)").evaluate_all(lines)) == {1}, "a verdict is in one line"
    shown.tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("write", [curves, speed, demonstration, transfer, comparison, diagnosis])
def test_a_page_on_a_phone(browser: Any, tmp_path: Path, write: Callable[[Path], Path], scheme: str) -> None:
    page = write(tmp_path)
    shown = Opened(browser, page.parent, page.name, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    widths, smallest = shown.narrow()
    assert widths == [360, 360]
    assert smallest >= 9
    assert (sum(shown.color("body", "backgroundColor")) > 600) == (scheme == "light")
    assert shown.tab.locator("main table tbody tr").count() > 1
    assert shown.tab.locator("figure").count() >= (write is not diagnosis)
    tables = shown.tab.locator("main table:not(.heat):not(.diagnosis table)").count()
    assert shown.tab.locator("button[data-copy=latex]:visible").count() == tables
    links = shown.tab.locator("main .permalink").evaluate_all("links => links.map(link => link.hash.slice(1))")
    assert links
    assert all(shown.tab.locator(f"[id='{link}']").count() == 1 for link in links)
    assert shown.mistakes == []
    assert shown.requests == [page.as_uri()]
    shown.tab.close()


def test_every_bar_has_its_range() -> None:
    with drawing.style():
        (axes,) = bars.bar_chart({"a": bars.Bar(3, 2, 5), "b": bars.Bar(1, 0.5, 1.5, False)}, "times").axes
    (lines,) = axes.collections
    assert [[point[0] for point in segment] for segment in lines.get_segments()] == [[2, 5], [0.5, 1.5]]
    assert [patch.get_width() for patch in axes.patches] == [3, 1]


def test_a_difference_has_its_range_around_zero() -> None:
    with drawing.style():
        (axes,) = bars.difference_chart({"a": bars.Bar(-3, -5, -1), "b": bars.Bar(1, -1, 3, False)}, "points").axes
    ranges, points = axes.lines[0:-1:2], axes.lines[1:-1:2]
    assert [list(line.get_xdata()) for line in ranges] == [[-5, -1], [-1, 3]]
    assert [list(line.get_xdata()) for line in points] == [[-3], [1]]
    assert list(axes.lines[-1].get_xdata()) == [0, 0]
    low, high = axes.get_xlim()
    assert low == -high < -5
