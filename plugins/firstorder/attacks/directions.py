"""Update rules: which way and how far a momentum m (N, ...) moves the iterate.

A zero component stays zero, a zero momentum gives a zero direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.projections import norm, rows

Scale = Literal["radius", "length", "component"]

Scope = Literal["example", "element"]


@runtime_checkable
class Direction(Protocol):
    """An update rule with explicit per-example state (a tensor with N rows, or None).

    A class of this form that can be made without arguments may be registered in the entry-point group
    `firstorder.rules`, see `firstorder.attacks.registry`.
    """

    @property
    def scale(self) -> Scale:
        """What a step of size alpha means, which decides on the step size that an attack takes by default.

        "radius": directions have size 1, in the norm of the ball, or are multiples of that, as `Quantised`'s: alpha is
        in the units of eps, and eps / T by default. "length": directions have a size of their own, near [NGM]'s
        momentum: alpha is a factor on an L2 length that grows with eps and, under L-infinity, with the number of
        elements. "component": no component moves further than alpha times the attribute `gamma`, a positive number
        that such a rule must have: alpha is a share of eps / gamma.
        """

    def init(self, x: Tensor) -> Tensor | None:
        """The state before the first step on x (N, ...)."""

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The direction (N, ...) of momentum m (N, ...), and the new state.

        `out`, of the shape of m, is memory to build the direction in. It may be m itself; otherwise m
        must stay as it is.
        """


class _Stateless:
    def init(self, x: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Sign(_Stateless):
    """sgn(m), the steepest ascent under L-infinity."""

    @property
    def scale(self) -> Scale:
        return "radius"

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.sign(m, out=out), state


@dataclass(frozen=True, kw_only=True)
class Normalised(_Stateless):
    """m / ||m||_2, the steepest ascent under L2."""

    @property
    def scale(self) -> Scale:
        return "radius"

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        # Scaled to a largest component of 1 first: the squares of small gradients would vanish.
        tiny = torch.finfo(m.dtype).tiny
        top = m.reshape(len(m), -1).abs().amax(1).clamp_min(tiny)
        unit = torch.div(m, rows(top, m), out=out)
        return unit.div_(norm(unit).clamp_min(tiny)), state


@dataclass(frozen=True, kw_only=True)
class Identity(_Stateless):
    """m itself."""

    @property
    def scale(self) -> Scale:
        return "length"

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        return m, state


@dataclass(frozen=True, kw_only=True)
class Quantised(_Stateless):
    """zeta(b m / max|m|), zeta(v) = sgn(v) if |v| < 1 else round(v) ([QG], Eq. 4).

    Components are integers up to b, so alpha times them saturates at the ball: large components move
    all the way, small ones by alpha.

    Args:
        levels: the paper's b, at least 1; b = 1 is the sign, 100 to 1000 work best.
    """

    levels: int = 200

    @property
    def scale(self) -> Scale:
        return "radius"

    def __post_init__(self) -> None:
        validation.count("levels", self.levels)

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        sign = m.sign()
        size = torch.abs(m, out=out)
        top = size.reshape(len(m), -1).amax(1).clamp_min(torch.finfo(m.dtype).tiny)
        # For v != 0, zeta(v) = sgn(v) max(round|v|, 1); for v = 0 the sign makes it 0.
        return size.div_(rows(top, m)).mul_(self.levels).round_().clamp_min_(1).mul_(sign), state


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """The radius-varying clip d_t m_t, d_t = min(gamma / ||m_t||_2, d_{t-1}), d_0 = 1 ([NGM], Alg. 1).

    Args:
        gamma: the clipping radius, positive.
        scope: "example" measures the L2 norm of the whole example (the paper's text); "element"
            limits every component by its own |m_t,j|, with its own non-increasing d_t,j.
        memory: whether d_t is at most d_{t-1}; without it the clip is min(1, gamma / ||m_t||_2) ([NGM], Eq. 8).
    """

    gamma: float = 0.8
    scope: Scope = "example"
    memory: bool = True

    @property
    def scale(self) -> Scale:
        return "length" if self.scope == "example" else "component"

    def __post_init__(self) -> None:
        validation.number("gamma", self.gamma, low=0, above=True)
        validation.choice("scope", self.scope, ("example", "element"))
        validation.switch("memory", self.memory)

    def init(self, x: Tensor) -> Tensor:
        shape = x.shape if self.scope == "element" else (len(x), *[1] * (x.ndim - 1))
        return x.new_ones(shape)

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        size = m.abs() if self.scope == "element" else norm(m)
        d = torch.minimum(self.gamma / size, state)
        return torch.mul(m, d, out=out), d if self.memory else state


def steepest(norm: str) -> Direction:
    """The steepest-ascent rule of the norm: `Sign` for "Linf", `Normalised` for "L2"."""
    return Sign() if norm == "Linf" else Normalised()
