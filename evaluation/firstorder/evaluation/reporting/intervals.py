"""Intervals for rates, and one-sided bounds from samples."""

from __future__ import annotations

import math

from firstorder.hosts.confidence import LEVEL, clopper_pearson_upper, hypergeometric_upper

__all__ = ["LEVEL", "Z", "clopper_pearson_upper", "hypergeometric_upper", "wilson"]

Z = 1.959963984540054
"""The normal quantile of a 95 % interval."""


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a rate over n trials (Wilson 1927, Eq. 9)."""
    if not n:
        return 0.0, 1.0
    middle = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)
