"""Which rows of an operation's tensors belong to which example.

A backward is linear in the losses' weights: an example's own gradient answers to its own weight alone. Weights that are
powers of two scale it without any rounding, in every floating-point format, so that what is left of another example
shows however weak it is: the two backwards of a pair give every example a small weight once, while others have one up
to 2^15 times as large.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The batch of N lies in dimension `dim`, which may also hold k positions of every example.

    Example i has the rows i k..(i + 1) k - 1 of it, or i, i + N, i + 2 N, ... if `inner`.
    """

    dim: int = 0
    inner: bool = False

    def split(self, tensor: Tensor, n: int) -> Tensor:
        """`tensor` with the examples in front: (N, ...), the k positions where the batch was."""
        k = tensor.shape[self.dim] // n
        parts = tensor.unflatten(self.dim, (k, n) if self.inner else (n, k))
        place = self.dim + self.inner
        moved: Tensor = parts.movedim(place, 0) if place else parts
        return moved

    def spread(self, weights: Tensor, like: Tensor) -> Tensor:
        """One weight (N,) per example, shaped so that it multiplies `like`."""
        k = like.shape[self.dim] // len(weights)
        rows = (weights.expand(k, -1) if self.inner else weights.unsqueeze(1).expand(-1, k)).flatten()
        for _ in range(like.ndim - 1 - self.dim):
            rows = rows.unsqueeze(-1)
        return rows.to(like.dtype)


class Precision(NamedTuple):
    """How exactly gradients follow the losses.

    Attributes:
        tolerance: the largest error of an example's gradient, relative to its norm, that passes for rounding: 1e-9 in
            float64, 1e-5 in float32, 1e-2 in half precision. Most kernels make none; those that add in no fixed order
            (some of CUDA's) do.
        tiny: norms up to this say nothing: numbers near the end of a format's range are rounded coarsely, or to 0.
        exponents: weights reach down to two to the minus this.
    """

    tolerance: float
    tiny: float
    exponents: int


class Finding(NamedTuple):
    """The layouts that fit, and whether this batch could have shown that they do not."""

    layouts: list[Layout]
    conclusive: bool


class Trial(NamedTuple):
    """Two backwards with the losses weighted by `first` and by `second` (N,), powers of two; or what they gave."""

    first: Tensor
    second: Tensor


def candidates(shape: torch.Size, n: int, dims: int) -> Iterator[Layout]:
    """The layouts that a tensor of this shape can have for N examples, the batch in one of the first `dims`."""
    for dim in range(min(dims, len(shape))):
        if shape[dim] % n == 0 and shape[dim] >= n:
            yield Layout(dim)
            if n < shape[dim]:
                yield Layout(dim, inner=True)


def precision(dtypes: Collection[torch.dtype]) -> Precision:
    """That of a backward through these formats: the coarsest one's."""
    tolerance = max(
        {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2) for dtype in dtypes if dtype.is_floating_point
    )
    tiny = max({torch.float64: 2.0**-960, torch.float16: 2.0**-11}.get(dtype, 2.0**-100) for dtype in dtypes)
    return Precision(tolerance, tiny, 7 if torch.float16 in dtypes else 15)


def trials(n: int, exponents: int, device: torch.device) -> list[Trial]:
    """Pairs of weights for N examples, any two of which differ in one of the pairs: one for N up to 16, two up to 256.

    The examples are numbered in no regular order, so that what neighbours add does not cancel; every pair shows one
    digit d of the numbers, as 2^-d and as 2^(d - exponents).
    """
    digits = 1
    while (exponents + 1) ** digits < n:
        digits += 1
    base = 2
    while base**digits < n:
        base += 1
    numbers = torch.arange(1, n + 1, dtype=torch.float64).mul(0.6180339887).frac().argsort().argsort()
    found = []
    for digit in range(digits):
        d = (numbers // base**digit % base) * exponents // (base - 1)
        found.append(Trial(*(torch.exp2(-e.double()).to(device) for e in (d, exponents - d))))
    return found


class Fingerprints:
    """Eight projections of a gradient that keep its first `dims` dimensions, in float64."""

    def __init__(self) -> None:
        self._waves: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, gradient: Tensor, dims: int) -> Tensor:
        rows = gradient.flatten(dims) if gradient.ndim > dims else gradient.unsqueeze(-1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        key = (rows.shape[-1], rows.dtype, rows.device)
        if key not in self._waves:
            ramp = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=torch.float64).square()
            phases = torch.arange(8, device=rows.device, dtype=torch.float64)
            self._waves[key] = (ramp[:, None] * (1.7 + 0.1 * phases) + phases).cos().to(rows.dtype)
        return (rows @ self._waves[key]).double()


def recognise(
    weights: Sequence[Trial], seen: Sequence[Trial], shape: torch.Size, dims: int, exact: Precision
) -> Finding:
    """The layouts that explain a gradient's fingerprints `seen` in backwards with these weights.

    There are none where the operation mixes examples, or where its rows are not examples; several where the gradient
    is zero in all rows that would tell them apart. Rows that are not finite say nothing.
    """
    n = len(weights[0].first)
    finite = torch.stack([t.isfinite().all(-1, keepdim=True) for pair in seen for t in pair]).all(0)
    seen = [Trial(*(t.where(finite, 0) for t in pair)) for pair in seen]
    found, shown = [], 0
    for layout in candidates(shape, n, dims):
        fits, shows = zip(*(_explains(layout, *pair, exact) for pair in zip(weights, seen, strict=True)), strict=True)
        if all(fits):
            found.append(layout)
            shown = min(shows)
    return Finding(found, len(found) == 1 and shown >= min(n, 2) and bool(finite.all()))


def _explains(layout: Layout, weights: Trial, seen: Trial, exact: Precision) -> tuple[bool, int]:
    """Whether every example's gradient answers to its own weight alone, and how many examples show one."""
    n = len(weights.first)
    ratio = weights.second / weights.first
    expected = seen.first * layout.spread(ratio, seen.first)
    error, size = (layout.split(t, n).flatten(1).norm(dim=1) for t in (seen.second - expected, seen.second))
    floor = exact.tiny * (1 + ratio)
    return bool((error <= exact.tolerance * size + floor).all()), int((size > floor).sum())
