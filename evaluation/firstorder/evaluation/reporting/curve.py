"""Robust accuracy at every radius, and the norm an attack reaches for its budget, from minimum-norm attacks.

An example is broken at radius eps iff its smallest known perturbation is no larger, so one run gives the
whole curve of accuracy against eps.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from firstorder.attacks import MinimumNormAttack
from firstorder.evaluation.names.attacks import parse
from firstorder.files import write_text

POINTS = 201
"""Radii at which the curve is tabulated."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attack with one budget on one model.

    Attributes:
        model: the model's name.
        attack: the attack's registry name.
        steps: its budget of gradients per example.
        norm: smallest perturbation of each example, infinite where none was found, shape (N,).
        doubtful: how many of the latter met NaN or infinite logits or gradients.
    """

    model: str
    attack: str
    steps: int
    norm: Tensor
    doubtful: int = 0

    def accuracy(self, eps: float) -> float:
        """The share of examples that no perturbation of norm eps is known to break."""
        return float((self.norm > eps).float().mean())

    def success(self) -> float:
        """The share of examples that were broken."""
        return float(self.norm.isfinite().float().mean())

    def mean(self) -> float:
        """The mean norm over the broken examples, NaN without any."""
        return float(self.norm[self.norm.isfinite()].mean())

    def median(self) -> float:
        """The median norm over all examples."""
        values: list[float] = self.norm.tolist()
        return statistics.median(values)


def create(label: str, steps: int, data: str) -> MinimumNormAttack:
    """The minimum-norm attack that `label` names, with the data set's preset where it has one.

    Args:
        label: a registry name with hyper-parameters in JSON, as in "anu" or "anu:annealed=false,gamma=0.3".
        steps: its budget of gradients.
        data: the images, as in `names.data.stream`.

    Raises:
        ValueError: no such attack or parameter, or an attack that stays within a given ball.
    """
    line = parse(label, without=("steps",), data=data)
    if line.bounded:
        raise ValueError(
            f"{label} stays within a given ball and has no norm to plot; name a minimum-norm attack (ddn, anu)"
        )
    attack = line.build(steps=steps)
    assert isinstance(attack, MinimumNormAttack)
    return attack


def norms(
    attack: MinimumNormAttack,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    batch_size: int = 100,
) -> Tensor:
    """The smallest norms (N,) that `attack` finds on x (N, ...) for labels, or targets, y (N,)."""
    return search(attack, model, x, y, targeted=targeted, batch_size=batch_size)[0]


def search(
    attack: MinimumNormAttack,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    batch_size: int = 100,
) -> tuple[Tensor, int]:
    """As `norms`, and of how many examples none is found but NaN or infinite logits or gradients are met."""
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    found = [attack.run(model, *batch, targeted=targeted) for batch in batches]
    doubtful = sum(int(one.doubtful.sum()) for one in found if one.doubtful is not None)
    return torch.cat([one.norm for one in found]), doubtful


def random_targets(y: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """A uniformly drawn class other than the label for each of y (N,)."""
    shift = torch.randint(1, classes, y.shape, generator=torch.Generator().manual_seed(seed))
    return (y + shift) % classes


def radii(runs: Sequence[Run]) -> list[float]:
    """Equidistant radii up to the largest finite norm at the largest budget of the runs; 0 alone without one."""
    most = max(run.steps for run in runs)
    found = torch.cat([run.norm for run in runs if run.steps == most])
    found = found[found.isfinite()]
    top = float(found.max()) if len(found) else 0.0
    return [top * i / (POINTS - 1) for i in range(POINTS)] if top else [0.0]


def write(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write the summary, the curve and the norms of all examples to `out` as CSV; returns the paths."""
    tables = {
        "summary.csv": (
            ("model", "attack", "steps", "examples", "success", "mean_norm", "median_norm", "doubtful"),
            ((r.model, r.attack, r.steps, len(r.norm), r.success(), r.mean(), r.median(), r.doubtful) for r in runs),
        ),
        "curve.csv": (
            ("model", "attack", "steps", "eps", "robust_accuracy"),
            (
                (r.model, r.attack, r.steps, eps, r.accuracy(eps))
                for name in dict.fromkeys(run.model for run in runs)
                for eps in radii([run for run in runs if run.model == name])
                for r in runs
                if r.model == name
            ),
        ),
        "norms.csv": (
            ("model", "attack", "steps", "example", "norm"),
            ((r.model, r.attack, r.steps, i, value) for r in runs for i, value in enumerate(r.norm.tolist())),
        ),
    }
    for name, (header, rows) in tables.items():
        write_text(out / name, _csv(header, rows))
    return [out / name for name in tables]


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    return text.getvalue()
