"""The residual blocks of a module, found in its graph: what gradients of surrogates are changed along."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from firstorder.attacks.ensemble import resized

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
"""Functions, and methods by name."""

RECTIFIERS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)

PLAIN = (
    *(_ConvNd, nn.Linear, *NORMS, nn.Identity, nn.Flatten, nn.Upsample, nn.ZeroPad2d),
    *(nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d),
)
PLAIN_CALLS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(F.pad, F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, F.dropout, F.batch_norm, operator.getitem),
    *(torch.flatten, "view", "reshape", "flatten", "permute", "transpose", "contiguous"),
)
"""What a skip connection may consist of; nothing else is passed on the way back to where it begins."""

CONTAINERS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch's own that have residual additions inside."""

IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, "add_": "add", "relu_": "relu", F.relu_: F.relu}
IN_PLACE[torch.relu_] = torch.relu


@dataclass(frozen=True)
class Block:
    """z + f(z), or s(z) + f(z) with a projection s.

    Attributes:
        start: z.
        branch: f(z), one of the two terms of `addition`.
        addition: the sum.
        inside: the nodes of f in their order, the last of them is `branch`.
    """

    start: fx.Node
    branch: fx.Node
    addition: fx.Node
    inside: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """Of the module that adds, as in `named_modules`."""
        return module_of(self.addition)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(resized,))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, CONTAINERS)


def traced(model: nn.Module) -> fx.GraphModule:
    """A copy of a module as a graph, in evaluation mode, its weights frozen, without operations in place.

    Raises:
        ValueError: another kind of model, or one that torch.fx cannot copy or trace.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {kind}; only a torch module has a surrogate")
    try:
        private = copy.deepcopy(model).eval().requires_grad_(False)
    except RuntimeError as error:
        raise ValueError(
            f"{kind} cannot be copied: {error}; weight_norm of torch.nn.utils.parametrizations can"
        ) from None
    tracer = _Tracer()
    for name, part in private.named_modules():
        if (not name or not tracer.is_leaf_module(part, name)) and _hooked(part):
            raise ValueError(f"{name or kind} has hooks, which a graph does not keep; remove them before")
    try:
        graph = fx.GraphModule(private, tracer.trace(private), kind)
    except Exception as error:  # tracing runs the module's own code on stand-ins, which may fail in any way
        raise ValueError(
            f"the forward of {kind} cannot be followed by torch.fx ({' '.join(str(error).split())[:200]}); change the "
            "part with the residual blocks alone, as in model.body = sgm(model.body), or each model of an ensemble"
        ) from error
    _settle(graph)
    return graph


def blocks(graph: fx.GraphModule) -> list[Block]:
    """The residual blocks of a traced module, in their order.

    A block is a sum of which one term, the skip connection, leads back through linear layers, normalisation, pooling
    and the like alone to where the other one, with a convolution or linear layer, begins.

    Raises:
        ValueError: a sum of which either term could be the skip connection, or a block within another.
    """
    above = _ancestors(graph)
    modules = dict(graph.named_modules())
    found = []
    for node in graph.graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS or len(node.args) != 2:
            continue
        one, two = node.args
        if not (isinstance(one, fx.Node) and isinstance(two, fx.Node)):
            continue
        sides = (_block(node, skip, branch, above, modules) for skip, branch in ((one, two), (two, one)))
        ways = [side for side in sides if side is not None]
        if len(ways) == 2:
            raise ValueError(
                f"the sum {node.name} in {module_of(node) or type(graph).__name__} has two branches of the same kind: "
                "which of them is the skip connection is not known"
            )
        found += ways
    counts = Counter(node for block in found for node in block.inside)
    for block in found:
        if any(counts[node] > 1 for node in block.inside):
            raise ValueError(f"the residual block {block.name!r} and another one overlap, which is not known")
    return found


def used(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the output depends on, and the output."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return _ancestors(graph)[output] | {output}


def is_rectifier(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node is a ReLU."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RECTIFIERS


def module_of(node: fx.Node) -> str:
    """The module whose forward a node belongs to, as in `named_modules`; empty for the whole."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def within(node: fx.Node, name: str) -> bool:
    """Whether a node belongs to the module called `name`, or to a part of it."""
    names = [str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        names.append(str(node.target))
    return any(part == name or part.startswith(f"{name}.") for part in names)


def call(graph: fx.GraphModule, function: Any, *args: Any) -> fx.Node:
    """A node that calls `function`, which later traces do not look into."""
    node = graph.graph.call_function(function, args)
    node.meta["is_wrapped"] = True
    return node


def _block(
    addition: fx.Node,
    skip: fx.Node,
    branch: fx.Node,
    above: dict[fx.Node, set[fx.Node]],
    modules: dict[str, nn.Module],
) -> Block | None:
    """The block in which the terms of a sum play these parts."""
    chain = list(_back(skip, modules))
    if branch in chain:
        return None
    start = next((node for node in chain if node in above[branch]), None)
    if start is None:
        return None
    inside = tuple(
        node for node in addition.graph.nodes if start in above[node] and (node is branch or node in above[branch])
    )
    return Block(start, branch, addition, inside) if any(_weighted(node, modules) for node in inside) else None


def _back(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """A node and those that it leads back to through what a skip connection may consist of."""
    yield node
    while _is(node, PLAIN, PLAIN_CALLS, modules) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node


def _weighted(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node has weights and does not only normalise: without such a one a path is no branch."""
    if node.op == "call_module":
        part = modules[str(node.target)]
        return not isinstance(part, NORMS) and next(part.parameters(), None) is not None
    return any(before.op == "get_attr" for before in node.all_input_nodes)


def _is(node: fx.Node, kinds: tuple[type, ...], calls: tuple[Any, ...], modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], kinds)
    return node.op in ("call_function", "call_method") and node.target in calls


def _ancestors(graph: fx.GraphModule) -> dict[fx.Node, set[fx.Node]]:
    """For each node those that depend on the input and that it depends on."""
    found: dict[fx.Node, set[fx.Node]] = {}
    images: set[fx.Node] = set()
    for node in graph.graph.nodes:
        known = [before for before in node.all_input_nodes if before in images]
        if node.op == "placeholder" or known:
            images.add(node)
        found[node] = set(known).union(*(found[before] for before in known))
    return found


def _settle(graph: fx.GraphModule) -> None:
    """Let sums and activations make new tensors: whoever reads a changed one later reads the new one."""
    modules = dict(graph.named_modules())
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        part = modules[str(node.target)] if node.op == "call_module" else None
        if part is not None and getattr(part, "inplace", False) is True:
            pass
        elif node.op in ("call_function", "call_method") and node.target in IN_PLACE:
            node.target = IN_PLACE[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        else:
            continue
        changed = node.args[0] if node.args else None
        if isinstance(changed, fx.Node):
            for user in [user for user in changed.users if order[user] > order[node]]:
                user.replace_input_with(changed, node)
    for part in modules.values():
        if getattr(part, "inplace", False) is True:
            part.inplace = False
    graph.recompile()


def _hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
