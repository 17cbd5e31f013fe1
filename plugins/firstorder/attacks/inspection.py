"""What looks wrong is said where it is seen: the first logits and gradients of an attack, looked at once."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.outputs import probabilities


class RobustnessWarning(UserWarning):
    """Something runs whose figures may not mean what they seem to.

    Turn it into an error with warnings.simplefilter("error", RobustnessWarning).
    """


def doubt(message: str) -> None:
    """Say what looks wrong."""
    warnings.warn(message, RobustnessWarning, stacklevel=3)


@contextmanager
def gathered() -> Iterator[list[str]]:
    """A context in which `RobustnessWarning`s are kept instead of shown, to be reported once.

    Yields:
        their texts, in order and each once; counts ("3 of 10") read "some", so that many batches say one thing.
        Complete when the context ends. What the filters ignore or turn into errors is ignored or an error here too;
        other warnings are shown as ever.
    """
    found: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield found
    finally:
        for one in caught:
            if issubclass(one.category, RobustnessWarning):
                text = re.sub(r"\b\d+ of \d+\b", "some", str(one.message))
                found.extend([text] if text not in found else [])
            else:
                warnings.showwarning(one.message, one.category, one.filename, one.lineno, one.file, one.line)


class Inspection:
    """Looks at the first logits and gradients of an attack, until every example was seen once."""

    def __init__(self, labels: validation.Labels) -> None:
        self._labels, self._left = labels, len(labels.indices)
        self._seen, self._zero = 0, 0

    @property
    def done(self) -> bool:
        """Whether there is nothing more to look at."""
        return self._left <= 0

    def logits(self, scores: Tensor) -> None:
        """Look at logits (M, K), before their backward.

        Raises:
            ValueError: labels of other classes; logits that are NaN or infinite.
        """
        k = scores.shape[1]
        if self._labels.columns not in (None, k):
            raise ValueError(f"the rows of labels have {self._labels.columns} classes, the model has {k}")
        validation.classes(self._labels.indices, k)
        least = float(scores.amin())
        if not (math.isfinite(least) and math.isfinite(float(scores.amax()))):
            raise ValueError("the model's logits are NaN or infinite; check its weights")
        if least >= 0 and bool(probabilities(scores)):
            doubt(
                "the model's outputs are probabilities, as after a softmax: gradients vanish and it looks more robust "
                "than it is; return the logits"
            )

    def gradient(self, gradient: Tensor) -> None:
        """Look at gradients (M, ...) of the loss by the points.

        Raises:
            ValueError: all of them are NaN or infinite.
        """
        rows = gradient.reshape(len(gradient), -1)
        top = rows.abs().amax(1)
        zero = 0
        if not (float(top.amin()) > 0 and math.isfinite(float(top.amax()))):
            zero = int((top == 0).sum())
            if not bool(top.isfinite().any()):
                raise ValueError("the attack met a non-finite gradient; check the model for NaN or infinite outputs")
        self._seen, self._zero, self._left = self._seen + len(rows), self._zero + zero, self._left - len(rows)
        if self.done and self._zero:
            doubt(
                f"the gradient is zero at {self._zero} of {self._seen} points, which an attack then cannot move: the "
                "model may be saturated or hide its gradient, and look more robust than it is"
            )
