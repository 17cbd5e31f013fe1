"""Do adversarial examples of one model fool others? Tables of a run, as papers on transfer show them.

A line is a source, an attack, a radius and a number of steps; a column is a target, bare or behind a defence. Several
seeds are one line: the mean, with their standard deviation. Pictures: `reporting.transfer_figures`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from firstorder.evaluation.reporting import transfer_figures, transfer_page
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.reporting.paired import pair
from firstorder.evaluation.reporting.tables import csv_text, escaped, markdown, radius
from firstorder.evaluation.reporting.transfer_outcomes import (
    CLEAN,
    Outcome,
    Values,
    at,
    average,
    displayed,
    grouped,
    mean,
    name,
    outcomes,
)
from firstorder.evaluation.reporting.transfer_page import Titled
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

Group = Sequence[Outcome]
Table = tuple[list[str], list[list[str]]]


def images(outcomes: Sequence[Outcome]) -> str:
    """Over which images success is counted, in words."""
    most = max(outcomes, key=lambda one: one.count)
    right, count, left_out = int(most.right.sum()), most.count, int(most.places.min())
    which = f"{count} images" if right == count else f"the {right} of {count} images"
    which += f" after the first {left_out}" if left_out else ""
    return f"{which} that all models classify correctly"


def table(outcomes: Sequence[Outcome], steps: int) -> Table:
    """Success in percent at T = `steps`; a line for each attack, a column per target.

    Attacks that have one number of steps of their own are shown at that. Means are over the targets that the examples
    were not made on; those of the 8-bit pictures, of all images and of any wrong class follow where there are such.
    """
    targets = list(outcomes[0].fooled)
    more = _more(outcomes)
    lines = []
    for group in displayed(outcomes, steps):
        clean, bare = group[0].attack == CLEAN, average(group[0]) is not None
        rates = [_spread([one.rate(target) for one in group]) for target in targets]
        whole = _spread([average(one) or 0.0 for one in group]) if bare and not clean else ""
        extra = ["" if clean else _spread([make(one) for one in group]) for make in more.values()]
        lines.append([*_heading(group[0]), _gradients(group), *rates, whole, *extra])
    return ["source", "attack", "eps", "gradients", *targets, "black-box mean", *more], lines


def _more(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Further means over the bare targets, by heading."""
    found: dict[str, Any] = {}
    if any(one.rounded for one in outcomes):
        found["8-bit mean"] = lambda one: _over(one, one.rounded, one.right)
    if any(one.targeted for one in outcomes):
        found["any wrong class"] = lambda one: _over(one, one.wrong, one.right)
    if not all(one.right.all() for one in outcomes):
        found[f"all {outcomes[0].count} images"] = lambda one: _over(one, one.fooled, None)
    return found


def _over(one: Outcome, values: Mapping[str, Values], among: Values | None) -> float:
    """The mean over the bare targets of what there is of them."""
    return mean([mean(values[name] if among is None else values[name][among]) for name in one.bare if name in values])


def long_table(outcomes: Sequence[Outcome], steps: int) -> Table:
    """Success in percent with its 95 % interval at T = `steps`; a line for each attack and target.

    The interval is Wilson's for one seed's number of images: several seeds on the same images make it no narrower.
    """
    several = any(len(group) > 1 for group in grouped(outcomes))
    eight, goal = any(one.rounded for one in outcomes), any(one.targeted for one in outcomes)
    whole = not all(one.right.all() for one in outcomes)
    lines = []
    for group in displayed(outcomes, steps):
        for target in group[0].fooled:
            rates = [one.rate(target) for one in group]
            count = int(group[0].right.sum())
            low, high = wilson(mean(rates), count)
            line = [*_heading(group[0]), target, _gradients(group), _percent(mean(rates))]
            line.append(f"{100 * low:.1f} – {100 * high:.1f}")
            line += [f"{100 * min(rates):.1f} – {100 * max(rates):.1f}"] * several
            line += [_only([one.rounded[target][one.right] for one in group if target in one.rounded])] * eight
            line += [_only([one.wrong[target][one.right] for one in group if target in one.wrong])] * goal
            line += [_only([one.fooled[target] for one in group])] * whole
            lines.append(line)
    more = ["seeds"] * several + ["8 bits"] * eight + ["any wrong class"] * goal
    more += [f"all {outcomes[0].count} images"] * whole
    return ["source", "attack", "eps", "target", "gradients", "success", "95 %", *more], lines


