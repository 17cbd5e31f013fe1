"""What a run found: robust accuracies, curves over the radius and the number of passes, overlaps, transfer.

Everything is computed from the rows of the cells that are finished, and says on how many examples it is. An example
is broken at a radius by a row that ends in success with a perturbation no larger than it. Examples that the model
misclassifies as they are count as broken at every radius at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE
from firstorder.evaluation.runs.store import Run

COLUMNS = (
    "model", "target", "defence", "attack", "eps", "seed", "example", "label", "clean_label", "success", "doubtful",
    "unverified", "linf", "l2", "forwards", "backwards", "seconds", "stage", "complete", "audit",
)  # fmt: skip
"""What the summary reads; the pictures stay on disk."""

Facts = Mapping[str, Any]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rate:
    """A share of examples, in [0, 1].

    Attributes:
        value: the share.
        count: how many examples it is a share of.
    """

    value: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson; of a mean over seeds, that on the examples."""
        return wilson(min(max(self.value, 0.0), 1.0), self.count)


@dataclass(frozen=True)
class Result:
    """An attack on a model at a radius.

    Attributes:
        attack: its name in the run.
        robust: the robust accuracy; with several seeds, the mean over them.
        worst: the share of examples that withstand every seed.
        seeds: the robust accuracy by seed.
        forwards, backwards: mean number per attacked example.
        linf, l2: median size of the perturbations that succeeded; NaN without any.
        seconds: mean per example, as measured on the machine of the run.
        doubtful: how many examples that count as robust met NaN or infinite logits or gradients, with some seed.
        unverified: how many the attack called broken, with some seed, that are not.
    """

    attack: str
    robust: Rate
    worst: Rate
    seeds: dict[int, Rate]
    forwards: float
    backwards: float
    linf: float
    l2: float
    seconds: float
    doubtful: int
    unverified: int


@dataclass(frozen=True)
class Score:
    """A model at a radius.

    Attributes:
        clean: the accuracy without an attack.
        robust: the share of examples that withstand every attack and seed at this radius and every smaller one.
        attacks: each on its own, the strongest first.
        doubtful: how many of the robust examples met NaN or infinite logits or gradients under some attack.
    """

    model: str
    eps: float
    clean: Rate
    robust: Rate
    attacks: list[Result]
    doubtful: int


@dataclass(frozen=True, eq=False)
class Curve:
    """The share of examples that are still robust, as something grows.

    Attributes:
        attack: whose; None for all attacks together, the worst case of every example.
        at: radii or numbers of passes (K,), increasing from 0.
        robust: the share there (K,), in [0, 1].
        stairs: the share is known everywhere, and constant from one point to the next; else at the points only.
        exact: every example falls where the attack first breaks it; else where the attack ends.
        count: how many examples it is on.
    """

    attack: str | None
    at: Array
    robust: Array
    stairs: bool
    exact: bool
    count: int


@dataclass(frozen=True)
class Overlap:
    """Which attacks break the same of the examples that the model classifies correctly.

    Attributes:
        sets: attacks, and how many examples are broken by exactly these; the largest first.
        rest: how many examples belong to the sets that are left out, and how many sets these are.
        broken: how many examples each attack breaks.
        robust: how many examples no attack breaks.
    """

    sets: list[tuple[tuple[str, ...], int]]
    rest: tuple[int, int]
    broken: dict[str, int]
    robust: int


def load(run: Run) -> pd.DataFrame:
    """The rows of all finished cells on bare targets, with three more columns.

    `clean`: the target is right about the example as it is. `reach`: the smallest radius at which the row breaks the
    example, up to rounding; infinite where it does not. `cost`: forwards and backwards; 0 where nothing was attacked.
    """
    rows = run.table(COLUMNS)
    rows = rows[rows["defence"].isna()].reset_index(drop=True)
    size = rows["linf" if run.facts["specification"]["norm"] == "Linf" else "l2"]
    rows["clean"] = rows["clean_label"] == rows["label"]
    rows["reach"] = ((size - ABSOLUTE) / (1 + RELATIVE)).clip(lower=0)
    rows["reach"] = rows["reach"].where(rows["success"], np.inf).where(rows["clean"], 0.0)
    rows["cost"] = (rows["forwards"] + rows["backwards"]).where(rows["clean"], 0.0)
    return rows


def names(facts: Facts, what: str) -> list[str]:
    """The names of the run's "models" or "attacks", in its order."""
    return [entry["name"] for entry in facts[what]]


