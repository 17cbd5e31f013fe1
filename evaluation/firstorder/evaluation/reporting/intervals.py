"""Intervals for rates and their differences, exact tests, and one-sided bounds from samples."""

from __future__ import annotations

import math

from firstorder.hosts.confidence import LEVEL, clopper_pearson_upper, hypergeometric_upper

__all__ = ["LEVEL", "Z", "clopper_pearson_upper", "hypergeometric_upper", "mcnemar", "paired", "student", "wilson"]

Z = 1.959963984540054
"""The normal quantile of a 95 % interval."""


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a rate over n trials (Wilson 1927, Eq. 9)."""
    if not n:
        return 0.0, 1.0
    middle = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two rates over the same trials, the first's minus the second's.

    Method 10 of Newcombe 1998, Improved confidence intervals for the difference between binomial proportions based on
    paired data: Wilson's intervals of both rates, joined by their correlation with its continuity correction.

    Args:
        both, neither: trials in which both are a success, or none.
        first, second: trials in which only the one is.
    """
    n = both + first + second + neither
    if not n:
        return -1.0, 1.0
    one, other = (both + first) / n, (both + second) / n
    (low, high), (lower, upper) = wilson(one, n), wilson(other, n)
    spread = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = float(both * neither - first * second)
    phi = (max(product - n / 2, 0.0) if product > 0 else product) / math.sqrt(spread) if spread else 0.0
    below, above = _joined(one - low, upper - other, phi), _joined(high - one, other - lower, phi)
    return max(one - other - below, -1.0), min(one - other + above, 1.0)


def student(freedom: int) -> float:
    """Student's quantile of a 95 % interval, of 1 or more degrees of freedom."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(0.975, freedom))


def mcnemar(first: int, second: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely a split at least as uneven is if both are as good.

    Args:
        first, second: trials in which only the one is a success, and only the other.
    """
    from scipy.stats import binomtest  # slow to import

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))
