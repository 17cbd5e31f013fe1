"""Step sizes from the step number t = 1..T and T: a number, or a tensor where it differs between examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Protocol, cast

from typing_extensions import TypeVar

from firstorder.attacks.projections import Size


class Schedule(Protocol):
    """The step size of step t (1-based) of `steps`."""

    def __call__(self, t: int, steps: int) -> Size: ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """alpha at every step."""

    size: Size

    def __call__(self, t: int, steps: int) -> Size:
        return self.size


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """alpha / sqrt(t) ([NGM], Theorem 3.4)."""

    size: Size

    def __call__(self, t: int, steps: int) -> Size:
        return self.size / math.sqrt(t)


S = TypeVar("S", bound=Size, default=float)


@dataclass(frozen=True, kw_only=True)
class Cosine(Generic[S]):
    """Annealed from `size` at the first step along half a cosine that reaches `end` after the last ([DDN], Sec. 3)."""

    size: S
    end: float = 0.0

    def __call__(self, t: int, steps: int) -> S:
        return cast(S, self.end + (self.size - self.end) * ((1 + math.cos(math.pi * (t - 1) / steps)) / 2))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a longer run: the sizes of another schedule from step `after` + 1 of `of` on.

    Args:
        schedule: of the whole run.
        after: how many of its steps went before.
        of: how many it has.
    """

    schedule: Schedule
    after: int
    of: int

    def __call__(self, t: int, steps: int) -> Size:
        return self.schedule(t + self.after, self.of)
