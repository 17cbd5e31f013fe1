"""What is read off a finished run of training: accuracies, and statistics of what it logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from firstorder.evaluation.training import estimates
from firstorder.evaluation.training.configuration import Configuration
from firstorder.evaluation.training.experiment import LANDSCAPE, Outcome, arrays
from firstorder.fabric.logs import EPOCHS, GRADIENTS

LATE = 10
"""One part of this many of the epochs is looked at before the learning rate's first drop, and at the end."""

RADIUS = "ε = "
"""What the measure of accuracy at a further radius begins with."""


class Trained(NamedTuple):
    """A finished run of training: its configuration, its folder and its outcome."""

    configuration: Configuration
    folder: Path
    outcome: Outcome


Measure = Callable[[Trained], float]


def _logged(column: str, when: str = "") -> Measure:
    """The mean of a column of the epochs: of all, or of those at the end or before the first drop."""

    def found(run: Trained) -> float:
        table, epochs = pd.read_csv(run.folder / EPOCHS), run.configuration.epochs
        last = {"": epochs, "end": epochs, "drop": int(epochs * min(run.configuration.drops, default=1.0))}[when]
        first = 0 if not when else last - max(epochs // LATE, 1)
        return float(table[(table["epoch"] > first) & (table["epoch"] <= last)][column].mean())

    return found


def _error(alpha: float) -> Measure:
    """The mean of |w' - w|, in percent."""

    def found(run: Trained) -> float:
        table = estimates.errors(pd.read_csv(run.folder / GRADIENTS), (alpha,))
        return 100 * float(table["error"].mean())

    return found


def _span(which: str) -> Measure:
    """How much the loss varies around an example, the mean of the examples."""

    def found(run: Trained) -> float:
        found = arrays(run.folder)
        if not found:
            raise ValueError(f"{run.folder} holds no {LANDSCAPE}; train with landscape above 0")
        loss = found[which]
        return float((loss.max((1, 2)) - loss.min((1, 2))).mean())

    return found


def _validated(part: Callable[[pd.Series], float]) -> Measure:
    """Of the robust accuracies on the validation images by epoch, in percent."""
    return lambda run: 100 * part(pd.read_csv(run.folder / EPOCHS)["validation_robust"].dropna())


ACCURACIES: dict[str, Measure] = {
    "natural": lambda run: 100 * run.outcome.best.natural,
    "best": lambda run: 100 * run.outcome.best.robust,
    "last": lambda run: 100 * run.outcome.last.robust,
    "overfitting": lambda run: 100 * run.outcome.overfitting,
}
"""What every study has, in percent."""

MEASURES: dict[str, Measure] = {
    **ACCURACIES,
    "μ": _logged("mu"),
    "σ²": _logged("sigma2"),
    "μ before the drop": _logged("mu", "drop"),
    "μ at the end": _logged("mu", "end"),
    "σ² before the drop": _logged("sigma2", "drop"),
    "σ² at the end": _logged("sigma2", "end"),
    "correlation": _logged("correlation"),
    "correlation at the end": _logged("correlation", "end"),
    "correlation in training mode": _logged("correlation_training"),
    "error of w at α = 0.1": _error(0.1),
    "error of w at α = 1": _error(1.0),
    "error of w at α = 3": _error(3.0),
    "span of the loss": _span("best"),
    "span of the loss at the end": _span("last"),
    "validation at its highest": _validated(lambda shares: float(shares.max())),
    "validation at the end": _validated(lambda shares: float(shares.iloc[-1])),
    "seconds": _logged("seconds"),
}
"""By the name that rows of a study end with."""


def measure(name: str, run: Trained) -> float:
    """What is called `name`: of `MEASURES`, or the accuracy of the best weights at a further radius, "ε = 1.5".

    Raises:
        ValueError: nothing is.
    """
    if name.startswith(RADIUS):
        radius = name.removeprefix(RADIUS)
        if radius not in run.outcome.radii:
            raise ValueError(f"{name!r} was not evaluated; radii are {', '.join(run.outcome.radii) or 'none'}")
        return 100 * run.outcome.radii[radius]
    if name not in MEASURES:
        raise ValueError(f"a study has no measure {name!r}; it has {', '.join(MEASURES)} and {RADIUS}RADIUS")
    return MEASURES[name](run)


def named(rows: Sequence[str]) -> tuple[str, ...]:
    """The measures that names of rows end with, after those that every study has where they name one of those."""
    found = tuple(dict.fromkeys(row.rpartition(", ")[2] for row in rows))
    return tuple(dict.fromkeys([*ACCURACIES, *found])) if set(found) & set(ACCURACIES) else found
