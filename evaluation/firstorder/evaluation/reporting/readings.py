"""What the figures of a table say of a paper's claims: agrees, differs or undecided, with an interval for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from firstorder.evaluation.names.papers import Claim, Item, Reading
from firstorder.evaluation.reporting import intervals
from firstorder.evaluation.reporting.paper_tables import Table, Values
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.evaluation.runs.seals import from_json, to_json
from firstorder.files import replacing, write_text

FILE = "reading.json"

CLAIM = ("claim", "difference", "95 %", "counts from", "reading")
"""The columns of what is found of claims."""


@dataclass(frozen=True)
class Finding:
    """What a table says of a claim.

    Attributes:
        says: the claim.
        value, low, high: the contrast that should be above 0, or within bounds, and its 95 % interval.
        reading: what follows.
        least: the smallest difference that counts, where one is known.
    """

    says: str
    value: float
    low: float
    high: float
    reading: Reading
    least: float | None = None


def interval(first: Values, second: Values, *, binary: bool = False) -> tuple[float, float, float]:
    """The mean of first - second over the units (N,) that have both, and its 95 % interval.

    For outcomes of 0 and 100 that of Newcombe for paired rates, else Student's. Shares of several outcomes that are all
    the same on both sides have no spread to tell by: they count as outcomes.
    """
    known = ~(np.isnan(first) | np.isnan(second))
    a, b = first[known], second[known]
    n = len(a)
    if n == 0:
        return math.nan, -math.inf, math.inf
    d = a - b
    if binary and (set(np.unique([a, b])) <= {0.0, 100.0} or not d.any()):
        counts = [int((((a > 50) == x) & ((b > 50) == y)).sum()) for x in (True, False) for y in (True, False)]
        low, high = intervals.paired(*counts)
        return float(d.mean()), 100 * low, 100 * high
    if n == 1:
        return float(d[0]), -math.inf, math.inf
    half = intervals.student(n - 1) * float(d.std(ddof=1)) / math.sqrt(n)
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


def read(claim: Claim, table: Table, published: Mapping[str, float] | None = None) -> Finding:
    """What a table says of a claim.

    Larger agrees where the whole interval is above 0. It differs where all of it is below 0, or below the smallest
    difference that counts: then there is none. Equal agrees where the interval lies within the bounds and differs where
    it lies beyond. An order is read off its ends, and differs where some neighbours do. All else is undecided.

    Args:
        claim: of the paper.
        table: what was found here.
        published: the paper's figures by row, which say what difference counts.
    """
    if claim.same:
        value, low, high = interval(_side(claim.same, table), _side(claim.as_, table), binary=table.binary)
        inside, beyond = -claim.within <= low <= high <= claim.within, low > claim.within or high < -claim.within
        return Finding(claim.says, value, low, high, "agrees" if inside else "differs" if beyond else "undecided")
    steps = []
    if claim.rising or claim.falling:
        rows = [table.row(name).values for name in claim.rising or claim.falling[::-1]]
        steps = [_above(*interval(b, a, binary=table.binary)[1:]) for a, b in pairwise(rows)]
        more, than = rows[-1], rows[0]
    else:
        more, than = _side(claim.more, table), _side(claim.than, table)
    value, low, high = interval(more, than, binary=table.binary)
    least = claim.smallest(published or {})
    return Finding(
        claim.says, value, low, high, "differs" if "differs" in steps else _above(low, high, least or 0.0), least
    )


def together(readings: Sequence[str]) -> Reading:
    """The reading of several: differs if any does, agrees if all do."""
    if "differs" in readings:
        return "differs"
    return "agrees" if readings and set(readings) == {"agrees"} else "undecided"


def _above(low: float, high: float, least: float = 0.0) -> Reading:
    return "agrees" if low > 0 else "differs" if high < least else "undecided"


def _side(named: str | tuple[str, str] | float, table: Table) -> Values:
    if isinstance(named, float):
        return np.full(len(table.rows[0].values), named)
    if isinstance(named, str):
        return table.row(named).values
    return table.row(named[0]).values - table.row(named[1]).values


# --- results


@dataclass(frozen=True)
class Result:
    """What an item found.

    Attributes:
        reading: of all claims.
        tables: per table its title, unit, mean by row, and of how many units where not all have a value.
        findings: per table its claims.
        small: it was computed at its smallest size, which decides nothing.
        version: of firstorder.
        count: of images, where it was asked for.
    """

    reading: Reading
    tables: list[dict[str, Any]]
    findings: list[list[dict[str, Any]]]
    small: bool
    version: str
    count: int | None = None


def result(item: Item, tables: Sequence[Table], *, small: bool, version: str, count: int | None = None) -> Result:
    """What the tables of an item say of its claims."""
    found = [[read(claim, table, _published(item, table)) for claim in item.claims] for table in tables]
    return Result(
        reading=together([one.reading for own in found for one in own]),
        tables=[
            {
                "title": t.title,
                "unit": t.unit,
                "rows": {row.name: _short(row.mean) for row in t.rows},
                "of": {row.name: row.known for row in t.rows if row.known < len(row.values)},
            }
            for t in tables
        ],
        findings=[[_plain(one) for one in own] for own in found],
        small=small,
        version=version,
        count=count,
    )


def _published(item: Item, table: Table) -> Mapping[str, float]:
    """The paper's figures by row; norms in proportion to those of the table, as networks differ in their size."""
    if item.kind != "norms":
        return item.published
    theirs = sum(item.published.values())
    ours = sum(table.row(name).mean for name in item.published)
    return {name: value * ours / theirs for name, value in item.published.items()}


