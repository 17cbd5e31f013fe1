"""Do adversarial examples of one model fool others? Tables and pictures of a run, as papers on transfer show them.

A line is a source, an attack, a radius and a number of steps; a column is a target, bare or behind a defence.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.reporting.tables import csv_text, escaped, markdown, radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

CLEAN = "clean"
"""The name of the line of the images as they are, against which defences are measured."""

COLUMNS = ("model", "target", "defence", "attack", "eps", "seed", "share", "clean_share", "doubtful")
LINES = ("#8a8f98", "#3b6fb6", "#c2571a", "#1b7f3b", "#7b4fa3", "#b3261e", "#0f7f8f", "#a67c00", "#444444", "#d27ab0")
MARKS = "osD^vP*X<>"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Examples made on one source by one attack, and whom they fool.

    Attributes:
        source: the model, or the models of an ensemble joined by "+".
        attack: its name; `CLEAN` for the images as they are.
        eps: the radius.
        steps: T; what the run gives to others, for an attack that does not iterate.
        seed: of the random draws.
        fooled: for every target, and every "target | defence", the share of draws in which each image fooled it, (N,).
        doubtful: for each of these, how many images met NaN or infinite logits or gradients, when they were made or
            classified, and did not fool it in every draw: whether they can is not sure.
    """

    source: str
    attack: str
    eps: float
    steps: int
    seed: int = 0
    fooled: dict[str, np.ndarray[Any, Any]]
    doubtful: dict[str, int] = field(default_factory=dict)

    def rate(self, target: str) -> float:
        """The share of images that fooled the target."""
        return float(self.fooled[target].mean())


def outcomes(run: Run) -> list[Outcome]:
    """What a run found, of finished cells; where there are defences, the images as they are come first."""
    specification, models = run.facts["specification"], [entry["name"] for entry in run.facts["models"]]
    carried_to = specification["targets"] or models[: len(specification["models"])]
    targets = [(name, spec) for name in carried_to for spec in ["", *specification["defences"]]]
    groups = dict(iter(run.table(COLUMNS).fillna({"defence": ""}).groupby(["model", "attack", "eps", "seed"])))
    labels = dict.fromkeys(attack["label"] for attack in run.facts["attacks"])
    found: list[Outcome] = []
    for source, label, eps in itertools.product(specification["sources"] or models, labels, specification["eps"]):
        for attack, seed in itertools.product(run.facts["attacks"], specification["seeds"]):
            rows = groups.get((source, attack["name"], eps, seed))
            if attack["label"] == label and rows is not None:
                own = dict(iter(rows.groupby(["target", "defence"])))
                shown = {
                    f"{name} | {spec}" if spec else name: own[name, spec]
                    for name, spec in targets
                    if (name, spec) in own
                }
                if specification["defences"] and not found:
                    found.append(_clean(source, shown))
                # an attack that does not iterate is the same at every number of steps
                for steps in [attack["steps"]] if attack["steps"] else specification["steps"] or [1]:
                    found.append(_outcome(source, label, eps, steps, seed, shown))
    return found


def _outcome(source: str, attack: str, eps: float, steps: int, seed: int, rows: Mapping[str, pd.DataFrame]) -> Outcome:
    return Outcome(
        source=source,
        attack=attack,
        eps=eps,
        steps=steps,
        seed=seed,
        fooled={name: own["share"].to_numpy() for name, own in rows.items()},
        doubtful={name: int(own["doubtful"].sum()) for name, own in rows.items()},
    )


def _clean(source: str, rows: Mapping[str, pd.DataFrame]) -> Outcome:
    fooled = {name: own["clean_share"].to_numpy() for name, own in rows.items()}
    return Outcome(source=source, attack=CLEAN, eps=0.0, steps=0, fooled=fooled)


def average(outcome: Outcome) -> float | None:
    """The mean success over bare targets that the examples were not made on, None without any."""
    own = outcome.source.split("+")
    rates = [outcome.rate(name) for name in outcome.fooled if " | " not in name and name not in own]
    return sum(rates) / len(rates) if rates else None


def table(outcomes: Sequence[Outcome], steps: int) -> tuple[list[str], list[list[str]]]:
    """Success in percent at T = `steps`; a line per outcome, a column per target."""
    targets = list(outcomes[0].fooled)
    lines = []
    for outcome in _at(outcomes, steps):
        mean = None if outcome.attack == CLEAN else average(outcome)
        rates = [f"{100 * outcome.rate(target):.1f}" for target in targets]
        lines.append([*_heading(outcome), *rates, "" if mean is None else f"{100 * mean:.1f}"])
    return ["source", "attack", "eps", *targets, "black-box mean"], lines


def long_table(outcomes: Sequence[Outcome], steps: int) -> tuple[list[str], list[list[str]]]:
    """Success in percent with its 95 % interval at T = `steps`; a line per outcome and target."""
    lines = []
    for outcome in _at(outcomes, steps):
        for target, shares in outcome.fooled.items():
            rate = outcome.rate(target)
            low, high = wilson(rate, len(shares))
            lines.append([*_heading(outcome), target, f"{100 * rate:.1f}", f"{100 * low:.1f} – {100 * high:.1f}"])
    return ["source", "attack", "eps", "target", "success", "95 %"], lines


