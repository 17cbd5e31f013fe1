"""Success against the gradients that an image took: which attack is the best at its price."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from firstorder.evaluation.reporting.document import View
from firstorder.evaluation.reporting.drawing import INK
from firstorder.evaluation.reporting.figures import COLORS, legends, short
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.reporting.transfer_outcomes import CLEAN, Outcome, grouped, mean

BEST = "best at its price"
MEAN = "mean of the targets"
LEAST = 20.0
"""Points that the upright axis spans at least, so that chance does not look like a difference."""

MARKS = "osD^vP*X<>"

EVERY = 4
"""With more targets than these a page has the picture of their mean alone."""

PRICED = re.compile(r"(?<=[:,])(?:steps|m)=\d+(?:,|$)")
"""What of an attack's line sets its price alone."""

EXPLAINED = (
    "Success against the gradients that an image took. The step line is the best success at that price or below, and "
    "its attacks are named; bars span the seeds."
)


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


def frontier_views(outcomes: Sequence[Outcome]) -> list[View]:
    """The picture as a page has it, for every radius: the mean of the targets, and each of a few.

    Args:
        outcomes: of attacks; none with less than two that have a price.
    """
    if len(points(outcomes, None)) < 2:
        return []
    found = []
    for i, eps in enumerate(sorted({one.eps for one in outcomes}), 1):
        targets = _targets(outcomes)
        panels = [None, *targets] if 1 < len(targets) <= EVERY else targets if len(targets) == 1 else [None]
        for j, target in enumerate(panels):
            if points([one for one in outcomes if one.eps == eps], target):
                title = f"Success against gradients: {target or MEAN}, ε = {radius(eps)}"
                draw = partial(panel_chart, outcomes, eps, target)
                found.append(View(f"frontier-{i}-{j}", title, EXPLAINED, draw))
    return found


def panel_chart(outcomes: Sequence[Outcome], eps: float, target: str | None, width: float) -> Figure:
    """Success on a target, or with None on the mean of them, against gradients, at a width in inches."""
    found, names = points([one for one in outcomes if one.eps == eps], target), _families(outcomes)
    figure = Figure(figsize=(width, 3.3))
    axes = figure.subplots()
    _panel(axes, found, names, most=int(5 * width))
    axes.set_ylabel("success, %")
    rows = legends(figure, axes.get_legend_handles_labels()[1])
    figure.set_figheight(3.0 + 0.19 * rows)
    return figure


def priced_chart(outcomes: Sequence[Outcome]) -> Figure | None:
    """The picture of success against gradients, where more than one attack has a price."""
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    return frontier_chart(attacked) if len(points(attacked, None)) > 1 else None


def frontier_chart(outcomes: Sequence[Outcome]) -> Figure:
    """Success against gradients per image: a row per radius, a panel per bare target and one for their mean.

    The step line is the best success at each number of gradients or fewer; its attacks are named. Bars span the seeds.
    """
    radii, targets = sorted({one.eps for one in outcomes}), _targets(outcomes)
    panels: list[str | None] = [*targets, None] if len(targets) > 1 else [*targets]
    names = _families(outcomes)
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
            axes.set_title(f"{target or MEAN}, ε = {radius(eps)}", fontsize=10)
        row[0].set_ylabel("success, %")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [one for one in [*names, BEST] if one in handles]
    figure.legend([handles[one] for one in shown], shown, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def mark(i: int) -> str:
    """The mark of the i-th line: another one where colours come again."""
    return MARKS[(i + i // len(COLORS)) % len(MARKS)]


def _panel(axes: Any, found: Sequence[Point], names: Sequence[str], most: int = 40) -> None:
    """Draw the points, and the best at every price with their names, of at most so many characters."""
    for i, family in enumerate(names):
        own = sorted((one for one in found if _family(one.attack) == family), key=lambda one: one.gradients)
        if own:
            prices, rates = [one.gradients for one in own], [one.success for one in own]
            spans = [[one.success - one.least for one in own], [one.most - one.success for one in own]]
            look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linewidth": 0.6, "alpha": 0.9}
            axes.plot(prices, rates, marker=mark(i), markersize=5, label=family, **look)
            if np.any(spans):
                axes.errorbar(prices, rates, spans, fmt="none", **look)
    best = frontier(found)
    low, high = min(one.gradients for one in found), max(one.gradients for one in found)
    prices, rates = [*(one.gradients for one in best), high], [*(one.success for one in best), best[-1].success]
    axes.plot(prices, rates, drawstyle="steps-post", color=INK, linewidth=1.2, zorder=1, label=BEST)
    for one in best:
        side = "right" if one.gradients > math.sqrt(low * high) else "left"
        at = (-3 if side == "right" else 3, 5)
        axes.annotate(
            short(one.attack, most), (one.gradients, one.success), at, textcoords="offset points", ha=side, fontsize=8
        )
    axes.set_xscale("log")
    ticks = _apart(sorted({round(one.gradients, 1) for one in found}))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="gradients per image", xlim=(0.8 * low, 1.25 * high))
    bottom, top = axes.get_ylim()
    if top - bottom < LEAST:
        bottom = min(max((top + bottom - LEAST) / 2, -1.0), 101.0 - LEAST)
        top = bottom + LEAST
    axes.set_ylim(bottom, top + 0.08 * (top - bottom))  # room for names
    axes.spines[["top", "right"]].set_visible(False)


def _apart(prices: Sequence[float]) -> list[float]:
    """Those prices that are far enough from the one before for their numbers on a logarithmic axis, and the last."""
    least = (prices[-1] / prices[0]) ** (1 / 7)
    found: list[float] = []
    for price in prices[:-1]:
        if not found or (price / found[-1] >= least and prices[-1] / price >= least):
            found.append(price)
    return [*found, prices[-1]]


def _targets(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(target for one in outcomes for target in one.bare))


def _families(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(_family(point.attack) for point in points(outcomes, None)))


def _family(label: str) -> str:
    """An attack without what sets its price alone, so that its points have one colour."""
    return PRICED.sub("", label).rstrip(":,")
