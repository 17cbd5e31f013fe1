"""Feasible regions: the epsilon-ball around the clean input, intersected with the bounds.

`project_` maps onto the ball, then onto the bounds. As the clean input lies within the bounds, the
second step cannot leave the ball, so projections are idempotent, and non-expansive as composed
projections onto convex sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Bound = float | Sequence[float] | Tensor
"""A limit of pixel values: a scalar, one value per channel, or an array that broadcasts to one example."""

Size = float | Tensor
"""A length: one number, or one for every example or feature, a tensor that broadcasts against (N, ...), the first
dimension 1 or N."""


class Region(Protocol):
    """The feasible perturbed inputs of a batch. All tensors have shape (N, ...)."""

    @property
    def center(self) -> Tensor: ...

    def project_(self, a: Tensor) -> Tensor:
        """Project every a, shape (N, ...), in place, and return it."""

    def sample(self, generator: torch.Generator, *, surface: bool = False) -> Tensor:
        """A point drawn uniformly from the ball, or scaled onto its `surface`, then projected onto the bounds."""

    def take(self, index: Tensor) -> Region:
        """The region of the examples at `index`."""


@dataclass(frozen=True)
class LinfBall:
    """{a: |a - center| <= eps elementwise, low <= a <= high}, kept as one box."""

    center: Tensor
    eps: Size
    lower: Tensor
    upper: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: Size, low: Tensor, high: Tensor) -> LinfBall:
        return cls(x, eps, (x - eps).clamp_(low, high), (x + eps).clamp_(low, high))

    def project_(self, a: Tensor) -> Tensor:
        return a.clamp_(self.lower, self.upper)

    def sample(self, generator: torch.Generator, *, surface: bool = False) -> Tensor:
        offset = _uniform(self.center, generator).mul_(2).sub_(1)
        if surface:
            offset /= rows(offset.reshape(len(offset), -1).abs().amax(1), offset)
        return self.project_(offset.mul_(self.eps).add_(self.center))

    def take(self, index: Tensor) -> LinfBall:
        eps = narrowed(self.eps, index)
        return LinfBall(self.center[index], eps, self.lower[index], self.upper[index])


@dataclass(frozen=True)
class L2Ball:
    """{a: ||a - center||_2 <= eps per example, low <= a <= high}."""

    center: Tensor
    eps: Size
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: Size, low: Tensor, high: Tensor) -> L2Ball:
        return cls(x, eps, low, high)

    def project_(self, a: Tensor) -> Tensor:
        delta = a.sub_(self.center)
        shrink = self.eps / norm(delta).clamp_min(torch.finfo(a.dtype).tiny)
        return delta.mul_(shrink.clamp_max_(1.0)).add_(self.center).clamp_(self.low, self.high)

    def sample(self, generator: torch.Generator, *, surface: bool = False) -> Tensor:
        x = self.center
        direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        offset = self.eps * direction / norm(direction)
        if not surface:
            radius = _uniform(x.reshape(len(x), -1)[:, :1], generator) ** (1 / x[0].numel())
            offset *= rows(radius[:, 0], x)
        return self.project_(x + offset)

    def take(self, index: Tensor) -> L2Ball:
        return replace(self, center=self.center[index], eps=narrowed(self.eps, index))


BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"Linf": LinfBall, "L2": L2Ball}


def narrowed(size: Size, index: Tensor) -> Size:
    """The sizes of the examples at `index`."""
    return size[index] if isinstance(size, Tensor) and size.ndim and len(size) > 1 else size


def rows(values: Tensor, like: Tensor) -> Tensor:
    """Per-example values (N,) shaped to broadcast against `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def norm(a: Tensor) -> Tensor:
    """The L2 norm of each example of a (N, ...), shape (N, 1, ...)."""
    return rows(torch.linalg.vector_norm(a.reshape(len(a), -1), dim=1), a)


def bound(value: Bound, like: Tensor) -> Tensor:
    """`value` as a tensor that broadcasts against `like` (N, C, ...); one dimension means channels."""
    limit = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if limit.ndim == 1 and like.ndim > 2 and len(limit) == like.shape[1]:
        limit = limit.reshape(-1, *[1] * (like.ndim - 2))
    try:
        limit.expand(like.shape[1:])
    except RuntimeError:
        raise ValueError(
            f"bounds of shape {tuple(limit.shape)} do not fit images of shape {tuple(like.shape[1:])}; "
            "give a scalar or one value per channel"
        ) from None
    return limit


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
