"""`firstorder figure`: figures for papers, legible at their width and in colours for all eyes."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from typer.testing import CliRunner

from evaluation_runs import ATTACKS, facts, make
from firstorder.evaluation.cli import app
from firstorder.evaluation.reporting import figures, paper, summary
from firstorder.evaluation.runs.store import Run, Store

NAMES = ["resnet", "a model with a rather long name, number 2"]
KINDS = ["curve", "passes", "attacks", "overlap", "transfer", "frontier", "pictures"]


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = facts(NAMES, list(ATTACKS), [0.1, 0.2], [0], 40, transfer=True)
    return make(tmp_path_factory.mktemp("runs") / "run", found, pictures=2)


@pytest.mark.parametrize("width", [2.5, 3.25, 6.75])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_legible_and_within_the_figure(run: Run, kind: str, width: float) -> None:
    figure = paper.draw(run, kind, width)
    assert figure.get_size_inches()[0] == pytest.approx(width)
    texts = [one for one in figure.findobj(Text) if isinstance(one, Text) and one.get_visible() and one.get_text()]
    assert len(texts) > 5
    assert min(text.get_fontsize() for text in texts) >= 8
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
    for axes in figure.axes:
        if kind in ("curve", "passes"):
            assert axes.get_window_extent().height > 0.8 * figure.dpi


def test_attacks_of_the_frontier_have_marks_of_their_own(run: Run) -> None:
    figure = paper.draw(run, "frontier", 6.75)
    (legend,) = figure.legends
    looks = {(one.get_color(), one.get_marker()) for one in legend.legend_handles if isinstance(one, Line2D)}
    assert len(looks) == len(legend.get_texts()) > len(ATTACKS)
    assert len({marker for _, marker in looks}) == len(looks)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_have_the_width_and_the_same_bytes(run: Run, suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = invoke("figure", run.store.folder, "curve", "--width", "82mm", "--out", tmp_path / f"{name}.{suffix}")
        assert done.exit_code == 0, done.output
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content == (tmp_path / f"b.{suffix}").read_bytes()
    if suffix == "png":
        assert Image.open(tmp_path / "a.png").width == pytest.approx(600 * 82 / 25.4, abs=1)
    else:
        pattern = rb'width="([\d.]+)pt"' if suffix == "svg" else rb"/MediaBox \[ 0 0 ([\d.]+) "
        found = re.search(pattern, content)
        assert found is not None
        assert float(found[1]) == pytest.approx(72 * 82 / 25.4, abs=0.01)


@pytest.mark.parametrize(("width", "attacks"), [(1.5, 1), (3.25, 1), (6.75, 3)])
def test_pictures_of_what_fell(run: Run, width: float, attacks: int) -> None:
    """Lines of clean, perturbation and end, of examples that the strongest attacks broke; nothing covers another."""
    figure = paper.draw(run, "pictures", width, model=NAMES[1], eps=0.2)
    (axes,) = figure.axes
    rows = summary.load(run)
    rows = rows[(rows["model"] == NAMES[1]) & (rows["target"] == NAMES[1]) & rows["clean"]]
    rows = rows[rows["eps"].isna() | (rows["eps"] == 0.2)].assign(fell=lambda rows: rows["reach"] <= 0.2)
    strongest = rows.groupby("attack")["fell"].sum().sort_values(ascending=False, kind="stable").index[:attacks]
    shown = [np.asarray(image.get_array()).reshape(8, 8, 3) for image in axes.images]
    assert len(shown) == 4 * (1 + 2 * attacks)
    broken = rows[rows["attack"].isin(strongest)].groupby("example")["fell"].sum()
    fell = broken.sort_values(ascending=False, kind="stable").index[:4]
    for line, i in enumerate(sorted(fell)):
        clean, delta, end = shown[line * (1 + 2 * attacks) :][:3]
        original = run.examples(int(i), int(i) + 1)[0].permute(1, 2, 0).numpy()
        assert np.allclose(clean, original)
        assert np.allclose(delta, 0.5 + 12 * (end - original), atol=1e-5)
        assert np.abs(end - original).max() == pytest.approx(0.04, abs=1e-6)
    texts = [text for text in axes.texts if text.get_text()]
    labels = [text.get_text() for text in texts]
    assert labels.count("δ × 12") == 4 * attacks
    assert labels.count("clean") == 1
    boxes = [text.get_window_extent() for text in texts]
    pictures = [image.get_window_extent() for image in axes.images]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.overlaps(picture.padded(-1)) for box in boxes for picture in pictures)
    assert {str(text.get_weight()) for text in texts if text.get_color() == "#d9485b"} == {"bold"}


def test_a_run_without_pictures_has_no_such_figure(tmp_path: Path) -> None:
    make(tmp_path / "run", facts(["a"], ["FGSM"], [0.1], [0], 20))
    done = invoke("figure", tmp_path / "run", "pictures")
    assert done.exit_code == 2
    assert "the run has nothing for the figure 'pictures'" in done.stderr


def test_where_the_file_is_by_default(run: Run) -> None:
    for form in ("pdf", "svg"):
        assert invoke("figure", run.store.folder, "attacks", "--format", form).exit_code == 0
        assert (run.store.folder / f"figures/paper-attacks.{form}").stat().st_size > 1000


def test_a_model_and_a_radius_can_be_chosen(run: Run) -> None:
    def lines(kind: str, **given: Any) -> list[str]:
        (axes,) = paper.draw(run, kind, 4, **given).axes
        return axes.get_legend_handles_labels()[1]

    assert [name[:20] for name in lines("curve")] == [name[:20] for name in NAMES]
    assert set(lines("curve", model=NAMES[0])) == {*ATTACKS, "all attacks"}
    for words, message in (
        (("curve", "--model", "x"), "the run has no model 'x'; it has resnet"),
        (("curve", "--eps", "0.5"), "the run has no radius 0.5; it has 0.1, 0.2"),
        (("defences",), "the run has nothing for the figure 'defences'"),
        (("curve", "--out", "x.jpg"), "x.jpg is no .png, .svg or .pdf"),
        (("curve", "--width", "3"), "width '3' is none from 1.5 to 20 inches; write it as 3.25in"),
        (("curve", "--width", "1in"), "width '1in' is none"),
    ):
        done = invoke("figure", run.store.folder, *words)
        assert done.exit_code == 2
        assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("3.25in", 3.25), ("82 mm", 82 / 25.4), ("234pt", 234 / 72.27), ("8cm", 8 / 2.54)]
)
def test_widths(text: str, size: float) -> None:
    assert paper.inches(text) == pytest.approx(size)


def test_runs_of_earlier_versions_are_refused_with_the_remedy(tmp_path: Path) -> None:
    Store(tmp_path / "run").write({**facts(["a"], ["FGSM"], [0.1], [0], 20), "format": 3})
    done = invoke("figure", tmp_path / "run", "curve")
    assert done.exit_code == 2
    assert "compute it anew: firstorder evaluate --out" in done.stderr


# --- colours


DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
"""Machado, Oliveira & Fernandes 2009, severity 1, of linear RGB."""

XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray[Any, Any]:
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x, y, z = (
        np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in XYZ @ rgb.clip(0, 1) / [0.95047, 1, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3), DEUTAN, PROTAN], ids=["all cones", "no green", "no red"])
def test_colours_differ_for_all_eyes(seen: np.ndarray[Any, Any]) -> None:
    """Distances in CIE Lab; below about 5 colours of lines are hard to distinguish."""
    points = [lab(seen @ linear(color)) for color in figures.COLORS]
    distances = {(i, j): float(np.linalg.norm(points[i] - points[j])) for i, j in combinations(range(len(points)), 2)}
    assert min(distances.values()) > 15
    assert min(distance for (_, j), distance in distances.items() if j < 4) > 30


def test_colours_are_readable_on_white_and_on_black() -> None:
    for color in figures.COLORS:
        light = float(XYZ[1] @ linear(color))
        assert 1.05 / (light + 0.05) >= 2.9
        assert (light + 0.05) / (0.0115 + 0.05) >= 2.9


def test_marks_differ_where_colours_do(run: Run) -> None:
    for kind in ("curve", "passes"):
        (axes,) = paper.draw(run, kind, 4, model=NAMES[0]).axes
        lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines) > 5
    (axes,) = paper.draw(run, "attacks", 4).axes
    marks = {
        (line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_marker() not in ("", "None")
    }
    assert len(marks) == len({color for color, _ in marks}) == len({mark for _, mark in marks}) == 2
