"""Images that can be stored: the points of a ball that lie on equidistant levels between the bounds, as bytes do.

A model sees the walk of an attack from the level nearest to it that is in the ball. The walk itself is not rounded, so
that steps shorter than a level add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from firstorder.attacks.projections import LinfBall, Size, narrowed, rows

SLACK = 1e-4
"""By what share of a level a value may miss it in rounding; 4e-7 of the width of the bounds for 256 levels."""

HALVINGS = 10
"""How often the way to a point outside the ball is halved in search of the last point inside."""

ORDERS = {"L1": 1, "L2": 2}


@dataclass(frozen=True)
class Levels:
    """Equidistant values from `low` to `high`, which broadcast to one image, in the dtype of images.

    Value k is (k * width) / (count - 1) + low in float32 or better: for [0, 1] what bytes divided by 255 are.
    """

    low: Tensor
    high: Tensor
    count: int

    def place(self, a: Tensor) -> Tensor:
        """At which level a (N, ...) is, not rounded, at least float32."""
        low, high = self._wide()
        return (a.to(low.dtype) - low) * ((self.count - 1) / (high - low))

    def value(self, k: Tensor) -> Tensor:
        """The values of levels k (N, ...), within the bounds."""
        low, high = self._wide()
        return ((k * (high - low)) / (self.count - 1) + low).clamp(low, high).to(self.low.dtype)

    def step(self) -> Tensor:
        """From one level to the next."""
        return (self.high - self.low) / (self.count - 1)

    def _wide(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.low.dtype, torch.float32)
        return self.low.to(dtype), self.high.to(dtype)


class Grid(Protocol):
    """The points of a ball on levels, for a batch of N; where a mask is False, the image alone."""

    def nearest(self, a: Tensor) -> Tensor:
        """The point seen of every iterate a (N, ...), in memory of its own."""

    def empty(self) -> Tensor:
        """For which images there is none, (N,)."""

    def take(self, index: Tensor) -> Grid:
        """The grid of the examples at `index`."""


@dataclass(frozen=True)
class BoxGrid:
    """The levels between two of them, `first` and `last` (N, ...), values elementwise."""

    levels: Levels
    first: Tensor
    last: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: Size, levels: Levels, mask: Tensor | None) -> BoxGrid:
        ball = LinfBall.around(x, eps, levels.low, levels.high)
        first = levels.value((levels.place(ball.lower) - SLACK).ceil_())
        last = levels.value((levels.place(ball.upper) + SLACK).floor_())
        if mask is not None:
            first, last = torch.where(mask, first, x), torch.where(mask, last, x)
        return cls(levels, first, last)

    def nearest(self, a: Tensor) -> Tensor:
        return self.levels.value(self.levels.place(a).round_()).clamp_(self.first, self.last)

    def empty(self) -> Tensor:
        return (self.first > self.last).flatten(1).any(1)

    def take(self, index: Tensor) -> BoxGrid:
        return replace(self, first=self.first[index], last=self.last[index])


@dataclass(frozen=True)
class BallGrid:
    """The levels at most eps from `center` (N, ...) in a norm over all elements.

    Of an iterate outside after rounding, the last point inside on the rounded way to it from the one nearest to the
    centre: on that way no element comes closer to the centre again.
    """

    levels: Levels
    center: Tensor
    eps: Size
    order: int
    mask: Tensor | None

    def nearest(self, a: Tensor) -> Tensor:
        base = self.levels.place(self.center).round_()
        way = self.levels.place(a) - base
        inside = way.new_zeros(len(a))
        outside = torch.ones_like(inside)
        whole = self._within(self._at(base, way, outside))
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            good = self._within(self._at(base, way, middle))
            inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
        return self._at(base, way, torch.where(whole, 1.0, inside))

    def empty(self) -> Tensor:
        base = self._at(self.levels.place(self.center).round_(), torch.zeros_like(self.center), None)
        return ~self._within(base, SLACK * self.levels.step())

    def take(self, index: Tensor) -> BallGrid:
        mask = None if self.mask is None else self.mask[index]
        return replace(self, center=self.center[index], eps=narrowed(self.eps, index), mask=mask)

    def _at(self, base: Tensor, way: Tensor, share: Tensor | None) -> Tensor:
        point = self.levels.value(base if share is None else (way * rows(share, way)).round_().add_(base))
        return point if self.mask is None else torch.where(self.mask, point, self.center)

    def _within(self, points: Tensor, slack: Tensor | float = 0.0) -> Tensor:
        """Which points (N, ...) are in the ball, elements that miss the centre by no more than `slack` at it, (N,)."""
        wide = torch.promote_types(points.dtype, torch.float32)
        apart = (points.to(wide) - self.center.to(wide)).abs_().sub_(slack).clamp_min_(0.0)
        size = rows(torch.linalg.vector_norm(apart.flatten(1), self.order, dim=1), points)
        return (size <= self.eps).flatten()


def grid(norm: str, x: Tensor, eps: Size, levels: Levels, mask: Tensor | None) -> Grid:
    """The points on `levels` of the ball of radius eps around x (N, ...) in a norm, where `mask` (N, ...) is True."""
    if norm == "Linf":
        return BoxGrid.around(x, eps, levels, mask)
    return BallGrid(levels, x, eps, ORDERS[norm], mask)
