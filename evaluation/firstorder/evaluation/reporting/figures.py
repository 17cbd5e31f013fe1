"""Figures of a run: curves, overlaps, transfer, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from firstorder.evaluation.reporting.drawing import INK, WIDTH
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.reporting.summary import Curve, Overlap, Rate, Score
from firstorder.evaluation.reporting.tables import radius

COLORS = (
    "#3f7fd6", "#ff6205", "#14a791", "#6b39ff", "#c90846", "#319fbf", "#c02c11", "#f26857", "#4b66ea", "#fc327d",
)  # fmt: skip
"""Of attacks or models, in their order; readable on white and on black; distinct without red or green cones."""

TOGETHER = "all attacks"


class Picture(NamedTuple):
    """An example before and after an attack; images (C, H, W) in [0, 1].

    Attributes:
        label, clean, adversarial: the names of the true class, and of those predicted before and after.
    """

    attack: str
    original: np.ndarray[Any, Any]
    image: np.ndarray[Any, Any]
    label: str
    clean: str
    adversarial: str


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for every name."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def radius_chart(
    curves: Mapping[str, Curve], palette: Mapping[str, str], eps: Sequence[float], *, width: float = WIDTH
) -> Figure:
    """Robust accuracy against the radius; in ink what is not in `palette`. All attacks together with 95 % intervals."""
    figure, axes = _panel(width)
    mixed = any(curve.stairs for curve in curves.values())
    for name, curve in curves.items():
        _line(axes, name, curve, palette.get(name), between=not mixed or curve.stairs)
    ends = [float(curve.at[-1]) for curve in curves.values() if curve.stairs]
    shown = [_intervals(axes, curve, palette.get(name), eps) for name, curve in curves.items()]
    _finish(axes, "radius ε", "robust accuracy, %", end=1.12 * max(eps or ends or [1.0]), low=min(shown, default=0.0))
    axes.set_xticks([0.0, *eps], ["0", *map(radius, eps)]) if len(eps) < 7 else None
    return figure


def query_chart(curves: Mapping[str, Curve], palette: Mapping[str, str], *, width: float = WIDTH) -> Figure:
    """The share of robust examples against forwards and backwards per example; dashed where it is not exact."""
    figure, axes = _panel(width)
    end = 1.3 * max(2.0, *(float(curve.at[-1]) for curve in curves.values()))
    for name, curve in curves.items():
        shown = replace(curve, at=np.append(curve.at, end), robust=np.append(curve.robust, curve.robust[-1]))
        _line(axes, name, shown, palette.get(name))
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    low = min((wilson(float(curve.robust[-1]), curve.count)[0] for curve in curves.values()), default=0.0)
    _finish(axes, "forward + backward passes per example", "robust examples, %", end=end, low=low)
    ticks = [10.0**power for power in range(6) if 10**power <= end]
    axes.set_xticks([0.0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axes.set_xticks([k * tick for tick in ticks for k in range(2, 10) if k * tick <= end], minor=True)
    return figure


def attack_chart(scores: Sequence[Score], palette: Mapping[str, str], *, width: float = WIDTH) -> Figure:
    """The robust accuracy of every model (colours) against every attack (lines) at a radius, with its 95 % interval."""
    found: dict[str, list[float]] = {}
    for score in scores:
        for result in score.attacks:
            found.setdefault(result.attack, []).append(result.robust.value)
    attacks = sorted(found, key=lambda attack: -sum(found[attack]) / len(found[attack]))
    lines = [*attacks, TOGETHER]
    figure = Figure(figsize=(width, 1.2 + 0.3 * len(lines)))
    axes = figure.subplots()
    for i, score in enumerate(scores):
        rates = {result.attack: result.robust for result in score.attacks} | {TOGETHER: score.robust}
        shift = 0.5 * ((i + 0.5) / len(scores) - 0.5)
        for y, name in enumerate(lines):
            if name in rates:
                low, high = rates[name].interval
                color, at = palette[score.model], y + shift
                axes.plot(
                    [100 * low, 100 * high], [at, at], color=color, alpha=0.4, linewidth=3, solid_capstyle="round"
                )
                label = _legend(score.model) if name == TOGETHER else None
                axes.plot([100 * rates[name].value], [at], "o", color=color, markersize=5.5, label=label)
    axes.axhline(len(attacks) - 0.5, color=INK, alpha=0.25, linewidth=0.8)
    axes.set(xlabel="robust accuracy, %", xlim=(-1.5, 101.5), xticks=range(0, 101, 20), ylim=(len(lines) - 0.45, -0.55))
    axes.set_yticks(range(len(lines)), [short(name, 28) for name in lines])
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.1, linewidth=0.8)
    axes.set_axisbelow(True)
    legends(figure, [score.model for score in scores])
    return figure


def overlap_chart(overlap: Overlap, palette: Mapping[str, str], *, width: float = WIDTH) -> Figure:
    """How many examples are broken by exactly the attacks dotted below; how many each breaks, beside its name."""
    attacks, most = list(overlap.broken), max(int((width - 1.9) / 0.34), 3)
    shown, left = list(overlap.sets[: most - 1]), overlap.sets[most - 1 :]
    rest = overlap.rest[0] + sum(count for _, count in left), overlap.rest[1] + len(left)
    if rest[1] == 1 and left:
        shown, rest = [*shown, left[0]], (0, 0)
    sets = [*shown, *([((), rest[0])] if rest[0] else [])]
    total = sum(count for _, count in overlap.sets) + overlap.rest[0] + overlap.robust
    figure = Figure(figsize=(width, 1.9 + 0.23 * len(attacks)))
    grid: Any = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 0.23 * len(attacks)])
    bars, dots = grid
    heights = [count for _, count in sets]
    bars.bar(range(len(sets)), heights, color=INK, alpha=0.75, width=0.62)
    for x, count in enumerate(heights):
        low, high = (total * share for share in wilson(count / total, total))
        bars.plot([x, x], [low, high], color=INK, linewidth=1.2, alpha=0.55)
        bars.annotate(str(count), (x, high), (0, 2), textcoords="offset points", ha="center", fontsize=8.5)
    bars.set(ylabel="examples", yticks=[])
    bars.spines[["left", "bottom"]].set_visible(False)
    bars.tick_params(bottom=False)
    for x, (chosen, _) in enumerate(sets):
        lines = [y for y, attack in enumerate(attacks) if attack in chosen]
        dots.scatter([x] * len(attacks), range(len(attacks)), s=34, color=INK, alpha=0.13, linewidths=0)
        if lines:
            dots.plot([x, x], [lines[0], lines[-1]], color=INK, alpha=0.4, linewidth=1.6, zorder=1)
        dots.scatter([x] * len(lines), lines, s=34, c=[palette[attacks[y]] for y in lines], linewidths=0, zorder=2)
    if rest[0]:
        middle = (len(attacks) - 1) / 2
        dots.text(len(sets) - 1, middle, f"{rest[1]} more sets", rotation=90, ha="center", va="center")
    dots.set_yticks(range(len(attacks)), [f"{short(attack)}  {overlap.broken[attack]}" for attack in attacks])
    dots.set(xticks=[], xlim=(-0.6, max(len(sets), 6) - 0.4), ylim=(len(attacks) - 0.4, -0.6))
    dots.spines[["left", "bottom"]].set_visible(False)
    dots.tick_params(left=False)
    return figure


def transfer_chart(matrices: Mapping[str, Sequence[Sequence[Rate | None]]], models: Sequence[str]) -> Figure:
    """A panel per attack: the model that examples were made on against the target, success in percent."""
    columns = min(len(matrices), 3 if len(models) < 5 else 2)
    lines = -(-len(matrices) // columns)
    side = 0.62 * len(models)
    figure = Figure(figsize=(1.6 + columns * (side + 0.2), 1.1 + lines * (side + 0.35)), layout="compressed")
    grid: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (attack, matrix) in zip(grid.flat, matrices.items(), strict=False):
        values = [[np.nan if rate is None else 100 * rate.value for rate in line] for line in matrix]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="equal")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                color = "white" if value > 55 else "#10151c"
                text = "–" if np.isnan(value) else f"{value:.0f}"
                axes.text(x, y, text, ha="center", va="center_baseline", color=INK if text == "–" else color)
        axes.set_title(attack, fontsize=9.5)
        axes.set_xticks(range(len(models)), [short(model) for model in models], rotation=90)
        axes.set_yticks(range(len(models)), [short(model) for model in models])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_visible(False)
    figure.supxlabel("tried on", fontsize=9.5)
    figure.supylabel("made on", fontsize=9.5)
    return figure


def picture_chart(rows: Sequence[Sequence[Picture | None]], factor: float, *, width: float | None = None) -> Figure:
    """A line per example: as it is, then for every attack the perturbation δ times `factor`, on grey, and its outcome.

    Below a picture is what the model takes it for, bold where it is wrong. A width in inches gives columns theirs.
    """
    columns, (_, high, wide) = 1 + 2 * len(rows[0]), next(p for p in rows[0] if p is not None).original.shape
    unit = 1.12 if width is None else width / columns
    text, most = (0.24 if width is None else 0.2) / unit, max(int(unit / 0.08), 2)
    line = high / wide + text
    figure = Figure(figsize=(unit * columns, unit * (line * len(rows) + text)))
    axes = figure.subplots()
    for y, pictures in enumerate(rows):
        first = next(picture for picture in pictures if picture is not None)
        right = first.clean == first.label
        _image(axes, 0, y * line, first.original, short(first.clean, most), right=right)
        for x, picture in enumerate(pictures):
            if picture is not None:
                delta = 0.5 + factor * (picture.image - picture.original)
                right = picture.adversarial == picture.label
                _image(axes, 1 + 2 * x, y * line, delta, f"δ × {factor:g}")
                _image(axes, 2 + 2 * x, y * line, picture.image, short(picture.adversarial, most), right=right)
    axes.text(0.5, -0.05, "clean", ha="center", fontsize=9.5)
    for x in range(len(rows[0])):
        attack = next(picture.attack for picture in (own[x] for own in rows) if picture is not None)
        axes.text(2 + 2 * x, -0.05, short(attack, 2 * most), ha="center", fontsize=9.5)
    axes.set(xlim=(0, columns), ylim=(line * len(rows), -text), aspect="equal")
    axes.set_axis_off()
    return figure


def _panel(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.5))
    return figure, figure.subplots()


def _intervals(axes: Axes, curve: Curve, color: str | None, eps: Iterable[float]) -> float:
    """Draw the 95 % intervals of a curve at radii, and return the lowest share that they reach."""
    lowest = 1.0
    for at in (0.0, *eps):
        index = int(np.searchsorted(curve.at, at, "right")) - 1
        if curve.stairs or (curve.at[index] == at):
            low, high = wilson(float(curve.robust[index]), curve.count)
            lowest = min(lowest, low)
            if curve.attack is None:
                axes.plot([at, at], [100 * low, 100 * high], color=color or INK, linewidth=3, alpha=0.25, zorder=1)
    return lowest


def _line(axes: Axes, name: str, curve: Curve, color: str | None, *, between: bool = True) -> None:
    """Draw a curve; dotted if it may not be read between its points beside others that may."""
    at, robust = curve.at, 100 * curve.robust
    if len(at) > 400:  # more than pixels
        chosen = np.unique(np.linspace(0, len(at) - 1, 400).round().astype(int))
        at, robust = at[chosen], robust[chosen]
    axes.plot(
        at,
        robust,
        label=_legend(name),
        color=color or INK,
        linewidth=1.6 if color else 2.2,
        linestyle=":" if not between else "-" if curve.exact else (0, (4, 1.6)),
        drawstyle="steps-post" if curve.stairs else "default",
        marker=None if curve.stairs else "o",
        markersize=4,
        zorder=2 if color else 3,
    )


def _finish(axes: Axes, across: str, up: str, *, end: float, low: float) -> None:
    """Label the axes. The upright one ends at 100 and begins at 0, or where all curves with their intervals are higher,
    but is never so short that chance looks like a difference.
    """
    bottom = 20 * int(5 * low) if low > 0.4 else 0
    axes.set(xlabel=across, ylabel=up, xlim=(-0.015 * end, end), ylim=(bottom - 0.015 * (100 - bottom), 101.5))
    axes.set_yticks(range(bottom, 101, 20 if bottom < 40 else 10))
    if bottom:
        axes.set_ylabel(f"{up} (from {bottom})")
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.8)
    axes.set_axisbelow(True)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    legends(figure, axes.get_legend_handles_labels()[1])


def legends(figure: Figure, names: Sequence[str]) -> int:
    """A legend below, in as many columns as the names leave room for; returns how many rows it has."""
    longest = max((min(len(name), 40) for name in names), default=1)
    columns = min(max(int((figure.get_figwidth() - 0.1) / (0.5 + 0.073 * longest)), 1), 3)
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.3, columnspacing=1.3)
    return -(-len(names) // columns)


def _legend(name: str) -> str:
    """A name as a legend shows it: a leading underscore would hide it."""
    return short(f" {name}" if name.startswith("_") else name, 40)


def short(name: str, most: int = 18) -> str:
    """A name, cut to so many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _image(
    axes: Axes, x: float, y: float, image: np.ndarray[Any, Any], caption: str, *, right: bool | None = None
) -> None:
    """Put an image (C, H, W) into the column from x to x + 1, its top at y, with a caption below: a class that is right
    or not, or neither.
    """
    pixels = image.clip(0, 1).transpose(1, 2, 0).squeeze(2 if len(image) == 1 else ())
    bottom = y + image.shape[1] / image.shape[2]
    extent = (x + 0.03, x + 0.97, bottom - 0.03, y + 0.03)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="none", extent=extent)
    color = INK if right is None else "#2f9e68" if right else "#d9485b"
    weight = "bold" if right is False else "normal"
    axes.text(x + 0.5, bottom, caption, ha="center", va="top", fontsize=9.5, color=color, weight=weight)
