"""BatchNorm in evaluation mode folded into the convolution before it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights


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


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    """Put `norm` into the weights of `layer`, if it can be."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if isinstance(layer, _ConvNd) and "weight" not in layer._parameters:
        return False  # computed from other parameters
    mean, variance, scale, shift = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if isinstance(layer, _ConvNd):
        transposed = isinstance(layer, _ConvTransposeNd)
        if transposed and layer.groups > 1:
            return False
        weight, bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, mean, variance, norm.eps, scale, shift, transpose=transposed
        )
    else:
        return False  # behind a linear layer the channels may be another dimension than its features
    layer.weight, layer.bias = weight.requires_grad_(False), bias.requires_grad_(False)
    return True
