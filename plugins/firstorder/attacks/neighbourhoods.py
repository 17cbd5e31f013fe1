"""Oracles that ask at several points around the iterate.

[PGN] Ge et al. 2023, Boosting adversarial transferability by achieving flat local maxima; [EMI] Wang et al. 2021,
Boosting adversarial transferability through enhanced momentum; [DEM] Zou et al. 2020, Improving the transferability of
adversarial examples with resized-diverse-inputs, diversity-ensemble and region fitting; [SVRE] Xiong et al. 2022,
Stochastic variance reduced ensemble adversarial attack. Constants were read in the authors' code,
Trustworthy-AI-Group/PGN, JHL-HUST/EMI, 278287847/DEM and JHL-HUST/SVRE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import momenta, validation
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Query, Stateless, Step
from firstorder.attacks.projections import Size
from firstorder.attacks.transformations import DiverseInput, OfImages, through


def times(points: Tensor, size: Size, n: int) -> Tensor:
    """Stacked points (k * n, ...) times sizes of n examples."""
    scaled: Tensor = points.unflatten(0, (-1, n)) * size
    return scaled.flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class GradientNormPenalty(Stateless):
    """The mean over m neighbours a' of (1 - delta) g' + delta g*, which prefers flat maxima ([PGN], Eq. 9, Alg. 1).

    a' = a + U[-radius, radius]^d, g' the gradient at a', g* that at a' - size * g' / mean|g'|.

    Args:
        radius: the paper's zeta * eps, in the units of the images; a tensor has 1 or N rows.
        m: number of neighbours, the paper's N, at least 1; a step takes two gradients for each.
        delta: the weight of the second gradient, in [0, 1].
        size: how far the second lies from the first, None for the step size.
    """

    radius: Size
    m: int = 20
    delta: float = 0.5
    size: Size | None = None

    def __post_init__(self) -> None:
        validation.size("radius", self.radius)
        validation.count("m", self.m)
        validation.number("delta", self.delta, low=0, high=1)

    @property
    def at_iterate(self) -> bool:
        return False

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        n, radius = len(step.iterate), step.draw.rows(self.radius)
        size = step.size if self.size is None else step.draw.rows(self.size)
        total, left = torch.zeros_like(a), self.m
        while left:
            room = step.copies()
            copies = left if room is None else min(left, max(room * n // len(a), 1))
            near = torch.cat([a] * copies)
            offsets = step.draw.uniform(near, tuple(a.shape[1:])).mul_(2).sub_(1)
            near.add_(times(offsets, radius, n).to(a.dtype))
            first = query(near).gradient
            second = query(near - times(first / momenta.size(first, "mean"), size, n).to(a.dtype)).gradient
            total.add_(torch.lerp(first, second, self.delta).reshape(copies, *a.shape).sum(0))
            left -= copies
        return Evaluation(total.div_(self.m), None), state


@dataclass(frozen=True, kw_only=True)
class EnhancedMomentum:
    """The mean gradient at points along the one of the step before ([EMI], Eqs. 7-8).

    The points are a + c_i size * g, g the mean gradient of the step before divided by its mean absolute value, at first
    0, and c_i evenly from -eta to eta. It goes before oracles that stack copies.

    Args:
        m: number of points, the paper's N, at least 1.
        eta: the farthest point, in steps, at least 0.
        size: a step, None for the step size.
    """

    m: int = 11
    eta: float = 7.0
    size: Size | None = None

    def __post_init__(self) -> None:
        validation.count("m", self.m)
        validation.number("eta", self.eta, low=0)

    @property
    def at_iterate(self) -> bool:
        return False

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def check(self, x: Tensor) -> None:
        return

    def __call__(self, query: Query, a: Tensor, state: Tensor, step: Step) -> tuple[Evaluation, Tensor]:
        if a.shape != state.shape:
            raise ValueError("EnhancedMomentum() has one gradient per example; chain it before the oracles that stack")
        along = state * (step.size if self.size is None else step.draw.rows(self.size))
        factors = torch.linspace(-self.eta, self.eta, self.m, dtype=torch.float64).tolist() if self.m > 1 else [0.0]
        stacked = query(torch.cat([a + factor * along for factor in factors])).gradient
        mean = stacked.reshape(self.m, *a.shape).mean(0)
        return Evaluation(mean, None), (mean / momenta.size(mean, "mean")).to(a.dtype)


@dataclass(frozen=True, kw_only=True)
class DiversityEnsemble(OfImages):
    """The gradient of the loss of the mean logits of copies resized and padded at random, one per rate ([DEM], Eq. 6).

    Each is a `DiverseInput` with probability 1. Oracles after it see all copies in one stack.

    Args:
        rates: the paper's resize rates, each positive; at least one.
    """

    rates: tuple[float, ...] = (1.14, 1.27, 1.4, 1.53, 1.66)

    def __post_init__(self) -> None:
        if not isinstance(self.rates, tuple) or not self.rates:
            raise ValueError(f"rates={self.rates!r} must be a tuple of at least one number")
        for rate in self.rates:
            validation.number("rates", rate, low=0, above=True)

    @property
    def at_iterate(self) -> bool:
        return False

    def check(self, x: Tensor) -> None:
        for part in self._parts():
            part.check(x)

    def _parts(self) -> list[DiverseInput]:
        return [DiverseInput(resize_rate=rate, diversity_prob=1.0) for rate in self.rates]

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        parts, points = self._parts(), torch.cat([a] * len(self.rates))
        draws = step.draw.uniform(points, (4,))

        def transform(x: Tensor) -> Tensor:
            pieces = zip(parts, x.split(len(a)), draws.split(len(a)), strict=True)
            return torch.cat([part.transform(piece, own) for part, piece, own in pieces])

        def together(inner: Tensor) -> Evaluation:
            return query(inner, mean=len(parts))

        gradient = through(together, points, transform).gradient
        return Evaluation(gradient.reshape(len(parts), *a.shape).sum(0), None), state


@dataclass(frozen=True, kw_only=True)
class VarianceReduction(Stateless):
    """The gradient of an ensemble with less variance between its members ([SVRE], Alg. 1).

    From a the attack's own momentum, rule and step make M steps along g_k(b) - g_k(a) + g(a), with b the point of the
    inner step, g the gradient of the ensemble, g_k that of a member drawn anew for every step, for the whole batch. The
    momentum after the last of them is what the attack then takes for the gradient. A member's gradient at a is taken
    once. With a model that is no `Ensemble` these are M steps of the attack itself. It goes before oracles that stack
    copies.

    Args:
        M: number of inner steps, at least 1; None for four times the members.
    """

    M: int | None = None

    def __post_init__(self) -> None:
        if self.M is not None:
            validation.count("M", self.M)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        if a.shape != step.iterate.shape:
            raise ValueError("VarianceReduction() walks from one point per example; chain it before what stacks")
        here = query(a)
        if step.members == 1:
            members = [0] * (4 if self.M is None else self.M)
        else:
            members = step.draw.shared(step.members, 4 * step.members if self.M is None else self.M)
        at_a = {0: here.gradient} if step.members == 1 else {}
        point, walk = a, step.walk(a)
        for k in members:
            if k not in at_a:
                at_a[k] = query(a, member=k).gradient
            point, momentum = walk(query(point, member=k).gradient - at_a[k] + here.gradient)
        return here._replace(gradient=momentum), state
