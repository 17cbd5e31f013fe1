"""What is diagnosed: a model at a few images, looked at once and then asked by every check."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks import FGSM, PGD, CrossEntropy, Loss, Margin, Model, TorchModel, broken, predicted, validation
from firstorder.attacks.base import Result
from firstorder.attacks.batched import Batched
from firstorder.attacks.modes import training
from firstorder.attacks.projections import BALLS

STEPS = 20
"""Steps of the attack by which the checks go."""

SHORT = 5
"""Steps of the attack that more steps are compared with."""

COMPARED = 6
"""Images whose gradients are compared with differences."""

ALIKE = 4
"""Images whose forwards are compared with each other."""

FORWARDS = 8
"""Forwards of the same images that are compared: of a model that is one of two at random, 1 in 128 times all agree."""

SAME = 1e-5
"""By how much of the largest logit two forwards may differ in the order of sums."""

INSIDE = 0.01
"""How far from the bounds the points lie at which gradients are compared with differences."""


class Unknown(Exception):  # noqa: N818 - no error, an answer
    """Why a check cannot be made."""


@dataclass(frozen=True)
class Attacked:
    """What the attack with cross-entropy, and after it the one with the margin, made of N examples.

    Attributes:
        adversarial: the examples, those of the margin where cross-entropy broke nothing, (N, ...).
        first: which cross-entropy broke, (N,).
        broken: which either broke, (N,).
        doubtful: which met NaN or infinity, (N,).
    """

    adversarial: Tensor
    first: Tensor
    broken: Tensor
    doubtful: Tensor


@dataclass(frozen=True)
class Local:
    """Derivatives of the margin along a direction at N points, by the gradient and by differences.

    Attributes:
        expected, found: by the gradient, and by the central difference, (N,).
        slack: what rounding may change in `found`, (N,).
        length: of the gradient, in the units of `expected`, (N,).
    """

    expected: Tensor
    found: Tensor
    slack: Tensor
    length: Tensor


class Subject:
    """A model at images, in evaluation mode, with what the checks have in common computed once.

    Args:
        model: from images (N, ...) in [0, 1] to logits (N, K).
        x: images (N, ...).
        y: their labels, as for attacks.
        eps: the radius asked about, above 0.
        norm: "Linf" or "L2".
        seed: of all draws.
        batch_size: images in a forward.

    Raises:
        ValueError: an argument out of range, or no image at all.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        norm: str,
        seed: int,
        batch_size: int,
    ) -> None:
        validation.number("eps", eps, low=0, above=True)
        validation.choice("norm", norm, ("Linf", "L2"))
        validation.count("batch_size", batch_size)
        if not callable(model):
            raise ValueError(f"the model is a {type(model).__name__}; pass a callable from images to logits")
        self.x = validation.tensor(x)
        if not self.x.numel():
            raise ValueError("there is no image; pass some")
        self.y = validation.indices(y, len(x), self.x.device)
        self.forward, self.eps, self.norm, self.seed, self._size = model, float(eps), norm, seed, batch_size
        self.module = model if isinstance(model, nn.Module) else None
        self.training = [] if self.module is None else training(self.module)
        self._started = False
        self.model: Model = Batched(TorchModel(self.ask, module=self.module), batch_size)

    def ask(self, x: Tensor) -> Any:
        """What the model returns; once it has returned something, an exception of its own ends the check alone."""
        try:
            return self.forward(x)
        except Exception as error:
            if not self._started:
                raise
            raise Unknown(f"the model raised {type(error).__name__}: {error}") from error

    def require(self) -> None:
        """Require a model that returns logits for the images, of classes that the labels have.

        Raises:
            ValueError: it does not. Exceptions of its own pass as they are.
        """
        validation.classes(self.y, self.logits.shape[1])
        self._started = True

    @cached_property
    def logits(self) -> Tensor:
        """Logits (N, K) of the images."""
        return self.model.logits(self.x)

    @cached_property
    def spread(self) -> float:
        """By how much of the largest logit `FORWARDS` of the same images differ."""
        x = self.x[:ALIKE]
        first = self.model.logits(x)
        return max(difference(first, self.model.logits(x)) for _ in range(FORWARDS - 1))

    @property
    def random(self) -> bool:
        """Whether forwards differ by more than rounding."""
        return self.spread > max(SAME, 4 * torch.finfo(self.logits.dtype).eps)

    @property
    def inside(self) -> bool:
        """Whether the images lie in [0, 1]."""
        slack = validation.BOUNDS_TOLERANCE
        return -slack <= float(self.x.amin()) and float(self.x.amax()) <= 1 + slack

    @cached_property
    def right(self) -> Tensor:
        """The indices (M,) of the images in [0, 1] that are classified correctly: those that are attacked."""
        if not self.inside:
            raise Unknown("the images lie outside [0, 1]")
        found = (predicted(self.logits) == self.y).nonzero()[:, 0]
        if not len(found):
            raise Unknown("the model is right on none of the images")
        return found

    def draws(self) -> torch.Generator:
        """A source of random draws, the same for every check."""
        return torch.Generator(self.x.device).manual_seed(self.seed)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradients (M, ...) of cross-entropy at the images that are right."""
        x, y = self.x[self.right], self.y[self.right]
        try:
            return self.model.gradient(x, y, CrossEntropy()).gradient
        except ValueError as error:
            raise Unknown(str(error)) from error

    def near(self) -> Tensor:
        """Random points (M, ...) in the ball around the images that are right."""
        x = self.x[self.right]
        ball = BALLS[self.norm].around(x, self.eps, x.new_zeros(()), x.new_ones(()))
        return ball.sample(self.draws())

    def attack(self, loss: Loss, eps: float, norm: str, *, steps: int = STEPS, levels: int | None = None) -> PGD:
        """Steepest ascent from the images themselves, that ends at the first success."""
        words: dict[str, Any] = {"steps": steps, "loss": loss, "levels": levels}
        return PGD(eps=eps, norm=norm, random_start=False, early_stop=True, **words)

    def run(self, attack: FGSM | PGD, index: Tensor | None = None) -> Result:
        """An attack on the images that are right, or on those at `index` of them."""
        if not bool(self.gradient.flatten(1).isfinite().all(1).any()):
            raise Unknown("no gradient is finite")
        chosen = self.right if index is None else self.right[index]
        return attack.run(self.model, self.x[chosen], self.y[chosen], generator=self.draws())

    @cached_property
    def attacked(self) -> Attacked:
        """The attack at the radius asked about."""
        return self.worst(self.eps, self.norm)

    @cached_property
    def whole(self) -> Attacked:
        """The attack at a radius that allows every image."""
        return self.worst(1.0, "Linf")

    @cached_property
    def first(self) -> Result:
        """The attack with cross-entropy at the radius asked about."""
        return self.run(self.attack(CrossEntropy(), self.eps, self.norm))

    def worst(self, eps: float, norm: str) -> Attacked:
        """The attack with cross-entropy and, on what withstands it, the one with the margin."""
        known = (eps, norm) == (self.eps, self.norm)
        result = self.first if known else self.run(self.attack(CrossEntropy(), eps, norm))
        assert result.success is not None
        assert result.doubtful is not None
        first, adversarial, doubtful = result.success, result.adversarial, result.doubtful
        left = (~first).nonzero()[:, 0]
        either = first.clone()
        if len(left):
            second = self.run(self.attack(Margin(), eps, norm), left)
            assert second.success is not None
            assert second.doubtful is not None
            either[left], doubtful = second.success, doubtful.index_copy(0, left, doubtful[left] | second.doubtful)
            adversarial = adversarial.index_copy(0, left, second.adversarial)
        return Attacked(adversarial, first, either, doubtful)

    @cached_property
    def double(self) -> Model | None:
        """A copy of the model that computes in float64; None where there is none, or where it rounds its input."""
        if self.module is None:
            return None
        with suppress(Exception):  # a user's module can resist a copy, or float64, in any way
            twin = Batched(TorchModel(copy.deepcopy(self.module).double()), self._size)
            with twin.preserved():
                x = self.x[:1].double()
                moved = twin.logits(x * (1 - 2 * INSIDE) + INSIDE * (1 + 1e-9))
                still = twin.logits(x * (1 - 2 * INSIDE) + INSIDE)
            computed = still.dtype == torch.float64 and not torch.equal(moved, still)
            return twin if computed else None
        return None

    @cached_property
    def local(self) -> tuple[Local, Local]:
        """Derivatives of the margin along the signs of the gradient, and along random ones.

        They are taken at random points near the images, away from the kinks at the bounds.
        """
        if self.random:
            raise Unknown("the forwards are random")
        chosen = self.right[:COMPARED]
        x, y, draws = self.x[chosen], self.y[chosen], self.draws()
        noise, signs = (torch.rand(x.shape, generator=draws, device=x.device, dtype=x.dtype) * 2 - 1 for _ in range(2))
        points = x * (1 - 2 * INSIDE) + INSIDE * (1 + 0.9 * noise)
        try:
            gradient = self.model.gradient(points, y, Margin()).gradient.double()
        except ValueError as error:
            raise Unknown(str(error)) from error
        lengths = gradient.flatten(1).abs().sum(1), gradient.flatten(1).norm(dim=1)
        along = self._along(points, y, gradient, gradient.sign(), lengths[0])
        return along, self._along(points, y, gradient, signs.double().sign(), lengths[1])

    def _along(self, points: Tensor, y: Tensor, gradient: Tensor, direction: Tensor, length: Tensor) -> Local:
        """Of one direction (M, ...), by central differences."""
        if self.double is None:
            model, dtype, h = self.model, points.dtype, 5e-4
        else:
            model, dtype, h = self.double, torch.float64, 1e-6
        with model.preserved():
            ends = [model.logits((points.double() + way * h * direction).to(dtype)).double() for way in (1, -1)]
        found = (Margin()(ends[0], y) - Margin()(ends[1], y)) / (2 * h)
        slack = 16 * torch.finfo(dtype).eps * ends[0].abs().amax(1) / h
        return Local((gradient * direction).flatten(1).sum(1), found, slack, length)

    def broken(self, adversarial: Tensor) -> Tensor:
        """Which of adversarial (M, ...) the model misclassifies, (M,)."""
        return broken(predicted(self.model.logits(adversarial)), self.y[self.right])

    def loss(self, points: Tensor, index: Tensor) -> Tensor:
        """Cross-entropy in float64 at points (L, ...) for the images at `index` of those that are right, (L,)."""
        return CrossEntropy()(self.model.logits(points).double(), self.y[self.right[index]])

    def still_training(self) -> list[str]:
        """Parts that are in training mode although evaluation mode was asked for."""
        return [] if self.module is None else training(self.module)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two sets of logits, by the largest logit; infinite where only one is a number."""
    rows = one.isfinite().all(1)
    if not torch.equal(rows, other.isfinite().all(1)):
        return math.inf
    if not bool(rows.any()):
        return 0.0
    wide, close = one[rows].double(), other[rows].double()
    return float((wide - close).abs().amax() / wide.abs().amax().clamp_min(torch.finfo(torch.float32).tiny))