def _short(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _plain(one: Finding) -> dict[str, Any]:
    """A finding as JSON has it: None for what is not finite."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(one).items()}


def write(name: str, item: Item, made: Sequence[Table], found: Result, out: Path) -> list[Path]:
    """Write a page of text, the table and a picture of an item into a folder; their paths."""
    rows = [
        (table.title, row.name, table.unit, row.mean, row.known, item.published.get(row.name))
        for table in made
        for row in table.rows
    ]
    write_text(out / "table.csv", csv_text(("table", "row", "unit", "mean", "units", "paper"), rows))
    write_text(out / FILE, to_json(asdict(found), name))
    write_text(out / "reading.md", text(name, item, found))
    figure = picture(item, made)
    with replacing(out / "table.png") as temporary:
        figure.savefig(temporary, dpi=150)
    return [out / one for one in ("reading.md", "table.csv", "table.png", FILE)]


def kept(name: str, out: Path) -> dict[str, Any] | None:
    """The result that `write` kept of an item in its folder; None where there is none.

    Raises:
        ValueError: it is damaged, or another item's.
    """
    path = out / FILE
    if not path.exists():
        return None
    found = from_json(path, name)
    if found is None or not found.keys() >= {"reading", "tables", "findings", "small"}:
        raise ValueError(f"{path} is damaged, or no reading of {name}; delete it, then firstorder reproduce {name}")
    return found


def text(name: str, item: Item, found: Result) -> str:
    """What was found of an item, as Markdown."""
    parts = [f"# {name}: {item.item}, {item.shows}", f"**{found.reading}**" + " (at its smallest size)" * found.small]
    for table, own in zip(found.tables, found.findings, strict=True):
        parts += [f"## {table['title']}", *tables(item, table, own)]
    return "\n\n".join(parts) + "\n"


def tables(
    item: Item, table: Mapping[str, Any], findings: Sequence[Mapping[str, Any]], rows: Sequence[str] = ()
) -> list[str]:
    """A table of a result and what it says of the claims, as two tables in Markdown.

    Args:
        item: of the papers.
        table: of the result, with its findings.
        findings: of that table.
        rows: which to show; all by default.
    """
    shown = [words for words in figures(item, table) if not rows or words[0] in rows]
    claims = [words(one) for one in findings]
    return [
        markdown(*_filled(("row", table["unit"], "paper"), shown)),
        markdown(*_filled(CLAIM, claims)),
    ]


def figures(item: Item, table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of a table of a result as texts: name, mean, and the paper's figure.

    A mean says of how many units it is where not all have a value.
    """
    of = table.get("of", {})
    return [
        (
            name,
            ("–" if value is None else f"{value:.4g}") + (f" (of {of[name]})" if name in of else ""),
            f"{item.published[name]:g}" if name in item.published else "",
        )
        for name, value in table["rows"].items()
    ]


def words(one: Mapping[str, Any]) -> tuple[str, ...]:
    """A finding as texts, in the columns of `CLAIM`."""
    value, low, high = ("–" if one[key] is None else f"{round(one[key], 9):.4g}" for key in ("value", "low", "high"))
    least = "" if one.get("least") is None else f"{one['least']:.4g}"
    return one["says"], value, f"{low} to {high}", least, one["reading"]


def _filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that hold nothing."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def picture(item: Item, made: Sequence[Table]) -> Figure:
    """The mean of every row with its interval, and the paper's, a panel for each table."""
    tallest = max(len(table.rows) for table in made)
    figure = Figure(figsize=(6.4 * len(made), 1.2 + 0.32 * tallest), layout="constrained")
    panels: Any = figure.subplots(1, len(made), squeeze=False)
    for axes, table in zip(panels[0], made, strict=True):
        for i, row in enumerate(table.rows):
            zero = np.zeros_like(row.values)
            mean, low, high = interval(row.values, zero)
            reach = [[mean - low], [high - mean]] if math.isfinite(high) else None
            axes.errorbar(mean, i, xerr=reach, fmt="o", color="#3b6fb6", capsize=3, label="here" if not i else None)
            theirs = item.published.get(row.name)
            if theirs is not None:
                axes.plot(theirs, i, marker="D", color="#c2571a", mfc="none", linestyle="none")
        axes.plot([], [], marker="D", color="#c2571a", mfc="none", linestyle="none", label="paper, its own networks")
        axes.set_yticks(range(len(table.rows)), [row.name for row in table.rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{table.unit} (95 % intervals)")
        axes.set_title(table.title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure
