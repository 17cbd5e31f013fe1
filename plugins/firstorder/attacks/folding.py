"""BatchNorm in evaluation mode folded into the convolution before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from firstorder.attacks.ensemble import ensembles

CONVOLUTIONS: dict[Any, type[_ConvNd]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""Functional convolutions, as which torch.fx sees subclasses that pad by themselves; and what they take."""


def fold(module: nn.Module) -> tuple[nn.Module, int]:
    """Fold what the graph allows, in place; the module to use from now on, and how many layers are gone.

    A module that torch.fx cannot trace is left as it is, and its children are tried. What depends on the input's
    values or size beyond the trace is not seen here: compare the result with the original.

    Args:
        module: in evaluation mode, its weights not shared with anything.
    """
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return module, 0
    try:
        if next(ensembles(module), None) is not None:
            raise TypeError("an ensemble must stay one, as its members may be asked for")
        graph = fx.symbolic_trace(module)
    except Exception:  # tracing runs the module's own code on stand-ins, which may fail in any way
        total = 0
        for name, child in list(module.named_children()):
            folded, count = fold(child)
            setattr(module, name, folded)
            total += count
        return module, total
    count = _fold(graph)
    return (graph, count) if count else (module, 0)


def _fold(graph: fx.GraphModule) -> int:
    _name_convolutions(graph)
    modules = dict(graph.named_modules())
    calls = Counter(modules[str(node.target)] for node in graph.graph.nodes if node.op == "call_module")
    count = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        layer, norm = modules[str(before.target)], modules[str(node.target)]
        if calls[layer] == calls[norm] == 1 and _folds(layer, norm):
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
            count += 1
    if count:
        graph.graph.lint()
        graph.delete_all_unused_submodules()
        graph.recompile()
    return count


def _name_convolutions(graph: fx.GraphModule) -> None:
    """Make a layer of every functional convolution with parameters, and of what pads by zeros before it."""
    parameters, modules = dict(graph.named_parameters()), dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in CONVOLUTIONS:
            continue
        given: dict[str, Any] = {**dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
        first, weight, bias = (given.pop(name, None) for name in ARGUMENTS[:3])
        known = [part is None or (part.op == "get_attr" and part.target in parameters) for part in (weight, bias)]
        if not all(known) or any(isinstance(value, fx.Node) for value in given.values()):
            continue  # a kernel that is computed, or sizes that depend on the input
        points, kernel, padding = first, parameters[weight.target], given.get("padding", 0)
        before = modules.get(str(first.target)) if first.op == "call_module" else None
        if type(before) is nn.ZeroPad2d and not isinstance(padding, str):
            left, right, top, bottom = before.padding
            if left == right and top == bottom:
                own = (padding, padding) if isinstance(padding, int) else padding
                given["padding"] = (own[0] + top, own[1] + left)
                points = first.args[0]
        layer = CONVOLUTIONS[node.target](
            kernel.shape[1] * given.get("groups", 1), kernel.shape[0], kernel.shape[2:], bias=bias is not None, **given
        )
        layer.weight = kernel
        layer.bias = None if bias is None else parameters[bias.target]
        name = f"{node.name}_layer"
        graph.add_submodule(name, layer)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_module(name, (points,)))
        for spare in (node, first, weight, bias):
            if isinstance(spare, fx.Node) and not spare.users:
                graph.graph.erase_node(spare)


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    """Put `norm` into the weights of `layer`, if it can be."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if not isinstance(layer, _ConvNd):
        return False  # behind a linear layer the channels may be another dimension than its features
    transposed = isinstance(layer, _ConvTransposeNd)
    if "weight" not in layer._parameters or (transposed and layer.groups > 1):
        return False  # a weight computed from other parameters; groups of which fuse_conv_bn_weights knows nothing
    mean, variance, scale, shift = norm.running_mean, norm.running_var, norm.weight, norm.bias
    layer.weight, layer.bias = (
        part.requires_grad_(False)
        for part in fuse_conv_bn_weights(
            layer.weight, layer.bias, mean, variance, norm.eps, scale, shift, transpose=transposed
        )
    )
    return True
