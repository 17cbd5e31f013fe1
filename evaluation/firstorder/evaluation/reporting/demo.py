"""The demonstration: runs of many attacks at one budget, as a page of text, a bar chart and pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from firstorder.attacks import UNDECIDED
from firstorder.evaluation.reporting import demo_page
from firstorder.evaluation.reporting.demo_outcomes import Ending, Outcome
from firstorder.evaluation.reporting.tables import radius
from firstorder.files import replacing, write_text

BAR, CLEAN = "#3b6fb6", "#8a8f98"


def write(outcomes: Sequence[Outcome], folder: Path, endings: Sequence[Ending] = ()) -> list[Path]:
    """Write all files of the demonstration into `folder` and return their paths, the report first."""
    chart = accuracy_chart(outcomes, folder / "accuracy.png")
    pictures = [picture_grid(one, folder / f"pictures-{one.data['name'].lower()}.png") for one in outcomes]
    found = outcomes[0].run.facts["versions"]
    results = folder / "results.json"
    record = {
        "versions": found,
        "models": [_record(o) for o in outcomes],
        "verdicts": [dataclasses.asdict(one) for one in endings],
    }
    write_text(results, json.dumps(record, indent=2) + "\n")
    report = folder / "report.md"
    templates = Environment(
        loader=PackageLoader("firstorder.evaluation"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    text = templates.get_template("demo.md").render(
        version=found["firstorder"],
        versions=found,
        outcomes=outcomes,
        endings=endings,
        radius=radius,
        chart=chart.name,
        pictures=[path.name for path in pictures],
    )
    write_text(report, text.rstrip() + "\n")
    return [report, demo_page.write(outcomes, endings, folder), results, chart, *pictures]


def accuracy_chart(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Robust accuracy of every attack, one panel per model, strongest attack on top, clean accuracy as a line."""
    tallest = max(len(outcome.rows) for outcome in outcomes)
    figure = Figure(figsize=(5.6 * len(outcomes), 1.4 + 0.34 * tallest), layout="constrained")
    panels: Any = figure.subplots(1, len(outcomes), squeeze=False)
    for axes, outcome in zip(panels[0], outcomes, strict=True):
        values = [100 * row.robust_accuracy for row in outcome.rows]
        names = [row.attack.replace(",", ",\n") for row in outcome.rows]
        bars = axes.barh(names, values, color=BAR, height=0.7)
        axes.tick_params("y", labelsize=9)
        for bar, value in zip(bars, values, strict=True):
            inside = value > 15
            axes.text(
                value - 1.5 if inside else value + 1.5,
                bar.get_y() + bar.get_height() / 2,
                f"{value:.1f}",
                ha="right" if inside else "left",
                va="center_baseline",
                fontsize=9,
                color="white" if inside else "black",
            )
        clean = 100 * outcome.clean_accuracy
        axes.axvline(clean, color=CLEAN, linestyle="--", linewidth=1.2)
        axes.set_ylim(tallest - 0.4, -0.6)
        axes.set_xlim(0, 102)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"accuracy under attack, %\ndashed: clean accuracy, {clean:.1f} %")
        axes.set_title(outcome.title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def picture_grid(outcome: Outcome, path: Path, *, count: int = 5, attacks: int = 4) -> Path:
    """Clean images, and for the strongest attacks the adversarial images and perturbations with predictions.

    Which images, says `pictured`.
    """
    kept = pictured(outcome, count)
    examples = list(dict.fromkeys(kept["example"]))
    names = [row.attack for row in outcome.rows[:attacks]]
    figure = Figure(figsize=(1.35 * (1 + 2 * len(names)) + 0.6, 1.62 * len(examples) + 0.8), layout="constrained")
    grid: Any = figure.subplots(len(examples), 1 + 2 * len(names), squeeze=False)
    for line, i in zip(grid, examples, strict=True):
        x = outcome.run.examples(i, i + 1)[0].numpy()
        own = kept[kept["example"] == i].set_index("attack")
        _show(line[0], x, _class(outcome, own["clean_label"].iloc[0]), "black")
        for column, name in enumerate(names):
            adversarial = np.frombuffer(own["adversarial"][name], "<f4").reshape(x.shape)
            label = int(own["adversarial_label"][name])
            color = "#b3261e" if label != own["label"][name] else "#1b7f3b"
            _show(line[1 + 2 * column], 0.5 + (adversarial - x) / (2 * outcome.eps), "", "black")
            _show(line[2 + 2 * column], adversarial, _class(outcome, label), color)
    grid[0, 0].set_title("clean", fontsize=9)
    for column, name in enumerate(names):
        grid[0, 1 + 2 * column].set_title("perturbation", fontsize=9)
        grid[0, 2 + 2 * column].set_title(_lines(name), fontsize=9)
    figure.suptitle(
        f"{outcome.title}\nunder each image the predicted class; perturbations from -ε (black) to +ε (white)",
        fontsize=9,
    )
    return _save(figure, path)


def pictured(outcome: Outcome, count: int) -> pd.DataFrame:
    """The rows of `count` of the first images: those that some attacks break and others do not, then broken ones.

    Among each of them first what most attacks break; images that the model misclassifies as they are come last.
    """
    columns = ["attack", "example", "label", "clean_label", "adversarial_label", "adversarial", "success"]
    rows = outcome.run.table(columns)
    rows = rows[rows["adversarial"].notna() & (rows["example"] < outcome.run.facts["specification"]["pictures"])]
    broken = rows["success"].where(rows["clean_label"] == rows["label"], -1.0).astype(float)
    share = broken.groupby(rows["example"]).mean()
    share = share.where(share < 1, 0.0).where(share != 0, -0.5)
    best = share.sort_values(ascending=False, kind="stable").index[:count]
    return pd.concat([rows[rows["example"] == i] for i in best])


def _record(outcome: Outcome) -> dict[str, object]:
    return {
        "model": outcome.name,
        "data": outcome.data["name"],
        "images": outcome.data["count"],
        "norm": outcome.run.facts["specification"]["norm"],
        "eps": outcome.eps,
        "gradients": outcome.budget,
        "clean_accuracy": outcome.clean_accuracy,
        "attacks": [dataclasses.asdict(row) for row in outcome.rows],
    }


def _class(outcome: Outcome, label: int) -> str:
    return "NaN" if label == UNDECIDED else str(outcome.data["classes"][int(label)])


def _show(axes: Axes, image: np.ndarray[Any, Any], caption: str, color: str) -> None:
    pixels = image.clip(0, 1).transpose(1, 2, 0)
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=8, color=color, labelpad=2)


def _lines(attack: str) -> str:
    """An attack's name with its parameters on lines of their own, so that it is no wider than its place."""
    return attack.replace(":", ":\n", 1).replace(",", ",\n")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
