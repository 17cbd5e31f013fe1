"""The per-example gradients that one use of a parameter contributes, in the cheapest form that still has all of them.

With inputs a (T, D) and output gradients g (T, O) of the T positions of an example, a linear layer or a convolution
(whose a are patches) contributes a^T g. Its norm needs no such product: ||a^T g||^2 = sum (a a^T) * (g g^T), the
ghost norm (Goodfellow 2015, Efficient per-example gradient computations; Li et al. 2022, Large language models can be
strong differentially private learners, for T > 1), which is cheaper where T (D + O) <= D O. And the weighted
sum over the examples is one ordinary weight gradient, with every output gradient scaled by its example's weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firstorder.training import convolutions
from firstorder.training.convolutions import Settings
from firstorder.training.layouts import Layout


class Factors(NamedTuple):
    """a (n, G, T, D) and g (n, G, T, O): the gradient of each of G groups is a^T g."""

    a: Tensor
    g: Tensor


class Work(NamedTuple):
    """What the norm of one example costs: groups G, positions T, widths D and O of the factors."""

    groups: int
    positions: int
    inputs: int
    outputs: int


class Contribution(ABC):
    """N per-example gradients of one effective parameter."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """The number of elements of one gradient."""

    @property
    @abstractmethod
    def held(self) -> int:
        """The number of elements this keeps alive only for itself."""

    @property
    def dense(self) -> int:
        """The number of elements that one example's gradient takes while it is computed."""
        return self.numel

    @abstractmethod
    def gradients(self, part: slice) -> Tensor:
        """The gradients of some examples, (n, *shape), at least in float32."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over all examples, weighted by weights (N,)."""


class Factored(Contribution):
    """Gradients that are products of factors."""

    work: Work | None = None
    """The sizes of the factors; None where the gradients themselves are cheaper in any case."""

    @property
    def ghost(self) -> int:
        """The number of elements that one example's ghost norm takes."""
        assert self.work is not None
        groups, positions, inputs, outputs = self.work
        return groups * positions * (inputs + outputs + 2 * positions)

    @abstractmethod
    def factors(self, part: slice) -> Factors:
        """The factors of some examples, at least in float32."""

    def products(self, part: slice) -> tuple[Tensor, Tensor]:
        """a a^T and g g^T of some examples, (n, G, T, T)."""
        a, g = self.factors(part)
        return a @ a.transpose(2, 3), g @ g.transpose(2, 3)


@dataclass(frozen=True, eq=False)
class Dense(Contribution):
    """The gradients themselves, (N, *shape)."""

    values: Tensor

    @property
    def numel(self) -> int:
        return self.values.numel() // len(self.values)

    @property
    def held(self) -> int:
        return self.values.numel()

    def gradients(self, part: slice) -> Tensor:
        return self.values[part]

    def weighted(self, weights: Tensor) -> Tensor:
        total: Tensor = torch.tensordot(weights.to(self.values.dtype), self.values, 1)
        return total


