"""Per-example losses J(logits, labels): larger means further from the label.

Untargeted attacks ascend J at the true label, targeted ones descend it at the target class.
No loss averages over the batch, so no attack depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from firstorder.attacks import validation


class Loss(Protocol):
    """A differentiable per-example loss: logits (N, K) and label indices (N,) to values (N,).

    Labels that are rows of probabilities (N, K) reach it as they are, unless its class says `soft = False`.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """J = log sum_j exp(z_j) - z_y; for rows of probabilities p, sum_k p_k J_k."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        target = labels.to(logits.dtype) if labels.ndim == 2 else labels
        return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class Margin:
    """J = max_{j != y} z_j - z_y (Carlini & Wagner 2017, f_6 without its clamp). Positive iff misclassified."""

    soft: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return others - logits.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class Logit:
    """J = -z_y (Zhao, Liu & Larson 2021). In targeted mode it raises the logit of the target class alone.

    Its gradient does not fade as the target class becomes likely, as that of the cross-entropy does: hundreds of steps
    go on to help.
    """

    soft: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class TargetedMargin:
    """J = z_k - z_y for a true label y and another class k: towards one class, away from the label.

    Labels are rows [y, k], shape (N, 2). Other than in targeted mode any wrong class may be a success.
    """

    soft: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        label, target = logits.gather(1, labels).unbind(1)
        return target - label


@dataclass(frozen=True)
class LogitDirection:
    """J = sum_k w_k z_k along weights w of the logits (Tashiro et al. 2020, Eq. 1).

    In place of labels it gets the weights (N, K).
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits * labels.to(logits.dtype)).sum(1)


@dataclass(frozen=True)
class ProbabilityMargin:
    """J = max_{j != y} p_j - p_y, p the softmax of the logits (PMA, CVPR 2025). Positive iff misclassified."""

    soft: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return Margin()(logits.softmax(1), labels)


@dataclass(frozen=True)
class DLR:
    """Difference of logits ratio, J = (max_{j != y} z_j - z_y) / (z_(1) - z_(3)).

    Croce & Hein 2020, Eq. 6. Invariant to shifting and scaling the logits; needs at least three
    classes; the denominator is 1 where the three largest logits are equal. In targeted mode -J at the
    target is used, as for every loss here (their Eq. 7 needs the true label as well).
    """

    soft: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}; use Margin()")
        top = logits.topk(3, dim=1).values
        gap = top[:, 0] - top[:, 2]
        return Margin()(logits, labels) / torch.where(gap > 0, gap, 1.0)


@dataclass(frozen=True, kw_only=True)
class MeanLogits:
    """The loss of the mean logits of an example's copies: logits (S * k * M, K) to values (S * M,).

    Stacked points hold k copies of M examples, copy after copy; a model that averages over draws stacks S such groups.

    Attributes:
        loss: of the mean logits, None for the model's own.
        copies: k.
        examples: M.
    """

    loss: Loss | None
    copies: int
    examples: int

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.loss is not None
        shape = (-1, self.copies, self.examples)
        means = logits.unflatten(0, shape).mean(1).flatten(0, 1)
        return self.loss(means, labels.unflatten(0, shape)[:, 0].flatten(0, 1))


def resolved(loss: Loss | None, own: Loss) -> Loss:
    """The loss to take, `own` where an attack names none."""
    if loss is None:
        return own
    return replace(loss, loss=own) if isinstance(loss, MeanLogits) and loss.loss is None else loss


NAMES: dict[str, Callable[[], Loss]] = {
    "ce": CrossEntropy,
    "dlr": DLR,
    "logit": Logit,
    "margin": Margin,
    "probability-margin": ProbabilityMargin,
}
"""Losses that may be given by name."""


def named(loss: Loss | str | None) -> Loss | None:
    """The loss that an attack's `loss` names.

    Raises:
        ValueError: a name of none.
    """
    if isinstance(loss, str):
        validation.choice("loss", loss, tuple(NAMES))
        return NAMES[loss]()
    return loss
