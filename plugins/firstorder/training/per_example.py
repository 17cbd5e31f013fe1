"""Norms of all per-example gradients, and their weighted sums, from one backward.

The backward runs from the losses down to the lowest operation that uses a parameter, without any weight gradient.
Where it passes an operation that uses one, the per-example gradients are reduced to their norms and to what their
weighted sum will need. Parameters behind an operation that is not known get one backward per example.

Opacus (Yousefpour et al. 2021) has the same norms for differentially private training. Its hooks sit on modules and
take the first dimension for the batch, it refuses BatchNorm in training mode, and it needs a second backward, of the
weighted losses, for the gradient.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstorder.attacks import validation
from firstorder.training.backward import backward, check, one_by_one, uncoupled, unhooked
from firstorder.training.contributions import Contribution, squared_norms
from firstorder.training.graph import Graph, Use, by_parameter, dtype, operation, shape, walk
from firstorder.training.layouts import Fingerprints, Layout, Trial, precision, recognise, trials
from firstorder.training.rules import Site, entering, knows, rule

Coupling = Literal["ignore", "exact"]
"""What the gradient of one example is where statistics of the batch tie the examples together, see `PerExample`."""

logger = logging.getLogger(__name__)


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


IGNORED = (
    "%s: the statistics of the batch tie its examples together; coupling='ignore' takes for the norm of one example's "
    "gradient that of what its own activations contribute, coupling='exact' that of its loss alone"
)

REMEMBERED = 2**16
"""How many layouts are remembered at most."""


class _Key(NamedTuple):
    """What the layout of a use is remembered by: `turn` counts the uses of one parameter."""

    structure: int
    parameter: str
    turn: int
    node: str
    position: int
    shape: torch.Size
    n: int


class PerExample:
    """Differentiates per-example losses by the parameters of a module, for every example at once.

    The layout of the batch in each operation is recognised from how the gradients answer to weighted losses: two more
    backwards up to N = 16, four up to 256, for the first batch of every graph (its operations and shapes), and again
    for its 2nd, 16th, 128th, ... batch. An operation that mixes the examples, or whose rows are not examples, is found
    in this way too, and its parameters go the slow way from then on; so do those that meet complex numbers.

    Norms and gradients are those of one backward per example, before any hooks of the parameters: an example's
    gradient in which another's share is more than 1e-9 (float64), 1e-5 (float32) or 1e-2 (half precision, where there
    is any in the graph) of its norm is not taken for its own. Mixing that begins later in a graph that stays the same,
    as by a factor that was 0, is found at the next of the batches above.

    Args:
        module: the module whose trainable parameters count.
        coupling: BatchNorm in training mode ties the examples together, the one exception to the above. "ignore" takes
            for the norm of example i that of what its own activations contribute to the gradient of the summed losses;
            one backward has them all; it is said once, in a warning of the log. Parameters that go the slow way have
            the norm of L_i alone even then. "exact" differentiates every L_i by itself, through the statistics: one
            backward per example (batches of them, through vmap, measured slower on the CPU). Weighted gradients are
            those of the weighted losses, through the statistics, in both: one more backward. Contributions, weighted
            each by itself, would leave what cancels between them, such as the part along a weight before BatchNorm,
            which only makes that weight grow. Without such layers the two are equal.
        memory_budget: bytes that temporaries of one layer may take.
    """

    def __init__(self, module: nn.Module, *, coupling: Coupling = "ignore", memory_budget: int = 2**28) -> None:
        validation.choice("coupling", coupling, ("ignore", "exact"))
        validation.count("memory_budget", memory_budget)
        self.module = module
        self.coupling = coupling
        self.memory_budget = memory_budget
        self._layouts: dict[_Key, Layout] = {}
        self._batches: Counter[tuple[int, int]] = Counter()
        self._refused: dict[str, str] = {}
        self._warned: set[str] = set()
        self._said = False

    @torch.no_grad()
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
            ValueError: losses that are not per-example, complex or without a graph; inputs outside it; no trainable
                parameter;
                a model whose layers are hidden (compiled, checkpointed).
        """
        n = check(losses, inputs)
        names, parameters = self._trainable()
        seeds = torch.full_like(losses, scale) / n
        graph, layouts = self._walk(losses, seeds, names, parameters)
        slow = [i for i in range(len(parameters)) if i in graph.unknown]
        again = list(range(len(parameters))) if graph.statistics else slow
        squares = [losses.new_zeros(n, dtype=torch.float64)]
        if norms and slow:
            squares.append(one_by_one(losses, [parameters[i] for i in slow], seeds))
        groups: dict[Hashable, list[tuple[Use, Contribution]]] = {}
        expected = Counter((use.parameter, use.part()) for use in graph.uses)

        def reduce(key: Hashable) -> None:
            use, contributions = groups[key][0][0], [one for _, one in groups[key]]
            if norms:
                more, contributions = squared_norms(contributions, n, self.memory_budget)
                squares.append(more)
            groups[key] = [(use, one) for one in contributions] if keep and not graph.statistics else []

        def visit(use: Use, gradient: Tensor) -> None:
            key = (use.parameter, use.part())
            site = Site(use.node, gradient, layouts.get(id(use), Layout()), n, entering(use))
            groups.setdefault(key, []).append((use, rule(use).contribution(site)))
            expected[key] -= 1
            if not expected[key]:
                reduce(key)

        by_inputs = backward(losses, seeds, graph, visit, inputs, retain=bool(again) or not keep)
        for key, missing in expected.items():
            if missing and key in groups:
                reduce(key)

        @torch.no_grad()
        def weighted(weights: Tensor) -> list[Tensor | None]:
            found: list[Tensor | None] = [None] * len(parameters)
            if again:
                given = [parameters[i] for i in again]
                with unhooked(given):
                    gradients = torch.autograd.grad(losses, given, seeds * weights, allow_unused=True)
                for i, g in zip(again, gradients, strict=True):
                    found[i] = g
            for key in list(groups):
                for use, contribution in groups.pop(key):
                    g = use.back(contribution.weighted(weights)).to(parameters[use.parameter].dtype)
                    before = found[use.parameter]
                    found[use.parameter] = g if before is None else before + g
            return found

        return Gradients(
            norms=(torch.stack(squares).sum(0).sqrt() * (n / scale)).to(losses.dtype) if norms else None,
            input_norms=_input_norms(by_inputs, n / scale, losses) if inputs else None,
            parameters=parameters,
            weighted=weighted,
        )

    def _trainable(self) -> tuple[list[str], list[nn.Parameter]]:
        pairs = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        if not pairs:
            raise ValueError("the model has no trainable parameter; set requires_grad on those to be trained")
        return [name for name, _ in pairs], [p for _, p in pairs]

    def _walk(
        self, losses: Tensor, seeds: Tensor, names: list[str], parameters: list[nn.Parameter]
    ) -> tuple[Graph, dict[int, Layout]]:
        """The graph, the layout of every use by its id, and a warning for every parameter that has none."""
        if self.coupling == "exact":
            return Graph((), dict.fromkeys(range(len(parameters)), ""), (), ()), {}
        due = None
        while True:
            refused = {i for i, name in enumerate(names) if name in self._refused}
            graph = walk(losses, parameters, knows, refused=refused)
            if due is None:
                due = self._due((graph.structure, len(losses)))
            before = len(self._refused)
            layouts = self._recognise(losses, seeds, graph, names, due)
            if len(self._refused) == before:
                break
        if graph.statistics and not self._said:
            self._said = True
            logger.warning(IGNORED, _listed(_batch_norms(self.module)) or "a functional batch_norm")
        for i, reason in graph.unknown.items():
            if names[i] not in self._warned:
                self._warned.add(names[i])
                logger.warning(
                    "parameter %s takes one backward per example: %s", names[i], self._refused.get(names[i], reason)
                )
        return graph, layouts

    def _due(self, kind: tuple[int, int]) -> bool:
        """Count a batch; whether its layouts are recognised anew though they are remembered."""
        if len(self._layouts) > REMEMBERED:
            self._layouts.clear()
            self._batches.clear()
        self._batches[kind] += 1
        count = self._batches[kind]
        while count > 2 and count % 8 == 0:
            count //= 8
        return count == 2

    def _recognise(self, losses: Tensor, seeds: Tensor, graph: Graph, names: list[str], due: bool) -> dict[int, Layout]:
        """The layout of every use, by its id; parameters without one are refused from now on.

        A layout is remembered once it is the only one that fits and two examples have a gradient there. Where several
        fit, the gradient is zero in all rows that tell them apart, and either is right for this batch.
        """
        n = len(losses)
        keys = _keys(graph, names, n)
        layouts = {} if due else {use: self._layouts[key] for use, key in keys.items() if key in self._layouts}
        if len(layouts) == len(keys):
            return layouts
        exact = precision({losses.dtype, *(dtype(use.node) for use in graph.uses)})
        weights = trials(n, exact.exponents, losses.device)
        fingerprint, seen = Fingerprints(), dict[int, list[Tensor]]()

        def visit(use: Use, gradient: Tensor) -> None:
            if id(use) not in layouts:
                seen.setdefault(id(use), []).append(fingerprint(gradient, rule(use).dims))

        with ExitStack() as stack:
            for node in graph.statistics:
                stack.enter_context(uncoupled(node))
            for one in (one for pair in weights for one in pair):
                backward(losses, seeds * one.to(seeds.dtype), graph, visit, (), retain=True)
        for use in graph.uses:
            if id(use) not in seen:
                continue
            key, marks = keys[id(use)], iter(seen[id(use)])
            found = recognise(
                weights, [Trial(*pair) for pair in zip(marks, marks, strict=True)], key.shape, rule(use).dims, exact
            )
            fitting = [layout for layout in found.layouts if rule(use).admits(layout, n, key.shape, entering(use))]
            if not fitting:
                self._refused[key.parameter] = f"{operation(use.node)} mixes examples or has other rows"
                continue
            layouts[id(use)] = fitting[0]
            if found.conclusive or n == 1:
                self._layouts[key] = fitting[0]
        return layouts


def _keys(graph: Graph, names: list[str], n: int) -> dict[int, _Key]:
    """What every use is remembered by, by its id."""
    return {
        id(use): _Key(graph.structure, names[use.parameter], turn, use.node.name(), use.position, shape(use.node), n)
        for group in by_parameter(graph.uses).values()
        for turn, use in enumerate(group)
    }


def _batch_norms(module: nn.Module) -> list[str]:
    """The names of the layers that normalise by the statistics of the batch."""
    return [
        name.removeprefix("_forward_module.").removeprefix("module.") or type(part).__name__  # of Fabric and DDP
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
    ]


def _listed(names: list[str]) -> str:
    """The first three names, and how many there are beside."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _input_norms(gradients: tuple[Tensor, ...], factor: float, like: Tensor) -> Tensor:
    total = sum(g.flatten(1).abs().to(torch.float64).square().sum(1) for g in gradients)
    assert isinstance(total, Tensor)
    return (total.sqrt() * factor).to(like.dtype)
