"""Figures of the demonstration, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from firstorder.attacks import UNDECIDED
from firstorder.evaluation.commands.demo import Outcome, pictured, radius
from firstorder.files import replacing

BAR, CLEAN = "#3b6fb6", "#8a8f98"
LINES = ("#8a8f98", "#3b6fb6", "#c2571a", "#1b7f3b")


def accuracy_chart(outcomes: Sequence[Outcome], path: Path) -> None:
    """Robust accuracy of every attack, one panel per model, strongest attack on top, clean accuracy as a line."""
    tallest = max(len(outcome.rows) for outcome in outcomes)
    figure = Figure(figsize=(5.6 * len(outcomes), 1.4 + 0.34 * tallest), layout="constrained")
    for axes, outcome in zip(_row(figure, len(outcomes)), outcomes, strict=True):
        values = [100 * row.robust_accuracy for row in outcome.rows]
        bars = axes.barh([row.attack.replace(",", ",\n") for row in outcome.rows], values, color=BAR, height=0.7)
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
        axes.axvline(clean, color=CLEAN, linestyle="--", linewidth=1.2, label=f"clean accuracy {clean:.1f} %")
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("accuracy under attack, %")
        axes.set_title(_title(outcome), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def picture_grid(outcome: Outcome, path: Path, *, count: int = 5, attacks: int = 4) -> None:
    """Clean images, and for the strongest attacks the adversarial images and perturbations with predictions."""
    indices = pictured(outcome, count)
    names = [row.attack for row in outcome.rows[:attacks]]
    figure = Figure(figsize=(1.35 * (1 + 2 * len(names)) + 0.6, 1.62 * len(indices) + 0.8), layout="constrained")
    grid: Any = figure.subplots(len(indices), 1 + 2 * len(names), squeeze=False)
    classes = outcome.images.classes
    for line, i in zip(grid, indices, strict=True):
        x = outcome.images.x[i]
        _show(line[0], x, classes[int(outcome.clean_predictions[i])], "black")
        for column, name in enumerate(names):
            adversarial, label = outcome.adversarial[name][i], int(outcome.predictions[name][i])
            wrong = label != int(outcome.images.y[i])
            _show(line[1 + 2 * column], 0.5 + (adversarial - x) / (2 * outcome.scenario.eps), "", "black")
            _show(
                line[2 + 2 * column],
                adversarial,
                "NaN" if label == UNDECIDED else classes[label],
                "#b3261e" if wrong else "#1b7f3b",
            )
    grid[0, 0].set_title("clean", fontsize=9)
    for column, name in enumerate(names):
        grid[0, 1 + 2 * column].set_title("perturbation", fontsize=9)
        grid[0, 2 + 2 * column].set_title(name, fontsize=9)
    figure.suptitle(
        f"{_title(outcome)}\nunder each image the predicted class; perturbations from -ε (black) to +ε (white)",
        fontsize=9,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _row(figure: Figure, columns: int) -> list[Axes]:
    return list(figure.subplots(1, columns, squeeze=False)[0])


def _title(outcome: Outcome) -> str:
    scenario = outcome.scenario
    size = f"{len(outcome.images.y)} images, ε = {radius(scenario.eps)}"
    return f"{scenario.name}\n{size}, {scenario.gradients} gradients per image"


def _show(axes: Axes, image: Tensor, caption: str, color: str) -> None:
    pixels: np.ndarray[Any, Any] = image.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=8, color=color, labelpad=2)
