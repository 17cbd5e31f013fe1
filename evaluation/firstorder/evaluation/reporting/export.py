"""What a run gives to others: its tables, its record, RobustBench's model_info, and the papers to be cited."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from firstorder.evaluation.names.packaged import ASSETS
from firstorder.evaluation.reporting import leaderboard as boards
from firstorder.evaluation.reporting import provenance, summary
from firstorder.evaluation.reporting.record import bibtex, record
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run

SCHEMA = ASSETS / "schemas/record-1.json"

DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet": "imagenet"}
"""RobustBench's names of data sets."""


def leaderboard(run: Run, info: Mapping[str, Mapping[str, Any]] | None = None) -> Sheet:
    """Every model at every radius, the most robust first; `info` as in `leaderboard.rows`."""
    return boards.sheet(boards.rows(run, info or {}), leaderboard_title(run))


def leaderboard_title(run: Run) -> str:
    """What the leaderboard of a run shows."""
    return f"Robust accuracy, {_threat(run)}, worst case of all attacks"


def attacks(run: Run) -> Sheet:
    """Every attack on every model at every radius."""
    percent, size = ".1f", ".3g"
    columns = (
        Column("model"),
        Column("attack"),
        Column("ε", radius),
        Column("robust, %", percent),
        Column("95 % low", percent),
        Column("95 % high", percent),
        Column("images", "d"),
        Column("forwards", percent),
        Column("backwards", percent),
        Column("L∞", size),
        Column("L2", size),
    )
    rows = [
        (
            score.model,
            one.attack,
            score.eps,
            100 * one.robust.value,
            *(100 * end for end in one.robust.interval),
            one.robust.count,
            one.forwards,
            one.backwards,
            one.linf,
            one.l2,
        )
        for score in summary.leaderboard(summary.load(run), run.facts)
        for one in score.attacks
    ]
    return Sheet("attacks", f"Robust accuracy by attack, {_threat(run)}", columns, rows)


TABLES: dict[str, Callable[[Run], Sheet]] = {
    "leaderboard": leaderboard,
    "attacks": attacks,
    "protocol": provenance.protocol,
    "provenance": provenance.provenance,
    "limits": provenance.limits,
}
"""The tables of a run, by name."""

TEXTS: dict[str, Callable[[Run], str]] = {
    "json": lambda run: record(run).model_dump_json(indent=2) + "\n",
    "schema": lambda _: SCHEMA.read_text(encoding="utf-8"),
    "bibtex": bibtex,
}
"""Forms of a whole run."""


def text(run: Run, form: str, name: str = "leaderboard") -> str:
    """A run in a form of `sheets.FORMS`, which are those of one of its tables, or of `TEXTS`.

    Raises:
        ValueError: a run of another version.
    """
    if form in TEXTS:
        return TEXTS[form](run)
    found: str = getattr(TABLES[name](run), form)()
    return found if found.endswith("\n") else f"{found}\n"


def model_info(run: Run, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """RobustBench's model_info of every model, by DATASET/THREAT/NAME.json: AutoAttack's own figure at the radius, and
    as `external` that of all attacks where it is lower.

    Args:
        run: with AutoAttack at one radius on all images.
        known: what the run does not know, by RobustBench's names: link, name, authors, additional_data, venue ...

    Raises:
        ValueError: no AutoAttack, or several radii.
    """
    facts, out = run.facts, run.store.folder
    standard = [one["name"] for one in facts["attacks"] if one["attack"] == "AutoAttack standard"]
    if not standard:
        raise ValueError(
            "RobustBench's model_info holds AutoAttack's figure, and the run has none; add it: firstorder evaluate "
            f"--out {out} --attack autoattack"
        )
    if len(summary.radii(facts)) != 1:
        raise ValueError(
            "RobustBench's model_info is of one radius, and the run has several; make a run of one: firstorder "
            f"evaluate --out {out} --only --eps ..."
        )
    found, models = {}, {one["name"]: one for one in facts["models"]}
    for score in summary.leaderboard(summary.load(run), facts):
        (own,) = (one for one in score.attacks if one.attack == standard[0])
        data = DATASETS.get(facts["data"]["spec"].partition(":")[0], facts["data"]["spec"])
        low, high = own.robust.interval
        info = {
            "link": "",
            "name": score.model,
            "authors": "",
            "additional_data": None,
            "number_forward_passes": 1,
            "dataset": data,
            "venue": "",
            "architecture": models[score.model]["architecture"],
            "eps": radius(score.eps),
            "clean_acc": f"{100 * score.clean.value:.2f}",
            "reported": "" if (figure := models[score.model].get("reported")) is None else f"{figure:.2f}",
            "autoattack_acc": f"{100 * own.robust.value:.2f}",
        }
        if score.robust.value < own.robust.value:
            info["external"] = f"{100 * score.robust.value:.2f}"
        info["footnote"] = f"On {own.robust.count} images; 95 % interval {100 * low:.2f} to {100 * high:.2f}."
        file = "".join(char if char.isalnum() or char in "._-" else "-" for char in score.model).strip(".-") or "model"
        found[f"{data}/{facts['specification']['norm']}/{file}.json"] = {**info, **(known or {})}
    return found


def written(info: Mapping[str, Any]) -> str:
    """A model's model_info as RobustBench writes it."""
    return json.dumps(info, indent=2) + "\n"


def _threat(run: Run) -> str:
    return f"{run.facts['specification']['norm']}, {run.facts['data']['count']} images of {run.facts['data']['spec']}"