def radii(facts: Facts) -> list[float]:
    """The radii of the run, increasing."""
    return sorted(set(facts["specification"]["eps"]))


def leaderboard(rows: pd.DataFrame, facts: Facts) -> list[Score]:
    """Every model at every radius at which there is a finished cell: by radius, then in the order of the models."""
    found = []
    for eps in radii(facts):
        for model in names(facts, "models"):
            mine = _of(rows, model)
            results = [_result(own, eps) for _, own in _attacks(_at(mine, eps), facts)]
            if results:
                clean, within = mine.groupby("example")["clean"].first(), _within(mine, eps)
                robust = _rate(within["reach"] > eps, within["example"], worst=True)
                ranked = sorted(results, key=lambda result: result.robust.value)
                unbroken = (within["reach"] > eps).groupby(within["example"]).all()
                doubtful = int((unbroken & within["doubtful"].groupby(within["example"]).any()).sum())
                found.append(Score(model, eps, Rate(float(clean.mean()), len(clean)), robust, ranked, doubtful))
    return found


def robust(rows: pd.DataFrame, model: str, eps: float) -> pd.Series[bool]:
    """Which examples withstand every attack and seed at this radius and every smaller one, by example."""
    within = _within(_of(rows, model), eps)
    return (within["reach"] > eps).groupby(within["example"]).all()


def radius_curves(rows: pd.DataFrame, facts: Facts, model: str) -> list[Curve]:
    """Robust accuracy against the radius, all attacks together last.

    Attacks with a radius are known at the radii of the run; a minimum-norm attack at all. Together they are known
    everywhere if there is a minimum-norm attack; an attack with a radius then counts from its radius on.
    """
    mine, found = _of(rows, model), []
    for attack, own in _attacks(mine, facts):
        if own["eps"].isna().all():
            found.append(_staircase(attack, own["reach"], own["example"]))
        else:
            found.append(_points(attack, own, facts))
    if mine.empty:
        return found
    if any(curve.stairs for curve in found):
        nearest = mine["reach"].clip(lower=mine["eps"].fillna(0.0)).where(mine["clean"], 0.0)
        fallen = nearest.groupby(mine["example"]).min()
        return [*found, _staircase(None, fallen, fallen.index.to_series())]
    return [*found, _points(None, mine, facts)]


def query_curves(rows: pd.DataFrame, facts: Facts, model: str, eps: float) -> list[Curve]:
    """The share that is robust after q forwards and backwards of an example, all attacks together last.

    An attack that goes on after its success is not `exact`: its examples fall at the number of passes it ends with.
    Together, every example falls to the attack and seed that needs the fewest, at this radius or a smaller one.
    """
    mine, found = _of(rows, model), []
    early = {entry["name"]: bool(entry["stops_early"]) for entry in facts["attacks"]}
    for attack, own in _attacks(_at(mine, eps), facts):
        falls, end = own["cost"].where(own["reach"] <= eps, np.inf), float(own["cost"].max())
        found.append(_staircase(attack, falls, own["example"], end=end, exact=early[attack]))
    if not found:
        return found
    within = _within(mine, eps)
    fallen = within["cost"].where(within["reach"] <= eps, np.inf).groupby(within["example"]).min()
    exact, end = all(curve.exact for curve in found), float(within["cost"].max())
    return [*found, _staircase(None, fallen, fallen.index.to_series(), end=end, exact=exact)]


def overlap(rows: pd.DataFrame, facts: Facts, model: str, eps: float, *, most: int = 15) -> Overlap:
    """Which attacks, at this radius and with any seed, break exactly the same examples; at most `most` sets."""
    mine = _at(_of(rows, model), eps)
    mine = mine[mine["clean"]]
    broken = (mine["reach"] <= eps).groupby([mine["example"], mine["attack"]]).any().unstack(fill_value=False)
    attacks = [attack for attack in names(facts, "attacks") if attack in broken.columns]
    patterns, counts = np.unique(broken[attacks].to_numpy(dtype=bool), axis=0, return_counts=True)
    sets = [
        (tuple(attack for attack, hit in zip(attacks, pattern, strict=True) if hit), int(count))
        for pattern, count in zip(patterns, counts, strict=True)
    ]
    robust = sum(count for hit, count in sets if not hit)
    ranked = sorted((entry for entry in sets if entry[0]), key=lambda entry: (-entry[1], len(entry[0]), entry[0]))
    left = ranked[most:]
    total = {attack: int(broken[attack].sum()) for attack in attacks}
    return Overlap(ranked[:most], (sum(count for _, count in left), len(left)), total, robust)


