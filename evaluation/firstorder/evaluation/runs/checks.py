"""Checks of a model's inputs and outputs, and what every check of a diagnosis is.

In the manner of Carlini et al. 2019, On evaluating adversarial robustness, Sec. 4 and 5: each is a function from the
subject to a `Sign`, with what it means and what to do beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import outputs, predicted
from firstorder.evaluation.runs.subject import FORWARDS, Subject, Unknown, difference

FEW = 0.1
"""The share of images that may look wrong in a check that is passed, besides a single one."""

ROUNDED = 1e-3
"""By how much of the largest logit forwards of different batches may differ in rounding."""


class Sign(NamedTuple):
    """What a check saw: its figure in words, and whether something is wrong."""

    figure: str
    wrong: bool


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: of what it looks for.
        meaning: of its figure.
        remedy: what to do where something is wrong.
        look: sees it.
    """

    name: str
    meaning: str
    remedy: str
    look: Callable[[Subject], Sign]


def check(name: str, meaning: str, remedy: str) -> Callable[[Callable[[Subject], Sign]], Check]:
    """A function as a check."""
    return lambda look: Check(name, meaning, remedy, look)


def many(count: int, n: int) -> bool:
    """Whether so many of n images are more than a few; a single one is, where there is no other."""
    return count > max(FEW * n, min(1, n - 1))


@check(
    "range of the images",
    "images in [0, 1] that fill it, on which the model is better than guessing and not better on a rescaled copy",
    "give images in [0, 1] and put the model's own scaling or normalisation into its forward; check the labels",
)
def range_(subject: Subject) -> Sign:
    x, n = subject.x, len(subject.x)
    low, high = float(x.amin()), float(x.amax())
    figure = f"values from {low:.3g} to {high:.3g}"
    if not subject.inside:
        return Sign(f"{figure}, outside [0, 1]", True)
    hits = int((predicted(subject.logits) == subject.y).sum())
    figure += f"; right on {hits} of {n}"
    margin, chance = max(math.sqrt(n), FEW * n), n / subject.logits.shape[1]
    if hits + margin >= n:  # nothing can be so much better
        return Sign(figure, high - low < 0.25 or hits <= chance + 2 * math.sqrt(chance))
    axes = (0, *range(2, x.ndim))
    mean, std = x.mean(axes, keepdim=True), x.std(axes, correction=0, keepdim=True)
    scaled = {"times 255": x * 255, "as 2x - 1": 2 * x - 1, "divided by 255": x / 255}
    scaled["of mean 0 and deviation 1"] = (x - mean) / std.clamp_min(1e-6)
    better = {how: _hits(subject, images) for how, images in scaled.items()}
    best = max(better, key=lambda how: better[how])
    if better[best] - hits > margin:
        return Sign(f"{figure}, and on {better[best]} with images {best}", True)
    return Sign(figure, high - low < 0.25 or hits <= chance + 2 * math.sqrt(chance))


@check(
    "training mode",
    "parts of the model that are in training mode: dropout is random there, BatchNorm mixes the examples of a batch",
    "call model.eval() before an evaluation; what shall be random belongs in the forward, see "
    "firstorder.attacks.Expectation",
)
def mode(subject: Subject) -> Sign:
    if subject.module is None:
        raise Unknown("the model is a function, which has no mode")
    names, left = subject.training, subject.still_training()
    if not names and not left:
        return Sign("none", False)
    count = len(left or names)
    some = ", ".join((left or names)[:3]) + (", ..." if count > 3 else "")
    return Sign(f"{count} part{'s' * (count != 1)}{', even after eval()' if left else ''}: {some}", True)


@check(
    "randomised forwards",
    f"the most by which {FORWARDS} forwards of the same images differ, by their largest logit",
    "attack the mean over draws, firstorder.attacks.Expectation(model, samples=20), AutoAttack version='rand'",
)
def random(subject: Subject) -> Sign:
    return Sign(f"{subject.spread:.1e}", subject.random)


@check(
    "examples that influence each other",
    "the most by which logits change with who else is in the batch, by the largest logit",
    "use fixed statistics in normalisation layers (BatchNorm with track_running_stats, in evaluation mode)",
)
def batch(subject: Subject) -> Sign:
    n = len(subject.x)
    if n < 2:
        raise Unknown("there is one image only")
    if subject.random:
        raise Unknown("the forwards are random")
    parts = subject.x.tensor_split(min(3, n))
    apart = difference(subject.logits, torch.cat([subject.model.logits(part) for part in parts]))
    return Sign(f"{apart:.1e}", apart > max(ROUNDED, 4 * torch.finfo(subject.logits.dtype).eps))


@check(
    "probabilities as outputs",
    "whether the outputs are logits; of probabilities the gradients vanish where the model is sure",
    "return the logits: take the softmax or sigmoid out of the forward",
)
def probabilities(subject: Subject) -> Sign:
    scores = subject.logits.float()
    low, high, sums = float(scores.amin()), float(scores.amax()), scores.sum(1)
    figure = f"outputs from {low:.3g} to {high:.3g}"
    if bool(outputs.probabilities(subject.logits)):
        return Sign(f"{figure}, rows that sum to 1", True)
    steady = float(sums.amax() - sums.amin()) <= 1e-3 * float(sums.abs().amax())
    if low >= 0 and (high <= 1 or (len(sums) > 1 and steady)):
        return Sign(f"{figure}{', rows of one sum' if steady else ''}", True)
    return Sign(figure, False)


@check(
    "NaN and infinity",
    "logits that are no numbers, at the images, at random points of the ball and where the attack ends; none of them "
    "counts as broken",
    "find where the forward divides by 0, takes a logarithm or overflows; it must be defined in the whole ball, not "
    "on 8-bit images alone",
)
def finite(subject: Subject) -> Sign:
    clean = int((~_finite_rows(subject.logits)).sum())
    figure = f"{clean} of {len(subject.x)} images"
    wrong = clean
    with suppress(Unknown):
        n, near = len(subject.right), int((~_finite_rows(subject.model.logits(subject.near()))).sum())
        figure, wrong = f"{figure}, {near} of {n} random points", wrong + near
        met = int(subject.attacked.doubtful.sum())
        figure, wrong = f"{figure}, {met} of {n} attacks", wrong + met
    return Sign(figure, wrong > 0)


CHECKS = (range_, mode, random, batch, probabilities, finite)
"""Of inputs and outputs, in the order of the table."""


def _hits(subject: Subject, images: Tensor) -> int:
    """How many of these images the model gets right; none of those it refuses."""
    try:
        return int((predicted(subject.model.logits(images)) == subject.y).sum())
    except Unknown:
        return 0


def _finite_rows(logits: Tensor) -> Tensor:
    return logits.isfinite().all(1)
