"""Norms of all per-example gradients, and their weighted sums, from one backward.

The backward runs from the losses down to the lowest operation that uses a parameter, without any weight gradient.
Where it passes an operation that uses one, the per-example gradients are reduced to their norms and to what their
weighted sum will need. Parameters behind an operation that is not known get one backward per example.

Opacus (Yousefpour et al. 2021) has the same norms for differentially private training. Its hooks sit on modules and
take the first dimension for the batch, it replaces attention, refuses BatchNorm in training mode, and needs a second
backward, of the weighted losses, for the gradient.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from firstorder.attacks import validation
from firstorder.training.contributions import Contribution, squared_norms
from firstorder.training.graph import Graph, Use, operation, walk
from firstorder.training.layouts import Layout, fingerprint, recognise, trials
from firstorder.training.rules import Site, entering, knows, rule

Coupling = Literal["ignore", "exact"]
"""What the gradient of one example is where statistics of the batch tie the examples together, see `PerExample`."""

logger = logging.getLogger(__name__)

_Visit = Callable[[Use, Tensor], None]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The per-example gradients of a batch of N.

    Attributes:
        norms: ||grad_theta L_i||_2 over all parameters, (N,); None where they were not asked for.
        input_norms: ||grad_x L_i||_2 over all inputs, (N,); None where no inputs were given.
        parameters: the trainable parameters.
        weighted: maps weights (N,) to (1/N) sum_i w_i grad_theta L_i, one entry per parameter, None for a parameter
            that the losses do not depend on. To be called once.
    """

    norms: Tensor | None
    input_norms: Tensor | None
    parameters: Sequence[nn.Parameter]
    weighted: Callable[[Tensor], list[Tensor | None]]


class _Key(NamedTuple):
    """What the layout of a use is remembered by."""

    parameter: str
    node: str
    position: int
    shape: torch.Size
    n: int


