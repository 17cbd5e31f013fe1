"""The columns of a run's rows, each a function of what a cell found.

A row is an example of a cell on a target, bare or behind a defence. A new column is one decorated function that
returns a value for every row, (N,) as a tensor or a list, or one value for all of them:

    @column(pa.float64())
    def l1(rows: Rows) -> Values:
        return rows.delta.abs().sum(1)

It is in every table that is computed from then on. The names of the columns are a part of every cell's key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from torch import Tensor

from firstorder.attacks import broken
from firstorder.evaluation.runs.adversaries import Found
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.classes import Seen

Values = Tensor | list[Any] | str | float | int | None


class Rounded(NamedTuple):
    """What a target makes of the adversarial pictures of 8 bits.

    Attributes:
        after: its class for each, (N,); `UNDECIDED` where logits are NaN or infinite.
        inside: which are within the bounds and the radius, or were not attacked, (N,).
    """

    after: Tensor
    inside: Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the columns of N rows are computed from: the examples of a cell on one target.

    Attributes:
        cell: which.
        target: the model that classifies them.
        defence: what is put before the target; None for nothing.
        examples: their places among the run's, (N,).
        x: the examples as they are, (N, ...) in [0, 1].
        y: their labels, (N,).
        wanted: the class that each is to be taken for, (N,); None in an untargeted run.
        found: what the attack made of them.
        before, after: the target's class for the example as it is, and for what the attack made of it, (N,);
            `UNDECIDED` where logits are NaN or infinite. Of a random defence, in the first draw.
        bare: more of what the bare target makes of them, before and after; None behind a defence.
        clean_share, share: the share of draws in which the target is wrong before, and in which the attack succeeds,
            (N,) in [0, 1]; 0 or 1 where nothing is random.
        wrong_share: the share of draws in which the target is wrong in the end, within bounds and radius, (N,).
        rounded: what the bare target makes of the pictures of 8 bits, where examples are carried to it; else None.
        undecided: for which logits were NaN or infinite in some draw, (N,).
        seconds: of the cell, divided by its examples.
        pictured: which are kept as pictures, (N,).
    """

    cell: Cell
    target: str
    defence: str | None
    examples: Tensor
    x: Tensor
    y: Tensor
    wanted: Tensor | None
    found: Found
    before: Tensor
    after: Tensor
    bare: tuple[Seen, Seen] | None
    clean_share: Tensor
    share: Tensor
    wrong_share: Tensor
    rounded: Rounded | None
    undecided: Tensor
    seconds: float
    pictured: Tensor

    @property
    def delta(self) -> Tensor:
        """The perturbations (N, D) in float64."""
        return (self.found.adversarial - self.x).flatten(1).double()


COLUMNS: dict[str, tuple[pa.DataType, Callable[[Rows], Values]]] = {}
"""The types and functions of the columns, by name and in order."""


def column(kind: pa.DataType) -> Callable[[Callable[[Rows], Values]], Callable[[Rows], Values]]:
    """Make a function the column of its name, with values of that type."""

    def enter(make: Callable[[Rows], Values]) -> Callable[[Rows], Values]:
        COLUMNS[make.__name__] = (kind, make)
        return make

    return enter


def schema() -> pa.Schema:
    """The names and types of all columns."""
    return pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])


def table(rows: Rows) -> pa.Table:
    """The rows with all columns."""
    arrays = []
    for kind, make in COLUMNS.values():
        value = make(rows)
        values = value.cpu().numpy() if isinstance(value, Tensor) else value
        whole = isinstance(value, Tensor | list)
        arrays.append(pa.array(values if whole else [values] * len(rows.y), kind))
    return pa.Table.from_arrays(arrays, schema=schema())


@column(pa.string())
def model(rows: Rows) -> Values:
    """The model, or ensemble A+B, that the example was made on."""
    return rows.cell.model


@column(pa.string())
def target(rows: Rows) -> Values:
    """The model that classifies it: the same, or another one that it was carried to."""
    return rows.target


@column(pa.string())
def defence(rows: Rows) -> Values:
    """What is put before the target; null for nothing."""
    return rows.defence


@column(pa.string())
def attack(rows: Rows) -> Values:
    """The attack's name in the run."""
    return rows.cell.attack


@column(pa.float64())
def eps(rows: Rows) -> Values:
    """The radius; null for minimum-norm attacks."""
    return rows.cell.eps


@column(pa.int64())
def seed(rows: Rows) -> Values:
    """Of the random draws."""
    return rows.cell.seed


@column(pa.int64())
def example(rows: Rows) -> Values:
    """Its place among the run's examples."""
    return rows.examples


@column(pa.int64())
def label(rows: Rows) -> Values:
    """The true class."""
    return rows.y


@column(pa.int64())
def wanted(rows: Rows) -> Values:
    """The class that it is to be taken for; null in an untargeted run."""
    return rows.wanted


@column(pa.int64())
def clean_label(rows: Rows) -> Values:
    """What the target predicts for the example as it is; of a random defence, in the first draw."""
    return rows.before


@column(pa.int64())
def adversarial_label(rows: Rows) -> Values:
    """And for what the attack made of it; -1 for logits that are NaN or infinite."""
    return rows.after


