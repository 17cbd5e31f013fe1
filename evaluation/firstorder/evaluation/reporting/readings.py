"""What the figures of a table say of a paper's claims: agrees, differs or undecided, with an interval for each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from firstorder.evaluation.names.papers import Claim, Item, Reading
from firstorder.evaluation.reporting import intervals, summary, transfer_outcomes
from firstorder.evaluation.reporting.curve import norms
from firstorder.evaluation.reporting.tables import csv_text, markdown, radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

FILE = "reading.json"

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's quantile of a 95 % interval, of 1 to 30 degrees of freedom."""

Values = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of an item's table.

    Attributes:
        name: as the claims call it.
        values: one per unit, (N,): images, or seeds of training; NaN where the unit has none. Rows of a table have the
            same units.
    """

    name: str
    values: Values

    @property
    def mean(self) -> float:
        """Over the units that have a value; NaN without any."""
        known = self.values[~np.isnan(self.values)]
        return float(known.mean()) if len(known) else math.nan


@dataclass(frozen=True, eq=False)
class Table:
    """Rows about one model, one source or one configuration.

    Attributes:
        title: what it is about.
        unit: of the values.
        binary: the values are 0 and 100, or means of such over seeds and targets.
    """

    title: str
    unit: str
    rows: tuple[Row, ...]
    binary: bool = True

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"the table has no row {name!r}; it has {', '.join(row.name for row in self.rows)}")


@dataclass(frozen=True)
class Finding:
    """What a table says of a claim.

    Attributes:
        says: the claim.
        value, low, high: the contrast that should be above 0, or within bounds, and its 95 % interval.
        reading: what follows.
    """

    says: str
    value: float
    low: float
    high: float
    reading: Reading


def interval(first: Values, second: Values, *, binary: bool = False) -> tuple[float, float, float]:
    """The mean of first - second over the units (N,) that have both, and its 95 % interval.

    For outcomes of 0 and 100 that of Newcombe for paired rates, else Student's.
    """
    known = ~(np.isnan(first) | np.isnan(second))
    a, b = first[known], second[known]
    n = len(a)
    if n == 0:
        return math.nan, -math.inf, math.inf
    d = a - b
    if binary and set(np.unique([a, b])) <= {0.0, 100.0}:
        counts = [int(((a > 50) == x).__and__((b > 50) == y).sum()) for x in (True, False) for y in (True, False)]
        low, high = intervals.paired(*counts)
        return float(d.mean()), 100 * low, 100 * high
    if n == 1:
        return float(d[0]), -math.inf, math.inf
    half = (STUDENT[n - 2] if n - 1 <= len(STUDENT) else intervals.Z) * float(d.std(ddof=1)) / math.sqrt(n)
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


def read(claim: Claim, table: Table) -> Finding:
    """What a table says of a claim.

    Larger agrees where the whole interval is above 0 and differs where all of it is below; equal agrees where it lies
    within the bounds and differs where it lies beyond. An order agrees where its ends do and no neighbours differ, and
    differs where some neighbours or the ends do. Everything else is undecided.
    """
    if claim.rising or claim.falling:
        return _order(claim, table)
    if claim.same:
        value, low, high = interval(_side(claim.same, table), _side(claim.as_, table), binary=table.binary)
        inside, beyond = -claim.within <= low <= high <= claim.within, low > claim.within or high < -claim.within
        return Finding(claim.says, value, low, high, "agrees" if inside else "differs" if beyond else "undecided")
    more, than = _side(claim.more, table), claim.times * _side(claim.than, table)
    value, low, high = (found - claim.by for found in interval(more, than, binary=table.binary))
    return Finding(claim.says, value, low, high, _above(low, high))


def together(readings: Sequence[str]) -> Reading:
    """The reading of several: differs if any does, agrees if all do."""
    if "differs" in readings:
        return "differs"
    return "agrees" if readings and set(readings) == {"agrees"} else "undecided"


def _above(low: float, high: float) -> Reading:
    return "agrees" if low > 0 else "differs" if high < 0 else "undecided"


def _side(named: str | tuple[str, str] | float, table: Table) -> Values:
    if isinstance(named, float):
        return np.full(len(table.rows[0].values), named)
    if isinstance(named, str):
        return table.row(named).values
    return table.row(named[0]).values - table.row(named[1]).values


def _order(claim: Claim, table: Table) -> Finding:
    names = claim.rising or claim.falling[::-1]
    rows = [table.row(name).values for name in names]
    steps = [_above(*interval(b, a, binary=table.binary)[1:]) for a, b in pairwise(rows)]
    value, low, high = interval(rows[-1], rows[0], binary=table.binary)
    ends = _above(low, high)
    return Finding(claim.says, value, low, high, "differs" if "differs" in steps else ends)


# --- tables of runs


def accuracies(run: Run, *, worst: bool = False) -> list[Table]:
    """The accuracy of every model under every attack and radius, in percent; of several seeds the mean.

    Args:
        run: with finished cells.
        worst: whether to add, for several seeds, the lowest run and the runs merged: an image is right if it is in all.
    """
    found = []
    facts = run.facts
    rows = summary.load(run)
    rows["right"] = 100.0 * (rows["clean"] & ~rows["success"])
    several = len(facts["specification"]["eps"]) > 1
    for model in (one["name"] for one in facts["models"]):
        own, made = rows[rows["model"] == model], list[Row]()
        for attack in (one["name"] for one in facts["attacks"]):
            for eps in facts["specification"]["eps"]:
                these = own[(own["attack"] == attack) & (own["eps"] == eps)]
                if these.empty:
                    continue
                name = f"{attack}, ε = {radius(eps)}" if several else attack
                seeds = these.pivot_table(index="seed", columns="example", values="right").to_numpy()
                made.append(Row(name, seeds.mean(0)))
                if worst:
                    made.append(Row(f"{name}, lowest run", seeds[seeds.mean(1).argmin()]))
                    made.append(Row(f"{name}, merged", seeds.min(0)))
        found.append(Table(_title(model, run), "accuracy, %", tuple(made)))
    return found


def successes(run: Run) -> list[Table]:
    """The success of examples on other models than those that they were made on, in percent, by source."""
    groups = transfer_outcomes.grouped(transfer_outcomes.outcomes(run))
    steps = {one.steps for (one, *_) in groups if one.attack != transfer_outcomes.CLEAN}
    tables: dict[str, list[Row]] = {}
    for group in groups:
        one = group[0]
        if one.attack == transfer_outcomes.CLEAN:
            continue
        name = f"{one.attack}, {one.steps} steps" if len(steps) > 1 else one.attack
        made = tables.setdefault(one.source, [])
        defences = dict.fromkeys(target.partition(" | ")[2] for target in one.fooled)
        for defence in defences:
            on = [f"{target} | {defence}" if defence else target for target in one.bare]
            shares = [np.mean([own.fooled[target][own.right] for target in on], 0) for own in group]
            made.append(Row(f"{name} | {defence}" if defence else name, 100 * np.mean(shares, 0)))
    return [Table(f"from {_title(source, run)}", "success, %", tuple(rows)) for source, rows in tables.items()]


def sizes(run: Run) -> list[Table]:
    """The norm of the smallest perturbation of every image that attacks of minimum norm found, by model."""
    tables: dict[str, list[Row]] = {}
    for one in norms(run):
        values = np.where(np.isfinite(one.norm), one.norm, np.nan)
        tables.setdefault(one.model, []).append(Row(f"{one.attack}, {one.steps} steps", values))
    return [Table(_title(model, run), "mean norm", tuple(rows), binary=False) for model, rows in tables.items()]


def _title(model: str, run: Run) -> str:
    return f"{model}, {run.facts['data']['count']} images of {run.facts['data']['name']}"


# --- results


@dataclass(frozen=True)
class Result:
    """What an item found.

    Attributes:
        reading: of all claims.
        tables: per table its title, unit, and mean by row.
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
    found = [[read(claim, table) for claim in item.claims] for table in tables]
    return Result(
        reading=together([one.reading for own in found for one in own]),
        tables=[
            {"title": t.title, "unit": t.unit, "rows": {row.name: _short(row.mean) for row in t.rows}} for t in tables
        ],
        findings=[[_plain(one) for one in own] for own in found],
        small=small,
        version=version,
        count=count,
    )