def doubts(board: Sequence[Score]) -> list[str]:
    """A line for every attack and radius under which examples are doubtful."""
    return [
        f"{result.attack} on {score.model}, radius {score.eps:.4g}: {result.doubtful} of {result.robust.count} "
        "examples met NaN or infinite logits or gradients: neither broken nor robust for sure, counted as robust"
        for score in board
        for result in score.attacks
        if result.doubtful
    ]


def transfer(rows: pd.DataFrame, facts: Facts, attack: str, eps: float) -> list[list[Rate | None]]:
    """How often what the attack made on a model (line) fools a target (column); on the diagonal, the model itself.

    Of the examples that both classify correctly as they are, the share that the target misclassifies in the end with
    a perturbation within the radius; with several seeds, the mean over them. None where no such row is finished.
    """
    models = names(facts, "models")
    mine = _at(rows[rows["attack"] == attack], eps)
    clean = {model: _of(rows, model).groupby("example")["clean"].first() for model in models}
    matrix: list[list[Rate | None]] = []
    for model in models:
        line: list[Rate | None] = []
        for target in models:
            pair = mine[(mine["model"] == model) & (mine["target"] == target) & mine["clean"]]
            pair = pair[pair["example"].map(clean[model]).eq(True)]
            line.append(None if pair.empty else _rate(pair["reach"] <= eps, pair["example"]))
        matrix.append(line)
    return matrix


def _of(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of the model itself on what was made on it."""
    return rows[(rows["model"] == model) & (rows["target"] == model)]


def _at(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    return rows[(rows["eps"] == eps) | rows["eps"].isna()]


def _within(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    return rows[(rows["eps"] <= eps) | rows["eps"].isna()]


def _attacks(rows: pd.DataFrame, facts: Facts) -> list[tuple[str, pd.DataFrame]]:
    groups = dict(iter(rows.groupby("attack")))
    return [(attack, groups[attack]) for attack in names(facts, "attacks") if attack in groups]


def _rate(held: pd.Series[Any], examples: pd.Series[Any], *, worst: bool = False) -> Rate:
    """The share of examples for which `held` is true: the mean over an example's rows, or in the worst case all."""
    each = held.groupby(examples)
    shares = each.all() if worst else each.mean()
    return Rate(float(shares.mean()), len(shares))


def _result(rows: pd.DataFrame, eps: float) -> Result:
    unbroken, attacked = rows["reach"] > eps, rows[rows["clean"]]
    sizes = attacked[attacked["success"]]
    return Result(
        attack=str(rows["attack"].iloc[0]),
        robust=_rate(unbroken, rows["example"]),
        worst=_rate(unbroken, rows["example"], worst=True),
        seeds={int(seed): _rate(unbroken[own.index], own["example"]) for seed, own in rows.groupby("seed")},
        forwards=float(attacked["forwards"].mean()),
        backwards=float(attacked["backwards"].mean()),
        linf=float(sizes["linf"].median()),
        l2=float(sizes["l2"].median()),
        seconds=float(rows["seconds"].mean()),
        doubtful=int(rows["example"][rows["doubtful"] & unbroken].nunique()),
        unverified=int(rows["example"][rows["unverified"]].nunique()),
    )


def _points(attack: str | None, rows: pd.DataFrame, facts: Facts) -> Curve:
    clean = rows.groupby("example")["clean"].first()
    at, robust = [0.0], [float(clean.mean())]
    for eps in radii(facts):
        if (rows["eps"] == eps).any():
            own = _within(rows, eps) if attack is None else _at(rows, eps)
            at.append(eps)
            robust.append(_rate(own["reach"] > eps, own["example"], worst=attack is None).value)
    return Curve(attack, np.array(at), np.array(robust), stairs=False, exact=True, count=len(clean))


def _staircase(
    attack: str | None, falls: pd.Series[Any], examples: pd.Series[Any], *, end: float = 0.0, exact: bool = True
) -> Curve:
    """The robust share, up to `end` at least, when the example of a row, which all its rows share, falls there."""
    count = examples.nunique()
    weights = 1 / (examples.groupby(examples).transform("size") * count)
    at, index = np.unique(np.append([0.0, end], falls), return_inverse=True)
    robust = 1 - np.bincount(index, np.append([0.0, 0.0], weights)).cumsum()
    finite = np.isfinite(at)
    return Curve(attack, at[finite], robust[finite].clip(0, 1), stairs=True, exact=exact, count=count)