def paired_table(outcomes: Sequence[Outcome], steps: int, against: str | None = None) -> Table:
    """Attacks of the same source and radius compared image by image, on images that all models classify correctly.

    Args:
        outcomes: of attacks.
        steps: as in `table`.
        against: the attack that all others are compared with, target by target and together; by default each is
            compared with the next one of the ranking by the mean over targets.
    """
    groups = [group for group in displayed(outcomes, steps) if group[0].attack != CLEAN]
    lines = []
    for own in _settings(groups):
        ranking = sorted(own, key=lambda group: -float(_each(group).mean()))
        if against is None:
            pairs = list(itertools.pairwise(ranking))
        else:
            pairs = [(one, two) for two in own if two[0].attack == against for one in ranking if one is not two]
        for one, two in pairs:
            targets = [None] if against is None or len(one[0].bare) == 1 else [None, *one[0].bare]
            lines += [_compared(one, two, target) for target in targets]
    header = ["source", "attack", "eps", "compared with", "target", "gradients", "success", "better", "worse", "p"]
    return header, lines


def tables(outcomes: Sequence[Outcome], against: str | None = None) -> list[Titled]:
    """All tables of outcomes in words; none without any."""
    if not outcomes:
        return []
    steps = at(outcomes)
    goal = "Success, here to be taken for the class aimed at," if any(one.targeted for one in outcomes) else "Success"
    title = (
        f"{goal} in percent among {images(outcomes)}, T = {steps} where an attack does not say otherwise. Gradients "
        "are those of an image."
    )
    found = [Titled(title, *table(outcomes, steps), 2), Titled(LONG, *long_table(outcomes, steps), 4)]
    pairs = paired_table(outcomes, steps, against)
    return [*found, Titled(PAIRED, *pairs, 5)] if pairs[1] else found


def require(against: str, attacks: Sequence[str]) -> None:
    """Check that what others are compared with is among the attacks.

    Raises:
        ValueError: it is not.
    """
    if against not in attacks:
        raise ValueError(f"compare={against!r} is no attack of the run; it has {', '.join(attacks)}")


