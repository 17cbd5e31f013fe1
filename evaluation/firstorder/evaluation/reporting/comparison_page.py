"""The page, the text and the table of a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from firstorder.evaluation.reporting import document, tables
from firstorder.evaluation.reporting.bars import Bar, difference_chart
from firstorder.evaluation.reporting.comparison import CLEAN, Comparison, Difference, compare
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

EXPLAINED = (
    "Every line is on the same images in both runs. The difference is the second accuracy minus the first, in points; "
    "its 95 % interval is Newcombe's for paired data (1998, method 10), p is the exact p-value of McNemar's test. "
    "Lines without an attack show clean accuracy; a run alone: on so many images it alone is right."
)
UNCHANGED = "Nothing changed in the protocol."

MOST = 24
"""Lines of a figure; with more differences it shows those of all attacks together and of none."""


def write(runs: Mapping[str, Run], out: Path, match: Mapping[str, str] | None = None) -> list[Path]:
    """Write comparison.html and comparison.md into `out`, the differences as CSV and figures/; returns the paths.

    Args:
        runs: the first is compared with each of the others.
        out: the folder.
        match: as in `comparison.compare`.

    Raises:
        ValueError: runs that cannot be compared.
    """
    found = compare(runs, match)
    parts = [(one, *sheets(one, i)) for i, one in enumerate(found, 1)]
    page = document.write(
        out / "comparison.html",
        over="firstorder · comparison of runs",
        title=", ".join(runs),
        lead=EXPLAINED,
        parts=[_part(out / "figures", i, *part) for i, part in enumerate(parts, 1)],
        name=f"{', '.join(runs)} side by side",
    )
    contents = {"comparison.md": markdown(parts)} | {f"{sheet.name}.csv": sheet.csv() for _, sheet, _ in parts}
    for name, text in contents.items():
        write_text(out / name, text)
    return [page, *(out / name for name in contents)]


def sheets(comparison: Comparison, number: int) -> tuple[Sheet, Sheet]:
    """The tables of the comparison that is the `number`-th of a page, from 1: what both found, and what changed."""
    after = f"-{number}" if number > 1 else ""
    return _differences(comparison, f"differences{after}"), _changes(comparison, f"changes{after}")


def markdown(parts: Sequence[tuple[Comparison, Sheet, Sheet]]) -> str:
    """Comparisons with their tables as Markdown."""
    lines = []
    for comparison, found, changed in parts:
        lines += [f"# {tables.escaped(comparison.one)} and {tables.escaped(comparison.other)}", EXPLAINED]
        lines += ["\n".join(f"- {tables.escaped(note)}" for note in comparison.notes)]
        lines += [f"## {tables.escaped(found.title)}", found.markdown(), f"## {tables.escaped(changed.title)}"]
        lines += [changed.markdown() if changed.rows else UNCHANGED]
    return "\n\n".join(lines) + "\n"


def _part(folder: Path, number: int, comparison: Comparison, found: Sheet, changed: Sheet) -> document.Part:
    """A comparison as a section of the page."""
    lines = _lines(comparison.differences)
    shown = document.drawn(
        partial(_chart, lines), folder, f"differences-{number}",
        title="Differences in accuracy", subject=f"{comparison.one} and {comparison.other}",
        caption=f"Accuracy in {comparison.other} minus that in {comparison.one}, in points, with 95 % intervals: right "
        f"of zero {comparison.other} is better.",
    )  # fmt: skip
    tail = changed.html() if changed.rows else f"<p>{UNCHANGED}</p>"
    return document.Part(
        anchor=f"comparison-{number}",
        title=f"{comparison.one} and {comparison.other}",
        notes=comparison.notes,
        drawings=[shown],
        markup=Markup("\n".join((found.html(), tail))),  # sheets escape what they hold
    )


def _lines(differences: Sequence[Difference]) -> dict[str, Bar]:
    """The differences that a figure shows, in points, under their names."""
    if len(differences) > MOST:
        differences = [one for one in differences if one.attack in (CLEAN, TOGETHER)]
    several = len({one.model for one in differences}) > 1
    radii = len({one.eps for one in differences if one.eps is not None}) > 1
    found = {}
    for one in differences:
        what = "clean" if one.eps is None else f"ε = {radius(one.eps)}, " * radii + one.attack
        name = f"{one.model}: {what}" if several else what
        low, high = one.interval
        found[name] = Bar(100 * one.value, 100 * low, 100 * high, one.attack in (CLEAN, TOGETHER))
    return found


def _chart(lines: Mapping[str, Bar], width: float) -> Figure:
    return difference_chart(lines, "difference, points", width=width)


def _differences(comparison: Comparison, name: str) -> Sheet:
    percent, points = ".1f", "+.1f"
    columns = (
        Column("model"),
        Column("attack"),
        Column("ε", radius),
        Column("images", "d"),
        Column(f"{comparison.one}, %", percent),
        Column(f"{comparison.other}, %", percent),
        Column("difference, points", points),
        Column("95 % low", points),
        Column("95 % high", points),
        Column(f"{comparison.one} alone", "d"),
        Column(f"{comparison.other} alone", "d"),
        Column("McNemar p", ".2g"),
    )
    rows = [
        (
            d.model,
            d.attack,
            d.eps,
            d.count,
            *(100 * rate.value for rate in d.rates),
            100 * d.value,
            *(100 * end for end in d.interval),
            d.first,
            d.second,
            d.p,
        )
        for d in comparison.differences
    ]
    title = f"Accuracy in {comparison.one} and {comparison.other} on the same {comparison.shared} images"
    return Sheet(name, title, columns, rows)


def _changes(comparison: Comparison, name: str) -> Sheet:
    columns = (Column("fact"), Column(comparison.one), Column(comparison.other))
    rows = [(change.fact, change.one, change.other) for change in comparison.changes]
    return Sheet(name, f"What changed from {comparison.one} to {comparison.other}", columns, rows)
