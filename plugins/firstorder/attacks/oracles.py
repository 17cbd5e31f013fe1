"""Which gradient an attack follows: transformations of the gradient query that compose with `chain`.

An oracle receives `query`, which evaluates the gradient at any stack of points, asks it where it
likes, and returns one gradient per example. Oracles never see the model, so they work for a module, an
ensemble and an ART estimator alike. Stacked points (k * N, ...) hold k copies of the batch of N, copy
after copy; the query splits a stack that exceeds the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.models import Evaluation

Query = Callable[[Tensor], Evaluation]
"""Gradient and logits at points (k * N, ...)."""


class Step(NamedTuple):
    """Where the loop stands when it asks an oracle."""

    t: int
    """The step number, from 1."""
    size: float
    """The step size about to be taken."""
    momentum: Tensor
    """m_{t-1}, shape (N, ...)."""


class Oracle(Protocol):
    """A gradient for each example, from queries at points of the oracle's choice."""

    @property
    def at_iterate(self) -> bool:
        """Whether the returned logits are those of the iterate itself, so that success can be read off them."""

    def init(self, x: Tensor) -> Any:
        """The state before the first step on x (N, ...): nested tuples of tensors with N rows, or None."""

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        """The evaluation for the iterate a (N, ...), and the new state."""


class _Stateless:
    @property
    def at_iterate(self) -> bool:
        return True

    def init(self, x: Tensor) -> Any:
        return None


@dataclass(frozen=True, kw_only=True)
class Plain(_Stateless):
    """The gradient at the iterate."""

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        return query(a), state


@dataclass(frozen=True, kw_only=True)
class LookAhead(_Stateless):
    """The gradient at Nesterov's point a + alpha * decay * m ([NI], Eq. 6).

    alpha is the step size as it stands. Where that is an L2 length (norm L2, or a rule whose scale is
    "length") and m is normalised by its mean, the point lies far outside the ball, and the attack is weaker
    than without the look-ahead; normaliser="sum" keeps it near.

    Args:
        decay: the paper's mu.
    """

    decay: float = 1.0

    @property
    def at_iterate(self) -> bool:
        return False

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        copies = len(a) // max(len(step.momentum), 1)
        momentum = torch.cat([step.momentum] * copies) if copies > 1 else step.momentum
        return query(a.add(momentum, alpha=step.size * self.decay)), state


@dataclass(frozen=True, kw_only=True)
class ScaleCopies(_Stateless):
    """The mean over i < m of the gradient by a of J(a / 2^i) ([NI], Eq. 8).

    Copy i carries the factor 1/2^i of the chain rule. All copies go through the model in one
    stacked forward. The logits returned are those of the unscaled copy.

    Args:
        m: number of copies, at least 1; one copy is the plain gradient.
    """

    m: int = 5

    def __post_init__(self) -> None:
        validation.count("m", self.m)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        factors = [0.5**i for i in range(self.m)]
        stacked = query(torch.cat([a * factor for factor in factors]))
        gradient = torch.zeros_like(a)
        for factor, part in zip(factors, stacked.gradient.split(len(a)), strict=True):
            gradient.add_(part, alpha=factor / self.m)
        logits = None if stacked.logits is None else stacked.logits[: len(a)]
        return Evaluation(gradient, logits), state


@dataclass(frozen=True)
class Chain:
    """Oracles nested left to right: the first decides where the second is asked, and so on."""

    oracles: tuple[Oracle, ...]

    @property
    def at_iterate(self) -> bool:
        return all(oracle.at_iterate for oracle in self.oracles)

    def init(self, x: Tensor) -> Any:
        return tuple(oracle.init(x) for oracle in self.oracles)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        new = list(state)

        def ask(depth: int, points: Tensor) -> Evaluation:
            if depth == len(self.oracles):
                return query(points)
            evaluation, new[depth] = self.oracles[depth](
                lambda inner: ask(depth + 1, inner), points, state[depth], step
            )
            return evaluation

        return ask(0, a), tuple(new)


def chain(*oracles: Oracle) -> Oracle:
    """Compose oracles: `chain(LookAhead(), ScaleCopies(m=5))` averages scale copies of the look-ahead point."""
    return Chain(oracles)
