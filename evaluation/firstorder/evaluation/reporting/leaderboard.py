"""A leaderboard in RobustBench's columns: a view of runs at one radius."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

AUTOATTACK = "autoattack"
"""The name of the standard AutoAttack among attacks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's line. Accuracies are shares; `robust` by attack; `best_known` after all attacks together.

    `gradients` and `forwards` are backward and forward passes per image, by attack. `reported` is what others published
    at the same radius, as RobustBench does of AutoAttack. `unverified` counts what attacks called broken although the
    model itself is right, or the bounds are left; `doubtful` the images that no attack broke but some met NaN or
    infinite logits or gradients on: neither broken nor robust for sure.
    """

    model: str
    clean: float
    robust: dict[str, float]
    best_known: float
    gradients: dict[str, float]
    forwards: dict[str, float]
    reported: float | None
    images: int
    unverified: int
    doubtful: int
    architecture: str
    venue: str


def rows(run: Run, info: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The models of a run at its only radius, of finished cells.

    Args:
        run: with one radius.
        info: RobustBench's model_info, by the model's name in the run.
    """
    models = {model["name"]: model for model in run.facts["models"]}
    labels = {attack["name"]: attack["label"] for attack in run.facts["attacks"]}
    found = []
    for line in summary.leaderboard(summary.load(run), run.facts):
        model, known = models[line.model], info.get(line.model, {})
        by = {labels[name]: result for name in labels for result in line.attacks if result.attack == name}
        attacked = line.clean.value
        found.append(
            Row(
                model=str(known.get("name") or line.model),
                clean=line.clean.value,
                robust={label: one.robust.value for label, one in by.items()},
                best_known=line.robust.value,
                gradients={label: one.backwards * attacked if attacked else 0.0 for label, one in by.items()},
                forwards={label: one.forwards * attacked if attacked else 0.0 for label, one in by.items()},
                reported=None if model["reported"] is None else model["reported"] / 100,
                images=line.robust.count,
                unverified=sum(one.unverified for one in by.values()),
                doubtful=line.doubtful,
                architecture=str(known.get("architecture") or model["architecture"]),
                venue=str(known.get("venue") or ""),
            )
        )
    return found


def write(rows: Sequence[Row], out: Path, *, facts: dict[str, Any]) -> list[Path]:
    """Write leaderboard.md, .csv and .json to `out`; returns the paths."""
    header, lines = table(rows)
    passes = [
        [row.model, name, f"{row.gradients[name]:.0f}", f"{row.forwards[name]:.0f}"]
        for row in rank(rows)
        for name in row.robust
    ]
    protocol = ", ".join(f"{name} {value}" for name, value in facts.items())
    contents = {
        "leaderboard.md": f"{markdown(header, lines, words=2)}\n\nAccuracies in percent; {protocol}. Doubtful images "
        "met NaN: neither broken nor robust for sure, counted as robust. Passes per image:\n\n"
        + markdown(["model", "attack", "backward", "forward"], passes, words=2)
        + "\n",
        "leaderboard.csv": csv_text(header, lines),
        "leaderboard.json": json.dumps({**facts, "models": [vars(row) for row in rank(rows)]}, indent=2) + "\n",
    }
    for name, content in contents.items():
        write_text(out / name, content)
    return [out / name for name in contents]


def rank(rows: Sequence[Row]) -> list[Row]:
    """Best known robust accuracy first, then clean accuracy, then name."""
    return sorted(rows, key=lambda row: (-row.best_known, -row.clean, row.model))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines, ranked, in percent."""
    attacks = [name for name in dict.fromkeys(name for row in rows for name in row.robust) if name != AUTOATTACK]
    header = ["rank", "model", "clean", "AutoAttack", "AutoAttack (reported)", "best known", *attacks]
    lines = [
        [
            str(place),
            row.model,
            _percent(row.clean),
            _percent(row.robust.get(AUTOATTACK)),
            _percent(row.reported),
            _percent(row.best_known),
            *[_percent(row.robust.get(name)) for name in attacks],
            str(row.images),
            str(row.unverified),
            str(row.doubtful),
            row.architecture,
            row.venue,
        ]
        for place, row in enumerate(rank(rows), 1)
    ]
    return [*header, "images", "unverified", "doubtful", "architecture", "venue"], lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
