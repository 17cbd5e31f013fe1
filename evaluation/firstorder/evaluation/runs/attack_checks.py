"""Checks of a model's gradients, and of an attack that goes by them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import FGSM, CrossEntropy, Margin, broken
from firstorder.attacks.distribution import pip_install
from firstorder.evaluation.runs.checks import FEW, Sign, check, many
from firstorder.evaluation.runs.subject import SHORT, STEPS, Subject, Unknown

SATURATED = 60.0
"""The margin from which on cross-entropy's gradient, about exp(-margin), comes close to float32's smallest numbers."""

APART = 0.1
"""By how much of a gradient's length a difference may depart from it."""

LEVELS = 256
"""Of 8-bit images."""

QUERIES, SAMPLE = 100, 10
"""Square's forwards of an image, and of how many images."""


@check(
    "zero or non-finite gradients",
    "images at which cross-entropy has no gradient, which an attack cannot move; channels without any",
    "attack through what has no gradient with a surrogate for its backward (BPDA); of saturated logits take the "
    "margin or DLR loss",
)
def gradients(subject: Subject) -> Sign:
    n = len(subject.right)
    try:
        gradient = subject.gradient
    except Unknown as reason:
        return Sign(f"none: {reason}", True)
    rows = gradient.flatten(1)
    zero, lost = int((rows == 0).all(1).sum()), int((~rows.isfinite().all(1)).sum())
    figure = f"{zero} of {n} zero, {lost} not finite"
    dead = _dead(gradient)
    if dead and zero < n:
        figure += f"; none in {dead} of {gradient.shape[1]} channels"
    return Sign(figure, many(zero, n) or lost > 0 or dead > 0)


@check(
    "differences against the gradient",
    "points near the images where the margin's difference quotient departs from its gradient by more than a tenth, "
    "along the gradient's signs and along random ones",
    "the gradient is not the model's: look for rounding, custom backward functions and hooks, detached parts; attack "
    "with a surrogate that agrees, and without gradients (Square)",
)
def differences(subject: Subject) -> Sign:
    n, counts = len(subject.local[0].found), []
    for local in subject.local:
        apart = (local.found - local.expected).abs() > APART * local.length + local.slack
        counts.append(int((apart | ~local.found.isfinite()).sum()))
    along = subject.local[0]
    ratio = (along.found / along.expected)[along.expected != 0]
    digits = "float64" if subject.double is not None else "float32"
    quotient = f", median quotient {float(ratio.median()):.3g}" if len(ratio) else ""
    figure = f"{counts[0]} and {counts[1]} of {n} in {digits}{quotient}"
    return Sign(figure, many(max(counts), n))


@check(
    "saturated logits",
    f"margins of more than {SATURATED:g}, where cross-entropy has next to no gradient in float32; and, where it is "
    "exactly 0 already, what a loss of the bare margin breaks beyond it",
    "take a loss that does not depend on the scale of the logits, DLR or margin (loss=firstorder.attacks.Margin()), or "
    "divide the logits by a constant",
)
def saturated(subject: Subject) -> Sign:
    n = len(subject.right)
    logits, y = subject.logits[subject.right].float(), subject.y[subject.right]
    large = int((-Margin()(logits, y) > SATURATED).sum())
    zero = int((CrossEntropy()(logits, y) == 0).sum())
    figure = f"{large} of {n}; loss exactly 0 at {zero}"
    try:
        attacked = subject.attacked
    except Unknown:
        return Sign(figure, many(large, n))
    first, either = int(attacked.first.sum()), int(attacked.broken.sum())
    figure += f"; broken {first} by cross-entropy, {either} with the margin"
    return Sign(figure, many(large, n) or (many(zero, n) and either - first > max(1, 2 * FEW * n)))


