"""The comparison's files: results.json, two CSV tables, a Markdown page and a picture. Ratios only."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from firstorder.attacks.distribution import versions
from firstorder.evaluation.bench.comparison import Steps, Verdicts
from firstorder.evaluation.bench.contenders import STEPS, VERDICTS, missing
from firstorder.evaluation.reporting import document, tables
from firstorder.evaluation.reporting.bars import Bar, bar_chart
from firstorder.files import replacing, write_text

PACKAGES = ("torch", "torchattacks", "adversarial-robustness-toolbox", "foolbox", "adv-lib")
OURS, OTHERS = "#3b6fb6", "#8a8f98"


class Sheet(NamedTuple):
    """A table of text: a title, headings, and rows of as many cells; the first column is names."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that one run of the comparison found.

    Attributes:
        steps, verdicts: per model; per model and radius.
        threads: of torch.
        step_rounds, verdict_rounds: paired rounds that medians are taken of.
    """

    steps: Sequence[Steps]
    verdicts: Sequence[Verdicts]
    threads: int
    step_rounds: int
    verdict_rounds: int

    def absent(self) -> list[str]:
        """What was left out because its package is not installed."""
        return sorted({name for name in (*STEPS, *VERDICTS) if missing(name) is not None})


def sheets(comparison: Comparison) -> list[Sheet]:
    """The tables: the cost of a step on every model, then one per verdict."""
    found = []
    if comparison.steps:
        names = [cost.name for cost in comparison.steps[0].costs]
        headings = ["contender"]
        columns: list[dict[str, str]] = []
        for part in comparison.steps:
            headings += [f"{part.scene.name}, batch {part.scene.step.images}", "range", "memory"]
            costs = {cost.name: cost for cost in part.costs}
            columns += [
                {name: f"{cost.median:.2f}" for name, cost in costs.items()},
                {name: f"{cost.low:.2f}-{cost.high:.2f}" for name, cost in costs.items()},
                {name: f"{ratio:.2f}" for name, ratio in part.memory.items()},
            ]
        title = f"time per step and peak memory / bare step's, median of {comparison.step_rounds} paired rounds"
        lines = [(name, *(column[name] for column in columns)) for name in names]
        found.append(Sheet(title, tuple(headings), lines))
    for known in comparison.verdicts:
        rounds = "one round" if comparison.verdict_rounds == 1 else f"median of {comparison.verdict_rounds} rounds"
        title = (
            f"to verdict, {known.scene.name}, {known.setting.label()}, {rounds}; the prepared model's differ on "
            f"{100 * known.differing:.1f} % of the images"
        )
        rows = [
            (
                row.name,
                f"{row.speed:.1f}",
                f"{100 * row.robust:.1f} %",
                "" if math.isnan(row.gradients) else f"{row.gradients:.1f}",
                f"{100 * row.verified:.0f} %",
                f"{row.memory:.2f}",
            )
            for row in known.rows
        ]
        measured = ("times faster than torchattacks", "robust accuracy", "gradients", "verified", "memory")
        found.append(Sheet(title, ("contender", *measured), rows))
    return found


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files into `folder`; their paths, the page first."""
    paths = [folder / name for name in ("bench.md", "results.json", "steps.csv", "verdicts.csv", "bench.png")]
    page, results, steps, verdicts, picture = paths
    write_text(page, _markdown(comparison))
    record = {"versions": _versions(), **dataclasses.asdict(comparison), "absent": comparison.absent()}
    write_text(results, json.dumps(_finite(record), indent=2) + "\n")
    write_text(
        steps,
        tables.csv_text(
            ("model", "batch", "steps", "contender", "median", "low", "high", "memory"), _step_rows(comparison)
        ),
    )
    headings = (
        "model",
        "eps_255",
        "steps",
        "images",
        "contender",
        "speed",
        "robust",
        "gradients",
        "verified",
        "memory",
    )
    write_text(verdicts, tables.csv_text(headings, _verdict_rows(comparison)))
    draw(comparison, picture)
    return [*paths, _page(comparison, folder)]


