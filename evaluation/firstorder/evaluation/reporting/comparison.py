"""Two runs side by side: what they found on the images that both have, and how they were made.

Images are the same where their pixels and labels are, whatever their place in the data. Models and attacks belong
together where they are called the same, or where the user says so: a model before and after a training, two versions of
an attack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.intervals import mcnemar, paired
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.summary import Rate
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs import examples
from firstorder.evaluation.runs.store import Run

CLEAN = "none"
"""What a line on clean accuracy has in the place of the attack."""

COMPARED = ("versions", "device", "machine", "settings", "data")
UNNAMED = ("models", "attacks")
BLOCK = 500
"""Images that are read at once."""


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


@dataclass(frozen=True)
class Change:
    """A fact in which two runs differ; None where a run does not have it."""

    fact: str
    one: str | None
    other: str | None


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


def differences(comparison: Comparison) -> Sheet:
    """What both found, as a table."""
    percent, points = ".1f", "+.1f"
    columns = (
        Column("model"),
        Column("attack"),
        Column("ε", radius),
        Column("images", "d"),
        Column(f"{comparison.one}, %", percent),
        Column(f"{comparison.other}, %", percent),
        Column("difference, points", points),
        Column("95 % low", points),
        Column("95 % high", points),
        Column("robust in the first alone", "d"),
        Column("robust in the second alone", "d"),
        Column("McNemar p", ".2g"),
    )
    rows = [
        (
            d.model,
            d.attack,
            d.eps,
            d.count,
            *(100 * rate.value for rate in d.rates),
            100 * d.value,
            *(100 * end for end in d.interval),
            d.first,
            d.second,
            d.p,
        )
        for d in comparison.differences
    ]
    title = f"Accuracy in {comparison.one} and {comparison.other} on the same {comparison.shared} images"
    return Sheet("differences", title, columns, rows)


def changes(comparison: Comparison) -> Sheet:
    """What changed in the protocol, as a table."""
    columns = (Column("fact"), Column(comparison.one), Column(comparison.other))
    rows = [(change.fact, change.one, change.other) for change in comparison.changes]
    return Sheet("changes", f"What changed from {comparison.one} to {comparison.other}", columns, rows)


def _compare(name: str, one: Run, label: str, other: Run, match: Mapping[str, str]) -> Comparison:
    _comparable(name, one, label, other)
    models, attacks = (_pairs(kind, one, other, match) for kind in UNNAMED)
    if not models:
        raise ValueError(
            f"{name} and {label} have no model of the same name: {_listed(one, 'models')}; {_listed(other, 'models')}. "
            "Say which belong together with --match A=B"
        )
    places, relabelled = _shared(one, other)
    if not places:
        raise ValueError(
            f"{name} and {label} have no image in common ({one.facts['data']['spec']}; {other.facts['data']['spec']}); "
            "evaluate both on the same data"
        )
    eps = _radii(name, one, label, other)
    found = list(_differences(one, other, places, models, attacks, eps))
    if not found:
        raise ValueError(f"{name} and {label} have no finished cell in common; finish them: firstorder evaluate --out")
    notes = [*_notes(name, one, label, other, models, attacks), *_images(name, one, label, other, places, relabelled)]
    changed = list(_changes(one.facts, other.facts, models, attacks))
    return Comparison(one=name, other=label, shared=len(places), differences=found, changes=changed, notes=notes)


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


def _shared(one: Run, other: Run) -> tuple[dict[int, int], int]:
    """Where the second run has the images of the first, and how many it has under another label."""
    data = one.facts["data"], other.facts["data"]
    if data[0]["digest"] == data[1]["digest"]:
        return {i: i for i in range(data[0]["count"])}, 0
    here, there = _images_of(one), {key: (i, label) for i, (key, label) in enumerate(_images_of(other))}
    found: dict[int, int] = {}
    relabelled = 0
    for i, (key, label) in enumerate(here):
        if key in there:
            place, known = there[key]
            found |= {i: place} if known == label else {}
            relabelled += known != label
    return found, relabelled


def _images_of(run: Run) -> list[tuple[tuple[bytes, int], int]]:
    """A name for the pixels of every image, with how often they were there before, and its label."""
    data, seen, found = run.facts["data"], dict[bytes, int](), []
    for start in range(0, data["count"], BLOCK):
        x, y = examples.rows(run.store.data, data["digest"], start, min(start + BLOCK, data["count"]))
        for image, label in zip(x, y.tolist(), strict=True):
            key = hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()
            found.append(((key, seen.get(key, 0)), label))
            seen[key] = seen.get(key, 0) + 1
    return found


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
        called = _named(model, also)
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
                yield from _difference(called, _named(attack, same), size, each, places)


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


def _changes(
    one: Mapping[str, Any], other: Mapping[str, Any], models: Mapping[str, str], attacks: Mapping[str, str]
) -> Iterator[Change]:
    first = {key: one[key] for key in COMPARED if key in one}
    second = {key: other[key] for key in COMPARED if key in other}
    for facts, into in ((one, first), (other, second)):
        into["specification"] = {k: v for k, v in facts["specification"].items() if k not in UNNAMED}
    for kind, pairs in (("models", models), ("attacks", attacks)):
        here, there = ({entry["name"]: entry for entry in facts[kind]} for facts in (one, other))
        for a, b in pairs.items():
            called = f"{kind[:-1]} {_named(a, b)}"
            first[called], second[called] = ({k: v for k, v in e.items() if k != "name"} for e in (here[a], there[b]))
        first |= {f"{kind[:-1]} {a}": "there" for a in here if a not in pairs}
        second |= {f"{kind[:-1]} {b}": "there" for b in there if b not in pairs.values()}
    flat, also = dict(_flat(first)), dict(_flat(second))
    for key in dict.fromkeys([*flat, *also]):
        if flat.get(key) != also.get(key):
            yield Change(key, flat.get(key), also.get(key))


def _flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of plain values, as texts, by where they are."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}: {key}" if path else str(key))
    elif value is not None:
        yield path, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _notes(
    name: str, one: Run, label: str, other: Run, models: Mapping[str, str], attacks: Mapping[str, str]
) -> Iterator[str]:
    for called, run in ((name, one), (label, other)):
        if len(run.done()) < len(run.cells):
            yield f"{called} is not finished: {len(run.done())} of {len(run.cells)} cells are done"
    only = [[a for a in summary.names(one.facts, "attacks") if a not in attacks]]
    only += [[b for b in summary.names(other.facts, "attacks") if b not in attacks.values()]]
    if any(only):
        told = "; ".join(
            f"{run} alone has {', '.join(own)}" for run, own in zip((name, label), only, strict=True) if own
        )
        yield f"{TOGETHER} are not the same attacks ({told}), so that this difference may be theirs alone"
    seeds = [run.facts["specification"].get("seeds", [0]) for run in (one, other)]
    if len(seeds[0]) != len(seeds[1]):
        yield f"{name} has {len(seeds[0])} seeds and {label} {len(seeds[1])}: an image counts as robust against all"
    radii = [summary.radii(run.facts) for run in (one, other)]
    if radii[0] != radii[1]:
        told = "; ".join(f"{run}: {', '.join(map(radius, own))}" for run, own in zip((name, label), radii, strict=True))
        yield f"the radii differ ({told}); {TOGETHER} are all those at a radius and at every smaller one of the run"
    here, there = ({entry["name"]: entry for entry in run.facts["models"]} for run in (one, other))
    for a, b in models.items():
        if a == b and here[a]["digest"] != there[b]["digest"]:
            yield f"{a} is not the same model in both: what it consists of or does differs"
    left = [[a for a in here if a not in models], [b for b in there if b not in models.values()]]
    if any(left):
        told = "; ".join(f"{run}: {', '.join(own)}" for run, own in zip((name, label), left, strict=True) if own)
        yield f"not compared, as the other run has no model of that name ({told})"
    yield "p-values are those of single comparisons, and intervals are over images, not over trainings of the model"


def _images(name: str, one: Run, label: str, other: Run, places: Mapping[int, int], relabelled: int) -> Iterator[str]:
    counts = one.facts["data"]["count"], other.facts["data"]["count"]
    if min(counts) > len(places) or counts[0] != counts[1]:
        had = f"of {counts[0]} in {name} and {counts[1]} in {label}"
        yield f"compared on the {len(places)} images that both have, {had}"
    if relabelled:
        yield f"left out: {relabelled} images that have another label in {label}"


def _own(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    return rows[(rows["model"] == model) & (rows["target"] == model)]


def _named(one: str, other: str) -> str:
    return one if one == other else f"{one} → {other}"


def _listed(run: Run, kind: str) -> str:
    return ", ".join(summary.names(run.facts, kind))


def _known(run: Run) -> str:
    return f"models {_listed(run, 'models')} and attacks {_listed(run, 'attacks')}"
