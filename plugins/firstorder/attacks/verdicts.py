"""What logits say of examples: one rule for every attack, host and table."""

from __future__ import annotations

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
