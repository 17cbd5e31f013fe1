"""A leaderboard in RobustBench's columns: a view of runs, radius by radius."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from firstorder.evaluation.names.numbers import number, radius
from firstorder.evaluation.reporting import summary, trust
from firstorder.evaluation.reporting.intervals import LEVEL, mcnemar
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.evaluation.reporting.tables import radius as shown
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

AUTOATTACK = "autoattack"
"""The name of the standard AutoAttack among attacks."""

DISTRUST = "not to be trusted"
"""The column that says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's line. Accuracies are shares; `robust` by attack; `best_known` after all attacks together.

    Attributes:
        model, name: RobustBench's name of it where that is known, and its name in the run.
        interval: of `best_known`, at 95 %.
        places: the best and the worst rank that it may have: models that an exact McNemar test on their common images
            does not distinguish at 5 % share theirs.
        gradients, forwards: backward and forward passes per image, by attack.
        reported: what others published at the same radius, as RobustBench does of AutoAttack.
        unverified: how many images attacks called broken although the model itself is right, or the bounds are left.
        doubtful: how many no attack broke but some met NaN or infinite logits or gradients on: neither broken nor
            robust for sure.
        link, extra_data: the paper's address, and whether the model saw more data than the data set; empty and None
            where RobustBench's model_info does not say it.
        distrust: why the figure is not to be trusted; empty where nothing is known against it.
    """

    model: str
    name: str
    eps: float
    clean: float
    robust: dict[str, float]
    best_known: float
    interval: tuple[float, float]
    places: tuple[int, int]
    strongest: str
    gradients: dict[str, float]
    forwards: dict[str, float]
    reported: float | None
    images: int
    unverified: int
    doubtful: int
    architecture: str
    parameters: int
    venue: str
    link: str
    extra_data: bool | None
    distrust: str

    @property
    def rate(self) -> summary.Rate:
        """`best_known` with its interval."""
        return summary.Rate(self.best_known, self.images)

    @property
    def place(self) -> str:
        """The rank; a range where it is tied."""
        best, worst = self.places
        return f"{best}" if best == worst else f"{best}–{worst}"


OPTIONAL = ("reported", "distrust", "extra_data", "venue")
"""What a table of models has a column for where it is known of one of them."""


def filled(rows: Sequence[Row]) -> list[str]:
    """Which of `OPTIONAL` are known of a model."""
    return [name for name in OPTIONAL if any(getattr(row, name) not in (None, "") for row in rows)]


def sheet(rows: Sequence[Row], title: str) -> Sheet:
    """A table of models in every form, by radius and rank; see `board`."""
    percent = ".1f"
    columns = (
        Column("rank"),
        Column("model"),
        Column("architecture"),
        Column("strongest attack"),
        Column("not to be trusted"),
        Column("extra data"),
        Column("venue"),
        Column("paper", text=False),
        Column("ε", shown),
        Column("clean, %", percent),
        Column("robust, %", percent),
        Column("95 % low", percent),
        Column("95 % high", percent),
        Column("reported, %", percent),
        Column("images", "d"),
        Column("parameters", "d", text=False),
    )
    values = [
        (
            row.place,
            row.model,
            row.architecture,
            row.strongest,
            row.distrust,
            row.extra_data,
            row.venue,
            row.link,
            row.eps,
            100 * row.clean,
            100 * row.best_known,
            *(100 * end for end in row.interval),
            None if row.reported is None else 100 * row.reported,
            row.images,
            row.parameters,
        )
        for row in sorted(rows, key=lambda row: row.eps)
    ]
    return Sheet("leaderboard", title, columns, values)


def rows(run: Run, info: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The models of a run at its radii, of finished cells.

    Args:
        run: finished or not.
        info: RobustBench's model_info, by the model's name in the run.
    """
    found = summary.load(run)
    return board(found, run.facts, summary.leaderboard(found, run.facts), info, trust.panels(run, found))


def board(
    found: pd.DataFrame,
    facts: Mapping[str, Any],
    scores: Sequence[summary.Score],
    info: Mapping[str, Mapping[str, Any]],
    panels: Sequence[trust.Panel],
) -> list[Row]:
    """The same of what `summary` and `trust` say of the run: by radius, then ranked."""
    lines: list[Row] = []
    reasons = {panel.model: panel.reasons for panel in panels}
    for eps in dict.fromkeys(score.eps for score in scores):
        own = [score for score in scores if score.eps == eps]
        places = _places([summary.robust(found, score.model, eps) for score in own])
        lines += rank(
            [
                _row(score, facts, info.get(score.model, {}), at, reasons.get(score.model, ()))
                for score, at in zip(own, places, strict=True)
            ]
        )
    return lines


