"""Pictures of whom adversarial examples fool: as a heat map, and against the steps; see also `reporting.frontier`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from firstorder.evaluation.reporting.document import Heat, View
from firstorder.evaluation.reporting.figures import COLORS, legends
from firstorder.evaluation.reporting.frontier import frontier_views, mark, priced_chart
from firstorder.evaluation.reporting.summary import Rate
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.reporting.transfer_outcomes import CLEAN, Outcome, displayed, grouped, mean, name
from firstorder.files import replacing


def write(outcomes: Sequence[Outcome], steps: int, out: Path) -> list[Path]:
    """The heat map; the frontier, where there is more than one attack; curves, where attacks have several T."""
    paths = [heat_map(outcomes, steps, out / "transfer.png")]
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    chart = priced_chart(outcomes)
    if chart is not None:
        paths.append(_save(chart, out / "frontier.png"))
    if stepped(attacked):
        paths.append(step_curves(attacked, out / "steps.png"))
    return paths


def views(outcomes: Sequence[Outcome]) -> list[View]:
    """The pictures of a page: success against gradients, and against the steps where an attack has several."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    found = frontier_views(attacked)
    if stepped(attacked):
        caption = "The mean over the targets that the examples were not made on, and of several seeds."
        for i, eps in enumerate(sorted({one.eps for one in attacked}), 1):
            title = f"Success against steps, ε = {radius(eps)}"
            found.append(View(f"steps-{i}", title, caption, partial(step_chart, attacked, eps)))
    return found


def stepped(outcomes: Sequence[Outcome]) -> bool:
    """Whether an attack has more than one T."""
    return len({(one.attack, one.steps) for one in outcomes}) > len({one.attack for one in outcomes})


def heat_map(outcomes: Sequence[Outcome], steps: int, path: Path) -> Path:
    """Success of every attack at T = `steps` on every target, as colours and numbers; of several seeds the mean."""
    shown = displayed(outcomes, steps)
    several = len({group[0].source for group in shown}) > 1
    figure = heat_chart(shown, [name(group[0], several) for group in shown])
    figure.axes[0].set_title(f"success, %, T = {steps}", fontsize=10)
    return _save(figure, path)


def defence_chart(outcomes: Sequence[Outcome]) -> Figure:
    """Success of every attack on every target, bare and behind defences; of several seeds the mean."""
    groups = grouped(outcomes)
    return heat_chart(groups, _names(groups))


def defence_heat(outcomes: Sequence[Outcome]) -> Heat:
    """The same as a table."""
    groups = grouped(outcomes)
    targets = list(dict.fromkeys(target for one in outcomes for target in one.fooled))
    lines = [
        (label, [_rate(group, target) for target in targets])
        for label, group in zip(_names(groups), groups, strict=True)
    ]
    return "", targets, lines


def _rate(group: Sequence[Outcome], target: str) -> Rate | None:
    own = [one for one in group if target in one.fooled]
    return Rate(mean([one.rate(target) for one in own]), int(own[0].right.sum())) if own else None


def _names(groups: Sequence[Sequence[Outcome]]) -> list[str]:
    """What each group of seeds is called where all are shown."""
    several = len({group[0].source for group in groups}) > 1
    varied = len({group[0].steps for group in groups if group[0].attack != CLEAN}) > 1
    return [
        name(group[0], several) + f", T = {group[0].steps}" * (varied and group[0].attack != CLEAN) for group in groups
    ]


def heat_chart(groups: Sequence[Sequence[Outcome]], names: Sequence[str]) -> Figure:
    """Success in percent, a line for every group of seeds and a column for every target, as colours and numbers."""
    targets = list(dict.fromkeys(target for group in groups for one in group for target in one.fooled))
    rates = [[[one.rate(target) for one in group if target in one.fooled] for target in targets] for group in groups]
    values = [[100 * mean(own) if own else np.nan for own in line] for line in rates]
    figure = Figure(figsize=(3.6 + 0.95 * len(targets), 1.9 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color, text = "white" if value > 60 else "black", "–" if np.isnan(value) else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(targets)), [target.replace(" | ", "\n") for target in targets], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8, length=0)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def step_curves(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Mean success over bare targets against T, of several seeds the mean: a panel per eps, a line per attack."""
    radii = sorted({outcome.eps for outcome in outcomes})
    figure = Figure(figsize=(5.4 * len(radii), 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(radii), squeeze=False)
    for axes, eps in zip(grid[0], radii, strict=True):
        _steps(axes, outcomes, eps)
        axes.set_title(f"ε = {radius(eps)}", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def step_chart(outcomes: Sequence[Outcome], eps: float, width: float) -> Figure:
    """The same at one radius, as a page shows it, at a width in inches."""
    figure = Figure(figsize=(width, 3.5))
    axes = figure.subplots()
    _steps(axes, outcomes, eps)
    legends(figure, axes.get_legend_handles_labels()[1])
    return figure


def _steps(axes: Any, outcomes: Sequence[Outcome], eps: float) -> None:
    several = len({outcome.source for outcome in outcomes}) > 1
    lines: dict[str, list[tuple[int, float]]] = {}
    for group in grouped([outcome for outcome in outcomes if outcome.eps == eps]):
        rate = mean([one.rate(target) for one in group for target in one.bare])
        label = f"{group[0].source}: {group[0].attack}" if several else group[0].attack
        lines.setdefault(label, []).append((group[0].steps, 100 * rate))
    for i, (label, own) in enumerate(lines.items()):
        at, rates = zip(*sorted(own), strict=True)
        axes.plot(at, rates, color=COLORS[i % len(COLORS)], marker=mark(i), markersize=4, label=label)
    axes.set(xlabel="steps T", ylabel="mean black-box success, %", ylim=(0, 102), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