class PerExample:
    """Differentiates per-example losses by the parameters of a module, for every example at once.

    The layout of the batch in each operation is recognised from how the gradients answer to scaled losses: two more
    backwards for the first batch of every shape. An operation that mixes the examples, or whose
    rows are not examples, is found in this way too, and its parameters go the slow way.

    Args:
        module: the module whose trainable parameters count.
        coupling: BatchNorm in training mode ties the examples together. "ignore" takes for the gradient of example i
            what its own activations contribute to the gradient of the summed losses; these add up to that gradient,
            and one backward has them all. "exact" differentiates every L_i by itself, through the
            statistics: one backward per example. Without such layers the two are equal.
        memory_budget: bytes that temporaries of one layer may take.
    """

    def __init__(self, module: nn.Module, *, coupling: Coupling = "ignore", memory_budget: int = 2**28) -> None:
        validation.choice("coupling", coupling, ("ignore", "exact"))
        validation.count("memory_budget", memory_budget)
        self.module = module
        self.coupling = coupling
        self.memory_budget = memory_budget
        self._layouts: dict[Hashable, Layout] = {}
        self._refused: dict[str, str] = {}
        self._told: set[str] = set()

    def __call__(
        self,
        losses: Tensor,
        inputs: Sequence[Tensor] = (),
        *,
        norms: bool = True,
        keep: bool = True,
        scale: float = 1.0,
    ) -> Gradients:
        """Differentiate `losses`.

        Args:
            losses: one loss per example, (N,), with a graph.
            inputs: leaves (N, ...) of the graph to take the gradient of as well.
            norms: whether the norms by the parameters are needed.
            keep: whether `Gradients.weighted` is needed; otherwise the graph is kept instead.
            scale: a factor on the losses against underflow; norms are without it, weighted gradients with it.

        Raises:
            ValueError: losses that are not per-example or have no graph; inputs outside it; no trainable parameter;
                a model whose layers are hidden (compiled, reentrant checkpoints).
        """
        n = check(losses, inputs)
        names, parameters = self._trainable()
        graph = self._walk(losses, names, parameters)
        seeds = torch.full_like(losses, scale) / n
        slow = [i for i in range(len(parameters)) if i in graph.unknown]
        squares = losses.new_zeros(n, dtype=torch.float64)
        if norms and slow:
            squares += _one_by_one(losses, [parameters[i] for i in slow], seeds)
        groups: dict[Hashable, list[tuple[Use, Contribution]]] = {}
        expected = Counter((use.parameter, use.part()) for use in graph.uses)

        def reduce(key: Hashable) -> None:
            use, contributions = groups[key][0][0], [one for _, one in groups[key]]
            if norms:
                more, contributions = squared_norms(contributions, n, self.memory_budget)
                squares.add_(more)
            groups[key] = [(use, one) for one in contributions] if keep else []

        def visit(use: Use, gradient: Tensor) -> None:
            key = (use.parameter, use.part())
            groups.setdefault(key, []).append((use, self._contribution(use, gradient, names, n)))
            expected[key] -= 1
            if not expected[key]:
                reduce(key)

        by_inputs = _backward(losses, seeds, graph, visit, inputs, retain=bool(slow) or not keep)
        for key, missing in expected.items():
            if missing and key in groups:
                reduce(key)

        def weighted(weights: Tensor) -> list[Tensor | None]:
            found: list[Tensor | None] = [None] * len(parameters)
            if slow:
                given = [parameters[i] for i in slow]
                gradients = torch.autograd.grad(losses, given, seeds * weights, allow_unused=True)
                for i, g in zip(slow, gradients, strict=True):
                    found[i] = g
            for key in list(groups):
                for use, contribution in groups.pop(key):
                    g = use.back(contribution.weighted(weights)).to(parameters[use.parameter].dtype)
                    before = found[use.parameter]
                    found[use.parameter] = g if before is None else before + g
            return found

        return Gradients(
            norms=(squares.sqrt() * (n / scale)).to(losses.dtype) if norms else None,
            input_norms=_input_norms(by_inputs, n / scale, losses) if inputs else None,
            parameters=parameters,
            weighted=weighted,
        )

    def _trainable(self) -> tuple[list[str], list[nn.Parameter]]:
        pairs = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        if not pairs:
            raise ValueError("the model has no trainable parameter; set requires_grad on those to be trained")
        return [name for name, _ in pairs], [p for _, p in pairs]

    def _walk(self, losses: Tensor, names: list[str], parameters: list[nn.Parameter]) -> Graph:
        """The graph with every layout known and every unknown parameter told."""
        if self.coupling == "exact":
            return Graph((), dict.fromkeys(range(len(parameters)), ""), (), ())
        while True:
            refused = {i for i, name in enumerate(names) if name in self._refused}
            graph = walk(losses, parameters, knows, refused=refused)
            before = len(self._refused)
            self._recognise(losses, graph, names)
            if len(self._refused) == before:
                break
        for i, reason in graph.unknown.items():
            if names[i] not in self._told:
                self._told.add(names[i])
                logger.warning(
                    "parameter %s takes one backward per example: %s", names[i], self._refused.get(names[i], reason)
                )
        return graph

    def _recognise(self, losses: Tensor, graph: Graph, names: list[str]) -> None:
        n = len(losses)
        seen: dict[int, list[tuple[Tensor, torch.Size, torch.dtype]]] = {}

        def visit(use: Use, gradient: Tensor) -> None:
            key = _key(use, gradient, names, n)
            if key not in self._layouts:
                mark = fingerprint(gradient, rule(use).dims)
                seen.setdefault(id(use), []).append((mark, gradient.shape, gradient.dtype))

        if all(self._known(use, names, n) for use in graph.uses):
            return
        weights = trials(n, losses.device)
        with ExitStack() as stack:
            for node in graph.statistics:
                stack.enter_context(_uncoupled(node))
            for seeds in (torch.ones_like(losses), weights.to(losses.dtype)):
                _backward(losses, seeds, graph, visit, (), retain=True)
        for use in graph.uses:
            if id(use) not in seen:
                continue
            (plain, shape, dtype), (scaled, _, _) = seen[id(use)]
            tolerance = 1e-3 if dtype.itemsize >= 4 else 3e-2
            layout = recognise(plain, scaled, weights, shape, rule(use).dims, tolerance)
            enters = entering(use)
            if layout is None or not rule(use).admits(layout, len(shape), enters):
                self._refused[names[use.parameter]] = f"{operation(use.node)} mixes examples or has other rows"
            elif bool(scaled.any()) or n == shape[layout.dim]:
                self._layouts[_Key(names[use.parameter], use.node.name(), use.position, shape, n)] = layout

    def _known(self, use: Use, names: list[str], n: int) -> bool:
        saved: Any = use.node
        shape = torch.Size(saved._input_metadata[0].shape)
        return _Key(names[use.parameter], saved.name(), use.position, shape, n) in self._layouts

    def _contribution(self, use: Use, gradient: Tensor, names: list[str], n: int) -> Contribution:
        layout = self._layouts.get(_key(use, gradient, names, n), Layout())
        return rule(use).contribution(Site(use.node, gradient, layout, n, entering(use)))


