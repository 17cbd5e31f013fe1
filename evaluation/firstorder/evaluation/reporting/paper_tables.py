"""The tables of an item of the papers: rows of one value per unit, and those that runs give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstorder.evaluation.reporting import summary, transfer_outcomes
from firstorder.evaluation.reporting.curve import norms
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run

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
        return float(np.nanmean(self.values)) if self.known else math.nan

    @property
    def known(self) -> int:
        """How many units have a value."""
        return int((~np.isnan(self.values)).sum())


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
    seeds = len(run.facts["specification"]["seeds"])
    images = f"{run.facts['data']['count']} images of {run.facts['data']['name']}"
    return f"{model}, {images}" + f", {seeds} seeds" * (seeds > 1)
