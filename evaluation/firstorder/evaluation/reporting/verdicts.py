"""What is not known of a robust accuracy, in numbers: what a verdict gave up, what its audit says of that, and how far
it is from limits that others have shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from firstorder.evaluation.reporting.intervals import LEVEL, hypergeometric_upper
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.limits import Limits

NAMED = 5
"""How many examples a line names."""


@dataclass(frozen=True)
class Sample:
    """A random sample of what a verdict left, which AutoAttack was run on.

    Attributes:
        population: how many examples it was drawn from.
        drawn, broken: how many it has, and how many of them AutoAttack broke.
        total: how many examples the run has.
    """

    population: int
    drawn: int
    broken: int
    total: int

    @property
    def bound(self) -> float:
        """How much AutoAttack would break beside these, at most, as a share of all examples: with a probability of
        95 % over the draw. For a large population without breaks (1 - 0.05^(1 / drawn)) * population / total.
        """
        return (hypergeometric_upper(self.broken, self.drawn, self.population) - self.broken) / max(self.total, 1)


@dataclass(frozen=True)
class Verdict:
    """What a verdict leaves open on a model at a radius, with a seed.

    Attributes:
        robust: how many examples it left.
        given_up: how many of these were not attacked to the end.
        sample: the last of its audit; None without one.
        reopened: how many AutoAttack broke of a first sample, after which the closing stages were reopened.
    """

    model: str
    attack: str
    eps: float
    seed: int
    robust: int
    given_up: int
    sample: Sample | None
    reopened: int

    @property
    def line(self) -> str:
        """It in a sentence."""
        to_the_end = f"{self.robust - self.given_up} of {self.robust} robust examples were attacked to the end"
        message = f"{self.attack} on {self.model}, radius {radius(self.eps)}, seed {self.seed}: {to_the_end}"
        message += f", {self.given_up} given up"
        last = self.sample
        if last is None:
            return f"{message}; an audit says what AutoAttack would break of these" if self.given_up else message
        message += f"; AutoAttack broke {last.broken} of {last.drawn} drawn from {last.population}"
        message += (
            f", after {self.reopened} of a first sample, which reopened the closing stages" if self.reopened else ""
        )
        return f"{message}: it would break at most {100 * last.bound:.2f} points more ({100 * LEVEL:.0f} %)"


def verdicts(rows: pd.DataFrame) -> list[Verdict]:
    """What the verdicts among the rows of `summary.load` leave open."""
    own = rows[rows["complete"].notna()]
    return [_verdict(part) for _, part in own.groupby(["model", "attack", "eps", "seed"], sort=False)]


def _verdict(rows: pd.DataFrame) -> Verdict:
    left, whole, audit = rows["stage"].isna(), rows["complete"].astype(bool), rows["audit"]
    given_up, sample, reopened = left & ~whole, None, 0
    if bool(audit.notna().any()):
        drawn, earlier = audit == audit.max(), audit < audit.max()
        first_of_given_up = not earlier.any() and not whole[drawn].all()
        population = given_up | drawn if first_of_given_up else (left | drawn) & ~earlier
        sample = Sample(int(population.sum()), int(drawn.sum()), int((drawn & ~left).sum()), len(rows))
        reopened = int((earlier & ~left).sum())
    first = rows.iloc[0]
    return Verdict(
        model=first["model"],
        attack=first["attack"],
        eps=float(first["eps"]),
        seed=int(first["seed"]),
        robust=int(left.sum()),
        given_up=int(given_up.sum()),
        sample=sample,
        reopened=reopened,
    )


def notes(rows: pd.DataFrame, facts: Mapping[str, Any]) -> list[str]:
    """A line on every verdict, and on how far from the limits of the run its models are."""
    return [*(verdict.line for verdict in verdicts(rows)), *_distances(rows, facts)]


def errors(rows: pd.DataFrame, facts: Mapping[str, Any]) -> list[str]:
    """A line on every attack that breaks what is proven to be robust: an error of ours, or of the proof."""
    found = []
    for model, eps, limits in _limited(facts):
        proven = set(limits.proven(eps))
        own = rows[(rows["model"] == model) & (rows["reach"] <= eps) & rows["example"].isin(proven)]
        for attack, part in own.groupby("attack", sort=False):
            examples = sorted(part["example"].unique().tolist())
            more = f" and {len(examples) - NAMED} more" if len(examples) > NAMED else ""
            named = ", ".join(map(str, examples[:NAMED]))
            found.append(
                f"{attack} on {model} breaks examples that are proven robust at radius {radius(eps)}: {named}{more}; "
                "the attack, the model or the proof is wrong"
            )
    return found


def _distances(rows: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[str]:
    for model, eps, limits in _limited(facts):
        mine = rows[(rows["model"] == model) & ((rows["eps"] <= eps) | rows["eps"].isna())]
        if mine.empty:
            continue
        robust = mine.groupby("example")["reach"].min() > eps
        left, total = set(robust.index[robust]), len(robust)
        seen = set(robust.index)
        proven, fallen = seen & set(limits.proven(eps)), seen & set(limits.broken(eps))
        yield (
            f"limits of {model}, radius {radius(eps)}: of {total} examples {len(proven)} are proven robust "
            f"({100 * len(proven) / total:.2f} %), others broke {len(fallen)} (leaving at most "
            f"{100 * (total - len(fallen)) / total:.2f} %); here {len(left)} are robust ({100 * len(left) / total:.2f} "
            f"%): {len(left - proven)} above what is proven, {len(left & fallen)} that others broke missed, "
            f"{len(seen - left - fallen)} broken that they left"
        )


def _limited(facts: Mapping[str, Any]) -> Iterator[tuple[str, float, Limits]]:
    """Every model and radius of the run that has limits."""
    if facts.get("limits"):
        for model in facts["models"]:
            for eps in sorted(set(facts["specification"]["eps"])):
                yield model["name"], eps, Limits.of(facts["limits"])
