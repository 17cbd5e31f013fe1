"""Can a robust accuracy be trusted? A model at a few images, looked at from every side.

    findings = diagnose(model, x, y, eps=8 / 255)
    [finding for finding in findings if finding.verdict == "warning"]

[C] Carlini et al. 2019, On evaluating adversarial robustness; [ACW] Athalye, Carlini & Wagner 2018, Obfuscated
gradients give a false sense of security, Sec. 3.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from firstorder.attacks import RobustnessWarning
from firstorder.evaluation.runs import attack_checks, checks
from firstorder.evaluation.runs.checks import Check
from firstorder.evaluation.runs.subject import Subject, Unknown

CHECKS: tuple[Check, ...] = (*checks.CHECKS, *attack_checks.CHECKS)
"""All checks, in the order of the table."""

Verdict = Literal["ok", "warning", "left out"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        check: what it looks for.
        figure: what it saw; where it is left out, why.
        meaning: of the figure.
        remedy: what to do about a warning; empty without one.
        verdict: "ok"; "warning"; "left out" where the check could not be made.
    """

    check: str
    figure: str
    meaning: str
    remedy: str
    verdict: Verdict


def diagnose(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 100,
) -> list[Finding]:
    """What speaks against trusting a robust accuracy of this model; about 25 images are enough.

    Args:
        model: from images (N, ...) in [0, 1] to logits (N, K). It is asked in evaluation mode and left as it was; that
            it came in training mode is a finding.
        x: images (N, ...), on the model's device.
        y: labels (N,), or one-hot rows (N, K).
        eps: the radius of the robust accuracy, above 0.
        norm: "Linf" or "L2".
        seed: of all draws.
        batch_size: the most images in a forward.

    Returns:
        a finding of every check, in a fixed order; what is wrong with the images or with the model is a finding, too.

    Raises:
        ValueError: an argument out of range; no image; labels of classes that the model does not have. An exception of
            the model's own at the images passes as it is; one in a later check leaves that check out.
    """
    subject = Subject(model, x, y, eps=eps, norm=norm, seed=seed, batch_size=batch_size)
    with warnings.catch_warnings(), subject.model.preserved():
        warnings.simplefilter("ignore", RobustnessWarning)  # what attacks would say is what checks find
        subject.require()
        return [_found(check, subject) for check in CHECKS]


def _found(check: Check, subject: Subject) -> Finding:
    try:
        figure, wrong = check.look(subject)
    except Unknown as reason:
        return Finding(check=check.name, figure=str(reason), meaning=check.meaning, remedy="", verdict="left out")
    remedy, verdict = (check.remedy, "warning") if wrong else ("", "ok")
    return Finding(check=check.name, figure=figure, meaning=check.meaning, remedy=remedy, verdict=verdict)  # type: ignore[arg-type]