def _page(comparison: Comparison, folder: Path) -> Path:
    """Write bench.html."""
    drawings = []
    for i, part in enumerate(comparison.steps, 1):
        step = {cost.name: Bar(cost.median, cost.low, cost.high, _ours(cost.name)) for cost in part.costs}
        drawings.append(_drawn(step, "time / bare step; lines span the rounds", folder, f"step-{i}", part.scene.name))
    for i, known in enumerate(comparison.verdicts, 1):
        speed = {row.name: Bar(row.speed, row.speed, row.speed, _ours(row.name)) for row in known.rows}
        name = f"{known.scene.name}, {known.setting.label()}"
        drawings.append(_drawn(speed, "times faster than torchattacks", folder, f"verdict-{i}", name))
    parts = [document.Part(anchor="bars", title="Bars", drawings=drawings)]
    for i, sheet in enumerate(sheets(comparison), 1):
        table = document.Table(title="", header=sheet.headings, rows=sheet.rows)
        parts.append(document.Part(anchor=f"table-{i}", title=f"Table {i}", text=sheet.title, tables=[table]))
    lead = f"{', '.join(f'{k} {v}' for k, v in _versions().items())}; threads: {comparison.threads}."
    left = [f"Left out, as not installed: {', '.join(absent)}"] if (absent := comparison.absent()) else []
    title = "Speed beside other packages"
    return document.write(
        folder / "bench.html", over="firstorder · bench", title=title, lead=lead, parts=parts, notices=left
    )


def _drawn(bars: dict[str, Bar], across: str, folder: Path, name: str, title: str) -> document.Drawing:
    return document.drawn(
        lambda width: bar_chart(bars, across, mark=1.0, width=width), folder / "figures", name, title=title
    )


def _ours(name: str) -> bool:
    return "PGD of ENGM" in name or name.startswith(("firstorder", "inner"))


def draw(comparison: Comparison, path: Path) -> None:
    """Bars: the cost of a step, shorter is better, and how many times faster the verdict is, longer is better."""
    panels: list[tuple[str, str, dict[str, float], float]] = []
    for part in comparison.steps:
        title = f"{part.scene.name}: a step"
        panels.append((title, "time / bare step", {cost.name: cost.median for cost in part.costs}, 1.0))
    for found in comparison.verdicts:
        title = f"{found.scene.name}: verdict\n{found.setting.label()}"
        panels.append((title, "times faster than torchattacks", {row.name: row.speed for row in found.rows}, 1.0))
    columns = 2
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.6 * columns, 3.4 * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, label, values, unit) in zip(grid.flat, panels, strict=False):
        colors = [OURS if _ours(name) else OTHERS for name in values]
        bars = axes.barh(list(values), list(values.values()), color=colors, height=0.7)
        axes.axvline(unit, color="black", linewidth=0.8, linestyle="--")
        legible = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the dashed line
        axes.bar_label(bars, fmt="%.2f" if "step" in label else "%.1f", fontsize=8, padding=2, bbox=legible)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(label, fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _markdown(comparison: Comparison) -> str:
    threads = f"{comparison.threads} thread{'s' if comparison.threads > 1 else ''}"
    lines = [
        "# Speed beside other packages",
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in _versions().items())}. {threads}.",
        "",
    ]
    if absent := comparison.absent():
        lines += [f"Left out, as not installed: {', '.join(absent)}.", ""]
    for sheet in sheets(comparison):
        lines += [f"**{sheet.title}**", "", tables.markdown(sheet.headings, sheet.rows), ""]
    return "\n".join([*lines, "![bars](bench.png)", ""])


def _step_rows(comparison: Comparison) -> list[tuple[object, ...]]:
    return [
        (
            part.scene.name,
            part.scene.step.images,
            part.scene.step.steps,
            c.name,
            c.median,
            c.low,
            c.high,
            part.memory[c.name],
        )
        for part in comparison.steps
        for c in part.costs
    ]


def _verdict_rows(comparison: Comparison) -> list[tuple[object, ...]]:
    return [
        (part.scene.name, part.setting.eps, part.setting.steps, part.setting.images, *dataclasses.astuple(row))
        for part in comparison.verdicts
        for row in part.rows
    ]


def _finite(tree: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(tree, float) and math.isnan(tree):
        return None
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _versions() -> dict[str, str]:
    return versions(PACKAGES) | {"python": platform.python_version()}
