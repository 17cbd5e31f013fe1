"""`firstorder report RUN1 RUN2`: the same images, paired differences, and what changed."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import evaluate_models
from evaluation_runs import facts, make
from firstorder.evaluation import evaluate
from firstorder.evaluation.cli import app
from firstorder.evaluation.reporting.comparison import Difference, compare, matches
from firstorder.evaluation.reporting.intervals import mcnemar, paired
from firstorder.evaluation.runs.store import Run, Store

MODEL, OTHER, EPS = "evaluate_models:linear", "evaluate_models:other", 0.08


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


# --- intervals and tests


def test_the_interval_of_a_paired_difference_is_newcombes() -> None:
    """The example of Newcombe 1998, Table III: 36, 12, 2 and 0 of 50 give 0.0569 to 0.3404."""
    assert paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert paired(36, 2, 12, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    assert paired(0, 0, 0, 0) == (-1, 1)
    assert paired(0, 50, 0, 0)[1] == 1
    low, high = paired(50, 0, 0, 0)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(0.0714, abs=1e-4)  # Wilson's of 50 of 50


def test_the_interval_covers_what_it_says() -> None:
    """0.95 of the draws from a table with a known difference, in simulation."""
    draws = np.random.default_rng(0).multinomial(100, [0.5, 0.2, 0.1, 0.2], 4000)
    inside = [low <= 0.1 <= high for low, high in (paired(*map(int, draw)) for draw in draws)]
    assert 0.94 < np.mean(inside) < 0.97


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (12, 2), (0, 7), (400, 800), (1300, 1200)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))), rel=1e-6)


# --- runs


def images(name: str, order: Sequence[int], *, relabelled: Sequence[int] = ()) -> None:
    arrays = evaluate_models.arrays(40)
    x, y = arrays["x"].copy(), arrays["y"].copy()
    y[list(relabelled)] = (y[list(relabelled)] + 1) % evaluate_models.CLASSES
    np.savez(name, x=x[list(order)], y=y[list(order)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images("images.npz", range(40))
    return tmp_path


def made(folder: str, **given: Any) -> Run:
    usual = {"models": MODEL, "data": "images.npz", "attacks": "fgsm", "eps": EPS, "pictures": 0}
    return evaluate({**usual, **given}, folder).run


def line(found: list[Difference], attack: str, eps: float | None = EPS) -> Difference:
    (own,) = (one for one in found if (one.attack, one.eps) == (attack, eps))
    return own


def robust(run: Run, model: str) -> pd.Series[bool]:
    rows = run.table()
    rows = rows[rows["model"] == model]
    return (~(rows["success"] | (rows["label"] != rows["clean_label"]))).groupby(rows["example"]).all()


def test_images_are_matched_by_what_they_are(here: Path) -> None:
    """The second run has them in another order, some of them twice or relabelled, and some that the first has not."""
    order = [39, 5, 7, 7, *range(20, 35)]
    images("shuffled.npz", order, relabelled=[21])
    one, other = made("one"), made("other", data="shuffled.npz", attacks="pgd:steps=3")
    (found,) = compare({"one": one, "other": other}, {"fgsm": "pgd:steps=3"})
    assert found.shared == len(set(order)) - 1
    right, also = robust(one, MODEL), robust(other, MODEL)
    pairs = [(right[i], also[j]) for j, i in enumerate(order) if i != 21 and order.index(i) == j]
    own = line(found.differences, "fgsm → pgd:steps=3")
    assert (own.both, own.first, own.second, own.neither) == tuple(
        pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    assert own.neither > 0 < own.both
    said = " ".join(found.notes)
    assert "left out: 1 images that have another label in other" in said
    assert f"compared on the {found.shared} images that both have, of 40 in one and 19 in other" in said


def test_a_model_before_and_after(here: Path) -> None:
    one, other = made("one", count=33), made("other", models=OTHER, count=33)
    (found,) = compare({"one": one, "other": other})
    before, after = robust(one, MODEL), robust(other, OTHER)
    own = line(found.differences, "all attacks")
    assert own.model == f"{MODEL} → {OTHER}"
    assert own.value == pytest.approx(after.mean() - before.mean())
    assert own.value != 0
    assert (own.first, own.second) == (int((before & ~after).sum()), int((after & ~before).sum()))
    low, high = own.interval
    assert low < own.value < high
    assert own.p == mcnemar(own.first, own.second)
    changed = {change.fact: (change.one, change.other) for change in found.changes}
    assert changed[f"model {MODEL} → {OTHER}: spec"] == (MODEL, OTHER)
    assert f"model {MODEL} → {OTHER}: digest" in changed
    assert not any(fact.startswith(("data", "attack", "specification")) for fact in changed)


def test_a_run_beside_itself_differs_in_nothing(here: Path) -> None:
    run = made("one", attacks=["fgsm", "ddn:steps=5"], norm="L2", eps=[0.5, 1.0], seeds=[0, 1])
    (found,) = compare({"a": run, "b": run})
    assert found.changes == []
    assert found.shared == 40
    assert {one.attack for one in found.differences} == {"none", "all attacks", "fgsm", "ddn:steps=5"}
    assert all((one.first, one.second, one.value, one.p) == (0, 0, 0, 1) for one in found.differences)
    assert all(one.count == 40 for one in found.differences)


def test_models_and_attacks_are_matched_by_name(here: Path) -> None:
    one, other = made("one", models=[MODEL, OTHER]), made("other", models=[OTHER, "evaluate_models:rough"])
    (found,) = compare({"a": one, "b": other})
    assert {own.model for own in found.differences} == {OTHER}
    assert line(found.differences, "all attacks").first == 0
    (found,) = compare({"a": one, "b": other}, {MODEL: "evaluate_models:rough"})
    assert {own.model for own in found.differences} == {OTHER, f"{MODEL} → evaluate_models:rough"}
    runs = {"a": one, "b": made("third", attacks="pgd:steps=3,alpha=0.02")}
    assert matches(["fgsm=pgd:steps=3,alpha=0.02"], runs) == {"fgsm": "pgd:steps=3,alpha=0.02"}
    for word in ("fgsm", "fgsm=pgd", f"{MODEL}=pgd:steps=3,alpha=0.02"):
        with pytest.raises(ValueError, match=re.escape(f"--match {word} names no two models or two attacks, as A=B")):
            matches([word], runs)


def test_what_cannot_be_compared_is_refused(here: Path) -> None:
    usual, found = made("one"), {}
    found["norm=Linf and L has norm=L2"] = made("l2", norm="L2", eps=1)
    found["targeted=no and L has targeted=random"] = made("targeted", targeted=True)
    found["no radius in common (0.08; 0.1); add one: firstorder evaluate --out L --eps"] = made("eps", eps=0.1)
    found["no model of the same name"] = made("models", models=[OTHER, "evaluate_models:rough"])
    np.savez("others.npz", **evaluate_models.arrays(5, seed=9))
    found["no image in common (images.npz; others.npz); evaluate both on the same data"] = made("x", data="others.npz")
    for message, other in found.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            compare({"K": usual, "L": other})
    with pytest.raises(ValueError, match="nothing to compare K with"):
        compare({"K": usual})


def test_the_page_the_text_and_the_table(here: Path) -> None:
    made("one"), made("two", attacks=["fgsm", "pgd:steps=3"], skip=5), made("three", models=OTHER)
    done = invoke("report", "one", "two", "three", "--match", f"{MODEL}={OTHER}", "--out", "out")
    assert done.exit_code == 0, done.output
    text = Path("out/comparison.md").read_text()
    assert "# one and two" in text
    assert "# one and three" in text
    assert "all attacks are not the same attacks (two alone has pgd:steps=3)" in text
    assert "| specification: skip | 0 | 5 |" in text
    page = Path("out/comparison.html").read_text()
    assert page.count('data-copy="latex"') == 4
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="', page))
    assert re.findall(r'<li><a href="#([^"]+)"', page) == ["summary", "comparison-1", "comparison-2"]
    assert all(f' id="{name}"' in page for name in ("differences", "changes", "differences-2", "changes-2"))
    assert Path("out/figures/differences-2.svg").exists()
    (row,) = (
        r
        for r in csv.DictReader(Path("out/differences-2.csv").read_text().splitlines())
        if r["attack"] == "all attacks"
    )
    assert float(row["difference, points"]) == pytest.approx(float(row["three, %"]) - float(row["one, %"]), abs=1e-3)
    assert set(re.findall(r'https?://[^"<]+', page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_names_are_text_and_old_runs_are_refused(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script>"
    for name in ("a", "b"):
        make(tmp_path / name / "run", facts([odd], ["FGSM"], [0.1], [0], 20))
    done = invoke("report", tmp_path / "a/run", tmp_path / "b/run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/comparison.html").read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page
    assert str(tmp_path / "a/run") in page  # both folders have the same name
    Store(tmp_path / "b/run").write({**facts([odd], ["FGSM"], [0.1], [0], 20), "format": 3})
    done = invoke("report", tmp_path / "a/run", tmp_path / "b/run", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"is of an older version; compute it anew: firstorder evaluate --out {tmp_path / 'b/run'}" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "one"], "a run is named twice"),
        (["one", "--match", "a=b"], "--match is for several runs"),
        (["one", "nowhere"], "nowhere holds no run (run.json is missing); make one with firstorder evaluate"),
    ],
)
def test_refused_words(here: Path, words: list[str], message: str) -> None:
    made("one", count=3)
    done = invoke("report", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_tables_are_copied_from_disk(here: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    made("one", count=10), made("two", count=10, models=OTHER)
    assert invoke("report", "one", "two", "--out", "out").exit_code == 0
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab, mistakes, requests = chromium.new_page(), [], []
        tab.on("pageerror", lambda error: mistakes.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(Path("out/comparison.html").resolve().as_uri())
        form = tab.locator("#differences form.copies")
        form.locator("button[data-copy=latex]").click()
        tab.wait_for_function("document.querySelector('#differences output').value !== ''")
        assert form.locator("output").inner_text() == "LaTeX copied"
        tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<textarea id=pasted></textarea>')")
        tab.locator("#pasted").focus()
        tab.keyboard.press("Control+V")
        pasted = tab.locator("#pasted").input_value()
        assert (mistakes, len(requests)) == ([], 1)
        chromium.close()
    assert pasted.startswith("% \\usepackage{booktabs}\n\\begin{table}")
    assert f"{MODEL} $\\rightarrow$ {OTHER}".replace("_", "\\_") in pasted