@check(
    "loss against steps",
    "whether the attack's loss rises at all, and whether more steps break at least as many images as fewer",
    "the gradients mislead: raise steps and restarts, change the step size, and look at the checks above",
)
def steps(subject: Subject) -> Sign:
    n = len(subject.right)
    one, long = subject.run(FGSM(eps=subject.eps, norm=subject.norm)), subject.first
    short = subject.run(subject.attack(CrossEntropy(), subject.eps, subject.norm, steps=SHORT))
    assert long.success is not None
    counts = [_count(result.success) for result in (one, short, long)]
    left, flat = (~long.success).nonzero()[:, 0], 0
    if len(left):
        ends = [subject.loss(points, left) for points in (subject.x[subject.right[left]], long.adversarial[left])]
        flat = int((~(ends[1] > ends[0])).sum())
    figure = f"broken {counts[0]}, {counts[1]} and {counts[2]} of {n} after 1, {SHORT} and {STEPS} steps"
    figure += f"; no rise at {flat} of the {len(left)} left"
    return Sign(figure, many(flat, n) or many(max(counts) - counts[2], n))


@check(
    "a radius that allows everything",
    "images that withstand the attack where any image at all is allowed; it should be none",
    "the attack does not work on this model, so that no radius means anything: look at the checks above",
)
def whole(subject: Subject) -> Sign:
    n, robust = len(subject.right), int((~subject.whole.broken).sum())
    return Sign(f"{robust} of {n} withstand", many(robust, n))


@check(
    "Square against gradients",
    f"images that {QUERIES} queries of Square, which takes no gradient, break where {STEPS} gradients broke none",
    "trust no number of gradient attacks alone: run AutoAttack with its full budget of Square",
)
def square(subject: Subject) -> Sign:
    n = len(subject.right)
    try:
        left = (~subject.attacked.broken).nonzero()[:, 0]
    except Unknown:
        left = torch.arange(n, device=subject.x.device)
    if not len(left):
        return Sign("the gradients broke all", False)
    chosen = subject.right[left[:SAMPLE]]
    x, y = subject.x[chosen], subject.y[chosen]
    if x.ndim != 4 or x.dtype.itemsize < 4 or min(x.shape[2:]) < 5:
        raise Unknown("Square is for images (N, C, H, W) of at least 5 x 5, in float32 or better")
    try:
        from firstorder.autoattack import AutoAttack
    except ModuleNotFoundError:
        raise Unknown(f"AutoAttack is not installed: {pip_install('robustbench')}") from None
    words: dict[str, Any] = {"seed": subject.seed, "verbose": False, "device": x.device}
    adversary = AutoAttack(subject.ask, subject.norm, subject.eps, attacks_to_run=["square"], **words)
    adversary.square.n_queries = QUERIES
    with _silent(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        adversary.run_standard_evaluation(x, y)
    assert adversary.record is not None
    count = int(broken(adversary.record.labels.to(y.device), y).sum())
    return Sign(f"{count} of {len(chosen)}", many(count, len(chosen)))


@check(
    "8-bit images",
    "broken images that no longer are once they are rounded to 8 bits, and do not break again on the 256 levels",
    "the attack lives between the levels: attack the images that can be stored, levels=256",
)
def levels(subject: Subject) -> Sign:
    attacked = subject.attacked
    n = int(attacked.broken.sum())
    if not n:
        raise Unknown("the attack broke nothing")
    x = subject.x[subject.right]
    if float((x * 255 - (x * 255).round()).abs().amax()) > 1e-2:
        raise Unknown("the images themselves are not of 8 bits")
    rounded = (attacked.adversarial * 255).round() / 255
    undone = attacked.broken & ~subject.broken(rounded)
    lost = undone.nonzero()[:, 0]
    for loss in (CrossEntropy(), Margin()):
        if len(lost):
            again = subject.run(subject.attack(loss, subject.eps, subject.norm, levels=LEVELS), lost)
            assert again.success is not None
            lost = lost[~again.success]
    return Sign(f"{int(undone.sum())} of {n} undone, {len(lost)} for good", len(lost) > max(1, 2 * FEW * n))


CHECKS = (gradients, differences, saturated, steps, whole, square, levels)
"""Of gradients and attacks, in the order of the table."""


@contextmanager
def _silent() -> Iterator[None]:
    """A context in which AutoAttack's log is off: what it would say is the check's figure."""
    logger = logging.getLogger("auto-attack")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _dead(gradient: Tensor) -> int:
    """How many of several channels have no gradient at any image of (M, C, ...)."""
    if gradient.ndim < 4 or gradient.shape[1] < 2:
        return 0
    return int((gradient == 0).transpose(0, 1).flatten(1).all(1).sum())


def _count(success: Tensor | None) -> int:
    assert success is not None
    return int(success.sum())
