"""How two runs were made: what differs in their protocols, and what that means for a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run

COMPARED = ("versions", "device", "machine", "settings", "data")
UNNAMED = ("models", "attacks")
"""What belongs together by name, or as the user says."""


@dataclass(frozen=True)
class Change:
    """A fact in which two runs differ; None where a run does not have it."""

    fact: str
    one: str | None
    other: str | None


def changes(
    one: Mapping[str, Any], other: Mapping[str, Any], models: Mapping[str, str], attacks: Mapping[str, str]
) -> Iterator[Change]:
    """In what the facts of two runs differ.

    Args:
        one, other: the facts.
        models, attacks: which belong together, by their names in the first.
    """
    first = {key: one[key] for key in COMPARED if key in one}
    second = {key: other[key] for key in COMPARED if key in other}
    for facts, into in ((one, first), (other, second)):
        into["specification"] = {k: v for k, v in facts["specification"].items() if k not in UNNAMED}
    for kind, pairs in (("models", models), ("attacks", attacks)):
        here, there = ({entry["name"]: entry for entry in facts[kind]} for facts in (one, other))
        for a, b in pairs.items():
            called = f"{kind[:-1]} {named(a, b)}"
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
        yield path, ", ".join(map(_word, value)) if isinstance(value, list | tuple) else _word(value)


def _word(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def notes(
    runs: Mapping[str, Run], models: Mapping[str, str], attacks: Mapping[str, str], shared: int, relabelled: int
) -> Iterator[str]:
    """What cannot be compared, and what to bear in mind, in sentences.

    Args:
        runs: the two, by what they are called.
        models, attacks: which belong together, by their names in the first.
        shared: how many images both have.
        relabelled: how many more both have, under other labels.
    """
    names, both = tuple(runs), tuple(runs.values())
    assert len(names) == len(both) == 2
    for name, run in runs.items():
        if len(run.done()) < len(run.cells):
            yield f"{name} is not finished: {len(run.done())} of {len(run.cells)} cells are done"
    if alone := _alone(runs, "attacks", attacks):
        message = "; ".join(f"{run} alone has {', '.join(own)}" for run, own in alone.items())
        yield f"{TOGETHER} are not the same attacks ({message}), so that this difference may be theirs alone"
    yield from _ranges(names, both)
    here, there = ({entry["name"]: entry for entry in run.facts["models"]} for run in both)
    for a, b in models.items():
        if a == b and here[a]["digest"] != there[b]["digest"]:
            yield f"{a} is not the same model in both: what it consists of or does differs"
    if left := _alone(runs, "models", models):
        message = "; ".join(f"{run}: {', '.join(own)}" for run, own in left.items())
        yield f"not compared, as the other run has no model of that name ({message})"
    yield "p-values are those of single comparisons, and intervals are over images, not over trainings of the model"
    yield from _images(names, both, shared, relabelled)


def _alone(runs: Mapping[str, Run], kind: str, pairs: Mapping[str, str]) -> dict[str, list[str]]:
    """The models or attacks that have no partner, by run."""
    known = [set(pairs), set(pairs.values())]
    found = {
        name: [one for one in summary.names(run.facts, kind) if one not in own]
        for (name, run), own in zip(runs.items(), known, strict=True)
    }
    return {name: own for name, own in found.items() if own}


def _ranges(names: tuple[str, str], runs: tuple[Run, Run]) -> Iterator[str]:
    """Seeds and radii, where they differ."""
    seeds = [len(run.facts["specification"].get("seeds", [0])) for run in runs]
    if seeds[0] != seeds[1]:
        yield f"{names[0]} has {seeds[0]} seeds and {names[1]} {seeds[1]}: an image counts as robust against all"
    radii = [summary.radii(run.facts) for run in runs]
    if radii[0] != radii[1]:
        message = "; ".join(f"{name}: {', '.join(map(radius, own))}" for name, own in zip(names, radii, strict=True))
        yield f"the radii differ ({message}); {TOGETHER} are all those at a radius and at every smaller one of the run"


def _images(names: tuple[str, str], runs: tuple[Run, Run], shared: int, relabelled: int) -> Iterator[str]:
    counts = [run.facts["data"]["count"] for run in runs]
    if min(counts) > shared or counts[0] != counts[1]:
        had = f"of {counts[0]} in {names[0]} and {counts[1]} in {names[1]}"
        yield f"compared on the {shared} images that both have, {had}"
    if relabelled:
        yield f"left out: {relabelled} images that have another label in {names[1]}"


def named(one: str, other: str) -> str:
    """What belongs together, under one name or as "A → B"."""
    return one if one == other else f"{one} → {other}"
