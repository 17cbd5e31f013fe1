"""`firstorder report`: the page in a browser, its text and its figures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluation_runs import ATTACKS, facts, make
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import documents, packaged
from firstorder.evaluation.reporting import drawing, figures, gallery, summary
from firstorder.evaluation.reporting import page as report
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import Run, Store, read
from report_pages import Opened

ODD, PLAIN = "<script>alert(1)</script>", "_resnet $x_1$ | *b*"
EPS = [4 / 255, 8 / 255]


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two models, six attacks, two radii, with its report in its folder; a cell failed and one is missing."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = facts([ODD, PLAIN], list(ATTACKS), EPS, [0, 1], 60, shard=30, transfer=True)
    failed, missing = [cell for cell in found["cells"] if cell["attack"] == "FGSM" and cell["model"] == PLAIN][:2]
    made = make(folder, found, pictures=3, unfinished=[failed["key"], missing["key"]])
    made.store.fail(Cell(**failed), "RuntimeError: <b>out of</b> memory")
    result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return (run.store.folder / report.PAGE).read_text(encoding="utf-8")


@pytest.fixture
def opened(browser: Any, run: Run) -> Iterator[Opened]:
    shown = Opened(browser, run.store.folder, viewport={"width": 1280, "height": 900})
    yield shown
    assert shown.requests == [shown.address]
    assert shown.mistakes == []
    shown.tab.close()


def test_a_click_sorts(opened: Opened) -> None:
    before = opened.column(3)
    header = opened.tab.locator("#results th", has_text="robust accuracy")
    assert header.get_attribute("aria-sort") is None
    header.locator("button").click()
    opened.sorted(header, "ascending")
    assert opened.column(3) == sorted(before) != before
    assert opened.rows()[0][2] == "all attacks"
    assert opened.rows()[0][0] == ODD
    header.locator("button").click()
    opened.sorted(header, "descending")
    assert opened.column(3) == sorted(before, reverse=True)
    assert opened.rows()[0][2] == "FGSM"


def test_the_keyboard_sorts(opened: Opened) -> None:
    opened.tab.locator("select[data-column='2']").focus()
    for _ in range(20):
        opened.tab.keyboard.press("Tab")
        focused = opened.tab.evaluate("document.activeElement.closest('th')?.innerText ?? ''")
        if focused.startswith("forwards"):
            break
    else:
        pytest.fail("the header cannot be reached")
    tag, outline = opened.tab.evaluate(
        "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    )
    assert (tag, outline) == ("BUTTON", "solid")
    opened.tab.keyboard.press("Enter")
    header = opened.tab.locator("#results th", has_text="forwards")
    opened.sorted(header, "ascending")
    opened.tab.keyboard.press("Enter")
    opened.sorted(header, "descending")
    values = [float(row[7]) for row in opened.rows() if row[7] != "–"]
    assert values == sorted(values, reverse=True)
    assert len(values) > 20


def test_filters(opened: Opened) -> None:
    every, form = opened.rows(), opened.tab.locator("form.filters[data-table]")
    assert opened.tab.locator("form[data-table] output").inner_text() == f"{len(every)} rows"
    form.get_by_label("Search").fill("ddn")
    assert opened.rows() == [row for row in every if row[2] == "DDN-1000"]
    assert opened.rows()[0][:3] == [ODD, "4/255", "DDN-1000"]
    assert opened.tab.locator("form[data-table] output").inner_text() == f"4 of {len(every)} rows"
    form.get_by_label("Search").fill("")
    form.get_by_label("Model").select_option(label=PLAIN)
    form.get_by_label("ε").select_option(label="8/255")
    form.get_by_label("Attack").select_option(label="all attacks")
    ((model, eps, attack, *_),) = opened.rows()
    assert (model, eps, attack) == (PLAIN, "8/255", "all attacks")
    for label in ("Model", "ε", "Attack"):
        form.get_by_label(label).select_option(index=0)
    assert opened.rows() == every


def test_a_name_is_text(opened: Opened, page: str) -> None:
    assert ODD not in page
    assert page.count("<script") == page.count("</script>") == 3 + 2 * 6 * 2 * 2 - 2 * 2
    heading = opened.tab.locator("section.model h2").first
    assert heading.inner_text().endswith(f"{ODD} #")  # with a link to it
    shown = opened.tab.locator("figure svg text").all_text_contents()
    assert any(ODD in text for text in shown)
    assert any("_resnet $x_1$ | *b*" in text for text in shown)
    opened.tab.locator(f"nav a:text-is('{ODD}')").click()
    assert opened.tab.evaluate("location.hash").startswith("#model-1-script-alert")
    assert heading.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, run: Run, scheme: str) -> None:
    shown = Opened(browser, run.store.folder, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    widths, smallest = shown.narrow()
    assert widths == [360, 360]
    assert smallest >= 9
    assert shown.tab.locator("#attacks .wide").evaluate("box => box.scrollWidth > box.clientWidth")
    assert shown.tab.locator("#leaderboard .wide").first.evaluate("box => box.scrollWidth <= box.clientWidth")
    ink, paper = shown.color("body"), shown.color("body", "backgroundColor")
    assert (sum(ink) < 3 * 80 and sum(paper) > 3 * 200) == (scheme == "light")
    assert (sum(ink) > 3 * 200 and sum(paper) < 3 * 80) == (scheme == "dark")
    assert shown.color("figure svg text", "fill") == ink
    assert shown.requests == [shown.address]
    assert shown.mistakes == []


def test_without_script_everything_is_there(browser: Any, run: Run) -> None:
    shown = Opened(browser, run.store.folder, java_script_enabled=False)
    assert shown.tab.locator("#results tbody tr").count() == 28
    assert not shown.tab.locator("form.filters[data-table]").is_visible()
    assert shown.tab.locator("figure svg").count() == 2 * (2 + 2 + 2 * (1 + 2 * 2))  # narrow and wide
    assert shown.tab.locator("figure table.heat").count() == 2 * 6
    assert shown.tab.locator("#leaderboard tbody tr").count() == 2 * 2


def test_a_run_on_packaged_data_ends_in_a_page(browser: Any, tmp_path: Path) -> None:
    """The packaged specification, on fewer images: two models, six attacks, two radii."""
    values, _ = documents.read(packaged.ASSETS / "evaluation.yaml")
    values["models"][0]["name"] = ODD
    (tmp_path / "spec.yaml").write_text(json.dumps({**values, "count": 6, "budget": 3}), encoding="utf-8")
    for words in (("evaluate", tmp_path / "spec.yaml", "--out", tmp_path / "run", "-q"), ("report", tmp_path / "run")):
        result = invoke(*words)
        assert result.exit_code == 0, result.output
    finished = read(tmp_path / "run")
    assert len(finished.done()) == len(finished.cells) == 2 * 6 * 2
    opened = Opened(browser, finished.store.folder)
    assert len(opened.rows()) == 2 * 2 * 7
    header = opened.tab.locator("#results th", has_text="robust accuracy")
    header.locator("button").click()
    opened.sorted(header, "ascending")
    board = summary.leaderboard(summary.load(finished), finished.facts)
    weakest = min(board, key=lambda score: score.robust.value)
    assert float(opened.rows()[0][3]) == round(100 * weakest.robust.value, 1)
    opened.tab.locator("form.filters[data-table]").get_by_label("Model").select_option(label=ODD)
    assert {row[0] for row in opened.rows()} == {ODD}
    assert opened.requests == [opened.address]
    assert opened.mistakes == []


def test_the_page_says_what_the_summary_says(run: Run, page: str) -> None:
    board = summary.leaderboard(summary.load(run), run.facts)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.split("<script>")[0]))
    text = " ".join(text.split())
    for line in board:
        low, high = line.robust.interval
        numbers = f"{100 * line.robust.value:.1f} {100 * low:.1f} – {100 * high:.1f} {100 * line.clean.value:.1f} 60"
        assert f"{line.model} {figures.radius(line.eps)} all attacks {numbers}" in text
        for result in line.attacks:
            low, high = result.robust.interval
            numbers = f"{100 * result.robust.value:.1f} {100 * low:.1f} – {100 * high:.1f}"
            assert f"{line.model} {figures.radius(line.eps)} {result.attack} {numbers}" in text
            assert " · ".join(f"{100 * rate.value:.1f}" for rate in result.seeds.values()) in text
    assert "Not finished: 86 of 88 cells are done, 1 failed" in text
    assert f"FGSM on {PLAIN}, ε = 4/255, seed 0, examples 0 to 29 RuntimeError: <b>out of</b> memory" in text
    for message in (
        run.facts["command"],
        "0123456789ab",
        "torch 2.12.0",
        "steps = 40, alpha = eps/4, decay = 0.9",
        "eps 4/255, 8/255",
    ):
        assert message in text


def test_the_text_has_no_markup_of_strangers(run: Run) -> None:
    text = (run.store.folder / report.TEXT).read_text(encoding="utf-8")
    assert "<" not in text
    assert r"| \_resnet \$x\_1\$ \| \*b\* | 8/255 |" in text
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; | 4/255 |" in text
    lines = text.splitlines()
    for head, line in pairwise(lines):
        if head.startswith("|") and line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", head)) == len(re.findall(r"(?<!\\)\|", line))
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (run.store.folder / name).read_bytes().startswith(b"\x89PNG")


def test_figures_are_alone_and_together(run: Run, page: str) -> None:
    folder = run.store.folder / report.FIGURES
    assert len(list(folder.iterdir())) == 2 * (2 + 2 + 2 + 2 * (2 + 2 * 2))  # svg and png
    for path in folder.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "prefers-color-scheme" in text
        assert drawing.INK not in text.replace(drawing.BOTH, "")
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_a_report_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Also where an attack has no picture of the examples that are shown, as its cell with the first is missing."""
    found = facts(["m"], ["PGD-40", "AutoAttack"], [0.1], [0], 8, shard=4)
    missing = next(cell["key"] for cell in found["cells"] if cell["attack"] == "AutoAttack")
    run = make(tmp_path / "run", found, pictures=5, unfinished=[missing])
    first, second = (report.write(run, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first[:2]] == [report.PAGE, report.TEXT]
    assert set((tmp_path / "first").rglob("*.*")) == set(first)
    assert len(first) == 2 + 2 * 6
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    (pictures,) = (path for path in first if path.name.endswith("pictures.svg"))
    assert ">PGD-40<" in pictures.read_text(encoding="utf-8")


def test_pictures_are_magnified_by_the_factor_that_is_reported(run: Run) -> None:
    """The largest difference of the pictures is at most half of the range, and nearly that."""
    text = (run.store.folder / report.TEXT).read_text(encoding="utf-8")
    factors = {float(number) for number in re.findall(r"perturbation δ of an attack, times ([\d.]+)", text)}
    assert factors == {12.0}  # differences are 0.04
    assert [gallery.two_digits(value) for value in (10.49, 9.99, 0.0123, 15.94, 255.0)] == [10, 9.9, 0.012, 15, 250]
    picture = figures.Picture("a", np.full((1, 2, 2), 0.5), np.full((1, 2, 2), 0.45), "cat", "cat", "dog")
    with drawing.style():
        shown = figures.picture_chart([[picture, None], [None, picture._replace(attack="b")]], 10.0)
    drawn = [image.get_array() for image in shown.axes[0].images]
    assert [round(float(np.asarray(image).max()), 6) for image in drawn] == [0.5, 0.0, 0.45, 0.5, 0.0, 0.45]


def test_a_run_without_anything_finished_is_reported(tmp_path: Path) -> None:
    found = facts(["m"], ["PGD-40"], [0.1], [0], 3)
    Store(tmp_path).write(found)
    read(tmp_path).store.fail(Cell(**found["cells"][0]), "no memory")
    result = invoke("report", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / report.PAGE).read_text(encoding="utf-8")
    assert "<strong>Not finished:</strong> 0 of 1 cells are done" in page
    assert "No cell of this model is finished." in page
    assert "no memory" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} holds no run (run.json is missing); make one with firstorder evaluate\n"
    (tmp_path / "run.json").write_text(json.dumps({"cells": [1]}))
    assert invoke("report", tmp_path).exit_code == 2
