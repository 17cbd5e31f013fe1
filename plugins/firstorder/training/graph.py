"""Where the parameters enter the graph of the losses.

A walk over the autograd graph, operation by operation, instead of hooks on modules: it sees shared parameters,
functional calls, attention and several forwards in one loss, costs nothing during the inner attack, and leaves no
trace on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Knows = Callable[[Node, int], bool]
"""Whether the per-example gradient of a node's i-th input is known."""

ISOMETRIES = frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "ToCopy", "Alias"),
        *("Slice", "Select"),
    )
) | {f"SqueezeBackward{i}" for i in range(6)}
"""Operations whose backward keeps the norm of a gradient: an effective weight behind them serves for the parameter."""

SPLITS = frozenset({"SplitBackward0", "SplitWithSizesBackward0"})
"""Operations that cut a parameter into disjoint parts, as attention does with its packed projections."""

OPAQUE = {
    "CompiledFunctionBackward": "a torch.compile'd model hides its layers; build the losses with the module it was "
    "made from (model._orig_mod), which shares its parameters, and keep the compiled one for the inner attack",
    "SyncBatchNormBackward": "SyncBatchNorm mixes the examples of all processes; use BatchNorm, whose statistics every "
    "process takes for itself, or GroupNorm",
    "CheckpointFunctionBackward": "checkpointing hides its layers; train without checkpoints, or take the batch in "
    "parts and accumulate",
}


class Link(NamedTuple):
    """One step on the way from a use to its parameter: a node and which of its outputs is used."""

    node: Node
    output: int


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a parameter enters an operation.

    Attributes:
        parameter: index of the parameter.
        node: the operation's node.
        position: which of the operation's inputs it is.
        chain: the isometries between the operation and the parameter, nearest to the operation first.
    """

    parameter: int
    node: Node
    position: int
    chain: tuple[Link, ...]

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient by the parameter, from the one by what enters the operation."""
        for node, output in self.chain:
            gradient = _call(node)(*[None] * output, gradient, *[None] * (_outputs(node) - 1 - output))
        return gradient

    def signature(self) -> tuple[Hashable, ...]:
        """What the chain does, so that equal signatures can be added before it."""
        return tuple((node.name(), shape(node, output), *_settings(node)) for node, output in self.chain)

    def part(self) -> tuple[int, ...]:
        """Which of disjoint parts of the parameter this is."""
        return tuple(output for _, output in self.chain)


@dataclass(frozen=True)
class Graph:
    """What a walk found.

    Attributes:
        uses: every place where a parameter enters through an operation whose per-example gradient is known.
        unknown: by index of parameter, why there is none.
        lowest: edges below which no other use lies; a backward to them runs every node above.
        statistics: nodes that normalise by the statistics of the batch.
        structure: equal for two graphs of the same operations and shapes, wired in the same way.
    """

    uses: tuple[Use, ...]
    unknown: Mapping[int, str]
    lowest: tuple[GradientEdge, ...]
    statistics: tuple[Node, ...]
    structure: int = 0


def walk(losses: Tensor, parameters: Sequence[Tensor], knows: Knows, *, refused: Collection[int] = ()) -> Graph:
    """Find where `parameters` enter the graph of `losses`.

    Args:
        losses: per-example losses (N,) with a graph.
        parameters: the leaves to look for.
        knows: which inputs of which nodes are served.
        refused: indices of parameters to treat as unknown.

    Raises:
        ValueError: the graph contains an operation that hides its layers.
    """
    assert losses.grad_fn is not None
    index = {id(parameter): i for i, parameter in enumerate(parameters)}
    uses: list[Use] = []
    unknown: dict[int, str] = {}
    statistics: list[Node] = []
    order: list[Node] = []
    for node in _postorder(losses.grad_fn):
        name = node.name()
        if name in OPAQUE:
            raise ValueError(OPAQUE[name])
        order.append(node)
        # InstanceNorm is a batch norm too, of one row that holds all examples as channels.
        if getattr(node, "_saved_training", False) and "BatchNorm" in name and shape(node)[0] > 1:
            statistics.append(node)
        for position, (below, output) in enumerate(node.next_functions):
            found = _parameter(below, output, index)
            if found is None:
                continue
            parameter, chain = found
            if name in ISOMETRIES or name in SPLITS:
                continue
            if dtype(node).is_complex or parameters[parameter].is_complex():
                unknown.setdefault(parameter, f"{operation(node)} computes with complex numbers")
            elif parameter not in refused and knows(node, position):
                uses.append(Use(parameter, node, position, chain))
            else:
                unknown.setdefault(parameter, f"the per-example gradient of {operation(node)} is not known")
    for parameter, group in by_parameter(uses).items():
        if parameter not in unknown and not _combine(group):
            unknown[parameter] = "it enters through different views"
    served = tuple(use for use in uses if use.parameter not in unknown)
    lowest = tuple(_lowest(order, {use.node for use in served}))
    return Graph(served, unknown, lowest, tuple(statistics), _structure(order))