def _settings(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each source and radius."""
    found: dict[tuple[str, float], list[Group]] = {}
    for group in groups:
        found.setdefault((group[0].source, group[0].eps), []).append(group)
    return list(found.values())


def _compared(one: Group, two: Group, target: str | None) -> list[str]:
    values = _each(one, target).align(_each(two, target), join="inner")
    found = pair(*(own.to_numpy() for own in values))
    prices, rates = (" : ".join(text) for text in (map(_gradients, (one, two)), (_percent(mean(v)) for v in values)))
    names = [*_heading(one[0]), two[0].attack, target or "mean" if len(one[0].bare) > 1 else one[0].bare[0]]
    return [*names, prices, rates, str(found.better), str(found.worse), f"{found.p:.2g}"]


def _each(group: Group, target: str | None = None) -> pd.Series[float]:
    """The share of bare targets, or of one, and of seeds that each image known to all models fools, by its place."""
    names = group[0].bare if target is None else [target]
    parts = [pd.Series(one.fooled[name], one.places)[one.right] for one in group for name in names]
    return pd.concat(parts, axis=1, join="inner").mean(axis=1)


def doubts(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every outcome and target of which images met NaN or infinite logits."""
    return [
        f"{count} of {len(outcome.fooled[target])} images of {name(outcome, True)}, T = {outcome.steps}, on "
        f"{target} met NaN or infinite logits or gradients: they do not count as fooling it, but might"
        for outcome in outcomes
        for target, count in outcome.doubtful.items()
        if count
    ]


def weights(run: Run) -> list[str]:
    """A line for every model of the run, with the digest of its weights."""
    return [f"{entry['name']}: weights {entry['weights']}" for entry in run.facts["models"]]


def _heading(one: Outcome) -> list[str]:
    return ["", CLEAN, ""] if one.attack == CLEAN else [one.source, one.attack, radius(one.eps)]


def _gradients(group: Group) -> str:
    return "" if group[0].attack == CLEAN else f"{mean([one.gradients for one in group]):.4g}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _only(shares: Sequence[Values]) -> str:
    return _percent(mean([mean(own) for own in shares])) if shares else ""


def _spread(rates: Sequence[float]) -> str:
    """The mean in percent, of several with their standard deviation."""
    return _percent(mean(rates)) + (f" ± {100 * statistics.stdev(rates):.1f}" if len(rates) > 1 else "")


def write(run: Run, out: Path, *, against: str | None = None, after: int = 0) -> list[Path]:
    """Write the tables and pictures of a run to `out`; returns the paths.

    Args:
        run: with finished cells.
        out: the folder.
        against: as in `paired_table`.
        after: as in `outcomes`.
    """
    specification = run.facts["specification"]
    facts: dict[str, object] = {"data": run.facts["data"]["name"], "images": run.facts["data"]["count"]}
    facts["seed"] = ", ".join(map(str, specification["seeds"]))
    facts["draws of random defences"] = specification["draws"]
    if specification["targeted"]:
        facts["targeted"] = specification["targeted"]
    if after:
        facts["images left out"] = f"the first {after}"
    return write_outcomes(outcomes(run, after=after), out, facts=facts, models=weights(run), against=against)


def write_outcomes(
    outcomes: Sequence[Outcome],
    out: Path,
    *,
    facts: Mapping[str, object],
    models: Sequence[str] = (),
    against: str | None = None,
) -> list[Path]:
    """Write transfer.md, transfer.csv, the heat map, the frontier where several attacks have prices, and curves where
    attacks have several T; returns the paths.
    """
    text = [escaped(", ".join(f"{key} {value}" for key, value in facts.items()))] if facts else []
    for one in tables(outcomes, against):
        text += [one.title, markdown(one.header, one.rows, words=one.words)]
    text += [f"**{escaped(line)}**" for line in doubts(outcomes)]
    text += ["\n".join(f"- {escaped(line)}" for line in models)] if models else []
    write_text(out / "transfer.md", "\n\n".join(text) + "\n")
    write_text(out / "transfer.csv", csv_text(HEADER, [line for one in outcomes for line in _lines(one)]))
    page = transfer_page.write(
        out / "transfer.html", outcomes, tables(outcomes, against), facts=facts, models=models, notices=doubts(outcomes)
    )
    return [out / "transfer.md", out / "transfer.csv", page, *transfer_figures.write(outcomes, at(outcomes), out)]


LONG = (
    "By target, with the 95 % interval (Wilson) of one seed's number of images, which more seeds on the same images "
    "make no narrower."
)

PAIRED = (
    "Image by image, attacks that stand next to each other in the ranking, or all with one: on how many images the "
    "first fools more targets and seeds, on how many fewer. p is two-sided and exact (McNemar's test where there is "
    "one target and one seed, else the sign test); it is not corrected for the number of comparisons."
)

HEADER = [
    "source", "attack", "eps", "steps", "seed", "gradients", "target", "images", "success", "low", "high", "rounded",
    "any_wrong_class", "all_images", "all_success", "all_rounded", "doubtful",
]  # fmt: skip


def _lines(one: Outcome) -> Iterable[list[object]]:
    """The lines of the CSV file."""
    right, count = one.right, int(one.right.sum())
    for target, shares in one.fooled.items():
        rate, rounded, wrong = one.rate(target), one.rounded.get(target), one.wrong.get(target)
        yield [
            one.source, one.attack, one.eps, one.steps, one.seed, one.gradients, target, count, rate,
            *wilson(rate, count),
            None if rounded is None else mean(rounded[right]), None if wrong is None else mean(wrong[right]),
            len(shares), mean(shares), None if rounded is None else mean(rounded), one.doubtful.get(target, 0),
        ]  # fmt: skip