def _row(
    line: summary.Score,
    facts: Mapping[str, Any],
    known: Mapping[str, Any],
    places: tuple[int, int],
    reasons: Sequence[str],
) -> Row:
    (model,) = (model for model in facts["models"] if model["name"] == line.model)
    labels = {attack["name"]: attack.get("label", attack["name"]) for attack in facts["attacks"]}
    by = {labels[name]: result for name in labels for result in line.attacks if result.attack == name}
    attacked, extra = line.clean.value, known.get("additional_data")
    return Row(
        model=str(known.get("name") or line.model),
        name=line.model,
        eps=line.eps,
        clean=line.clean.value,
        robust={label: one.robust.value for label, one in by.items()},
        best_known=line.robust.value,
        interval=line.robust.interval,
        places=places,
        strongest=line.attacks[0].attack,
        gradients={label: one.backwards * attacked if attacked else 0.0 for label, one in by.items()},
        forwards={label: one.forwards * attacked if attacked else 0.0 for label, one in by.items()},
        reported=_reported(model, facts, known, line.eps),
        images=line.robust.count,
        unverified=sum(one.unverified for one in by.values()),
        doubtful=line.doubtful,
        architecture=str(known.get("architecture") or model["architecture"]),
        parameters=int(model["parameters"]),
        venue=str(known.get("venue") or ""),
        link=link if (link := str(known.get("link") or "")).startswith(("https://", "http://")) else "",
        extra_data=None if extra is None else extra is True or str(extra).lower() in ("true", "yes", "1"),
        distrust=_distrust(reasons, line),
    )


def _reported(model: Mapping[str, Any], facts: Mapping[str, Any], known: Mapping[str, Any], eps: float) -> float | None:
    """The share that others report at the radius: as the run was given it at its only one, or as RobustBench says."""
    if model.get("reported") is not None and len(set(facts["specification"]["eps"])) == 1:
        return float(model["reported"]) / 100
    figure = known.get("autoattack_acc")
    return float(figure) / 100 if figure and same_radius(known, eps) else None


def same_radius(known: Mapping[str, Any], eps: float) -> bool:
    """Whether RobustBench's figures are at the radius; where it names none, they are taken to be."""
    return abs(radius(known.get("eps") or eps, name="eps") - eps) < 1e-4


def _distrust(reasons: Sequence[str], line: summary.Score) -> str:
    """Why a figure is not to be trusted: the checks that warn, and what was seen under the attacks."""
    doubtful = f"{line.doubtful} robust images met NaN or infinite logits or gradients" if line.doubtful else ""
    return "; ".join(filter(None, (*reasons, doubtful)))


def _places(outcomes: Sequence[pd.Series[bool]]) -> list[tuple[int, int]]:
    """The best and the worst rank of each model, of which images withstand every attack, by example."""
    better = [0] * len(outcomes)
    worse = [0] * len(outcomes)
    for i, j in combinations(range(len(outcomes)), 2):
        pair = pd.concat([outcomes[i], outcomes[j]], axis=1, join="inner").to_numpy(dtype=bool)
        first, second = int((pair[:, 0] & ~pair[:, 1]).sum()), int((pair[:, 1] & ~pair[:, 0]).sum())
        if mcnemar(first, second) < 1 - LEVEL:
            above, below = (i, j) if first > second else (j, i)
            worse[above] += 1
            better[below] += 1
    return [(1 + up, len(outcomes) - down) for up, down in zip(better, worse, strict=True)]


def known_of(path: Path) -> dict[str, Any]:
    """What a file of RobustBench's model_info says.

    Raises:
        ValueError: it holds no facts, or an accuracy or a radius that is none.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("these are no facts of a model")
        figure = found.get("autoattack_acc")
        if figure not in (None, "") and not 0 <= number(str(figure)) <= 100:
            raise ValueError(f"autoattack_acc={figure} is no accuracy in percent")
        if found.get("eps"):
            radius(found["eps"], name="eps")
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; mend it, or leave out --model-info") from None
    return dict(found)


def model_info(facts: Mapping[str, Any], folder: Path | None) -> dict[str, dict[str, Any]]:
    """RobustBench's model_info of the run's models, by name in the run: what FOLDER/DATASET/THREAT/NAME.json says."""
    specification, found = facts["specification"], {}
    zoo = specification.get("zoo") or {}
    for model in facts["models"] if folder is not None else ():
        source, _, name = str(model["spec"]).partition(":")
        threat = zoo.get("threat") or specification["norm"]
        path = folder / (zoo.get("dataset") or "cifar10") / threat / f"{name}.json" if folder else Path()
        if source == "robustbench" and path.is_file():
            found[model["name"]] = known_of(path)
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
            row.distrust,
        ]
        for place, row in enumerate(rank(rows), 1)
    ]
    return [*header, "images", "unverified", "doubtful", "architecture", "venue", DISTRUST], lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
