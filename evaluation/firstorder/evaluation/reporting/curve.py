"""Robust accuracy at every radius, and the norm an attack reaches for its budget: a view of minimum-norm attacks.

An example is broken at radius eps iff its smallest known perturbation is no larger, so one run gives the
whole curve of accuracy against eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from firstorder.evaluation.reporting import document
from firstorder.evaluation.reporting.figures import colors, legends
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

COLUMNS = ("model", "target", "defence", "attack", "success", "doubtful", "linf", "l2", "seconds")

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
        seconds: that an example took, the mean as measured on the machine of the run.
    """

    model: str
    attack: str
    steps: int
    norm: np.ndarray[Any, Any]
    doubtful: int = 0
    seconds: float = math.nan

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
            seconds=float(own["seconds"].mean()),
        )
        for model in run.facts["models"]
        for attack in run.facts["attacks"]
        if attack["kind"] == "minimum-norm"
        for own in [groups.get((model["name"], attack["name"]))]
        if own is not None
    ]


def together(runs: Sequence[Norms]) -> list[Norms]:
    """Runs of the same attack, budget and model as one, over all their examples: towards several classes."""
    groups: dict[tuple[str, str, int], list[Norms]] = {}
    for run in runs:
        groups.setdefault((run.model, run.attack, run.steps), []).append(run)
    return [
        replace(
            own[0],
            norm=np.concatenate([run.norm for run in own]),
            doubtful=sum(run.doubtful for run in own),
            seconds=sum(run.seconds * len(run.norm) for run in own) / sum(len(run.norm) for run in own),
        )
        for own in groups.values()
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
            ("model", "attack", "steps", "examples", "success", "mean_norm", "median_norm", "doubtful", "seconds"),
            (
                (r.model, r.attack, r.steps, len(r.norm), r.success(), r.mean(), r.median(), r.doubtful, r.seconds)
                for r in runs
            ),
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
    page = _page(runs, out)
    return [*(out / name for name in tables), picture(runs, out / "curve.png"), page]


def _page(runs: Sequence[Norms], out: Path) -> Path:
    """Write curve.html."""
    header = ("attack", "gradients", "examples", "broken, %", "mean norm", "median norm", "doubtful")
    attacks, parts = list(dict.fromkeys(run.attack for run in runs)), []
    for i, model in enumerate(dict.fromkeys(run.model for run in runs), 1):
        mine = [run for run in runs if run.model == model]
        rows = [
            (r.attack, f"{r.steps}", f"{len(r.norm)}", f"{100 * r.success():.1f}", f"{r.mean():.4g}",
             f"{r.median():.4g}", f"{r.doubtful}")
            for r in mine
        ]  # fmt: skip
        drawings = [
            document.drawn(
                _one(draw, mine, attacks), out / "figures", f"{name}-{i}", title=title, caption=caption, subject=model
            )
            for draw, name, title, caption in (
                (
                    _accuracy,
                    "accuracy",
                    "Robust accuracy by radius",
                    "At the largest budget, with 95 % intervals.",
                ),
                (_budget, "budget", "Norms by budget", "Mean over the broken examples, median over all."),
            )
        ]
        tables = [document.Table(title="", header=header, rows=rows)]
        parts.append(document.Part(anchor=f"model-{i}", title=model, tables=tables, drawings=drawings))
    lead = "An example is broken at a radius if its smallest known perturbation is no larger."
    title = "Robust accuracy at every radius"
    return document.write(
        out / "curve.html", over="firstorder · minimum-norm attacks", title=title, lead=lead, parts=parts
    )


def _one(
    draw: Callable[[Axes, Sequence[Norms], Sequence[str]], None], runs: Sequence[Norms], attacks: Sequence[str]
) -> Callable[[float], Figure]:
    """A figure that `draw` fills alone, at any width."""

    def made(width: float) -> Figure:
        figure = Figure(figsize=(width, 3.5), layout="constrained")
        axes = figure.subplots()
        draw(axes, runs, attacks)
        rows = legends(figure, axes.get_legend_handles_labels()[1])
        figure.set_figheight(3.2 + 0.19 * rows)
        return figure

    return made


def picture(runs: Sequence[Norms], path: Path) -> Path:
    """Per model: robust accuracy against the radius at the largest budget, and the norms against the budget."""
    models, attacks = (list(dict.fromkeys(values)) for values in ([r.model for r in runs], [r.attack for r in runs]))
    figure = Figure(figsize=(5.2 * len(models), 7.2), layout="constrained")
    grid: Any = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        mine = [run for run in runs if run.model == model]
        _accuracy(grid[0, column], mine, attacks)
        _budget(grid[1, column], mine, attacks)
        most = max(run.steps for run in mine)
        for axes in grid[:, column]:
            axes.legend(frameon=False, fontsize=8.5)
        grid[0, column].set_title(f"{model}, {most} gradients per image", fontsize=10, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _accuracy(axes: Axes, runs: Sequence[Norms], attacks: Sequence[str]) -> None:
    """The robust accuracy at the largest budget against the radius."""
    eps = radii(runs)
    for attack, color, own in _series(runs, attacks):
        values = [own[-1].accuracy(e) for e in eps]
        ends = [wilson(value, len(own[-1].norm)) for value in values]
        axes.plot(eps, [100 * value for value in values], color=color, label=attack, drawstyle="steps-post")
        low, high = [100 * end[0] for end in ends], [100 * end[1] for end in ends]
        axes.fill_between(eps, low, high, color=color, alpha=0.15, linewidth=0, step="post")
    axes.set(xlabel="radius ε (L2)", ylabel="robust accuracy, %", ylim=(0, 102), xlim=(0, None))
    _plain(axes)


def _budget(axes: Axes, runs: Sequence[Norms], attacks: Sequence[str]) -> None:
    """The norms against the budget."""
    known = sorted({run.steps for run in runs})
    for attack, color, own in _series(runs, attacks):
        steps, medians = [run.steps for run in own], [run.median() for run in own]
        axes.plot(steps, [run.mean() for run in own], color=color, marker="o", label=f"{attack}, mean")
        axes.plot(steps, medians, color=color, marker="o", linestyle="--", mfc="none", label=f"{attack}, median")
    axes.set(xlabel="gradients per image", ylabel="L2 norm of the perturbation", xscale="log", ylim=(0, None))
    axes.set_xticks(known, [str(k) for k in known], minor=False)
    axes.minorticks_off()
    _plain(axes)


def _series(runs: Sequence[Norms], attacks: Sequence[str]) -> Iterator[tuple[str, str, list[Norms]]]:
    """Each attack with its colour and its runs by budget."""
    for attack, color in colors(attacks).items():
        own = sorted((run for run in runs if run.attack == attack), key=lambda run: run.steps)
        if own:
            yield attack, color, own


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
