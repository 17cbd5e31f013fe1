"""Random search without gradients, on the loop of the gradient attacks: proposals are what the oracle returns.

[Square] Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via random search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.bounded import IterativeAttack
from firstorder.attacks.controls import Control, Turn
from firstorder.attacks.directions import Direction
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Oracle, Query, Stateless, Step
from firstorder.attacks.projections import Size, rows


@dataclass(frozen=True, kw_only=True)
class Blocks(Stateless):
    """In place of a gradient a block of random signs, one for each channel, at a random place, and zero elsewhere
    ([Square], Alg. 2); the model is asked for its logits alone.

    Blocks shrink geometrically from step to step. Those of inputs without channels, (N, d), are intervals.

    Args:
        shares: of the area of an input that the first block covers, and that the last does, in (0, 1].
        steps: after how many the last share is reached.
    """

    shares: tuple[float, float]
    steps: int

    def __post_init__(self) -> None:
        for share in self.shares:
            validation.number("shares", share, low=0, above=True, high=1)
        validation.count("steps", self.steps)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        channels, sides = (a.shape[1], a.shape[2:]) if a.ndim > 2 else (1, a.shape[1:])
        first, last = self.shares
        share = first * (last / first) ** ((step.t - 1) / self.steps)
        drawn = step.draw.uniform(a, (len(sides) + channels,))
        one = [1] * len(sides)
        signs = (drawn[:, len(sides) :] * 2).floor().clamp(max=1) * 2 - 1
        block = signs.to(a.dtype).reshape(len(a), channels, *one).expand(len(a), channels, *sides)
        inside = torch.ones(len(a), *one, dtype=torch.bool, device=a.device)
        for axis, side in enumerate(sides):
            length = max(round(side * share ** (1 / len(sides))), 1)
            begin = (drawn[:, axis, None] * (side - length + 1)).floor().clamp(max=side - length)
            at = torch.arange(side, device=a.device)
            covered = (at >= begin) & (at < begin + length)
            inside = inside & covered.reshape(len(a), *one[:axis], side, *one[axis + 1 :])
        return Evaluation((block * inside[:, None]).reshape(a.shape), step.logits(a)), state


class Accepted(NamedTuple):
    """What `Acceptance` carries: a row per example in every tensor."""

    best: Tensor
    """The iterate of the largest loss, (N, ...)."""
    top: Tensor
    """That loss, (N,)."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Every step begins at the iterate of the largest loss so far."""

    def init(self, a: Tensor) -> Accepted:
        return Accepted(a.clone(), a.new_full((len(a),), -torch.inf))

    def factor(self, state: Accepted) -> Size:
        return 1.0

    def __call__(self, state: Accepted, a: Tensor, gradient: Tensor, losses: Tensor, t: int, steps: int) -> Turn:
        better = losses > state.top
        best = torch.where(rows(better, a), a, state.best)
        return Turn(Accepted(best, torch.where(better, losses.to(state.top), state.top)), best.clone(), gradient)


@dataclass(frozen=True, kw_only=True)
class SquareSearch(IterativeAttack):
    """Random search by blocks at a corner of the ball, kept where the margin became smaller: T forwards, no gradient.

    Unlike the paper's it is made to go on from the best point that other attacks have found: blocks are small from the
    first, every example has places of its own, and a block may have the same sign in all channels.

    Args:
        shares: see `Blocks`.
    """

    paper: ClassVar[str] = "Andriushchenko et al. 2020, Alg. 1 and 2"
    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    shares: tuple[float, float] = (0.05, 0.002)

    def oracle(self) -> Oracle:
        return Blocks(shares=self.shares, steps=self.steps)

    def control(self) -> Control:
        return Acceptance()

    def step_size(self, direction: Direction, numel: int) -> Size:
        first = self.alpha is None and direction.scale == "radius"
        return 2.0 * self.eps if first else super().step_size(direction, numel)