def _key(use: Use, gradient: Tensor, names: list[str], n: int) -> _Key:
    return _Key(names[use.parameter], use.node.name(), use.position, gradient.shape, n)


def check(losses: Tensor, inputs: Sequence[Tensor]) -> int:
    """Require per-example losses (N,) and inputs (N, ...) that can be differentiated by; N."""
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"the losses have shape {tuple(losses.shape)}; pass one per example, (N,): reduction='none'")
    for x in inputs:
        if not (x.requires_grad and x.is_leaf):
            raise ValueError(
                "the inputs' gradient is needed, but they are not leaves that require it; call inputs.requires_grad_() "
                "before the forward"
            )
        if len(x) != len(losses):
            raise ValueError(f"there are {len(losses)} losses but {len(x)} inputs")
    return len(losses)


def _one_by_one(losses: Tensor, parameters: list[nn.Parameter], seeds: Tensor) -> Tensor:
    """The squared norms (N,) of the gradients of every single loss."""
    squares = losses.new_zeros(len(losses), dtype=torch.float64)
    for i in range(len(losses)):
        seed = torch.zeros_like(seeds)
        seed[i] = seeds[i]
        for g in torch.autograd.grad(losses, parameters, seed, retain_graph=True, allow_unused=True):
            if g is not None:
                squares[i] += g.square().sum(dtype=torch.float64)
    return squares


def _backward(
    losses: Tensor, seeds: Tensor, graph: Graph, visit: _Visit, inputs: Sequence[Tensor], *, retain: bool
) -> tuple[Tensor, ...]:
    """Run the backward to the lowest uses and the inputs; `visit` sees every use with its output's gradient."""
    at: dict[Node, list[Use]] = {}
    for use in graph.uses:
        at.setdefault(use.node, []).append(use)
    ends: list[Any] = [*graph.lowest, *inputs]
    if not ends:
        return ()

    def arrive(node: Node, gradient: Tensor | None) -> None:
        # A lowest node runs, and gives its saved tensors away, only where the inputs lie below it.
        for use in at.pop(node, ()):
            if gradient is not None:
                visit(use, gradient)

    with ExitStack() as stack:
        for node in at:
            handle = node.register_prehook(lambda gradients, node=node: arrive(node, gradients[0]))
            stack.callback(handle.remove)
        found = torch.autograd.grad(losses, ends, seeds, retain_graph=retain, allow_unused=True)
    for edge, gradient in zip(graph.lowest, found, strict=False):
        arrive(edge.node, gradient)
    by_inputs = found[len(graph.lowest) :]
    if any(g is None for g in by_inputs):
        raise ValueError("the losses do not depend on the inputs; pass those that the forward was called with")
    return by_inputs


def _input_norms(gradients: tuple[Tensor, ...], factor: float, like: Tensor) -> Tensor:
    total = sum(g.flatten(1).square().sum(1, dtype=torch.float64) for g in gradients)
    assert isinstance(total, Tensor)
    return (total.sqrt() * factor).to(like.dtype)


@contextmanager
def _uncoupled(node: Any) -> Iterator[None]:
    """BatchNorm's backward as if its statistics were constants."""

    def replace(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        scale = node._saved_result2 if node._saved_weight is None else node._saved_result2 * node._saved_weight
        gradient = outputs[0] * scale.reshape(-1, *[1] * (outputs[0].ndim - 2))
        return (None if inputs[0] is None else gradient.to(inputs[0].dtype), *inputs[1:])

    handle = node.register_hook(replace)
    try:
        yield
    finally:
        handle.remove()
