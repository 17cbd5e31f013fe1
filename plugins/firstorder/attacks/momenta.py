"""How gradients are accumulated: m_t from m_{t-1} and g_t, with m_0 = 0. Tensors have shape (N, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from firstorder.attacks.projections import rows

Normaliser = Literal["mean", "sum", "none"]
"""What divides a gradient before it is accumulated: mean |g| (the released codes), ||g||_1 (the papers' text), or
nothing, what [NGM], Sec. 1, compares with.
"""
NORMALISERS = ("mean", "sum", "none")


class Momentum(Protocol):
    """How gradients are accumulated."""

    def init(self, x: Tensor) -> Tensor:
        """m_0 = 0 for examples x (N, ...), in memory that a call may write to if it does."""

    def __call__(self, m: Tensor, g: Tensor, t: int) -> Tensor:
        """The momentum after the gradient g of step t (1-based), built in the memory of m, or g itself."""


class FromZero:
    """A momentum that is built in memory of its own."""

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, kw_only=True)
class NoMomentum:
    """m_t = g_t; nothing is carried from step to step, so a look-ahead stays at the iterate."""

    def init(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand_as(x)

    def __call__(self, m: Tensor, g: Tensor, t: int) -> Tensor:
        return g


@dataclass(frozen=True, kw_only=True)
class Accumulate(FromZero):
    """m_t = decay * m_{t-1} + g_t / normaliser(g_t) ([MI], Eq. 6).

    Args:
        decay: the paper's mu.
        normaliser: "mean" for mean|g|, "sum" for ||g||_1, "none" for 1.
    """

    decay: float = 1.0
    normaliser: Normaliser = "mean"

    def __call__(self, m: Tensor, g: Tensor, t: int) -> Tensor:
        past = m if self.decay == 1 else m.mul_(self.decay)
        return _add(past, g, size(g, self.normaliser), 1.0)


@dataclass(frozen=True, kw_only=True)
class EMA(FromZero):
    """m_t = beta_t m_{t-1} + (1 - beta_t) g_t / normaliser(g_t), beta_t = beta1 * lam^(t-1) ([NGM], Alg. 1).

    With the sum normaliser ||m_t||_1 <= 1, which [NGM] Lemma 3.1 builds on.

    Args:
        beta1: initial weight of the past, in [0, 1).
        lam: its decay per step, the paper's lambda, in (0, 1].
        normaliser: "mean" for mean|g|, "sum" for ||g||_1, "none" for 1.
    """

    beta1: float = 0.9
    lam: float = 0.99
    normaliser: Normaliser = "mean"

    def __call__(self, m: Tensor, g: Tensor, t: int) -> Tensor:
        beta = self.beta1 * self.lam ** (t - 1)
        return _add(m.mul_(beta), g, size(g, self.normaliser), 1 - beta)


def size(g: Tensor, normaliser: Normaliser) -> Tensor:
    """Per-example mean|g| or ||g||_1 of g (N, ...), or 1, shape (N, 1, ...), positive so that 0 / size is 0.

    At least float32: in half precision the sum overflows and small means vanish.
    """
    if normaliser == "none":
        return rows(g.new_ones(len(g)), g)
    total = g.reshape(len(g), -1).abs().sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
    if normaliser == "mean":
        total = total / g[0].numel()
    return rows(total.clamp_min(torch.finfo(total.dtype).tiny), g)


def _add(m: Tensor, g: Tensor, size: Tensor, weight: float) -> Tensor:
    """Add weight * g / size to m in place; in half precision through float32."""
    return m.addcdiv_(g, size, value=weight) if size.dtype == g.dtype else m.add_(g / size, alpha=weight)
