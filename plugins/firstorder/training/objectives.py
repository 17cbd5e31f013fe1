"""Objectives of adversarial training: which examples are made, and the loss of each.

objective = TRADES(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10))
adversarial = objective.adversarial(model, x, y)
with objective.perturbed(model, x, adversarial, y):
method.backward(objective.losses(model, x, adversarial, y), adversarial)
optimizer.step()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from firstorder.attacks import Attack, Model, as_model, validation
from firstorder.attacks.base import Bounds, Target
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.losses import Loss, MeanLogits
from firstorder.attacks.models import Evaluation, Wrapper, preserved
from firstorder.attacks.validation import Labels
from firstorder.training.criteria import Criterion, MARTLoss, TRADESLoss, VanillaLoss, divergence, fit
from firstorder.training.method import averaged


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """An objective on the examples that an inner attack makes."""

    paper: ClassVar[str] = ""

    @abstractmethod
    def adversarial(
        self,
        model: nn.Module | Model,
        x: Tensor,
        y: Tensor,
        *,
        bounds: Bounds = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Solve the inner problem: training examples for x (N, ...) within `bounds` and labels y.

        Labels are indices (N,) of any integer type, one-hot rows (N, K), or probabilities (N, K) where the loss is
        defined for them. The model is attacked in evaluation mode and left as it was; it may be a prepared one,
        refreshed.

        Raises:
            ValueError: labels of another form, before the attack; what the attack refuses.
        """

    @abstractmethod
    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        """The loss (N,) of every example, with a graph. Forwards at x and at x' may come in any order."""

    @abstractmethod
    def scaled(self, factor: float) -> Objective:
        """The same objective at `factor` times the attack's budget: eps and the step size, or max_norm."""

    def perturbed(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> AbstractContextManager[None]:
        """A context in which the model has the weights to differentiate at."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Attacked(Objective):
    """A criterion at the examples that an attack makes. A subclass says which criterion, and what the attack sees.

    Args:
        attack: the inner attack, any registered one: PGD, PQGD, or ANU with `max_norm`.
    """

    attack: Attack

    @property
    @abstractmethod
    def criterion(self) -> Criterion:
        """What is minimised."""

    def adversarial(
        self,
        model: nn.Module | Model,
        x: Tensor,
        y: Tensor,
        *,
        bounds: Bounds = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x = validation.tensor(x)
        target, goals = self._inner(model, x, self.criterion.labels(y, len(x), x.device))
        return self.attack(target, x, goals, bounds=bounds, generator=generator)

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        return self.criterion.losses(model, x, adversarial, y)

    def scaled(self, factor: float) -> Self:
        return replace(self, attack=scaled(self.attack, factor))

    def _inner(self, model: Target, x: Tensor, y: Labels) -> tuple[Target, Tensor]:
        """The model and the labels that the attack is given."""
        return model, y.indices if y.rows is None else y.rows


@dataclass(frozen=True, kw_only=True)
class Vanilla(Attacked):
    """L = CE(f(x'), y), x' from the attack (Madry et al. 2018).

    Args:
        attack: the inner attack, any registered one: PGD, PQGD, or ANU with `max_norm`.
    """

    paper: ClassVar[str] = VanillaLoss.paper

    @property
    def criterion(self) -> VanillaLoss:
        return VanillaLoss()


@dataclass(frozen=True, kw_only=True)
class Natural(Objective):
    """L = CE(f(x), y): training without an attack, what adversarial training is compared with ([ENGM], Fig. 2)."""

    def adversarial(
        self,
        model: nn.Module | Model,
        x: Tensor,
        y: Tensor,
        *,
        bounds: Bounds = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x = validation.tensor(x)
        VanillaLoss().labels(y, len(x), x.device)
        return x.detach().clone()

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        return VanillaLoss().losses(model, x, adversarial, y)

    def scaled(self, factor: float) -> Natural:
        return self


@dataclass(frozen=True, kw_only=True)
class TRADES(Attacked):
    """L = CE(f(x), y) + beta KL(p(x) || p(x')), x' from maximising the KL divergence (Zhang et al. 2019).

    The divergence has no gradient at x itself, so a bounded attack needs its random start (the paper's is a tiny
    normal one). An attack of minimum norm is driven by labels and keeps its own loss.

    Args:
        attack: the inner attack.
        beta: the weight of the divergence.
    """

    paper: ClassVar[str] = TRADESLoss.paper
    beta: float = 6.0

    def __post_init__(self) -> None:
        _ = self.criterion  # which checks beta
        if isinstance(self.attack, BoundedAttack):
            if not self.attack.random_start:
                raise ValueError("TRADES needs random_start=True: the divergence has no gradient at the clean example")
            if self.attack.loss is not None:
                raise ValueError(f"TRADES maximises its own divergence; leave out loss={self.attack.loss!r}")
            if self.attack.early_stop or self.attack.restarts > 1:
                raise ValueError(
                    "TRADES maximises a divergence that no label decides; set early_stop=False and restarts=1"
                )

    @property
    def criterion(self) -> TRADESLoss:
        return TRADESLoss(beta=self.beta)

    def _inner(self, model: Target, x: Tensor, y: Labels) -> tuple[Target, Tensor]:
        if not isinstance(self.attack, BoundedAttack):
            return super()._inner(model, x, y)
        known = as_model(model)
        with known.preserved(), torch.no_grad():
            known.check(x, y, None)
            natural = F.log_softmax(known.logits(x), dim=1)
        fit(y, natural.shape[1])
        return _Divergence(known, natural), torch.arange(len(x), device=x.device)


@dataclass(frozen=True, kw_only=True)
class MART(Attacked):
    """L = BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)) (Wang et al. 2020, Eq. 11), x' the attack's own.

    BCE adds -log(1 - max_{k != y} p_k(x')) to the cross-entropy. Labels are single classes.

    Args:
        attack: the inner attack.
        beta: lambda of the paper.
    """

    paper: ClassVar[str] = MARTLoss.paper
    beta: float = 6.0

    def __post_init__(self) -> None:
        _ = self.criterion  # which checks beta

    @property
    def criterion(self) -> MARTLoss:
        return MARTLoss(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class AWP(Objective):
    """Adversarial weight perturbation of another objective (Wu et al. 2020, Eq. 8 and 9).

    Within `perturbed` every weight of two or more dimensions is moved by gamma ||w|| along its gradient of the mean
    loss (over all processes), layer by layer; on leaving it every weight has its old value, bit for bit.

    Args:
        base: the objective, for example TRADES.
        gamma: the relative size of the perturbation.
    """

    paper: ClassVar[str] = "Wu et al. 2020, Eq. 8 and 9"
    base: Objective
    gamma: float = 5e-3

    def __post_init__(self) -> None:
        validation.number("gamma", self.gamma, low=0)

    def adversarial(self, model: nn.Module | Model, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """The base's, with its `bounds` and `generator`."""
        return self.base.adversarial(model, x, y, **options)

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        return self.base.losses(model, x, adversarial, y)

    def scaled(self, factor: float) -> AWP:
        return replace(self, base=self.base.scaled(factor))

    @contextmanager
    def perturbed(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Iterator[None]:
        moved = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        with preserved(model, evaluate=False), torch.enable_grad():
            loss = self.base.losses(model, x, adversarial.detach(), y).mean()
            gradients = torch.autograd.grad(loss, moved, allow_unused=True) if moved else ()
        averaged(model, gradients)
        saved = [p.detach().clone() for p in moved]
        try:
            with torch.no_grad():
                for p, g in zip(moved, gradients, strict=True):
                    if g is not None:
                        p.add_(_unit(g) * (self.gamma * p.norm()))
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(moved, saved, strict=True):
                    p.copy_(old)


def scaled(attack: Attack, factor: float) -> Attack:
    """`attack` at `factor` times its budget: eps and the step size alpha, or max_norm.

    Raises:
        ValueError: an attack that has neither.
    """
    names = ("eps", "alpha") if isinstance(attack, BoundedAttack) else ("max_norm",)
    budget = {name: getattr(attack, name, None) for name in names}
    if budget[names[0]] is None:
        raise ValueError(f"{type(attack).__name__} has no budget to scale; give it a max_norm")
    return replace(attack, **{name: factor * size for name, size in budget.items() if size is not None})


def _unit(g: Tensor) -> Tensor:
    """g / ||g||, 0 where g is."""
    tiny = torch.finfo(g.dtype).tiny
    scaled = g / g.abs().amax().clamp_min(tiny)  # the squares of small gradients would vanish
    unit: Tensor = scaled / scaled.norm().clamp_min(tiny)
    return unit


class _Divergence(Wrapper):
    """A model whose own loss is the divergence from the predictions at the clean examples; "labels" number these."""

    def __init__(self, model: Model, natural: Tensor) -> None:
        super().__init__(model)
        self._natural = natural

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        def own(logits: Tensor, labels: Tensor) -> Tensor:
            return divergence(self._natural[labels], logits)

        used: Loss = replace(loss, loss=own) if isinstance(loss, MeanLogits) else own
        return super().gradient(x, labels, used, logits=logits)

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        super().check(x, labels._replace(indices=torch.zeros_like(labels.indices)), loss)
