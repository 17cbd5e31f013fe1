"""Whom adversarial examples of a run fool: an outcome is of a source, an attack, a radius, a number T and a seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from firstorder.evaluation.names.code import surrogate
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run

CLEAN = "clean"
"""The name of the line of the images as they are, against which defences are measured."""

COLUMNS = (
    "model", "target", "defence", "attack", "eps", "seed", "example", "label", "wanted", "clean_label", "share",
    "wrong_share", "clean_share", "rounded_success", "doubtful", "backwards",
)  # fmt: skip

Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Examples made on one source by one attack with one seed, and whom they fool.

    Attributes:
        source: the model, or the models of an ensemble joined by "+".
        attack: its name; `CLEAN` for the images as they are.
        eps: the radius.
        steps: T; what the run gives to others, for an attack that does not iterate.
        seed: of the random draws.
        gradients: that an image took, the mean of those that were attacked.
        targeted: whether to fool is to be taken for the class that the attack was towards.
        fooled: for every target, and every "target | defence", the share of draws in which each image fooled it, (N,).
        wrong: the same for any wrong class; in an untargeted run nothing else.
        rounded: for every bare target, whether the picture of 8 bits fooled it, (N,).
        known: which images all models classify correctly, (N,); None for all.
        examples: the places of the images among the run's, (N,); None for the first N.
        doubtful: for each target, how many images met NaN or infinite logits or gradients, when they were made or
            classified, and did not fool it in every draw: whether they can is not sure.
    """

    source: str
    attack: str
    eps: float
    steps: int
    seed: int = 0
    gradients: float = 0.0
    targeted: bool = False
    fooled: dict[str, Values]
    wrong: dict[str, Values] = field(default_factory=dict)
    rounded: dict[str, Values] = field(default_factory=dict)
    known: Values | None = None
    examples: Values | None = None
    doubtful: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(next(iter(self.fooled.values())))

    @property
    def right(self) -> Values:
        """The images that all models classify correctly, (N,)."""
        return np.ones(self.count, dtype=bool) if self.known is None else self.known

    @property
    def places(self) -> Values:
        """The places of the images among the run's, (N,)."""
        return np.arange(self.count) if self.examples is None else self.examples

    def rate(self, target: str) -> float:
        """The share of the images that all models classify correctly which fooled the target."""
        return mean(self.fooled[target][self.right])

    @property
    def bare(self) -> list[str]:
        """The targets without a defence that the examples were not made on; all bare ones where there are none."""
        bare = [name for name in self.fooled if " | " not in name]
        return [name for name in bare if name not in made_on(self.source)] or bare


def outcomes(run: Run, *, after: int = 0) -> list[Outcome]:
    """What a run found, of finished cells; where there are defences, the images as they are come first.

    Args:
        run: with targets.
        after: how many of its first images are left out, as those that attacks were chosen on.
    """
    specification, models = run.facts["specification"], [entry["name"] for entry in run.facts["models"]]
    carried_to = specification["targets"] or models[: len(specification["models"])]
    targets = [(name, spec) for name in carried_to for spec in ["", *specification["defences"]]]
    rows = run.table(COLUMNS).fillna({"defence": ""})
    rows = rows[rows["example"] >= after]
    rows["known"] = _known(rows)
    groups = dict(iter(rows.groupby(["model", "attack", "eps", "seed"])))
    labels = dict.fromkeys(attack["label"] for attack in run.facts["attacks"])
    found: list[Outcome] = []
    for source, label, eps in itertools.product(specification["sources"] or models, labels, specification["eps"]):
        for attack, seed in itertools.product(run.facts["attacks"], specification["seeds"]):
            own = groups.get((source, attack["name"], eps, seed))
            if attack["label"] == label and own is not None:
                parts = dict(iter(own.groupby(["target", "defence"])))
                shown = {
                    f"{name} | {spec}" if spec else name: parts[name, spec]
                    for name, spec in targets
                    if (name, spec) in parts
                }
                if specification["defences"] and not found:
                    found.append(_clean(source, shown))
                # an attack that does not iterate is the same at every number of steps
                for steps in [attack["steps"]] if attack["steps"] else specification["steps"] or [1]:
                    found.append(_outcome(source, label, eps, steps, seed, shown))
    return found


