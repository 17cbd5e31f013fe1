"""Which rows of an operation's tensors belong to which example."""

from __future__ import annotations

from collections.abc import Iterator
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
        moved: Tensor = parts.movedim(self.dim + self.inner, 0)
        return moved

    def spread(self, weights: Tensor, like: Tensor) -> Tensor:
        """One weight (N,) per example, shaped so that it multiplies `like`."""
        k = like.shape[self.dim] // len(weights)
        rows = weights.repeat(k) if self.inner else weights.repeat_interleave(k)
        for _ in range(like.ndim - 1 - self.dim):
            rows = rows.unsqueeze(-1)
        return rows.to(like.dtype)


def candidates(shape: torch.Size, n: int, dims: int) -> Iterator[Layout]:
    """The layouts that a tensor of this shape can have for N examples, the batch in one of the first `dims`."""
    for dim in range(min(dims, len(shape))):
        if shape[dim] % n == 0 and shape[dim] >= n:
            yield Layout(dim)
            if n < shape[dim]:
                yield Layout(dim, inner=True)


def trials(n: int, device: torch.device) -> Tensor:
    """Distinct weights in [1, 2) for N examples: scaling the losses by them shows which rows are whose."""
    return 1 + torch.arange(1, n + 1, device=device, dtype=torch.float64).mul(0.6180339887).frac()


def fingerprint(gradient: Tensor, dims: int) -> Tensor:
    """Eight projections of a gradient that keep its first `dims` dimensions, in float64."""
    rows = gradient.flatten(dims) if gradient.ndim > dims else gradient.unsqueeze(-1)
    ramp = torch.arange(1, rows.shape[-1] + 1, device=gradient.device, dtype=torch.float32)
    phases = torch.arange(8, device=gradient.device, dtype=torch.float32)
    return (rows.float() @ (ramp[:, None] * (1.7 + 0.1 * phases) + phases).cos()).double()


def recognise(
    plain: Tensor, scaled: Tensor, weights: Tensor, shape: torch.Size, dims: int, tolerance: float
) -> list[Layout]:
    """The layouts that explain how a gradient's fingerprint changes when the losses are scaled by `weights` (N,).

    None where the operation mixes examples, or its rows are not examples; several where the gradient is zero in all
    rows that would tell them apart.
    """
    found = []
    for layout in candidates(shape, len(weights), dims):
        expected = plain * layout.spread(weights, plain)
        if float((scaled - expected).norm()) <= tolerance * float(scaled.norm()):
            found.append(layout)
    return found
