"""The figures of a report for papers: at the width of a column, with text of a size to be read there."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from firstorder.evaluation.reporting import (
    drawing,
    figures,
    frontier,
    stills,
    summary,
    transfer_figures,
    transfer_outcomes,
)
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing

UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27, "bp": 1 / 72}
"""Inches of a unit of length, as TeX has them."""

MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
"""Of lines, by their colours, so that these need not be distinguished."""

NARROWEST, WIDEST = 1.5, 20.0
"""Widths in inches, of which no figure is legible below, and no page is beyond."""

COLUMN = 0.8
"""The width in inches of a picture with the name of its class, beside others."""

POINTS = 8.0
"""The size of text, which no text of a figure is below."""

STYLE: dict[Any, Any] = {
    **drawing.STYLE,
    "font.size": POINTS, "axes.labelsize": POINTS, "xtick.labelsize": POINTS, "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS, "lines.linewidth": 1.2, "pdf.fonttype": 42, "svg.fonttype": "path",
}  # fmt: skip
"""Letters are outlines, or whole fonts, which publishers ask for."""


def inches(text: str) -> float:
    """A width, as 3.25in, 82mm, 8.2cm or 234pt.

    Raises:
        ValueError: text that says no width, or one that no figure has.
    """
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(in|cm|mm|pt|bp)\s*", text[:40])
    width = float(found[1]) * UNITS[found[2]] if found else float("nan")
    if not (isfinite(width) and NARROWEST <= width <= WIDEST):
        raise ValueError(
            f"width {text[:40]!r} is none from {NARROWEST:g} to {WIDEST:g} inches; write it as 3.25in, 82mm or 234pt"
        )
    return width


def draw(run: Run, kind: str, width: float, *, model: str | None = None, eps: float | None = None) -> Figure:
    """A figure of a run at a width in inches.

    Args:
        run: finished or not.
        kind: of `KINDS`.
        width: of the figure as it is printed.
        model: which it is about; the first by default, and all of them in those that show all.
        eps: the radius; the largest by default.

    Raises:
        ValueError: a model, a radius or a figure that the run does not have.
    """
    names, radii = summary.names(run.facts, "models"), summary.radii(run.facts)
    if model is not None and model not in names:
        raise ValueError(f"the run has no model {model!r}; it has {', '.join(names)}")
    if eps is not None and eps not in radii:
        raise ValueError(f"the run has no radius {radius(eps)}; it has {', '.join(map(radius, radii)) or 'none'}")
    with matplotlib.rc_context(STYLE):
        figure = KINDS[kind](run, model, eps if eps is not None else max(radii, default=0.0), width)
        if figure is None:
            raise ValueError(f"the run has nothing for the figure {kind!r}; firstorder report shows what it has")
        _fit(figure, width)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG (600 dots an inch), SVG or PDF, by the suffix of `path`; the same bytes every time.

    Raises:
        ValueError: another suffix.
    """
    kind = path.suffix[1:].lower()
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    if kind not in metadata:
        raise ValueError(f"{path} is no .png, .svg or .pdf; give it one of these suffixes")
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=600, facecolor="white", metadata=metadata[kind])


