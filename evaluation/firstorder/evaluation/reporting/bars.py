"""Bars with the range of each, and what they are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from firstorder.evaluation.reporting.drawing import INK, WIDTH

OURS, OTHERS = "#3f7fd6", "#8a8f98"


class Bar(NamedTuple):
    """A value, the range of what it may be, and whether it stands out."""

    value: float
    low: float
    high: float
    ours: bool = True


def bar_chart(bars: Mapping[str, Bar], across: str, *, mark: float | None = None, width: float = WIDTH) -> Figure:
    """A bar for every name, from above, with its range as a line.

    Args:
        bars: by name.
        across: what the values are.
        mark: a value that others are compared with, as a dashed line.
        width: of the figure in inches.
    """
    figure, axes = _lines(bars, across, width)
    colors = [OURS if bar.ours else OTHERS for bar in bars.values()]
    at = range(len(bars))
    axes.barh(at, [bar.value for bar in bars.values()], color=colors, height=0.62)
    axes.hlines(at, [bar.low for bar in bars.values()], [bar.high for bar in bars.values()], color=INK, linewidth=1.6)
    end = max([bar.high for bar in bars.values()] + [mark or 0.0]) or 1.0
    for y, bar in zip(at, bars.values(), strict=True):
        axes.text(1.02 * end, y, f"{bar.value:.3g}", va="center_baseline", fontsize=9)
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(0, 1.18 * end))
    return figure


def difference_chart(bars: Mapping[str, Bar], across: str, *, width: float = WIDTH) -> Figure:
    """A point for every name, from above, with its range as a line, and where there is no difference.

    Args:
        bars: by name.
        across: what the values are.
        width: of the figure in inches.
    """
    figure, axes = _lines(bars, across, width)
    for y, bar in enumerate(bars.values()):
        color = OURS if bar.ours else OTHERS
        axes.plot([bar.low, bar.high], [y, y], color=color, linewidth=2.0, solid_capstyle="round")
        axes.plot(bar.value, y, "o", color=color, markersize=6)
    end = 1.08 * max((abs(side) for bar in bars.values() for side in (bar.low, bar.high)), default=1.0) or 1.0
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(-end, end))
    return figure


def _lines(bars: Mapping[str, Bar], across: str, width: float) -> tuple[Figure, Axes]:
    """A line for every name, from above."""
    figure = Figure(figsize=(width, 0.9 + 0.3 * len(bars)))
    axes = figure.subplots()
    axes.set_yticks(range(len(bars)), [name if len(name) <= 26 else f"{name[:25]}…" for name in bars])
    axes.set(xlabel=across, ylim=(len(bars) - 0.4, -0.6))
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    return figure, axes
