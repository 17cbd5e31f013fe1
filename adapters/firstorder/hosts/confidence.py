"""One-sided bounds on how many of a population have a property, from a random sample of it."""

from __future__ import annotations

from math import comb, exp, lgamma, log, log1p

from firstorder.attacks import validation

LEVEL = 0.95
"""The confidence of a bound where none is named."""


def clopper_pearson_upper(hits: int, sample: int, level: float = LEVEL) -> float:
    """The largest rate that `hits` among `sample` trials leave plausible: Clopper & Pearson 1934, one-sided.

    Without hits it is 1 - (1 - level)^(1 / sample).

    Args:
        hits: 0 to `sample`.
        sample: number of trials; without any the bound is 1.
        level: with what probability the bound holds, at least.

    Raises:
        ValueError: a value outside its range.
    """
    _check(hits, sample, sample, level)
    if hits == sample:
        return 1.0
    if hits == 0:
        return float(1 - (1 - level) ** (1 / sample))
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        fewer = sum(_binomial(i, sample, rate) for i in range(hits + 1))
        low, high = (rate, high) if fewer > 1 - level else (low, rate)
    return high


def hypergeometric_upper(hits: int, sample: int, population: int, level: float = LEVEL) -> int:
    """The largest number among a finite population that `hits` in a sample of it, drawn without replacement, leave
    plausible: the exact hypergeometric bound. It counts the hits themselves, and is their number once all are drawn.

    Args:
        hits: 0 to `sample`.
        sample: 0 to `population`.
        population: from which the sample was drawn, each with the same chance.
        level: with what probability the bound holds, at least.

    Raises:
        ValueError: a value outside its range.
    """
    _check(hits, sample, population, level)
    low, high = hits, population - sample + hits
    while low < high:
        number = (low + high + 1) // 2
        fewer = sum(comb(number, i) * comb(population - number, sample - i) for i in range(hits + 1))
        low, high = (number, high) if fewer / comb(population, sample) > 1 - level else (low, number - 1)
    return low


def _binomial(hits: int, sample: int, rate: float) -> float:
    """The probability of so many hits in a sample."""
    ways = lgamma(sample + 1) - lgamma(hits + 1) - lgamma(sample - hits + 1)
    return exp(ways + hits * log(rate) + (sample - hits) * log1p(-rate))


def _check(hits: int, sample: int, population: int, level: float) -> None:
    validation.count("population", population, low=0)
    validation.count("sample", sample, low=0)
    validation.count("hits", hits, low=0)
    validation.number("level", level, low=0, above=True, high=1, below=True)
    if sample > population:
        raise ValueError(f"sample={sample} is more than the population of {population}; draw without replacement")
    if hits > sample:
        raise ValueError(f"hits={hits} are more than the sample of {sample}; pass those of the sample alone")
