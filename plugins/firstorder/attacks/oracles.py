"""Which gradient an attack follows: transformations of the gradient query that compose with `chain`.

An oracle receives `query`, which evaluates the gradient at any stack of points, asks it where it
likes, and returns one gradient per example. Oracles never see the model, so they work for a module, an
ensemble and an ART estimator alike. Stacked points (k * N, ...) hold k copies of the batch of N, copy
after copy; the query splits a stack that exceeds the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.models import Evaluation
from firstorder.attacks.projections import Size, narrowed


class Query(Protocol):
    """Gradient and logits at points (k * N, ...)."""

    def __call__(self, points: Tensor, *, member: int | None = None, mean: int = 1, rows: int = 0) -> Evaluation:
        """What the model gives at points.

        Args:
            points: (k * N, ...).
            member: of an ensemble, whose gradient it is; None for the mean of the logits of all.
            mean: how many copies, stacked, have one loss, that of the mean of their logits; the logits are left out.
            rows: points in each of these copies, len(points) / mean where it is not given.
        """


class Walk(Protocol):
    """Steps of one's own with the attack's momentum, rule, step size and projection."""

    def __call__(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The next point (N, ...) and the momentum (N, ...) after a gradient (N, ...) at the last one."""


@dataclass(frozen=True)
class Draw:
    """Random draws with a row per example of the whole batch, so that none depends on who is still attacked."""

    generator: torch.Generator
    total: int
    """How many examples the batch had."""
    index: Tensor | None = None
    """Which of them are still attacked, shape (N,); None for all."""

    def uniform(self, points: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform on [0, 1) for stacked points (k * N, ...), shape (k * N, *shape), at least float32."""
        copies = len(points) // (self.total if self.index is None else len(self.index))
        dtype = torch.promote_types(points.dtype, torch.float32)
        size = (copies, self.total, *shape)
        drawn = torch.rand(size, generator=self.generator, device=points.device, dtype=dtype)
        return (drawn if self.index is None else drawn[:, self.index]).flatten(0, 1)

    def shared(self, options: int, count: int) -> list[int]:
        """`count` draws from 0 .. options - 1 that all examples share, however many they are."""
        device = self.generator.device
        return torch.randint(options, (count,), generator=self.generator, device=device).tolist()

    def rows(self, size: Size) -> Size:
        """Of sizes for the whole batch, those of the examples still attacked."""
        return size if self.index is None else narrowed(size, self.index)

    def take(self, index: Tensor) -> Draw:
        """The draws of the examples at `index` of those still attacked."""
        return replace(self, index=index if self.index is None else self.index[index])


class Step(NamedTuple):
    """What an oracle may know of the loop."""

    t: int
    """The step number, from 1."""
    size: Size
    """The step size about to be taken, of the examples still attacked."""
    iterate: Tensor
    """a_{t-1}, shape (N, ...)."""
    momentum: Tensor
    """m_{t-1}, shape (N, ...)."""
    draw: Draw
    """The run's random draws."""
    coast: Callable[[float], Tensor]
    """How far the update rule would carry the iterate along a multiple of m_{t-1} alone, shape (N, ...)."""
    copies: Callable[[], int | None]
    """How many copies of the batch one forward takes within the memory budget; None for any number."""
    members: int
    """Of how many models the model is the mean."""
    walk: Callable[[Tensor], Walk]
    """Begin a walk at points (N, ...)."""
    logits: Callable[[Tensor], Tensor]
    """The logits (N, K) at points (N, ...), in a forward without a gradient."""


class Oracle(Protocol):
    """A gradient for each example, from queries at points of the oracle's choice."""

    @property
    def at_iterate(self) -> bool:
        """Whether the returned logits are those of the iterate itself, so that success can be read off them."""

    def init(self, x: Tensor) -> Any:
        """The state before the first step on x (N, ...): nested tuples of tensors with N rows, and of what
        is no tensor and holds for all examples.
        """

    def check(self, x: Tensor) -> None:
        """Raise ValueError where images x (N, ...) are not what the oracle transforms."""

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        """The evaluation for the iterate a (N, ...), and the new state."""


class Stateless:
    """An oracle that keeps nothing, takes any images and evaluates at the iterate."""

    @property
    def at_iterate(self) -> bool:
        return True

    def init(self, x: Tensor) -> Any:
        return None

    def check(self, x: Tensor) -> None:
        return


@dataclass(frozen=True, kw_only=True)
class Plain(Stateless):
    """The gradient at the iterate."""

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        return query(a), state


@dataclass(frozen=True, kw_only=True)
class LookAhead(Stateless):
    """The gradient at Nesterov's point.

    "momentum" is the paper's a + alpha * decay * m ([NI], Eq. 6), made for steps along the sign: alpha is
    in the units of eps and m of components about 1. Where the step is an L2 length (a rule of scale
    "length", or norm L2) that point lies far outside the ball; "step" takes P(a + alpha * decay * direction(m))
    instead, where the rule would carry the iterate without a new gradient.

    Args:
        decay: the paper's mu.
        along: "momentum" or "step".
    """

    decay: float = 1.0
    along: Literal["momentum", "step"] = "momentum"

    @property
    def at_iterate(self) -> bool:
        return False

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        ahead = step.coast(self.decay) if self.along == "step" else step.momentum * (step.size * self.decay)
        copies = len(a) // max(len(ahead), 1)
        return query(a + (torch.cat([ahead] * copies) if copies > 1 else ahead)), state


@dataclass(frozen=True, kw_only=True)
class ScaleCopies(Stateless):
    """The mean over i < m of the gradient by a of J(a / 2^i) ([NI], Eq. 9).

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
        losses = None if stacked.losses is None else stacked.losses.reshape(self.m, -1).mean(0)
        return Evaluation(gradient, logits, losses), state


@dataclass(frozen=True, kw_only=True)
class VarianceTuning:
    """The gradient plus the variance of the step before: the mean over N neighbours of the iterate minus the gradient.

    g_t = grad J(a) + v_t, v_{t+1} = (1/N) sum_i grad J(a + r_i) - grad J(a), r_i uniform on
    [-radius, radius]^d, v_1 = 0 ([VT], Eq. 7, Alg. 1). After a `LookAhead` the gradient is the one there and the
    neighbours are still the iterate's, as in the released code. It goes before oracles that stack copies.

    Args:
        radius: the paper's beta * eps, in the units of the images; a tensor has 1 or N rows.
        N: number of neighbours, at least 1.
    """

    radius: Size
    N: int = 20

    def __post_init__(self) -> None:
        validation.size("radius", self.radius)
        validation.count("N", self.N)

    @property
    def at_iterate(self) -> bool:
        return True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def check(self, x: Tensor) -> None:
        return

    def __call__(self, query: Query, a: Tensor, state: Tensor, step: Step) -> tuple[Evaluation, Tensor]:
        if a.shape != state.shape:
            raise ValueError("VarianceTuning() has one variance per example; chain it before the oracles that stack")
        here = query(a)
        total, left, radius = torch.zeros_like(a), self.N, step.draw.rows(self.radius)
        while left:
            copies = min(left, step.copies() or left)
            around = torch.cat([step.iterate] * copies)
            offsets = step.draw.uniform(around, tuple(a.shape[1:])).mul_(2).sub_(1)
            offsets.reshape(copies, *a.shape).mul_(radius)
            near = query(around.add_(offsets.to(a.dtype))).gradient
            total.add_(near.reshape(copies, *a.shape).sum(0))
            left -= copies
        return here._replace(gradient=here.gradient + state), total.div_(self.N).sub_(here.gradient)


@dataclass(frozen=True)
class Chain:
    """Oracles nested left to right: the first decides where the second is asked, and so on."""

    oracles: tuple[Oracle, ...]

    @property
    def at_iterate(self) -> bool:
        return all(oracle.at_iterate for oracle in self.oracles)

    def init(self, x: Tensor) -> Any:
        return tuple(oracle.init(x) for oracle in self.oracles)

    def check(self, x: Tensor) -> None:
        for oracle in self.oracles:
            oracle.check(x)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        new = list(state)

        def ask(depth: int, points: Tensor, member: int | None, mean: int, rows: int) -> Evaluation:
            """What an oracle asks for holds for those after it."""
            if depth == len(self.oracles):
                return query(points, member=member, mean=mean, rows=rows)

            def deeper(points: Tensor, *, member: int | None = member, mean: int = 1, rows: int = 0) -> Evaluation:
                mine = (mean, rows or len(points) // mean) if mean > 1 else outer
                return ask(depth + 1, points, member, *mine)

            outer = mean, rows
            evaluation, new[depth] = self.oracles[depth](deeper, points, state[depth], step)
            return evaluation

        return ask(0, a, None, 1, 0), tuple(new)


def chain(*oracles: Oracle) -> Oracle:
    """Compose oracles: `chain(LookAhead(), ScaleCopies(m=5))` averages scale copies of the look-ahead point."""
    return Chain(oracles)
