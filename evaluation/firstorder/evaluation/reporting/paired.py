"""Two attacks on the same images: on how many each does better, and how likely that is by chance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from firstorder.evaluation.reporting.intervals import mcnemar

SAME = 1e-9
"""How far apart shares may be that are the same."""


class Pair(NamedTuple):
    """Two attacks image by image.

    Attributes:
        better, worse: on how many images the first does better, and worse: the discordant pairs.
        p: the probability of counts as uneven as these, or more, if neither were better.
    """

    better: int
    worse: int
    p: float


def pair(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> Pair:
    """Compare two attacks by what they reach on each image, (N,): 0 or 1, or shares of targets and draws.

    For 0 and 1 this is McNemar's exact test (McNemar 1947, in the binomial form), for shares the exact sign test.
    """
    better, worse = int((first > second + SAME).sum()), int((first < second - SAME).sum())
    return Pair(better, worse, mcnemar(better, worse))