def _known(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether all models that are attacked, or carried to, classify the example of the row correctly."""
    right = (rows["clean_label"] == rows["label"]) | (rows["defence"] != "")
    return right.groupby(rows["example"]).transform("all")


def _outcome(source: str, attack: str, eps: float, steps: int, seed: int, rows: Mapping[str, pd.DataFrame]) -> Outcome:
    first = next(iter(rows.values()))
    spent = first["backwards"].to_numpy()
    bare = {name: own for name, own in rows.items() if own["rounded_success"].notna().all()}
    return Outcome(
        source=source,
        attack=attack,
        eps=eps,
        steps=steps,
        seed=seed,
        gradients=mean(spent[spent > 0]),
        targeted=bool(first["wanted"].notna().any()),
        fooled={name: own["share"].to_numpy() for name, own in rows.items()},
        wrong={name: own["wrong_share"].to_numpy() for name, own in rows.items()},
        rounded={name: own["rounded_success"].to_numpy(dtype=float) for name, own in bare.items()},
        known=first["known"].to_numpy(),
        examples=first["example"].to_numpy(),
        doubtful={name: int(own["doubtful"].sum()) for name, own in rows.items()},
    )


def _clean(source: str, rows: Mapping[str, pd.DataFrame]) -> Outcome:
    fooled, first = {name: own["clean_share"].to_numpy() for name, own in rows.items()}, next(iter(rows.values()))
    own = {"known": first["known"].to_numpy(), "examples": first["example"].to_numpy()}
    return Outcome(source=source, attack=CLEAN, eps=0.0, steps=0, fooled=fooled, **own)


def made_on(source: str) -> set[str]:
    """The models that examples of a source were made on: its members, and those that members are surrogates of."""
    members = source.split("+")
    return {*members, *(surrogate(member)[2] for member in members)}


def average(outcome: Outcome) -> float | None:
    """The mean success over bare targets that the examples were not made on, None without any."""
    own = made_on(outcome.source)
    rates = [outcome.rate(name) for name in outcome.fooled if " | " not in name and name not in own]
    return sum(rates) / len(rates) if rates else None


def grouped(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """The outcomes that differ in nothing but the seed, together, in order."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.source, one.attack, one.eps, one.steps), []).append(one)
    return list(groups.values())


def at(outcomes: Sequence[Outcome]) -> int:
    """The T to show: the largest one of attacks that have several; without such, that of most attacks."""
    times: dict[tuple[str, str, float], set[int]] = {}
    for one in outcomes:
        times.setdefault((one.source, one.attack, one.eps), set()).add(one.steps)
    shared = [steps for own in times.values() if len(own) > 1 for steps in own]
    if shared:
        return max(shared)
    alone = [steps for own in times.values() for steps in own if steps] or [0]
    return max(alone, key=lambda steps: (alone.count(steps), steps))


def displayed(outcomes: Sequence[Outcome], steps: int) -> list[list[Outcome]]:
    """The groups at T = `steps`, and those of attacks with a single number of steps."""
    groups = grouped(outcomes)
    labels = [(group[0].source, group[0].attack, group[0].eps) for group in groups]
    return [
        group
        for group, label in zip(groups, labels, strict=True)
        if group[0].steps == steps or labels.count(label) == 1
    ]


def name(outcome: Outcome, several: bool) -> str:
    """The outcome in a picture or a sentence, with its source where there are several."""
    if outcome.attack == CLEAN:
        return CLEAN
    return f"{outcome.source}: " * several + f"{outcome.attack}, ε = {radius(outcome.eps)}"


def mean(values: Any) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0