def doubts(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every outcome and target of which images met NaN or infinite logits."""
    return [
        f"{count} of {len(outcome.fooled[target])} images of {_name(outcome, True)}, T = {outcome.steps}, on "
        f"{target} met NaN or infinite logits or gradients: they do not count as fooling it, but might"
        for outcome in outcomes
        for target, count in outcome.doubtful.items()
        if count
    ]


def _at(outcomes: Sequence[Outcome], steps: int) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.steps == steps or outcome.attack == CLEAN]


def _heading(outcome: Outcome) -> list[str]:
    one = outcome
    return ["", CLEAN, ""] if one.attack == CLEAN else [one.source, one.attack, radius(one.eps)]


def write(run: Run, out: Path) -> list[Path]:
    """Write the tables and pictures of a run to `out`; returns the paths."""
    specification = run.facts["specification"]
    facts: dict[str, object] = {"data": run.facts["data"]["name"], "images": run.facts["data"]["count"]}
    facts["seed"] = ", ".join(map(str, specification["seeds"]))
    facts["draws of random defences"] = specification["draws"]
    return write_outcomes(outcomes(run), out, facts=facts)


def write_outcomes(outcomes: Sequence[Outcome], out: Path, *, facts: Mapping[str, object]) -> list[Path]:
    """Write transfer.md, transfer.csv, the heat map, and curves where there are several T; returns the paths."""
    steps = max(outcome.steps for outcome in outcomes)
    protocol = ", ".join(f"{name} {value}" for name, value in facts.items())
    tables = "\n\n".join(markdown(*make(outcomes, steps), words=words) for make, words in ((table, 2), (long_table, 4)))
    write_text(
        out / "transfer.md",
        f"Success in percent among images that all models classify correctly, T = {steps}; "
        f"{escaped(protocol)}. With 95 % intervals (Wilson) below.\n\n{tables}\n"
        + "".join(f"\n**{escaped(line)}**\n" for line in doubts(outcomes)),
    )
    lines = []
    for outcome in outcomes:
        facts_of = [outcome.source, outcome.attack, outcome.eps, outcome.steps, outcome.seed]
        for target, shares in outcome.fooled.items():
            rate = outcome.rate(target)
            numbers = [len(shares), rate, *wilson(rate, len(shares)), outcome.doubtful.get(target, 0)]
            lines.append([*facts_of, target, *numbers])
    header = ["source", "attack", "eps", "steps", "seed", "target", "images", "success", "low", "high", "doubtful"]
    write_text(out / "transfer.csv", csv_text(header, lines))
    paths = [out / "transfer.md", out / "transfer.csv", heat_map(outcomes, steps, out / "transfer.png")]
    attacked = [outcome for outcome in outcomes if outcome.attack != CLEAN]
    if len({outcome.steps for outcome in attacked}) > 1:
        paths.append(step_curves(attacked, out / "steps.png"))
    return paths


def heat_map(outcomes: Sequence[Outcome], steps: int, path: Path) -> Path:
    """Success of every outcome at T = `steps` on every target, as colours and numbers."""
    shown = _at(outcomes, steps)
    several = len({outcome.source for outcome in shown}) > 1
    figure = heat_chart(shown, [_name(outcome, several) for outcome in shown])
    figure.axes[0].set_title(f"success, %, T = {steps}", fontsize=10)
    return _save(figure, path)


def defence_chart(outcomes: Sequence[Outcome]) -> Figure:
    """Success of every outcome on every target, bare and behind defences."""
    several = len({outcome.source for outcome in outcomes}) > 1
    varied = len({outcome.steps for outcome in outcomes if outcome.attack != CLEAN}) > 1
    names = [
        _name(outcome, several) + f", T = {outcome.steps}" * (varied and outcome.attack != CLEAN)
        for outcome in outcomes
    ]
    return heat_chart(outcomes, names)


def heat_chart(outcomes: Sequence[Outcome], names: Sequence[str]) -> Figure:
    """Success in percent, a line for every outcome and a column for every target, as colours and numbers."""
    targets = list(dict.fromkeys(target for outcome in outcomes for target in outcome.fooled))
    values = [
        [100 * outcome.rate(target) if target in outcome.fooled else np.nan for target in targets]
        for outcome in outcomes
    ]
    figure = Figure(figsize=(3.6 + 0.95 * len(targets), 1.9 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color, text = "white" if value > 60 else "black", "–" if np.isnan(value) else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(targets)), [target.replace(" | ", "\n") for target in targets], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8, length=0)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def step_curves(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Mean black-box success (of all targets, without any) against T: a panel per eps, a line per attack and source."""
    radii = sorted({outcome.eps for outcome in outcomes})
    several = len({outcome.source for outcome in outcomes}) > 1
    figure = Figure(figsize=(5.4 * len(radii), 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(radii), squeeze=False)
    for axes, eps in zip(grid[0], radii, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for outcome in outcomes:
            if outcome.eps == eps:
                bare = [outcome.rate(name) for name in outcome.fooled if " | " not in name]
                mean = average(outcome)
                rate = sum(bare) / len(bare) if mean is None else mean
                name = f"{outcome.source}: {outcome.attack}" if several else outcome.attack
                lines.setdefault(name, []).append((outcome.steps, 100 * rate))
        for i, (name, points) in enumerate(lines.items()):
            at, rates = zip(*sorted(points), strict=True)
            axes.plot(at, rates, color=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)], markersize=4, label=name)
        axes.set(xlabel="steps T", ylabel="mean black-box success, %", ylim=(0, 102), xlim=(0, None))
        axes.set_title(f"ε = {radius(eps)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _name(outcome: Outcome, several: bool) -> str:
    if outcome.attack == CLEAN:
        return CLEAN
    return f"{outcome.source}: " * several + f"{outcome.attack}, ε = {radius(outcome.eps)}"


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
