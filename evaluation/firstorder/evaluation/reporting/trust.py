"""Can the numbers of a run be trusted? The diagnosis of every model, and what its attacks say of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from firstorder.evaluation.reporting import diagnosis, summary, tables
from firstorder.evaluation.reporting.sheets import permalink
from firstorder.evaluation.reporting.summary import Facts
from firstorder.evaluation.runs import trust
from firstorder.evaluation.runs.checks import many
from firstorder.evaluation.runs.diagnosis import Finding
from firstorder.evaluation.runs.store import Run

WITHOUT_GRADIENTS, ONE_STEP = ("square",), ("fgsm",)
"""Attacks, by the names in `names.attacks`, that take no gradient, and that take a single one."""


@dataclass(frozen=True)
class Panel:
    """What speaks against trusting the numbers of a model, or does not.

    Attributes:
        model: its name in the run.
        findings: of its diagnosis, then of the run's own rows.
        missing: why there is no diagnosis; empty where there is one.
    """

    model: str
    findings: tuple[Finding, ...]
    missing: str

    @property
    def reasons(self) -> tuple[str, ...]:
        """The checks that warn."""
        return tuple(finding.check for finding in self.findings if finding.verdict == "warning")


def panels(run: Run, rows: pd.DataFrame) -> list[Panel]:
    """A panel for every model of a run.

    Args:
        rows: of the run, as `summary.load` makes them.
    """
    found = []
    for model in run.facts["models"][: len(run.facts["specification"]["models"])]:
        name = model["name"]
        known = trust.findings(run, name)
        missing = "" if known is not None else _missing(run, name, model["spec"])
        found.append(Panel(name, (*(known or ()), *of_rows(rows, run.facts, name)), missing))
    return found


def of_rows(rows: pd.DataFrame, facts: Facts, model: str) -> Iterator[Finding]:
    """What attacks on a model say of each other, at the radius where it is worst; only what the run can show.

    That iterations find less than a single step, and gradients less than none, are signs of masked gradients (Athalye,
    Carlini & Wagner 2018, Sec. 3.1).
    """
    mine = rows[(rows["model"] == model) & (rows["target"] == model) & rows["clean"]]
    attacks, radii = facts["attacks"], summary.radii(facts)
    bounded = [one for one in attacks if one["kind"] != "minimum-norm"]
    free = [one["name"] for one in bounded if one["attack"] in WITHOUT_GRADIENTS]
    single = [one["name"] for one in bounded if one["attack"] in ONE_STEP or one.get("steps") == 1]
    longer = [one["name"] for one in bounded if one["name"] not in (*free, *single)]
    at = [_broken(mine, eps) for eps in radii]
    mask = "the gradients mislead the attacks: see what firstorder diagnose says of them, and trust Square alone"
    if single and longer:
        missed = max((_missed(broken, single, longer) for broken in at), default=(0, 0))
        meaning = "images that a single step breaks and no attack of several does, at the radius with most of them"
        yield _finding("one step against several", *missed, meaning, mask)
    if free and len(free) < len(bounded):
        missed = max((_missed(broken, free, [*single, *longer]) for broken in at), default=(0, 0))
        meaning = "images that an attack without gradients breaks and none with gradients does"
        yield _finding("without gradients against with", *missed, meaning, mask)
    if len(radii) > 1 and longer:
        pairs = [(small, large, name) for small, large in pairwise(at) for name in longer]
        lost = max((_lost(*pair) for pair in pairs), default=(0, 0))
        meaning = "images that an attack of several steps loses in all from a radius to the next larger one"
        yield _finding("a larger radius", *lost, meaning, "give the attack more steps, or a step size for the radius")
    if len(mine):
        n = mine["example"].nunique()
        wrong = int(mine["example"][mine["unverified"].fillna(False).astype(bool)].nunique())
        remedy = "the model is random, or its answers change with the batch or the precision: see firstorder diagnose"
        meaning = "images that an attack called broken and that are not, or not within the radius"
        yield _finding("breaks that were not confirmed", wrong, n, meaning, remedy)


def lines(found: Sequence[Panel]) -> list[str]:
    """A line for every model that is not to be trusted."""
    return [f"{one.model}: not to be trusted: {', '.join(one.reasons)}" for one in found if one.reasons]


def html(found: Sequence[Panel]) -> Markup:
    """The section of a page."""
    title = f'<h2 id="trust-title">{escape(diagnosis.TITLE)} {permalink("trust")}</h2>'
    parts = [f'<section id="trust" aria-labelledby="trust-title">{title}']
    for one in found:
        state = " open" if one.reasons else ""
        said = " ".join(filter(None, (one.missing, diagnosis.summary(one.findings) if one.findings else "")))
        parts.append(f"<details{state}><summary><strong>{escape(one.model)}</strong>: {escape(said)}</summary>")
        if one.findings:
            parts.append(diagnosis.table_html(one.findings, label=f"Checks of {one.model}"))
        parts.append("</details>")
    return Markup("\n".join([*parts, "</section>"]))


def markdown(found: Sequence[Panel], escaped: Callable[[object], str]) -> Markup:
    """The section as text, `escaped` where it comes from outside."""
    parts = [f"## {diagnosis.TITLE}"]
    for one in found:
        parts.append(f"### {escaped(one.model)}")
        parts += [escaped(one.missing)] if one.missing else []
        if one.findings:
            parts.append(escaped(diagnosis.summary(one.findings)))
            parts.append(diagnosis.table_markdown(one.findings))
    return Markup("\n\n".join(parts))


def _missing(run: Run, name: str, spec: str) -> str:
    error = trust.failure(run, name)
    if error is not None:
        return f"The diagnosis failed: {error}."
    if not summary.radii(run.facts):
        return "Not diagnosed: the run has no radius."
    eps, norm = max(summary.radii(run.facts)), run.facts["specification"]["norm"]
    data = run.facts["data"]["spec"]
    return f"Not diagnosed: firstorder diagnose {spec} --data {data} --eps {tables.radius(eps)} --norm {norm}."


def _finding(check: str, count: int, n: int, meaning: str, remedy: str) -> Finding:
    wrong = bool(n) and many(count, n)
    words: dict[str, Any] = {"remedy": remedy, "verdict": "warning"} if wrong else {"remedy": "", "verdict": "ok"}
    return Finding(check=check, figure=f"{count} of {n}", meaning=meaning, **words)


def _broken(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    """Which examples (lines) each attack (columns) with that radius breaks, with any seed; NaN where it is unknown."""
    own = rows[rows["eps"] == eps]
    return (own["reach"] <= eps).groupby([own["example"], own["attack"]]).any().unstack()


def _missed(broken: pd.DataFrame, some: Sequence[str], others: Sequence[str]) -> tuple[int, int]:
    """How many examples some attacks break and the others do not, and of how many that is known."""
    own, rest = (broken.reindex(columns=list(names)).dropna(axis=1, how="all") for names in (some, others))
    if own.shape[1] == 0 or rest.shape[1] == 0:
        return 0, 0
    known = own.notna().all(axis=1) & rest.notna().all(axis=1)
    hit = own[known].astype(bool).any(axis=1) & ~rest[known].astype(bool).any(axis=1)
    return int(hit.sum()), int(known.sum())


def _lost(small: pd.DataFrame, large: pd.DataFrame, attack: str) -> tuple[int, int]:
    """How many examples fewer an attack breaks at the larger radius, and of how many that is known."""
    if attack not in small or attack not in large:
        return 0, 0
    both = pd.concat([small[attack], large[attack]], axis=1).dropna().astype(bool)
    return max(int(both.iloc[:, 0].sum()) - int(both.iloc[:, 1].sum()), 0), len(both)
