"""The operations whose per-example gradients are known, by the name of their autograd node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from firstorder.training.contributions import Contribution, Convolution, Dense, Lookup, Matrix, wide
from firstorder.training.convolutions import Settings
from firstorder.training.graph import Use, shape
from firstorder.training.layouts import Layout


class Site(NamedTuple):
    """One use of a parameter in a backward that has reached it."""

    node: Any
    """The operation's node, with its saved tensors."""
    gradient: Tensor
    """The gradient by the operation's output."""
    layout: Layout
    n: int
    shape: torch.Size
    """The shape of what enters the operation: the parameter or a view of it."""


class Rule(NamedTuple):
    """How one input of an operation contributes.

    Attributes:
        contribution: from the site of a use.
        broadcast: the input may be broadcast along the batch, which may lie in the first or the second dimension of
            the output.
        applies: whether the node's settings are served.
        fits: whether what enters an output of a shape is the same for all examples of a layout.
    """

    contribution: Callable[[Site], Contribution]
    broadcast: bool = False
    applies: Callable[[Any], bool] = lambda node: True
    fits: Callable[[Layout, int, torch.Size, torch.Size], bool] = lambda layout, n, output, enters: True

    @property
    def dims(self) -> int:
        """In how many of the first dimensions of the output the batch may lie."""
        return 2 if self.broadcast else 1

    def admits(self, layout: Layout, n: int, output: torch.Size, enters: torch.Size) -> bool:
        """Whether what enters, of shape `enters`, is the same for all N examples in this layout of the output."""
        alone = not self.broadcast or _aligned(enters, len(output))[layout.dim] == 1
        return alone and self.fits(layout, n, output, enters)


def knows(node: Node, position: int) -> bool:
    """Whether there is a rule for the `position`-th input of `node`."""
    rule = RULES.get((node.name(), position))
    return rule is not None and rule.applies(node)


def rule(use: Use) -> Rule:
    """The rule for a use that is known."""
    return RULES[use.node.name(), use.position]


def entering(use: Use) -> torch.Size:
    """The shape of what enters the operation of a use."""
    below, output = use.node.next_functions[use.position]
    assert below is not None
    variable = getattr(below, "variable", None)
    return shape(below, output) if variable is None else torch.Size(variable.shape)


def _reduced(site: Site, values: Tensor) -> Dense:
    """Sum values of the output's shape over what the parameter (or statistic) was broadcast along, per example."""
    along = [1 + dim for dim, size in enumerate(_aligned(site.shape, values.ndim)) if size == 1]
    return Dense(wide(site.layout.split(values, site.n)).sum(along).reshape(site.n, *site.shape))


def _aligned(shape: torch.Size, dims: int) -> tuple[int, ...]:
    return (1,) * (dims - len(shape)) + tuple(shape)


def _broadcast(factor: Callable[[Any], Tensor | None] = lambda node: None) -> Callable[[Site], Dense]:
    def contribution(site: Site) -> Dense:
        other = factor(site.node)
        return _reduced(site, site.gradient if other is None else wide(site.gradient) * other)

    return contribution


def _repeat(site: Site) -> Dense:
    parts = site.layout.split(site.gradient, site.n)
    size = _aligned(site.shape, site.gradient.ndim)[0]
    return Dense(wide(parts).unflatten(1, (-1, size)).sum(1).reshape(site.n, *site.shape))


