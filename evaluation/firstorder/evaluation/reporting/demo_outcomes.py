"""What the demonstration found: runs of many attacks on one model at one radius and budget, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firstorder.evaluation.reporting import summary, verdicts
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack, as the table shows it. Sizes and gradients are means over the attacked images."""

    attack: str
    robust_accuracy: float
    mean_linf: float
    mean_l2: float
    gradients: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run of one model at one radius.

    Attributes:
        run: where the images are.
        name: the model's.
        eps: the radius.
        budget: gradients per image that an attack may take.
        clean_accuracy: without an attack.
        rows: the strongest attack first.
        left_out: the attacks of which one step costs more than the budget.
    """

    run: Run
    name: str
    eps: float
    budget: int
    clean_accuracy: float
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]

    @property
    def data(self) -> dict[str, Any]:
        """What the run says of its images."""
        found: dict[str, Any] = self.run.facts["data"]
        return found

    @property
    def title(self) -> str:
        """In two lines."""
        size = f"{self.data['count']} images, ε = {radius(self.eps)}"
        return f"{self.name}\n{size}, {self.budget} gradients per image"


def outcome(run: Run) -> Outcome:
    """What a run of one model at one radius found, of finished cells."""
    rows, facts = summary.load(run), run.facts
    (line,) = summary.leaderboard(rows, facts)
    means = rows[rows["clean"]].groupby("attack")[["linf", "l2", "backwards"]].mean()
    steps = {attack["name"]: attack["steps"] or 1 for attack in facts["attacks"]}
    found = [
        Row(
            attack=one.attack,
            robust_accuracy=one.robust.value,
            mean_linf=float(means["linf"].get(one.attack, 0.0)),
            mean_l2=float(means["l2"].get(one.attack, 0.0)),
            gradients=float(means["backwards"].get(one.attack, 0.0)),
            steps=steps[one.attack],
        )
        for one in line.attacks
    ]
    return Outcome(
        run=run,
        name=line.model,
        eps=line.eps,
        budget=facts["specification"]["budget"],
        clean_accuracy=line.clean.value,
        rows=tuple(sorted(found, key=lambda row: (row.robust_accuracy, row.attack))),
        left_out=tuple(facts["left out"]),
    )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The verdict on a model, beside single attacks.

    Attributes:
        title: the model, the images and the radius.
        rows: attack, robust accuracy in [0, 1], forwards and backwards per attacked image; in the order of the run.
        notes: what the verdict leaves open.
    """

    title: str
    rows: tuple[tuple[str, float, float, float], ...]
    notes: tuple[str, ...]


def ending(run: Run) -> Ending:
    """What a run of a verdict and other attacks on one model at one radius found."""
    rows, data = summary.load(run), run.facts["data"]
    (line,) = summary.leaderboard(rows, run.facts)
    order = summary.names(run.facts, "attacks")
    found = sorted(line.attacks, key=lambda one: order.index(one.attack))
    return Ending(
        title=f"{line.model}: {data['count']} images of {data['name']}, ε = {radius(line.eps)}",
        rows=tuple((one.attack, one.robust.value, one.forwards, one.backwards) for one in found),
        notes=tuple(verdicts.notes(rows, run.facts)),
    )