def _curve(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    rows, facts = summary.load(run), run.facts
    if model is not None:
        return _radius(run, {curve.attack or TOGETHER: curve for curve in summary.radius_curves(rows, facts, model)})
    worst = {one: summary.radius_curves(rows, facts, one)[-1:] for one in summary.names(facts, "models")}
    return _radius(run, {one: found[0] for one, found in worst.items() if found})


def _radius(run: Run, curves: dict[str, summary.Curve]) -> Figure | None:
    palette = figures.colors([name for name in curves if name != TOGETHER])
    return figures.radius_chart(curves, palette, summary.radii(run.facts)) if curves else None


def _passes(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    found = summary.query_curves(summary.load(run), run.facts, model or summary.names(run.facts, "models")[0], eps)
    palette = figures.colors(summary.names(run.facts, "attacks"))
    return figures.query_chart({curve.attack or TOGETHER: curve for curve in found}, palette) if found else None


def _attacks(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    scores = [score for score in summary.leaderboard(summary.load(run), run.facts) if score.eps == eps]
    scores = [score for score in scores if model in (None, score.model)]
    return figures.attack_chart(scores, figures.colors(summary.names(run.facts, "models"))) if scores else None


def _overlap(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    found = summary.overlap(summary.load(run), run.facts, model or summary.names(run.facts, "models")[0], eps)
    return figures.overlap_chart(found, figures.colors(summary.names(run.facts, "attacks"))) if found.sets else None


def _transfer(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    rows, names = summary.load(run), summary.names(run.facts, "models")
    if not (rows["model"] != rows["target"]).any():
        return None
    every = {one: summary.transfer(rows, run.facts, one, eps) for one in summary.names(run.facts, "attacks")}
    matrices = {one: matrix for one, matrix in every.items() if any(rate for line in matrix for rate in line)}
    return figures.transfer_chart(matrices, names) if matrices else None


def _frontier(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    rows = summary.load(run)
    if not (rows["model"] != rows["target"]).any():
        return None
    found = [one for one in transfer_outcomes.outcomes(run) if one.eps == eps and one.attack != transfer_outcomes.CLEAN]
    own = [one for one in found if model in (None, one.source)]
    return frontier.panel_chart(own, eps, None, width) if len(frontier.points(own, None)) > 1 else None


def _defences(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    found = transfer_outcomes.outcomes(run) if run.facts["specification"].get("defences") else []
    return transfer_figures.defence_chart(found) if found else None


def _pictures(run: Run, model: str | None, eps: float, width: float) -> Figure | None:
    own = model or summary.names(run.facts, "models")[0]
    scores = [score for score in summary.leaderboard(summary.load(run), run.facts) if score.eps == eps]
    found = [stills.stills(run, score, attacks=_room(width), width=width) for score in scores if score.model == own]
    return found[0][0] if found and found[0] else None


def _room(width: float) -> int:
    """How many attacks there is room for beside the clean images, each with two columns of `COLUMN` inches."""
    return max(int((width / COLUMN - 1) / 2), 1)


KINDS: dict[str, Callable[[Run, str | None, float, float], Figure | None]] = {
    "curve": _curve,
    "passes": _passes,
    "attacks": _attacks,
    "overlap": _overlap,
    "transfer": _transfer,
    "frontier": _frontier,
    "defences": _defences,
    "pictures": _pictures,
}
"""The figures: accuracy by radius, by passes, by attack; which attacks break the same images; transfer; its success by
gradients; defences; examples that fell.
"""


def _fit(figure: Figure, width: float) -> None:
    """Give a figure its printed width, text of `POINTS`, marks that differ as colours do, and a legend no wider."""
    before, height = figure.get_size_inches()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontsize(POINTS)
    _mark(figure)
    plot = float(height) if before <= width else float(height) * max(width / float(before), 0.6)
    figure.set_size_inches(width, plot)
    for legend in list(figure.legends):
        handles = [handle for handle in legend.legend_handles if handle is not None]
        labels = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        columns = _legend(figure, handles, labels)
        figure.set_size_inches(width, plot + 0.15 * (-(-len(labels) // columns) - 1))
    figure.draw_without_rendering()


def _legend(figure: Figure, handles: list[Artist], labels: list[str]) -> int:
    """Draw a legend below no wider than the figure, in as few lines as that takes; names are cut where they must be.

    Returns:
        The number of its columns.
    """
    columns, most = 3, max(map(len, labels))
    while True:
        texts = [label if len(label) <= most else f"{label[: most - 1]}…" for label in labels]
        made = figure.legend(handles, texts, loc="outside lower center", ncols=columns, handlelength=2.0)
        figure.draw_without_rendering()
        if made.get_window_extent().width <= figure.bbox.width or (columns, most) == (1, 2):
            return columns
        made.remove()
        columns, most = max(columns - 1, 1), most if columns > 1 else most - 1


def _mark(figure: Figure) -> None:
    """Give the lines of every colour a mark of their own, also those without one: some along their way. A figure
    that has several marks keeps them.
    """
    if len({line.get_marker() for axes in figure.axes for line in axes.get_lines()} - {None, "None", ""}) > 1:
        return
    marks: dict[object, str] = {}
    for axes in figure.axes:
        shown = [line for line in axes.get_lines() if line.get_marker() not in (None, "None", "")]
        named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        for line in dict.fromkeys([*named, *shown]):
            mark = marks.setdefault(line.get_color(), MARKS[len(marks) % len(MARKS)])
            if line not in shown:
                line.set_markevery((0.03 * len(marks), 0.3))
            line.set_marker(mark)
            line.set_markersize(4.5)
    for legend in figure.legends:
        for handle in legend.legend_handles:
            if isinstance(handle, Line2D) and handle.get_color() in marks:
                handle.set_marker(marks[handle.get_color()])
