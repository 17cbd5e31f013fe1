"""Controls: how the steps of every example follow the losses that it has met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.projections import Size, rows


class Turn(NamedTuple):
    """Where the next step begins."""

    state: Any
    a: Tensor
    """The iterate (N, ...), the current one or one before."""
    gradient: Tensor
    """The gradient there, (N, ...)."""


class Control(Protocol):
    """Sizes of steps, and returns to iterates before, by the losses of an example's iterates so far."""

    def init(self, a: Tensor) -> Any:
        """The state before the first gradient at a (N, ...): nested tuples of tensors with N rows."""

    def factor(self, state: Any) -> Size:
        """What the schedule's step size is multiplied by."""

    def __call__(self, state: Any, a: Tensor, gradient: Tensor, losses: Tensor, t: int, steps: int) -> Turn:
        """What follows from the losses (N,) to ascend at the iterate a (N, ...), where step t (1-based) begins."""


class Halved(NamedTuple):
    """What `Halving` carries: a row per example in every tensor."""

    factor: Tensor
    """Of the step size, (N, 1, ...)."""
    best: Tensor
    """The iterate of the largest loss, (N, ...)."""
    gradient: Tensor
    """The gradient there, (N, ...)."""
    top: Tensor
    """The largest loss, (N,)."""
    last: Tensor
    """The loss before, (N,)."""
    rises: Tensor
    """How often the loss rose since the last checkpoint, (N,)."""
    checked: Tensor
    """The largest loss up to the last checkpoint, (N,)."""
    halved: Tensor
    """Whether the step was halved there, (N,)."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """APGD's step sizes ([APGD], Sec. 3.1): at checkpoints an example whose loss does not rise often enough, or
    whose best loss is what it was, goes back to its best iterate with half the step.

    The text is unclear or differs in places; this is the released code. A step is halved where the loss rose in at most
    (not: less than) a share rho of the steps since the last checkpoint, or where neither the largest loss nor the step
    changed since that; the second never at the first checkpoint. The first loss, that of the first iterate after the
    start, counts as a rise where it is positive, not where it is larger than the start's. Periods between checkpoints
    are rounded down, see `checkpoints`.

    Args:
        rho: the share of steps that must raise the loss, in [0, 1].
    """

    rho: float = 0.75

    def __post_init__(self) -> None:
        validation.number("rho", self.rho, low=0, high=1)

    def init(self, a: Tensor) -> Halved:
        losses = a.new_zeros(len(a), dtype=torch.promote_types(a.dtype, torch.float32))
        return Halved(
            factor=a.new_ones(len(a), *[1] * (a.ndim - 1)),
            best=a.clone(),
            gradient=torch.zeros_like(a),
            top=losses - torch.inf,
            last=losses,
            rises=torch.zeros_like(losses, dtype=torch.long),
            checked=losses,
            halved=torch.ones_like(losses, dtype=torch.bool),
        )

    def factor(self, state: Halved) -> Size:
        return state.factor

    def __call__(self, state: Halved, a: Tensor, gradient: Tensor, losses: Tensor, t: int, steps: int) -> Turn:
        losses = losses.to(state.top.dtype)
        better = losses > state.top
        torch.where(rows(better, a), a, state.best, out=state.best)
        torch.where(rows(better, a), gradient, state.gradient, out=state.gradient)
        state = state._replace(top=torch.where(better, losses, state.top))
        if t == 1:
            return Turn(state._replace(checked=state.top), a, gradient)
        state = state._replace(rises=state.rises + (losses > state.last), last=losses)
        period = checkpoints(steps).get(t - 1)
        if period is None:
            return Turn(state, a, gradient)
        halve = (state.rises <= self.rho * period) | (~state.halved & (state.checked >= state.top))
        chosen = rows(halve, a)
        factor = torch.where(chosen, state.factor / 2, state.factor)
        state = state._replace(factor=factor, rises=torch.zeros_like(state.rises), checked=state.top, halved=halve)
        return Turn(state, torch.where(chosen, state.best, a), torch.where(chosen, state.gradient, gradient))


@cache
def checkpoints(steps: int) -> Mapping[int, int]:
    """After how many of so many steps APGD looks at the losses, with the number of steps since the checkpoint before.

    The first period is 0.22 of the steps, every later one shorter by 0.03 of them and no shorter than 0.06 of them; all
    are rounded down, to one step at least.
    """
    period, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = {}, period
    while at <= steps:
        found[at] = period
        period = max(period - shorter, least)
        at += period
    return MappingProxyType(found)


class Kept(NamedTuple):
    """The iterate of every example that a controlled run returns: the last one that was broken, or else the nearest."""

    a: Tensor
    """Shape (N, ...)."""
    distance: Tensor
    """From success, (N,)."""
    broken: Tensor
    """Whether any was, (N,)."""
    unknown: Tensor
    """Whether the logits of any were NaN or infinite, (N,)."""

    @classmethod
    def init(cls, a: Tensor) -> Kept:
        distance = a.new_full((len(a),), torch.inf, dtype=torch.promote_types(a.dtype, torch.float32))
        none = torch.zeros_like(distance, dtype=torch.bool)
        return cls(a.clone(), distance, none, none)

    def after(self, a: Tensor, logits: Tensor, distance: Tensor, broken: Tensor) -> Kept:
        """After another iterate a (N, ...), its logits (N, K), its distance from success (N,), and whether it is broken
        (N,).
        """
        taken = broken | (~self.broken & (distance < self.distance))
        torch.where(rows(taken, a), a, self.a, out=self.a)
        distance = torch.where(taken, distance.to(self.distance), self.distance)
        return Kept(self.a, distance, self.broken | broken, self.unknown | ~logits.isfinite().all(1))

    def result(self) -> Tensor:
        """The iterates (N, ...); NaN for examples that met logits that are no numbers and were never broken."""
        return torch.where(rows(self.unknown & ~self.broken, self.a), torch.nan, self.a)
