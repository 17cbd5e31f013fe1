"""The page of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from firstorder.evaluation.reporting import document
from firstorder.evaluation.reporting.bars import Bar, bar_chart
from firstorder.evaluation.reporting.demo_outcomes import Ending, Outcome
from firstorder.evaluation.reporting.intervals import wilson


def write(outcomes: Sequence[Outcome], endings: Sequence[Ending], folder: Path) -> Path:
    """Write report.html into `folder`, and its figures below it; returns the path of the page."""
    parts = []
    for i, one in enumerate(outcomes, 1):
        count = one.data["count"]
        ranges = {row.attack: wilson(row.robust_accuracy, count) for row in one.rows}
        bars = {
            row.attack: Bar(100 * row.robust_accuracy, 100 * ranges[row.attack][0], 100 * ranges[row.attack][1])
            for row in one.rows
        }
        shown = document.drawn(
            partial(_bars, bars, 100 * one.clean_accuracy), folder / "figures", f"accuracy-{i}",
            title="Accuracy under attack", caption="Lines are 95 % intervals; dashed: without an attack.",
            subject=one.name,
        )  # fmt: skip
        rows = [
            (r.attack, f"{r.steps}", f"{100 * r.robust_accuracy:.1f}",
             " – ".join(f"{100 * end:.1f}" for end in ranges[r.attack]), f"{r.mean_linf:.4f}", f"{r.mean_l2:.3f}",
             f"{r.gradients:g}")
            for r in one.rows
        ]  # fmt: skip
        header = ("attack", "steps", "robust accuracy, %", "95 %", "mean L∞", "mean L2", "gradients")
        text = one.title.replace("\n", ": ") + ("." if not one.left_out else (
            f". Left out, as a single step takes more gradients: {', '.join(one.left_out)}."))  # fmt: skip
        table = document.Table(title="", header=header, rows=rows)
        parts.append(document.Part(anchor=f"model-{i}", title=one.name, text=text, tables=[table], drawings=[shown]))
    for i, end in enumerate(endings, 1):
        passes = [(attack, f"{100 * robust:.1f}", f"{forwards:.0f}", f"{backwards:.0f}")
                for attack, robust, forwards, backwards in end.rows]  # fmt: skip
        table = document.Table(title="", header=("attack", "robust accuracy, %", "forwards", "backwards"), rows=passes)
        name, _, images = end.title.partition(": ")
        text = " ".join((f"{images}.", *(f"{note}." for note in end.notes)))
        parts.append(document.Part(anchor=f"verdict-{i}", title=f"The verdict on {name}", text=text, tables=[table]))
    lead = "Sizes and gradients are means over the images that are attacked, those that the model classifies correctly."
    title = "Attacks at equal budgets"
    return document.write(folder / "report.html", over="firstorder · demo", title=title, lead=lead, parts=parts)


def _bars(bars: dict[str, Bar], clean: float, width: float) -> Figure:
    return bar_chart(bars, "accuracy under attack, %", mark=clean, width=width)