@dataclass(frozen=True, eq=False)
class Matrix(Factored):
    """A matrix product of inputs (R, D) with a weight (D, O): output gradients (R, O)."""

    inputs: Tensor
    outputs: Tensor
    layout: Layout
    n: int

    def __post_init__(self) -> None:
        (rows, d), o = self.inputs.shape, self.outputs.shape[1]
        object.__setattr__(self, "work", Work(1, rows // self.n, d, o))

    @property
    def numel(self) -> int:
        return self.inputs.shape[1] * self.outputs.shape[1]

    @property
    def held(self) -> int:
        return self.outputs.numel()

    def factors(self, part: slice) -> Factors:
        a, g = (wide(self.layout.split(t, self.n)[part]).unsqueeze(1) for t in (self.inputs, self.outputs))
        return Factors(a, g)

    @property
    def dense(self) -> int:
        return self.numel + (self.inputs.numel() + self.outputs.numel()) // self.n

    def gradients(self, part: slice) -> Tensor:
        a, g = self.factors(part)
        return (a.transpose(2, 3) @ g).squeeze(1)

    def weighted(self, weights: Tensor) -> Tensor:
        return self.inputs.t() @ (self.outputs * self.layout.spread(weights, self.outputs))


@dataclass(frozen=True, eq=False)
class Convolution(Factored):
    """A convolution in one to three dimensions: inputs (R, C, ...), output gradients (R, O, ...)."""

    inputs: Tensor
    outputs: Tensor
    weight: Tensor
    settings: Settings
    layout: Layout
    n: int

    def __post_init__(self) -> None:
        if self.settings.transposed:
            return
        groups, positions = self.settings.groups, self.outputs[0, 0].numel() * (len(self.outputs) // self.n)
        work = Work(groups, positions, self.weight[0].numel(), len(self.weight) // groups)
        object.__setattr__(self, "work", work)

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def held(self) -> int:
        return self.outputs.numel()

    @property
    def dense(self) -> int:
        if self.work is not None and self.inputs.is_cuda:
            groups, positions, inputs, outputs = self.work
            return self.numel + groups * positions * (inputs + outputs)
        return self.numel + (self.inputs.numel() + self.outputs.numel()) // self.n

    @property
    def ghost(self) -> int:
        if not self._by_pixels:
            return super().ghost
        assert self.work is not None
        pixels, positions = self._pixels, self.work.positions
        return pixels * (self.weight.shape[1] + pixels) + positions * (self.work.outputs + 2 * positions)

    def gradients(self, part: slice) -> Tensor:
        return convolutions.gradients(*self.images(part), self.weight.shape, self.settings)

    def weighted(self, weights: Tensor) -> Tensor:
        scaled = self.outputs * self.layout.spread(weights, self.outputs)
        return convolutions.gradient(self.inputs, scaled, self.weight.shape, self.settings)

    def factors(self, part: slice) -> Factors:
        a, g = self.images(part)
        patches = convolutions.patches(a.flatten(0, 1), self.weight.shape[2:], self.settings)
        return Factors(
            patches.unflatten(0, a.shape[:2]).transpose(1, 2).flatten(2, 3), convolutions.outputs(g, self.settings)
        )

    def products(self, part: slice) -> tuple[Tensor, Tensor]:
        if not self._by_pixels:
            return super().products(part)
        a, g = self.images(part)
        rows = convolutions.outputs(g, self.settings)
        return (
            convolutions.gram(a, self.weight.shape[2:], self.settings, g.shape[3:]).unsqueeze(1),
            rows @ rows.transpose(2, 3),
        )

    @property
    def _by_pixels(self) -> bool:
        """Whether products of pixels, added along the kernel, cost less than products of patches: not on a GPU."""
        if self.work is None or self.work.groups > 1 or self.inputs.is_cuda:
            return False
        channels, kernel = self.weight.shape[1], self.weight[0, 0].numel()
        return self._pixels**2 * channels + self.work.positions**2 * kernel < self.work.positions**2 * self.work.inputs

    @property
    def _pixels(self) -> int:
        """How many pixels the padded inputs of one example have."""
        sides = zip(self.inputs.shape[2:], self.settings.padding, strict=True)
        return math.prod(side + 2 * pad for side, pad in sides) * (len(self.inputs) // self.n)

    def images(self, part: slice) -> tuple[Tensor, Tensor]:
        """Inputs (n, k, C, ...) and output gradients (n, k, O, ...) of some examples, at least in float32."""
        a, g = (wide(self.layout.split(t, self.n)[part]) for t in (self.inputs, self.outputs))
        return a, g


@dataclass(frozen=True, eq=False)
class Lookup(Contribution):
    """An embedding: indices (N, T) into a table (V, D), output gradients (N, T, D)."""

    indices: Tensor
    outputs: Tensor
    size: int

    @property
    def numel(self) -> int:
        return self.size * self.outputs.shape[-1]

    @property
    def held(self) -> int:
        return self.outputs.numel()

    def gradients(self, part: slice) -> Tensor:
        g = wide(self.outputs[part])
        table = g.new_zeros(len(g), self.size, g.shape[-1])
        return table.scatter_add_(1, self.indices[part].unsqueeze(-1).expand_as(g), g)

    def weighted(self, weights: Tensor) -> Tensor:
        g = self.outputs * weights.to(self.outputs.dtype)[:, None, None]
        return g.new_zeros(self.size, g.shape[-1]).index_add_(0, self.indices.flatten(), g.flatten(0, 1))

    def squared_norms(self) -> Tensor:
        """Rows of the table that an example does not look up contribute nothing."""
        g = wide(self.outputs)
        same = self.indices.unsqueeze(2) == self.indices.unsqueeze(1)
        return ((g @ g.transpose(1, 2)) * same).sum((1, 2), dtype=torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_norms(group: list[Contribution], n: int, budget: int) -> tuple[Tensor, list[Contribution]]:
    """||g_i||^2 of the summed contributions to one parameter, and a form of them that is no larger.

    Args:
        group: all contributions to the parameter.
        n: the number of examples N.
        budget: bytes that temporaries may take (those of one example are always allowed).

    Returns:
        (N,) in float64, and contributions of the same weighted sum.
    """
    if len(group) == 1 and isinstance(group[0], Lookup):
        return group[0].squared_norms(), group
    factored = [one for one in group if isinstance(one, Factored)]
    if len(factored) == len(group) and _ghost_is_cheaper(factored):
        parts = _parts(n, budget, sum(one.ghost for one in factored))
        return _joined([_ghost(factored, part) for part in parts]).clamp_min(0), group
    keep = n * group[0].numel <= sum(one.held for one in group)
    squares, kept = [], []
    for part in _parts(n, budget, sum(one.dense for one in group)):
        gradients = group[0].gradients(part)
        for other in group[1:]:
            gradients = gradients + other.gradients(part)
        squares.append(gradients.reshape(len(gradients), -1).square().sum(1, dtype=torch.float64))
        if keep:
            kept.append(gradients)
    return _joined(squares), [Dense(_joined(kept))] if keep else group


def _ghost_is_cheaper(group: list[Factored]) -> bool:
    sizes = [one.work for one in group if one.work is not None]
    if len(sizes) < len(group):
        return False
    first = sizes[0]
    if any(work[2:] != first[2:] or work[0] != first[0] for work in sizes):
        return False
    positions = sum(work.positions for work in sizes)
    return positions * (first.inputs + first.outputs) <= first.inputs * first.outputs


def _ghost(group: list[Factored], part: slice) -> Tensor:
    if len(group) == 1 and group[0].work is not None and group[0].work.positions > 1:
        inputs, outputs = group[0].products(part)
        return inputs.mul_(outputs).sum((1, 2, 3), dtype=torch.float64)
    a, g = (t[0] if len(t) == 1 else torch.cat(t, 2) for t in zip(*(one.factors(part) for one in group), strict=True))
    if a.shape[2] == 1:
        return (a.square().sum((2, 3), dtype=torch.float64) * g.square().sum((2, 3), dtype=torch.float64)).sum(1)
    return ((a @ a.transpose(2, 3)).mul_(g @ g.transpose(2, 3))).sum((1, 2, 3), dtype=torch.float64)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(n: int, budget: int, elements: int) -> list[slice]:
    """Slices of N examples whose temporaries, of so many elements each, fit the budget."""
    size = max(1, budget // (4 * elements))
    return [slice(start, start + size) for start in range(0, n, size)]
