"""Labels as ART has them: indices, one-hot rows, rows of anything, or none."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from firstorder.art.models import predictions

Array = np.ndarray[Any, Any]


def classes(estimator: Any, x: Array, y: Any, *, targeted: bool, batch_size: int) -> Array:
    """Label indices (N,) or rows (N, K), which the core reads; the classifier's predictions for None.

    Raises:
        ValueError: y of another form, or missing where the attack is targeted.
    """
    if y is None:
        if targeted:
            raise ValueError("y=None: a targeted attack needs the target classes; pass y")
        scores = predictions(estimator, x, batch_size)
        y = scores.argmax(1) if scores.shape[1] > 1 else scores[:, 0].round()
    return checked(y, len(x))


def checked(y: Any, n: int) -> Array:
    """Label indices (N,) or rows (N, K) of n examples, as the caller has them.

    Raises:
        ValueError: y of another form.
    """
    given: Array = np.asarray(y)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim not in (1, 2) or len(given) != n:
        raise ValueError(f"y has shape {given.shape}; pass one-hot rows ({n}, K) or indices ({n},)")
    if given.ndim == 2:
        if not np.isfinite(given).all():
            raise ValueError("y holds NaN or infinity; pass rows of finite numbers, or indices (N,)")
        return given
    if not np.array_equal(given, given.astype(np.int64)):
        raise ValueError("y holds fractions; class indices must be whole numbers")
    return given.astype(np.int64)


def one_hot(rows: Tensor) -> bool:
    """Whether every row of (N, K) names one class."""
    return bool((((rows == 1).sum(1) == 1) & ((rows != 0).sum(1) == 1)).all())
