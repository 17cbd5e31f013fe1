"""How well the norms by the input estimate the weights of ENGM (ENGM, Fig. 3c, d), from the norms that a run logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

ALPHAS = (0.1, 1.0, 3.0)
"""Those of the paper."""

ERRORS = "weights.csv"
"""The file of them in a report."""


def errors(gradients: pd.DataFrame, alphas: Sequence[float] = ALPHAS) -> pd.DataFrame:
    """The mean of |w' - w| over the measured examples, for every step at which they were measured and every alpha.

    w = min(alpha / n, 1) by the norm n of an example's gradient by the parameters, w' the same of gamma1 m + gamma0,
    m the norm by the input; gamma is the least-squares line through the examples of the measurement before, as A-ENGM
    has it from a batch before.

    Args:
        gradients: a row per example and measurement, with step, norm and input_norm.
        alphas: limits, above 0.

    Returns:
        Columns step, alpha and error, in the order of the steps; none for the first measurement.
    """
    return pd.DataFrame(_rows(gradients, alphas), columns=["step", "alpha", "error"])


def _rows(gradients: pd.DataFrame, alphas: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    line: Any = None
    for step, own in gradients.groupby("step", sort=True):
        norms, inputs = own["norm"].to_numpy(float), own["input_norm"].to_numpy(float)
        if line is not None:
            estimated = np.polyval(line, inputs)
            for alpha in alphas:
                yield int(step), alpha, float(np.abs(_weights(estimated, alpha) - _weights(norms, alpha)).mean())
        line = np.polyfit(inputs, norms, 1) if np.ptp(inputs) > 0 else None


def _weights(norms: np.ndarray[Any, Any], alpha: float) -> np.ndarray[Any, Any]:
    """The weights (N,) of norms (N,); 1 for those that are not positive."""
    return np.where(norms <= alpha, 1.0, alpha / np.maximum(norms, alpha))
