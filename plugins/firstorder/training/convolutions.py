"""The gradient of every example by a convolution's weight, and what its norm alone needs, in several ways.

Inputs a (n, k, C, ...) and output gradients g (n, k, O, ...) of n examples with k images each; the gradients are
(n, O, C / G, *kernel). Convolutions have one to three dimensions and G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """The arguments of a convolution, as its backward takes them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def gradients(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """In the way that is fastest on the device: measured in tests/cuda/engm.py."""
    if not a.is_cuda:
        return looped(a, g, weight, settings)
    return (mapped if settings.transposed else multiplied)(a, g, weight, settings)


def gradient(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """The gradient of all images together: a (R, C, ...), g (R, O, ...)."""
    like = a.new_empty(weight)
    found: Tensor = torch.ops.aten.convolution_backward(g, a, like, None, *settings, [False, True, False])[1]
    return found


def looped(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """One backward per example."""
    return torch.stack([gradient(*rows, weight, settings) for rows in zip(a, g, strict=True)])


def mapped(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """All examples as groups of one backward, by vmap."""

    def one(a: Tensor, g: Tensor) -> Tensor:
        return gradient(a, g, weight, settings)

    found: Tensor = torch.func.vmap(one)(a, g)
    return found


def multiplied(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """A product of patches and output gradients per example; not for transposed convolutions."""
    n, k = a.shape[:2]
    rows = patches(a.flatten(0, 1), weight[2:], settings).unflatten(0, (n, k)).transpose(1, 2).flatten(2, 3)
    found: Tensor = outputs(g, settings).transpose(2, 3) @ rows
    return found.reshape(n, *weight)


def gram(a: Tensor, kernel: Sequence[int], settings: Settings, sizes: Sequence[int]) -> Tensor:
    """The products p_t . p_s of all patches of an example, (n, T, T) for its T = k positions of the output, of `sizes`.

    Products of single pixels, added along the kernel: the patches are never made. For one group.
    """
    n, k = a.shape[:2]
    a = torch.nn.functional.pad(a, [p for pad in reversed(settings.padding) for p in (pad, pad)])
    places = a.shape[3:]
    pixels = a.movedim(2, -1).flatten(1, -2)
    products = (pixels @ pixels.transpose(1, 2)).reshape(n, k, *places, k, *places)
    total = None
    for part in _windows(kernel, settings, sizes):
        one = products[(slice(None), slice(None), *part, slice(None), *part)]
        total = one.clone() if total is None else total.add_(one)
    assert total is not None
    return total.reshape(n, k * torch.Size(sizes).numel(), -1)


def _windows(kernel: Sequence[int], settings: Settings, sizes: Sequence[int]) -> Iterator[list[slice]]:
    """For every position of the kernel, where it lies for all outputs."""
    for position in itertools.product(*map(range, kernel)):
        starts = [at * dilation for at, dilation in zip(position, settings.dilation, strict=True)]
        yield [
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, stride, size in zip(starts, settings.stride, sizes, strict=True)
        ]


def outputs(g: Tensor, settings: Settings) -> Tensor:
    """Output gradients (n, k, O, ...) as rows (n, G, T, O / G)."""
    groups: Tensor = g.flatten(3).unflatten(2, (settings.groups, -1))
    return groups.permute(0, 2, 1, 4, 3).flatten(2, 3)


def patches(a: Tensor, kernel: Sequence[int], settings: Settings) -> Tensor:
    """The inputs that every output position sees: (R, G, positions, C / G * kernel) for a (R, C, ...)."""
    a = torch.nn.functional.pad(a, [p for pad in reversed(settings.padding) for p in (pad, pad)])
    for dim, (size, stride, dilation) in enumerate(zip(kernel, settings.stride, settings.dilation, strict=True), 2):
        a = a.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    dims = len(kernel)
    groups: Tensor = a.unflatten(1, (settings.groups, -1))
    groups = groups.permute(0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return groups.flatten(2 + dims).flatten(2, 1 + dims)
