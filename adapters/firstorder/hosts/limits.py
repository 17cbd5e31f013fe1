"""alpha="auto" in trainings that may end before it is known."""

from __future__ import annotations

import warnings

from firstorder.training import GradientMethod


def backwards(steps: int, accumulated: int, epoch: int) -> int:
    """How many backwards so many steps of an optimizer are.

    Args:
        steps: of the optimizer.
        accumulated: backwards in a step.
        epoch: backwards in an epoch, whose last step takes what is left of it.
    """
    epochs, rest = divmod(steps, -(-epoch // accumulated))
    return epochs * epoch + min(rest * accumulated, epoch)


def warn_unlimited(method: GradientMethod | None) -> None:
    """Warn at the end of a training whose limit was still being measured."""
    if getattr(method, "measuring", False):
        warnings.warn(
            'the training has ended while alpha="auto" was still measuring: nothing was limited, and it was plain '
            "training; train for more epochs, make the method with a lower warmup, or pass a number for alpha",
            stacklevel=3,
        )
