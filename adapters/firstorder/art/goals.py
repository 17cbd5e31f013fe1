"""Estimators without classes: object detectors, regressors, whatever has a loss and its gradient.

What an attack moves away from, or towards, is a goal for every example: a value, a dictionary of boxes, a text. Success
is not defined without classes; of several runs the one of the worst loss counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from art.estimators.estimator import BaseEstimator
from torch import Tensor

from firstorder.art.labels import Array
from firstorder.art.models import EstimatorModel
from firstorder.attacks import Evaluation, Loss
from firstorder.attacks.validation import Labels

Goals = Array | Sequence[Any]
"""What a loss compares with, one entry for every example."""

CLASSES_ONLY = {"early_stop": False, "minimal": False, "loss": None}
"""Parameters that mean something for classes only, with the values that are neutral."""


class GoalModel(EstimatorModel):
    """An estimator without classes. Its labels are positions among the goals.

    Args:
        estimator: has `loss_gradient`.
        goals: one for every example of the whole input.
    """

    def __init__(self, estimator: Any, goals: Goals) -> None:
        super().__init__(estimator)
        self._goals = goals

    def logits(self, x: Tensor) -> Tensor:
        raise ValueError(f"{type(self._estimator).__name__} has no classes, which this attack needs")

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        return Evaluation(self.by_input(x, self.at(labels)), None)

    def at(self, labels: Tensor) -> Goals:
        """The goals at `labels` (N,)."""
        if isinstance(self._goals, np.ndarray):
            return cast(Goals, self._goals[labels.cpu().numpy()])
        return [self._goals[i] for i in labels.tolist()]

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        pass


def given(estimator: Any, x: Array, y: Goals | None, *, targeted: bool, batch_size: int) -> Goals:
    """y as it is, for x (N, ...); the estimator's predictions for None.

    Raises:
        ValueError: y of another length, or missing where the attack is targeted.
    """
    if y is None:
        if targeted:
            raise ValueError("y=None: a targeted attack needs what to move towards; pass y")
        y = cast(Goals, estimator.predict(x, batch_size=batch_size))
    if len(y) != len(x):
        raise ValueError(f"y has {len(y)} entries; pass one for each of the {len(x)} examples")
    return y


def require(attack: Any) -> None:
    """Require parameters that need no classes, of an attack on an estimator without.

    Raises:
        ValueError: another value; several runs where the estimator cannot say which has the worst loss.
    """
    name = type(attack.estimator).__name__
    for word, neutral in CLASSES_ONLY.items():
        if getattr(attack, word, neutral) != neutral:
            raise ValueError(f"{word}={getattr(attack, word)!r} needs classes, {name} has none; use {word}={neutral}")
    runs = getattr(attack, "num_random_init", 0)
    if runs > 1 and type(attack.estimator).compute_loss is BaseEstimator.compute_loss:
        raise ValueError(f"num_random_init={runs}: {name} has no compute_loss to compare the runs by; use 0 or 1")


def worst(estimator: Any, found: list[Array], goals: Goals, *, targeted: bool) -> Array:
    """Of several arrays of examples (N, ...), for every example the one of the largest loss, if `targeted` smallest."""
    with EstimatorModel(estimator).preserved():
        losses = [
            [np.mean(estimator.compute_loss(one[None].astype(np.float32), goals[i : i + 1])) for i, one in enumerate(x)]
            for x in found
        ]
    size = np.nan_to_num(-np.array(losses) if targeted else np.array(losses), nan=-np.inf)
    chosen = size.argmax(0)
    return np.stack([found[run][i] for i, run in enumerate(chosen)])
