"""Pictures of whom adversarial examples fool: as a heat map, against the steps, and against the gradients they took."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from firstorder.evaluation.reporting.document import Heat
from firstorder.evaluation.reporting.summary import Rate
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.reporting.transfer_outcomes import CLEAN, Outcome, displayed, grouped, mean, name
from firstorder.files import replacing

LINES = ("#8a8f98", "#3b6fb6", "#c2571a", "#1b7f3b", "#7b4fa3", "#b3261e", "#0f7f8f", "#a67c00", "#444444", "#d27ab0")
MARKS = "osD^vP*X<>"

BEST = "best at this price or below"

PRICED = re.compile(r"(?<=[:,])(?:steps|m)=\d+(?:,|$)")
"""What of an attack's line sets its price alone."""


def write(outcomes: Sequence[Outcome], steps: int, out: Path) -> list[Path]:
    """The heat map; the frontier, where there is more than one attack; curves, where attacks have several T."""
    paths = [heat_map(outcomes, steps, out / "transfer.png")]
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    chart = priced_chart(outcomes)
    if chart is not None:
        paths.append(_save(chart, out / "frontier.png"))
    times: dict[str, set[int]] = {}
    for one in attacked:
        times.setdefault(one.attack, set()).add(one.steps)
    if any(len(own) > 1 for own in times.values()):
        paths.append(step_curves(attacked, out / "steps.png"))
    return paths


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
    several = len({outcome.source for outcome in outcomes}) > 1
    figure = Figure(figsize=(5.4 * len(radii), 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(radii), squeeze=False)
    for axes, eps in zip(grid[0], radii, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for group in grouped([outcome for outcome in outcomes if outcome.eps == eps]):
            rate = mean([one.rate(target) for one in group for target in one.bare])
            label = f"{group[0].source}: {group[0].attack}" if several else group[0].attack
            lines.setdefault(label, []).append((group[0].steps, 100 * rate))
        for i, (label, own) in enumerate(lines.items()):
            at, rates = zip(*sorted(own), strict=True)
            axes.plot(at, rates, color=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)], markersize=4, label=label)
        axes.set(xlabel="steps T", ylabel="mean black-box success, %", ylim=(0, 102), xlim=(0, None))
        axes.set_title(f"ε = {radius(eps)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


class Point(NamedTuple):
    """An attack in the picture of success against gradients.

    Attributes:
        attack: its name.
        gradients: that an image took.
        success: in percent, the mean of the seeds.
        least, most: of the seeds.
    """

    attack: str
    gradients: float
    success: float
    least: float
    most: float


def points(outcomes: Sequence[Outcome], target: str | None) -> list[Point]:
    """The outcomes of one radius on a target, or with None on the mean of the bare ones that they were not made on."""
    several = len({outcome.source for outcome in outcomes}) > 1
    found = []
    for group in grouped(outcomes):
        own = [one for one in group if one.gradients and (target is None or target in one.bare)]
        rates = [100 * mean([one.rate(n) for n in one.bare] if target is None else [one.rate(target)]) for one in own]
        if rates:
            label = f"{own[0].source}: " * several + own[0].attack
            found.append(Point(label, mean([one.gradients for one in own]), mean(rates), min(rates), max(rates)))
    return found


def frontier(found: Sequence[Point]) -> list[Point]:
    """The points that have more success than every other one at their price or below, by price."""
    best: list[Point] = []
    for point in sorted(found, key=lambda one: (one.gradients, -one.success)):
        if not best or point.success > best[-1].success:
            best.append(point)
    return best


def priced_chart(outcomes: Sequence[Outcome]) -> Figure | None:
    """The picture of success against gradients, where more than one attack has a price."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    return frontier_chart(attacked) if len(points(attacked, None)) > 1 else None


def frontier_chart(outcomes: Sequence[Outcome]) -> Figure:
    """Success against gradients per image: a row per radius, a panel per bare target and one for their mean.

    The step line is the best success at each number of gradients or fewer; its attacks are named. Bars span the seeds.
    """
    radii = sorted({one.eps for one in outcomes})
    targets = list(dict.fromkeys(target for one in outcomes for target in one.bare))
    panels: list[str | None] = [*targets, None] if len(targets) > 1 else [*targets]
    names = list(dict.fromkeys(_family(point.attack) for point in points(outcomes, None)))
    size = (4.4 * len(panels) + 2.4, max(4.0 * len(radii), 0.24 * len(names) + 1.0))
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(len(radii), len(panels), squeeze=False, sharey=True)
    for row, eps in zip(grid, radii, strict=True):
        here = [one for one in outcomes if one.eps == eps]
        for axes, target in zip(row, panels, strict=True):
            found = points(here, target)
            if not found:
                axes.set_axis_off()
                continue
            _panel(axes, found, names)
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.08 * (high - low))  # room for names
            axes.set_title(f"{target or 'mean of the targets'}, ε = {radius(eps)}", fontsize=10)
        row[0].set_ylabel("success, %")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [one for one in [*names, BEST] if one in handles]
    figure.legend([handles[one] for one in shown], shown, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _panel(axes: Any, found: Sequence[Point], names: Sequence[str]) -> None:
    for i, family in enumerate(names):
        own = sorted((one for one in found if _family(one.attack) == family), key=lambda one: one.gradients)
        if own:
            prices, rates = [one.gradients for one in own], [one.success for one in own]
            spans = [[one.success - one.least for one in own], [one.most - one.success for one in own]]
            mark = MARKS[(i + i // len(LINES)) % len(MARKS)]
            axes.errorbar(
                prices, rates, spans if np.any(spans) else None, color=LINES[i % len(LINES)], marker=mark, markersize=5,
                linewidth=0.6, alpha=0.9, label=family,
            )  # fmt: skip
    best = frontier(found)
    last = max(one.gradients for one in found)
    prices, rates = [*(one.gradients for one in best), last], [*(one.success for one in best), best[-1].success]
    axes.plot(prices, rates, drawstyle="steps-post", color="black", linewidth=1.2, zorder=1, label=BEST)
    for one in best:
        axes.annotate(one.attack, (one.gradients, one.success), (3, 5), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    ticks = sorted({round(one.gradients, 1) for one in found})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="gradients per image", xlim=(0.8 * ticks[0], 1.7 * ticks[-1]))
    axes.spines[["top", "right"]].set_visible(False)


def _family(label: str) -> str:
    """An attack without what sets its price alone, so that its points have one colour."""
    return PRICED.sub("", label).rstrip(":,")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
