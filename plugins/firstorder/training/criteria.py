"""Criteria of adversarial training: what is minimised, whatever attack makes the examples.

losses = TRADESLoss(beta=6.0).losses(model, x, adversarial, y)  # does the forwards that it needs
losses = TRADESLoss(beta=6.0)(model(x), model(adversarial), y)  # the same, of logits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.validation import Labels


@dataclass(frozen=True, kw_only=True)
class Criterion(ABC):
    """A per-example loss of the logits at clean and at adversarial examples.

    A subclass defines `values`; `hard` says that it knows no labels but single classes.
    """

    paper: ClassVar[str] = ""
    natural: ClassVar[bool] = True
    """Whether it needs the logits at the clean examples."""
    hard: ClassVar[bool] = False
    """Whether labels must be single classes, no probabilities."""

    @abstractmethod
    def values(self, natural: Tensor | None, attacked: Tensor, y: Labels) -> Tensor:
        """The losses (N,) of logits (N, K) at x, None where they are not needed, and at x'."""

    def __call__(self, natural: Tensor | None, attacked: Tensor, y: Tensor) -> Tensor:
        """The loss (N,) of every example, with the graph of the logits.

        Args:
            natural: logits (N, K) at the clean examples; may be None where `Criterion.natural` is False.
            attacked: logits (N, K) at the adversarial examples.
            y: label indices (N,) of any integer type, one-hot rows or probabilities (N, K).

        Raises:
            ValueError: labels that are none of these, that do not fit the logits, or probabilities where `hard`.
        """
        return self._values(natural, attacked, self.labels(y, len(attacked), attacked.device))

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        """The loss (N,) of every example, with a graph, from one forward at x (where needed) and one at x'.

        Raises:
            ValueError: as a call; labels of another form are refused before the forwards.
        """
        found = self.labels(y, len(adversarial), adversarial.device)
        return self._values(model(x) if self.natural else None, model(adversarial), found)

    def labels(self, y: Tensor, n: int, device: torch.device) -> Labels:
        """The labels of n examples in the form that the criterion takes.

        Raises:
            ValueError: labels that are neither indices, one-hot rows nor probabilities; probabilities where `hard`.
        """
        found = validation.labels(y, n, device, ties=True)
        if self.hard and found.rows is not None:
            raise ValueError(
                f"{type(self).__name__} is defined for single classes, not for rows of probabilities; pass indices "
                "(N,) or one-hot rows (N, K), or train with cross-entropy or TRADES"
            )
        return found

    def _values(self, natural: Tensor | None, attacked: Tensor, y: Labels) -> Tensor:
        fit(y, attacked.shape[1])
        return self.values(natural, attacked, y)


@dataclass(frozen=True, kw_only=True)
class VanillaLoss(Criterion):
    """L = CE(f(x'), y) (Madry et al. 2018); of probabilities y it is -sum_k y_k log p_k(x')."""

    paper: ClassVar[str] = "Madry et al. 2018"
    natural: ClassVar[bool] = False

    def values(self, natural: Tensor | None, attacked: Tensor, y: Labels) -> Tensor:
        return entropy(attacked, y)


@dataclass(frozen=True, kw_only=True)
class TRADESLoss(Criterion):
    """L = CE(f(x), y) + beta KL(p(x) || p(x')) (Zhang et al. 2019).

    Args:
        beta: the weight of the divergence.
    """

    paper: ClassVar[str] = "Zhang et al. 2019, Algorithm 1"
    beta: float = 6.0

    def __post_init__(self) -> None:
        validation.number("beta", self.beta, low=0)

    def values(self, natural: Tensor | None, attacked: Tensor, y: Labels) -> Tensor:
        assert natural is not None
        return entropy(natural, y) + self.beta * divergence(natural, attacked)


@dataclass(frozen=True, kw_only=True)
class MARTLoss(Criterion):
    """L = BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)) (Wang et al. 2020, Eq. 11).

    BCE adds -log(1 - max_{k != y} p_k(x')) to the cross-entropy.

    Args:
        beta: lambda of the paper.
    """

    paper: ClassVar[str] = "Wang et al. 2020, Eq. 11"
    hard: ClassVar[bool] = True
    beta: float = 6.0

    def __post_init__(self) -> None:
        validation.number("beta", self.beta, low=0)

    def values(self, natural: Tensor | None, attacked: Tensor, y: Labels) -> Tensor:
        assert natural is not None
        own = y.indices[:, None]
        # log(1 - p_k) is the log of the sum of all other probabilities: no 1 - p that loses digits.
        best = attacked.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
        rest = attacked.scatter(1, best, -torch.inf).logsumexp(1) - attacked.logsumexp(1)
        doubt = 1 - natural.softmax(1).gather(1, own)[:, 0]
        total: Tensor = entropy(attacked, y) - rest + self.beta * divergence(natural, attacked) * doubt
        return total


def fit(y: Labels, classes: int) -> None:
    """Require labels of logits (N, classes)."""
    if y.columns not in (None, classes):
        raise ValueError(f"the rows of labels have {y.columns} classes, the model has {classes}")
    validation.classes(y.indices, classes)


def entropy(logits: Tensor, y: Labels) -> Tensor:
    """The cross-entropy (N,) of logits (N, K)."""
    target = y.indices if y.rows is None else y.rows.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none")


def divergence(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax(natural) || softmax(adversarial)) of logits (N, K), per example (N,)."""
    p, q = natural.log_softmax(1), adversarial.log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)
