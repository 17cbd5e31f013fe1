"""Tables and pictures of a transfer study."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from firstorder.evaluation.commands.demo import radius
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.runs.transfer import CLEAN, Outcome
from firstorder.files import replacing, write_text

LINES = ("#8a8f98", "#3b6fb6", "#c2571a", "#1b7f3b", "#7b4fa3", "#b3261e", "#0f7f8f", "#a67c00", "#444444", "#d27ab0")
MARKS = "osD^vP*X<>"


def average(outcome: Outcome) -> float | None:
    """The mean success over bare targets that the examples were not made on, None without any."""
    own = outcome.cell.source.split("+")
    rates = [outcome.rate(name) for name in outcome.fooled if " | " not in name and name not in own]
    return sum(rates) / len(rates) if rates else None


def table(outcomes: Sequence[Outcome], steps: int) -> tuple[list[str], list[list[str]]]:
    """Success in percent at T = `steps`; a line per cell, a column per judge."""
    judges = list(outcomes[0].fooled)
    lines = []
    for outcome in _at(outcomes, steps):
        mean = None if outcome.cell.attack == CLEAN else average(outcome)
        rates = [f"{100 * outcome.rate(judge):.1f}" for judge in judges]
        lines.append([*_heading(outcome), *rates, "" if mean is None else f"{100 * mean:.1f}"])
    return ["source", "attack", "eps", *judges, "black-box mean"], lines


def long_table(outcomes: Sequence[Outcome], steps: int) -> tuple[list[str], list[list[str]]]:
    """Success in percent with its 95 % interval at T = `steps`; a line per cell and judge."""
    lines = []
    for outcome in _at(outcomes, steps):
        for judge, shares in outcome.fooled.items():
            rate = outcome.rate(judge)
            low, high = wilson(rate, len(shares))
            lines.append([*_heading(outcome), judge, f"{100 * rate:.1f}", f"{100 * low:.1f} – {100 * high:.1f}"])
    return ["source", "attack", "eps", "judge", "success", "95 %"], lines


def doubts(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every cell and judge of which images met NaN or infinite logits."""
    return [
        f"{count} of {len(outcome.fooled[judge])} images of {_name(outcome, True)}, T = {outcome.cell.steps}, on "
        f"{judge} met NaN or infinite logits or gradients: they do not count as fooling it, but might"
        for outcome in outcomes
        for judge, count in outcome.doubtful.items()
        if count
    ]


def _at(outcomes: Sequence[Outcome], steps: int) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.cell.steps == steps or outcome.cell.attack == CLEAN]


def _heading(outcome: Outcome) -> list[str]:
    cell = outcome.cell
    return ["", CLEAN, ""] if cell.attack == CLEAN else [cell.source, cell.attack, radius(cell.eps)]


def write(outcomes: Sequence[Outcome], out: Path, *, facts: Mapping[str, object]) -> list[Path]:
    """Write transfer.md, transfer.csv, the heat map, and curves where there are several T; returns the paths."""
    steps = max(outcome.cell.steps for outcome in outcomes)
    protocol = ", ".join(f"{name} {value}" for name, value in facts.items())
    tables = "\n\n".join(_markdown(*make(outcomes, steps)) for make in (table, long_table))
    write_text(
        out / "transfer.md",
        f"Success in percent among images that all models classify correctly, T = {steps}; "
        f"{_escaped(protocol)}. With 95 % intervals (Wilson) below.\n\n{tables}\n"
        + "".join(f"\n**{_escaped(line)}**\n" for line in doubts(outcomes)),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["source", "attack", "eps", "steps", "seed", "judge", "images", "success", "low", "high", "doubtful"]
    )
    for outcome in outcomes:
        for judge, shares in outcome.fooled.items():
            rate, cell = outcome.rate(judge), outcome.cell
            limits = [f"{value:.6f}" for value in (rate, *wilson(rate, len(shares)))]
            numbers = [len(shares), *limits, outcome.doubtful.get(judge, 0)]
            writer.writerow([cell.source, cell.attack, cell.eps, cell.steps, cell.seed, judge, *numbers])
    write_text(out / "transfer.csv", text.getvalue())
    paths = [out / "transfer.md", out / "transfer.csv", heat_map(outcomes, steps, out / "transfer.png")]
    attacked = [outcome for outcome in outcomes if outcome.cell.attack != CLEAN]
    if len({outcome.cell.steps for outcome in attacked}) > 1:
        paths.append(step_curves(attacked, out / "steps.png"))
    return paths


def heat_map(outcomes: Sequence[Outcome], steps: int, path: Path) -> Path:
    """Success of every cell at T = `steps` on every judge, as colours and numbers."""
    shown = _at(outcomes, steps)
    judges = list(shown[0].fooled)
    several = len({outcome.cell.source for outcome in shown}) > 1
    values = [[100 * outcome.rate(judge) for judge in judges] for outcome in shown]
    figure = Figure(figsize=(3.6 + 0.95 * len(judges), 1.9 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if value > 60 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(judges)), [judge.replace(" | ", "\n") for judge in judges], rotation=30, ha="right")
    axes.set_yticks(range(len(shown)), [_name(outcome, several) for outcome in shown])
    axes.tick_params(labelsize=8, length=0)
    axes.set_title(f"success, %, T = {steps}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return _save(figure, path)


def step_curves(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Mean black-box success (of all targets, without any) against T: a panel per eps, a line per attack and source."""
    radii = sorted({outcome.cell.eps for outcome in outcomes})
    several = len({outcome.cell.source for outcome in outcomes}) > 1
    figure = Figure(figsize=(5.4 * len(radii), 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(radii), squeeze=False)
    for axes, eps in zip(grid[0], radii, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for outcome in outcomes:
            if outcome.cell.eps == eps:
                bare = [outcome.rate(name) for name in outcome.fooled if " | " not in name]
                mean = average(outcome)
                rate = sum(bare) / len(bare) if mean is None else mean
                name = f"{outcome.cell.source}: {outcome.cell.attack}" if several else outcome.cell.attack
                lines.setdefault(name, []).append((outcome.cell.steps, 100 * rate))
        for i, (name, points) in enumerate(lines.items()):
            at, rates = zip(*sorted(points), strict=True)
            axes.plot(at, rates, color=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)], markersize=4, label=name)
        axes.set(xlabel="steps T", ylabel="mean black-box success, %", ylim=(0, 102), xlim=(0, None))
        axes.set_title(f"ε = {radius(eps)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _name(outcome: Outcome, several: bool) -> str:
    cell = outcome.cell
    if cell.attack == CLEAN:
        return CLEAN
    return f"{cell.source}: " * several + f"{cell.attack}, ε = {radius(cell.eps)}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(_escaped(value) for value in row) + " |" for row in rows)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
