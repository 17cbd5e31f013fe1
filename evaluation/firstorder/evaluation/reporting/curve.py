"""Robust accuracy at every radius, and the norm an attack reaches for its budget: a view of minimum-norm attacks.

An example is broken at radius eps iff its smallest known perturbation is no larger, so one run gives the
whole curve of accuracy against eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

COLUMNS = ("model", "target", "defence", "attack", "success", "doubtful", "linf", "l2")
LINES = ("#8a8f98", "#3b6fb6", "#c2571a", "#1b7f3b")

POINTS = 201
"""Radii at which the curve is tabulated."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """One attack with one budget on one model.

    Attributes:
        model: the model's name.
        attack: the attack's name.
        steps: its budget of gradients per example.
        norm: smallest perturbation of each example, infinite where none was found, shape (N,).
        doubtful: how many of the latter met NaN or infinite logits or gradients.
    """

    model: str
    attack: str
    steps: int
    norm: np.ndarray[Any, Any]
    doubtful: int = 0

    def accuracy(self, eps: float) -> float:
        """The share of examples that no perturbation of norm eps is known to break."""
        return float((self.norm > eps).mean())

    def success(self) -> float:
        """The share of examples that were broken."""
        return float(np.isfinite(self.norm).mean())

    def mean(self) -> float:
        """The mean norm over the broken examples, NaN without any."""
        found = self.norm[np.isfinite(self.norm)]
        return float(found.mean()) if len(found) else math.nan

    def median(self) -> float:
        """The median norm over all examples."""
        return float(np.median(self.norm))


def norms(run: Run) -> list[Norms]:
    """The norms that the minimum-norm attacks of a run found, of finished cells."""
    rows = run.table(COLUMNS)
    size = "linf" if run.facts["specification"]["norm"] == "Linf" else "l2"
    rows = rows[(rows["model"] == rows["target"]) & rows["defence"].isna()]
    groups = dict(iter(rows.groupby(["model", "attack"])))
    return [
        Norms(
            model=model["name"],
            attack=attack["label"],
            steps=attack["steps"] or 1,
            norm=own[size].where(own["success"], np.inf).to_numpy(),
            doubtful=int(own["doubtful"].sum()),
        )
        for model in run.facts["models"]
        for attack in run.facts["attacks"]
        if attack["kind"] == "minimum-norm"
        for own in [groups.get((model["name"], attack["name"]))]
        if own is not None
    ]


def radii(runs: Sequence[Norms]) -> list[float]:
    """Equidistant radii up to the largest finite norm at the largest budget of the runs; 0 alone without one."""
    most = max(run.steps for run in runs)
    found = np.concatenate([run.norm for run in runs if run.steps == most])
    top = float(found[np.isfinite(found)].max(initial=0.0))
    return [top * i / (POINTS - 1) for i in range(POINTS)] if top else [0.0]


def write(runs: Sequence[Norms], out: Path) -> list[Path]:
    """Write the summary, the curve and the norms of all examples to `out` as CSV, and a picture; returns the paths."""
    tables = {
        "summary.csv": (
            ("model", "attack", "steps", "examples", "success", "mean_norm", "median_norm", "doubtful"),
            ((r.model, r.attack, r.steps, len(r.norm), r.success(), r.mean(), r.median(), r.doubtful) for r in runs),
        ),
        "curve.csv": (
            ("model", "attack", "steps", "eps", "robust_accuracy"),
            (
                (r.model, r.attack, r.steps, eps, r.accuracy(eps))
                for name in dict.fromkeys(run.model for run in runs)
                for eps in radii([run for run in runs if run.model == name])
                for r in runs
                if r.model == name
            ),
        ),
        "norms.csv": (
            ("model", "attack", "steps", "example", "norm"),
            ((r.model, r.attack, r.steps, i, value) for r in runs for i, value in enumerate(r.norm.tolist())),
        ),
    }
    for name, (header, rows) in tables.items():
        write_text(out / name, csv_text(header, rows))
    return [*(out / name for name in tables), picture(runs, out / "curve.png")]


def picture(runs: Sequence[Norms], path: Path) -> Path:
    """Per model: robust accuracy against the radius at the largest budget, and the norms against the budget."""
    models, attacks = (list(dict.fromkeys(values)) for values in ([r.model for r in runs], [r.attack for r in runs]))
    figure = Figure(figsize=(5.2 * len(models), 7.2), layout="constrained")
    grid: Any = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        accuracy, budget = grid[0, column], grid[1, column]
        mine = [run for run in runs if run.model == model]
        eps, largest = radii(mine), max(run.steps for run in mine)
        for attack, color in zip(attacks, LINES * len(attacks), strict=False):
            own = sorted((run for run in mine if run.attack == attack), key=lambda run: run.steps)
            values = [100 * own[-1].accuracy(e) for e in eps]
            accuracy.plot(eps, values, color=color, label=attack, drawstyle="steps-post")
            steps = [run.steps for run in own]
            means, shares = [run.mean() for run in own], [run.success() for run in own]
            of = "" if min(shares) == 1 else " of the broken (their share at the point)"
            budget.plot(steps, means, color=color, marker="o", label=f"{attack}, mean{of}")
            for step, mean, share in zip(steps, means, shares, strict=True):
                if 0 < share < 1:
                    words = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "color": color, "zorder": 4}
                    budget.annotate(f"{100 * share:.0f} %", (step, mean), (0, 5), **words)
            medians = [run.median() for run in own]
            budget.plot(steps, medians, color=color, marker="o", linestyle="--", mfc="white", label=f"{attack}, median")
        accuracy.set(xlabel="radius ε (L2)", ylabel="robust accuracy, %", ylim=(0, 102), xlim=(0, None))
        accuracy.set_title(f"{model}, {largest} gradients per image", fontsize=10)
        budget.set(xlabel="gradients per image", ylabel="L2 norm of the perturbation", xscale="log")
        budget.set_xticks(steps, [str(k) for k in steps], minor=False)
        budget.minorticks_off()
        for axes in (accuracy, budget):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