def _short(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _plain(one: Finding) -> dict[str, Any]:
    """A finding as JSON has it: None for what is not finite."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(one).items()}


def write(name: str, item: Item, tables: Sequence[Table], found: Result, out: Path) -> list[Path]:
    """Write a page of text, the table and a picture of an item into a folder; their paths."""
    rows = [
        (table.title, row.name, table.unit, row.mean, int((~np.isnan(row.values)).sum()), item.published.get(row.name))
        for table in tables
        for row in table.rows
    ]
    write_text(out / "table.csv", csv_text(("table", "row", "unit", "mean", "units", "paper"), rows))
    write_text(out / FILE, json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    write_text(out / "reading.md", text(name, item, tables, found))
    figure = picture(item, tables)
    with replacing(out / "table.png") as temporary:
        figure.savefig(temporary, dpi=150)
    return [out / one for one in ("reading.md", "table.csv", "table.png", FILE)]


def text(name: str, item: Item, tables: Sequence[Table], found: Result) -> str:
    """An item's tables and readings as Markdown."""
    parts = [f"# {name}: {item.item}, {item.shows}", f"**{found.reading}**" + " (at its smallest size)" * found.small]
    for table, own in zip(tables, found.findings, strict=True):
        lines = [(row.name, f"{row.mean:.4g}", theirs(item, row.name)) for row in table.rows]
        parts += [f"## {table.title}", markdown(("row", table.unit, "paper"), lines)]
        parts.append(markdown(("claim", "difference", "95 %", "reading"), [words(one) for one in own]))
    return "\n\n".join(parts) + "\n"


def words(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A finding as texts: the claim, the difference, its interval, the reading."""
    value, low, high = ("–" if one[key] is None else f"{one[key]:.4g}" for key in ("value", "low", "high"))
    return one["says"], value, f"{low} to {high}", one["reading"]


def theirs(item: Item, row: str) -> str:
    """The paper's figure of a row; empty where it has none."""
    value = item.published.get(row)
    return "" if value is None else f"{value:g}"


def picture(item: Item, tables: Sequence[Table]) -> Figure:
    """The mean of every row with its interval, and the paper's, a panel for each table."""
    tallest = max(len(table.rows) for table in tables)
    figure = Figure(figsize=(6.4 * len(tables), 1.2 + 0.32 * tallest), layout="constrained")
    panels: Any = figure.subplots(1, len(tables), squeeze=False)
    for axes, table in zip(panels[0], tables, strict=True):
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