def shape(node: Node, output: int = 0) -> torch.Size:
    """The shape of one of a node's outputs."""
    known: Any = node
    return torch.Size(known._input_metadata[output].shape)


def dtype(node: Node) -> torch.dtype:
    """The type of a node's first output."""
    known: Any = node
    found: torch.dtype = known._input_metadata[0].dtype
    return found


def operation(node: Node) -> str:
    """The name of a node's operation."""
    return node.name().removesuffix("0").removesuffix("Backward")


def by_parameter(uses: Sequence[Use]) -> dict[int, list[Use]]:
    """The uses of every parameter, by its index."""
    groups: dict[int, list[Use]] = {}
    for use in uses:
        groups.setdefault(use.parameter, []).append(use)
    return groups


def _postorder(root: Node) -> Iterator[Node]:
    """Every node below `root` and itself, a node after all that lie below it."""
    seen = {root}
    stack: list[tuple[Node, Iterator[Node]]] = [(root, _below(root))]
    while stack:
        node, below = stack[-1]
        for child in below:
            if child not in seen:
                seen.add(child)
                stack.append((child, _below(child)))
                break
        else:
            stack.pop()
            yield node


def _below(node: Node) -> Iterator[Node]:
    return (child for child, _ in node.next_functions if child is not None)


def _parameter(node: Node | None, output: int, index: Mapping[int, int]) -> tuple[int, tuple[Link, ...]] | None:
    """The parameter that reaches an operation through isometries alone, and the way."""
    chain = []
    while node is not None and (node.name() in ISOMETRIES or node.name() in SPLITS) and len(node.next_functions) == 1:
        chain.append(Link(node, output))
        node, output = node.next_functions[0]
    variable = getattr(node, "variable", None)
    return None if variable is None or id(variable) not in index else (index[id(variable)], tuple(chain))


def _lowest(order: Sequence[Node], used: Collection[Node]) -> Iterator[GradientEdge]:
    reaches: set[Node] = set()
    for node in order:
        if any(child in reaches or child in used for child in _below(node)):
            reaches.add(node)
        elif node in used:
            yield GradientEdge(node, 0)


def _structure(order: Sequence[Node]) -> int:
    number: dict[Node | None, int] = {node: i for i, node in enumerate(order)}
    return hash(
        tuple(
            (node.name(), shape(node), *((number.get(below), output) for below, output in node.next_functions))
            for node in order
        )
    )


def _combine(group: Sequence[Use]) -> bool:
    """Whether the uses meet the parameter through the same views, or through disjoint parts of one split."""
    return len({use.signature() for use in group}) == 1


def _settings(node: Node) -> Iterator[Hashable]:
    for name in sorted(name for name in dir(node) if name.startswith("_saved")):
        value = getattr(node, name)
        yield name, tuple(value) if isinstance(value, (list, tuple)) else repr(value)


def _outputs(node: Node) -> int:
    saved: Any = node
    if node.name() == "SplitWithSizesBackward0":
        return len(saved._saved_split_sizes)
    if node.name() != "SplitBackward0":
        return 1
    whole: int = saved._saved_self_sym_sizes[saved._saved_dim]
    part: int = saved._saved_split_size
    return math.ceil(whole / part)


def _call(node: Node) -> Callable[..., Tensor]:
    """A node is callable with the gradients of its outputs; torch's stubs do not say so."""
    function: Any = node
    return function  # type: ignore[no-any-return]
