"""What logits say of examples: one rule for every attack, host and table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNDECIDED = -1
"""The class of an example whose logits are NaN or infinite."""


def predicted(logits: Tensor) -> Tensor:
    """The predicted classes (N,) of logits (N, K): the largest; `UNDECIDED` where any of them is NaN or infinite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), UNDECIDED)


def broken(classes: Tensor, labels: Tensor, *, targeted: bool = False) -> Tensor:
    """Which examples of these predicted classes (N,) are misclassified, or classified as the target, shape (N,).

    An `UNDECIDED` one is not: logits that are no numbers are no success.
    """
    hit = classes == labels
    return hit if targeted else ~hit & (classes != UNDECIDED)


def lost(a: Tensor) -> Tensor | None:
    """Which examples of a (N, ...) hold NaN or infinity, shape (N,); None where all are finite."""
    if math.isfinite(float(a.amin())) and math.isfinite(float(a.amax())):
        return None
    return ~a.isfinite().flatten(1).all(1)