@column(pa.bool_())
def success(rows: Rows) -> Values:
    """The attack's end is reached, in every draw, within bounds and radius. Misclassified examples are not attacked."""
    return rows.share == 1


@column(pa.float64())
def share(rows: Rows) -> Values:
    """The share of a random defence's draws in which it is reached; without one 0 or 1."""
    return rows.share


@column(pa.float64())
def clean_share(rows: Rows) -> Values:
    """The share of draws in which the target is wrong about the example as it is."""
    return rows.clean_share


@column(pa.float64())
def wrong_share(rows: Rows) -> Values:
    """The share of draws in which the target is wrong in the end, whatever the attack's end was."""
    return rows.wrong_share


@column(pa.int64())
def rounded_label(rows: Rows) -> Values:
    """What the target predicts for the adversarial picture of 8 bits, `ball.eight_bit`; null where the ball holds none,
    behind a defence, and where no examples are carried.
    """
    if rows.rounded is None:
        return None
    known = zip(rows.rounded.after.tolist(), rows.rounded.inside.tolist(), strict=True)
    return [label if inside else None for label, inside in known]


@column(pa.bool_())
def rounded_success(rows: Rows) -> Values:
    """Whether the attack's end is reached by that picture; null behind a defence, and where none are carried."""
    if rows.rounded is None:
        return None
    after = rows.rounded.after
    reached = broken(after, rows.y) if rows.wanted is None else after == rows.wanted
    return reached & rows.rounded.inside


@column(pa.bool_())
def doubtful(rows: Rows) -> Values:
    """No success, but NaN or infinite logits or gradients were met."""
    return (rows.found.doubtful | rows.undecided) & (rows.share < 1)


@column(pa.bool_())
def unverified(rows: Rows) -> Values:
    """The attack calls it a success, but it is none on the model itself, within the bounds and the radius."""
    own = rows.target == rows.cell.model and rows.defence is None
    return rows.found.claimed & (rows.share < 1) & own


@column(pa.float64())
def linf(rows: Rows) -> Values:
    """The largest change of a pixel."""
    return rows.delta.abs().amax(1)


@column(pa.float64())
def l2(rows: Rows) -> Values:
    """The Euclidean norm of the perturbation."""
    norms: Tensor = rows.delta.norm(dim=1)
    return norms


@column(pa.float64())
def loss(rows: Rows) -> Values:
    """The target's cross-entropy in the end; null behind a defence."""
    return None if rows.bare is None else rows.bare[1].loss


@column(pa.float64())
def clean_confidence(rows: Rows) -> Values:
    """The probability that the target gives its class for the example as it is; null behind a defence."""
    return None if rows.bare is None else rows.bare[0].confidence


@column(pa.float64())
def confidence(rows: Rows) -> Values:
    """And for what the attack made of it; NaN for logits that are NaN or infinite."""
    return None if rows.bare is None else rows.bare[1].confidence


@column(pa.float64())
def logit_margin(rows: Rows) -> Values:
    """In the end, the target's logit of the true class minus the largest other one; null and NaN likewise."""
    return None if rows.bare is None else rows.bare[1].margin


@column(pa.float64())
def forwards(rows: Rows) -> Values:
    """Forward passes through the model it was made on."""
    return rows.found.forwards


@column(pa.float64())
def backwards(rows: Rows) -> Values:
    """Backward passes likewise."""
    return rows.found.backwards


@column(pa.string())
def stage(rows: Rows) -> Values:
    """Of a verdict: the stage that broke it, "input" where it is misclassified as it is; null where none did."""
    return None if rows.found.course is None else rows.found.course.stage


@column(pa.float64())
def margin(rows: Rows) -> Values:
    """Of a verdict: the smallest margin found, in units of the logits; null where nothing was attacked."""
    return None if rows.found.course is None else [None if m != m else m for m in rows.found.course.margin.tolist()]


@column(pa.bool_())
def complete(rows: Rows) -> Values:
    """Of a verdict: attacked to the end, that is broken or robust against every stage; else given up."""
    return None if rows.found.course is None else rows.found.course.complete


@column(pa.int64())
def audit(rows: Rows) -> Values:
    """Of a verdict: the number of the sample in which AutoAttack was run on it, which enters it; null for none."""
    return None


@column(pa.float64())
def audit_passes(rows: Rows) -> Values:
    """Forward and backward passes that AutoAttack took there, the mean of the sample; null without."""
    return None


@column(pa.binary())
def carried(rows: Rows) -> Values:
    """Of a verdict before its closing stages: what these go on from where nothing broke it, little-endian float32."""
    course = rows.found.course
    if course is None or course.carried is None:
        return None
    values = zip(course.carried.cpu().numpy().astype("<f4"), course.stage, strict=True)
    return [one.tobytes() if stage is None else None for one, stage in values]


@column(pa.float64())
def seconds(rows: Rows) -> Values:
    """Of the cell, divided by its examples."""
    return rows.seconds


@column(pa.binary())
def adversarial(rows: Rows) -> Values:
    """The example in the end, little-endian float32, where it is pictured; else null."""
    ends = zip(rows.found.adversarial, rows.pictured.tolist(), strict=True)
    return [one.cpu().numpy().astype("<f4").tobytes() if kept else None for one, kept in ends]
