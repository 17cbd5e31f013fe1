"""Two runs side by side: what they found on the images that both have, and how they were made.

Images are the same where their pixels and labels are, whatever their place in the data. Models and attacks belong
together where they are called the same, or where the user says so: a model before and after a training, two versions of
an attack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.common_images import places
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.intervals import mcnemar, paired
from firstorder.evaluation.reporting.protocols import UNNAMED, Change, changes, named, notes
from firstorder.evaluation.reporting.summary import Rate
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run

CLEAN = "none"
"""What a line on clean accuracy has in the place of the attack."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model in both runs, without an attack, against one or against all, on the images that both have.

    Attributes:
        model, attack: their names; "A → B" where the runs call them differently.
        eps: the radius; None without an attack.
        both, neither: how many images both are right about in the end, or none.
        first, second: how many the first run's is alone, and the second's.
    """

    model: str
    attack: str
    eps: float | None
    both: int
    first: int
    second: int
    neither: int

    @property
    def count(self) -> int:
        """How many images these are."""
        return self.both + self.first + self.second + self.neither

    @property
    def rates(self) -> tuple[Rate, Rate]:
        """The accuracy in the first run, and in the second."""
        one, other = (self.both + own for own in (self.first, self.second))
        return Rate(one / self.count, self.count), Rate(other / self.count, self.count)

    @property
    def value(self) -> float:
        """The second accuracy minus the first, in [-1, 1]."""
        return (self.second - self.first) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval, see `intervals.paired`."""
        return paired(self.both, self.second, self.first, self.neither)

    @property
    def p(self) -> float:
        """The exact p-value of McNemar's test."""
        return mcnemar(self.first, self.second)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        one, other: what the runs are called.
        shared: how many images both have.
        differences: on these.
        changes: in the protocol.
        notes: what cannot be compared, and what to bear in mind, in sentences.
    """

    one: str
    other: str
    shared: int
    differences: list[Difference]
    changes: list[Change]
    notes: list[str]


def compare(runs: Mapping[str, Run], match: Mapping[str, str] | None = None) -> list[Comparison]:
    """The first run beside each of the others.

    Args:
        runs: two or more, by what they are called.
        match: names of models or attacks of the first run, and what they are called in the others. Those of the same
            name belong together without it; so do the only models of two runs.

    Raises:
        ValueError: runs that cannot be compared.
    """
    (name, first), *others = runs.items()
    if not others:
        raise ValueError(f"there is nothing to compare {name} with; name another run")
    return [_compare(name, first, label, run, match or {}) for label, run in others]


def matches(words: Sequence[str], runs: Mapping[str, Run]) -> dict[str, str]:
    """The pairs that words A=B name, for `compare`. Names may hold equality signs themselves.

    Raises:
        ValueError: a word that names no model or attack of the first run and of another.
    """
    (_, first), *others = runs.items()
    found: dict[str, str] = {}
    for word in words:
        parts = word.split("=")
        splits = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
        good = [
            pair
            for pair in splits
            for kind in UNNAMED
            if pair[0] in summary.names(first.facts, kind)
            and any(pair[1] in summary.names(run.facts, kind) for _, run in others)
        ]
        if not good:
            known = "; ".join(f"{name} has {_known(run)}" for name, run in runs.items())
            raise ValueError(f"--match {word} names no two models or two attacks, as A=B of {known}")
        found[good[0][0]] = good[0][1]
    return found


def _compare(name: str, one: Run, label: str, other: Run, match: Mapping[str, str]) -> Comparison:
    _comparable(name, one, label, other)
    models, attacks = (_pairs(kind, one, other, match) for kind in UNNAMED)
    if not models:
        raise ValueError(
            f"{name} and {label} have no model of the same name: {_listed(one, 'models')}; {_listed(other, 'models')}. "
            "Say which belong together with --match A=B"
        )
    shared, relabelled = places(one, other)
    if not shared:
        raise ValueError(
            f"{name} and {label} have no image in common ({one.facts['data']['spec']}; {other.facts['data']['spec']}); "
            "evaluate both on the same data"
        )
    eps = _radii(name, one, label, other)
    found = list(_differences(one, other, shared, models, attacks, eps))
    if not found:
        raise ValueError(f"{name} and {label} have no finished cell in common; finish them: firstorder evaluate --out")
    return Comparison(
        one=name,
        other=label,
        shared=len(shared),
        differences=found,
        changes=list(changes(one.facts, other.facts, models, attacks)),
        notes=list(notes({name: one, label: other}, models, attacks, len(shared), relabelled)),
    )


def _comparable(name: str, one: Run, label: str, other: Run) -> None:
    """Raise ValueError for runs that answer different questions."""
    first, second = (run.facts["specification"] for run in (one, other))
    for key, default in (("norm", "Linf"), ("targeted", "no")):
        values = first.get(key) or default, second.get(key) or default
        if values[0] != values[1]:
            raise ValueError(
                f"{name} has {key}={values[0]} and {label} has {key}={values[1]}, which is another threat model; "
                "compare runs of the same"
            )


def _radii(name: str, one: Run, label: str, other: Run) -> list[float]:
    """The radii at which both runs know something."""
    first, second = summary.radii(one.facts), summary.radii(other.facts)
    # minimum-norm attacks alone know all
    shared = [eps for eps in first if eps in second] if first and second else first or second
    if not shared:
        raise ValueError(
            f"{name} and {label} have no radius in common ({', '.join(map(radius, first)) or 'none'}; "
            f"{', '.join(map(radius, second)) or 'none'}); add one: firstorder evaluate --out {label} --eps ..."
        )
    return shared


def _pairs(kind: str, one: Run, other: Run, match: Mapping[str, str]) -> dict[str, str]:
    """Which models or attacks of two runs belong together, by their names in the first."""
    first, second = summary.names(one.facts, kind), summary.names(other.facts, kind)
    given = {a: b for a, b in match.items() if a in first and b in second}
    same = {a: a for a in first if a in second and a not in given and a not in given.values()}
    if kind == "models" and not given and not same and len(first) == len(second) == 1:
        return {first[0]: second[0]}
    return {a: (given | same)[a] for a in first if a in given or a in same}


def _differences(
    one: Run,
    other: Run,
    places: Mapping[int, int],
    models: Mapping[str, str],
    attacks: Mapping[str, str],
    eps: Sequence[float],
) -> Iterator[Difference]:
    rows, others = summary.load(one), summary.load(other)
    for model, also in models.items():
        called = named(model, also)
        clean = [_own(own, name).groupby("example")["clean"].first() for own, name in ((rows, model), (others, also))]
        yield from _difference(called, CLEAN, None, clean, places)
        for size in eps:
            worst = [summary.robust(rows, model, size), summary.robust(others, also, size)]
            yield from _difference(called, TOGETHER, size, worst, places)
            for attack, same in attacks.items():
                each = [
                    summary.robust(
                        own[(own["attack"] == word) & ((own["eps"] == size) | own["eps"].isna())], name, size
                    )
                    for own, name, word in ((rows, model, attack), (others, also, same))
                ]
                yield from _difference(called, named(attack, same), size, each, places)


def _difference(
    model: str, attack: str, eps: float | None, right: list[pd.Series[bool]], places: Mapping[int, int]
) -> Iterator[Difference]:
    """A line where both have images in common; `right` says by example whether the model is, in both runs."""
    one, other = right
    known = [(i, j) for i, j in places.items() if i in one.index and j in other.index]
    if known:
        a, b = one.loc[[i for i, _ in known]].to_numpy(bool), other.loc[[j for _, j in known]].to_numpy(bool)
        yield Difference(
            model=model,
            attack=attack,
            eps=eps,
            both=int((a & b).sum()),
            first=int((a & ~b).sum()),
            second=int((~a & b).sum()),
            neither=int((~a & ~b).sum()),
        )


def _own(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    return rows[(rows["model"] == model) & (rows["target"] == model)]


def _listed(run: Run, kind: str) -> str:
    return ", ".join(summary.names(run.facts, kind))


def _known(run: Run) -> str:
    return f"models {_listed(run, 'models')} and attacks {_listed(run, 'attacks')}"
