"""What a reviewer asks of a run: how it was made, so that it can be made again, and the limits of what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from firstorder.attacks.distribution import DISTRIBUTION
from firstorder.evaluation.reporting import summary, trust
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.summary import Score
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.reporting.verdicts import verdicts
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, digest
from firstorder.evaluation.runs.store import Run

UNKNOWN = "not recorded: the run was made by an earlier version"
OURS = ("firstorder", DISTRIBUTION, "autoattack", "pyautoattack")
"""Distributions whose attacks know nothing of the model at hand."""


def provenance(run: Run) -> Sheet:
    """How the run was made: dates, commands, hardware, versions, settings, seeds, thresholds, step sizes, digests."""
    return Sheet("provenance", "How this was made", (Column("what"), Column("value")), list(_made(run)))


def protocol(run: Run) -> Sheet:
    """The attacks with their parameters and step sizes as they were used."""
    columns = ("name", "attack", "kind", "stops at success", "parameters", "step size at radius", "paper", "from")
    rows = [
        (
            attack["name"],
            attack["attack"],
            attack["kind"],
            bool(attack["stops_early"]),
            _plain(attack["parameters"]),
            ", ".join(f"{eps}: {size:.4g}" for eps, size in attack.get("step_sizes", {}).items()),
            attack["paper"],
            attack["source"],
        )
        for attack in run.facts["attacks"]
    ]
    return Sheet("protocol", "Attacks as they were used", tuple(map(Column, columns)), rows)


def limits(run: Run, rows: pd.DataFrame | None = None, scores: Sequence[Score] | None = None) -> Sheet:
    """What this evaluation does not show, written from what was run.

    Args:
        run: finished or not.
        rows: of `summary.load`, where they are there already.
        scores: of `summary.leaderboard`, likewise.
    """
    rows = summary.load(run) if rows is None else rows
    scores = summary.leaderboard(rows, run.facts) if scores is None else scores
    parts = [
        *_attacks(run.facts),
        *_images(run.facts, scores),
        *_radii(run.facts),
        *_open(run.facts, rows, scores),
        *_trusted(trust.panels(run, rows)),
        *_unfinished(run),
    ]
    return Sheet("limits", "Limits of this evaluation", (Column("about"), Column("what is not known")), parts)


def _made(run: Run) -> Iterator[tuple[str, str]]:
    facts, specification = run.facts, run.facts["specification"]
    calls = facts.get("calls", [])
    for i, call in enumerate(calls, 1):
        which = f" {i}" if len(calls) > 1 else ""
        yield f"date{which}", call["date"]
        yield f"command{which}", call["command"]
        yield f"hardware{which}", _plain(call["machine"])
        yield f"settings of torch{which}", _plain(call["settings"])
    if not calls:
        yield "date", UNKNOWN
        yield "command", facts["command"]
        yield "hardware", UNKNOWN
    yield "device", facts["device"]
    yield "versions", _plain(facts["versions"])
    yield "seeds", ", ".join(map(str, specification["seeds"]))
    yield (
        "broken",
        (
            f"misclassified with a perturbation of {specification['norm']} size at most the radius, times 1 + "
            f"{RELATIVE:g}, plus {ABSOLUTE:g} for rounding; pixels are in [0, 1]; checked on the model itself"
        ),
    )
    for attack in facts["attacks"]:
        for eps, size in attack.get("step_sizes", {}).items():
            yield f"first step size of {attack['name']}, ε = {eps}", f"{size:.6g}"
    yield "data", f"{facts['data']['spec']}: {facts['data']['count']} images, digest {facts['data']['digest']}"
    for model in facts["models"]:
        yield (
            f"model {model['name']}",
            (
                f"{model['spec']}, {model['architecture']}, {model['parameters']} parameters, gradients in "
                f"{model['precision']}, digest {model['digest']}"
            ),
        )
    yield "digest of the run", digest({key: value for key, value in facts.items() if key != "calls"})


def _attacks(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    attacks, seeds = facts["attacks"], len(facts["specification"]["seeds"])
    strange = [one["name"] for one in attacks if one["source"].partition(" ")[0] not in OURS]
    if strange:
        yield (
            "adaptive attacks",
            (f"whether {', '.join(strange)} were adapted to these models is not known; the other attacks are general"),
        )
    else:
        yield "adaptive attacks", "none: no attack was designed against these models, as a determined attacker would"
    once = [one["name"] for one in attacks if one["parameters"].get("restarts", 1) == 1 and one["kind"] != "autoattack"]
    if once and seeds == 1:
        yield "restarts", f"none beside those of their own for {', '.join(once)}; the random draws are of one seed"
    elif seeds > 1:
        yield "restarts", f"every attack ran with {seeds} seeds, and an image counts as robust if it withstands all"
    if not any("square" in one["attack"] or one["attack"].startswith("AutoAttack") for one in attacks):
        yield (
            "black-box attacks",
            (
                "none: every attack uses gradients, so that masked gradients may look like robustness; Square, or "
                "autoattack, would say"
            ),
        )
    if not any(one["attack"].startswith("AutoAttack") for one in attacks):
        yield "AutoAttack", "not run on all images: the figures are upper bounds that may lie above its own"
    if facts["specification"].get("random"):
        yield "random models", "what was found is of one draw of the model's own randomness, not of its expectation"


def _images(facts: Mapping[str, Any], scores: Sequence[Score]) -> Iterator[tuple[str, str]]:
    specification, count = facts["specification"], facts["data"]["count"]
    if specification.get("select") == "all-correct":
        chosen = "those that all models classify correctly, which raises every accuracy"
    elif specification.get("count") is None and not specification.get("skip"):
        chosen = "all of the data set as it was named"
    else:
        after = f" after the first {specification['skip']}" if specification.get("skip") else " first"
        chosen = f"the{after} ones of the data set as it was named, no random sample"
    wide = max((high - low for low, high in (score.robust.interval for score in scores)), default=1.0)
    yield (
        "images",
        (
            f"{count}: {chosen}. The 95 % intervals of robust accuracies are up to {100 * wide:.1f} points wide, so "
            "that smaller differences between runs on different images may be chance"
        ),
    )


def _radii(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    eps, norm = summary.radii(facts), facts["specification"]["norm"]
    everywhere = any(one["kind"] == "minimum-norm" for one in facts["attacks"])
    at = ", ".join(map(radius, eps)) or "none"
    between = (
        "between them minimum-norm attacks alone count" if everywhere else "nothing is known between or above them"
    )
    yield "radii", f"{at} in {norm}; {between}. Other norms and changes of an image were not tried"
    if facts["specification"].get("targeted"):
        yield "goal", "targeted attacks alone: an image that withstands one target may fall to another"


def _open(facts: Mapping[str, Any], rows: pd.DataFrame, scores: Sequence[Score]) -> Iterator[tuple[str, str]]:
    found = verdicts(rows)
    for verdict in found:
        yield "verdict", verdict.line
    if any("population" in one["parameters"] or "blob" in one["attack"] for one in facts["attacks"]) or found:
        yield (
            "populations",
            (
                "some attacks let the images of a cell, or of all cells, act on each other: other images beside them "
                "may change what is found of one"
            ),
        )
    if not any(verdict.sample for verdict in found):
        yield "audit", "none: no random sample of what was left as robust was attacked again with AutoAttack"
    doubtful = sum(score.doubtful for score in scores)
    if doubtful:
        yield "doubtful images", f"{doubtful} met NaN or infinite logits or gradients and count as robust"
    unverified = sum(result.unverified for score in scores for result in score.attacks)
    if unverified:
        yield "unverified successes", f"{unverified} that attacks claim are none on the model itself, and do not count"
    lower = [one["name"] for one in facts["models"] if one["precision"] != "float32"]
    if lower:
        yield "precision", f"gradients in lower precision for {', '.join(lower)}; in float32 attacks may be stronger"


def _trusted(panels: Sequence[trust.Panel]) -> Iterator[tuple[str, str]]:
    missing = [panel.model for panel in panels if panel.missing]
    warned = [f"{panel.model} ({', '.join(panel.reasons)})" for panel in panels if panel.reasons]
    if missing:
        yield "diagnosis", f"none of {', '.join(missing)}: whether gradients are masked was not looked for"
    if warned:
        yield "diagnosis", f"warns of {', '.join(warned)}: these figures are not to be trusted"
    if panels and not missing and not warned:
        yield "diagnosis", "no check warned; a defence may mislead in ways that none looks for"


def _unfinished(run: Run) -> Iterator[tuple[str, str]]:
    done, planned = len(run.done()), len(run.cells)
    if done < planned:
        yield "cells", f"{planned - done} of {planned} are not finished; every figure is on the images that are there"


def _plain(value: object) -> str:
    """A plain value in words."""
    if isinstance(value, Mapping):
        known = {key: entry for key, entry in value.items() if entry is not None}
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in known.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