def _repeats_per_example(layout: Layout, n: int, output: torch.Size, enters: torch.Size) -> bool:
    size = _aligned(enters, len(output))[0]
    return size == 1 or (not layout.inner and output[0] // n % size == 0)


def _matrix(inputs: str) -> Callable[[Site], Matrix]:
    return lambda site: Matrix(getattr(site.node, inputs), site.gradient, site.layout, site.n)


def _convolution(site: Site) -> Convolution:
    node = site.node
    settings = Settings(
        stride=list(node._saved_stride),
        padding=list(node._saved_padding),
        dilation=list(node._saved_dilation),
        transposed=node._saved_transposed,
        output_padding=list(node._saved_output_padding),
        groups=node._saved_groups,
    )
    return Convolution(node._saved_input, site.gradient, node._saved_weight, settings, site.layout, site.n)


def _channels(site: Site) -> Dense:
    """A vector of one value per channel, added."""
    parts = wide(site.layout.split(site.gradient, site.n))
    return Dense(parts.sum([1, *range(3, parts.ndim)]))


def _batch_norm(site: Site) -> Dense:
    node = site.node
    x = wide(node._saved_input)
    if node._saved_training:
        mean, scale = node._saved_result1, node._saved_result2
    else:
        eps = node._saved_epsilon if node.name().startswith("Cudnn") else node._saved_eps
        mean, scale = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    products = (x - mean.reshape(shape)).mul_(site.gradient)
    return Dense(_channels(site._replace(gradient=products)).values * scale)


def _group_norm(site: Site) -> Dense:
    node = site.node
    x = wide(node._saved_input)
    grouped = x.reshape(len(x), node._saved_group, -1)
    mean, scale = (t.reshape(len(x), -1, 1) for t in (node._saved_result1, node._saved_result2))
    normalised = ((grouped - mean) * scale).reshape(x.shape)
    return _channels(site._replace(gradient=normalised.mul_(site.gradient)))


def _layer_norm(site: Site) -> Dense:
    node = site.node
    normalised = (wide(node._saved_input) - node._saved_result1) * node._saved_result2
    return _reduced(site, normalised.mul_(site.gradient))


def _rms_norm(site: Site) -> Dense:
    x = wide(site.node._saved_input)
    scale = site.node._saved_result1.reshape(*x.shape[: -len(site.shape)], *[1] * len(site.shape))
    return _reduced(site, (x * scale).mul_(site.gradient))


def _embedding(site: Site) -> Lookup:
    node = site.node
    indices, g = node._saved_indices, site.gradient
    if node._saved_padding_idx >= 0:
        g = g * (indices != node._saved_padding_idx).unsqueeze(-1)
    indices, g = (site.layout.split(t, site.n) for t in (indices, g))
    return Lookup(indices.flatten(1), g.flatten(1, -2), site.shape[0])


def _plain_product(node: Any) -> bool:
    return bool(node._saved_alpha == 1 and node._saved_beta == 1)


def _unscaled(node: Any) -> bool:
    return bool(node._saved_alpha == 1)


RULES: Mapping[tuple[str, int], Rule] = {
    ("MmBackward0", 1): Rule(_matrix("_saved_self")),
    ("AddmmBackward0", 2): Rule(_matrix("_saved_mat1"), applies=_plain_product),
    ("AddmmBackward0", 0): Rule(_broadcast(), applies=_plain_product),
    ("ConvolutionBackward0", 1): Rule(_convolution),
    ("ConvolutionBackward0", 2): Rule(_channels),
    **{(f"{name}BatchNormBackward0", 1): Rule(_batch_norm) for name in ("Native", "Cudnn")},
    **{(f"{name}BatchNormBackward0", 2): Rule(_channels) for name in ("Native", "Cudnn")},
    ("NativeGroupNormBackward0", 1): Rule(_group_norm),
    ("NativeGroupNormBackward0", 2): Rule(_channels),
    ("NativeLayerNormBackward0", 1): Rule(_layer_norm, broadcast=True),
    ("NativeLayerNormBackward0", 2): Rule(_broadcast(), broadcast=True),
    ("FusedRmsNormBackward0", 1): Rule(_rms_norm, broadcast=True),
    ("EmbeddingBackward0", 0): Rule(
        _embedding, applies=lambda node: not (node._saved_scale_grad_by_freq or node._saved_sparse)
    ),
    ("AddBackward0", 0): Rule(_broadcast(), broadcast=True),
    ("AddBackward0", 1): Rule(_broadcast(), broadcast=True, applies=_unscaled),
    ("MulBackward0", 0): Rule(_broadcast(lambda node: node._saved_other), broadcast=True),
    ("MulBackward0", 1): Rule(_broadcast(lambda node: node._saved_self), broadcast=True),
    ("ExpandBackward0", 0): Rule(_broadcast(), broadcast=True),
    ("RepeatBackward0", 0): Rule(
        _repeat,
        applies=lambda node: all(count == 1 for count in node._saved_repeats[1:]),
        fits=_repeats_per_example,
    ),
}
"""By the node's name and the position of its input. What is not here goes the slow way."""
