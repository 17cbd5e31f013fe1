"""The loop of every bounded attack, and the parts it is made of.

    for t = 1..T:   g = oracle(query, a)                        which gradient
                    m = momentum(m, g, t)                       how gradients are accumulated
                    a = P(a + step(t) * direction(m))           rule, schedule and projection

State is explicit: a run starts from `init` and leaves nothing behind, so a restart cannot leak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from firstorder.attacks.directions import Direction
from firstorder.attacks.losses import Loss
from firstorder.attacks.models import Evaluation, Model
from firstorder.attacks.momenta import Momentum, NoMomentum
from firstorder.attacks.oracles import Oracle, Plain, Step
from firstorder.attacks.projections import Region
from firstorder.attacks.schedules import Schedule

StepHook = Callable[[int, Tensor, Tensor], None]
"""Called after every gradient with t, the gradient and the iterate, (M, ...) for the M examples still attacked."""

Tree = TypeVar("Tree")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an attack is made of; any combination is a valid attack."""

    oracle: Oracle = field(default_factory=Plain)
    momentum: Momentum = field(default_factory=NoMomentum)
    direction: Direction
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch to attack.

    Attributes:
        labels: true labels (N,), or the targets where `targeted`.
        loss: the per-example loss, None for the model's own.
        mask: True where the input may change, shape (N, ...); None frees all of it.
        memory_budget: bytes of activations that stacked copies may take in one forward; None for no limit.
    """

    model: Model
    region: Region
    labels: Tensor
    targeted: bool = False
    loss: Loss | None = None
    mask: Tensor | None = None
    memory_budget: int | None = None

    def take(self, index: Tensor) -> Problem:
        """The problem of the examples at `index`."""
        mask = None if self.mask is None else self.mask[index]
        return replace(self, region=self.region.take(index), labels=self.labels[index], mask=mask)

    def adversarial(self, logits: Tensor) -> Tensor:
        """Which examples are broken by their logits (N, K), shape (N,)."""
        hit = logits.argmax(1) == self.labels
        return hit if self.targeted else ~hit

    def evaluate(self, points: Tensor, *, logits: bool) -> Evaluation:
        """The objective to ascend, J or -J at the target, and its gradient at stacked points (k * N, ...)."""
        copies = len(points) // len(self.labels)
        labels = torch.cat([self.labels] * copies) if copies > 1 else self.labels
        chunk = len(points)
        if copies > 1 and self.memory_budget is not None:
            chunk = max(self.memory_budget // self.model.footprint(points), len(self.labels))
        pieces = [
            self.model.gradient(part, chosen, self.loss, logits=logits)
            for part, chosen in zip(points.split(chunk), labels.split(chunk), strict=True)
        ]
        result = pieces[0] if len(pieces) == 1 else _joined(pieces)
        return Evaluation(-result.gradient, result.logits) if self.targeted else result


class State(NamedTuple):
    """All that the loop carries from step to step; every tensor has a row per example."""

    a: Tensor
    momentum: Tensor
    direction: Tensor | None
    oracle: Any


class Outcome(NamedTuple):
    """The end of one run: the last iterates (N, ...), and the gradients each example was part of (N,)."""

    a: Tensor
    gradients: Tensor


def ascend(
    problem: Problem, parts: Parts, start: Tensor, steps: int, *, drop: bool = False, hook: StepHook | None = None
) -> Outcome:
    """Run `steps` steps of the attack made of `parts` from `start` (N, ...).

    Args:
        drop: take an example out of the batch at the first iterate that is adversarial; the oracle
            must evaluate at the iterate.
        hook: called after every gradient.
    """
    state = State(start, torch.zeros_like(start), parts.direction.init(start), parts.oracle.init(start))
    gradients = torch.zeros(len(start), dtype=torch.long, device=start.device)
    active = torch.arange(len(start), device=start.device)
    final = start
    for t in range(1, steps + 1):
        queries = _Counted(problem, logits=drop)
        step = Step(t, parts.schedule(t, steps), state.momentum)
        evaluation, oracle = parts.oracle(queries, state.a, state.oracle, step)
        state = state._replace(oracle=oracle)
        gradients[active] += queries.count
        if hook is not None:
            hook(t, evaluation.gradient, state.a)
        if drop:
            assert evaluation.logits is not None
            unbroken = (~problem.adversarial(evaluation.logits)).nonzero()[:, 0]
            if len(unbroken) < len(active):
                final = final.index_copy(0, active, state.a)
                active, problem = active[unbroken], problem.take(unbroken)
                state, evaluation = take(state, unbroken), take(evaluation, unbroken)
            if not len(active):
                return Outcome(final, gradients)
        state = advance(problem, parts, state, evaluation.gradient, t, step.size)
    return Outcome(state.a if len(active) == len(final) else final.index_copy(0, active, state.a), gradients)


def advance(problem: Problem, parts: Parts, state: State, gradient: Tensor, t: int, size: float) -> State:
    """One step: accumulate the gradient, choose the direction, move and project."""
    g = gradient if problem.mask is None else torch.where(problem.mask, gradient, 0.0)
    m = parts.momentum(state.momentum, g, t)
    direction, rule = parts.direction(m, state.direction)
    return State(problem.region.project(state.a.add(direction, alpha=size)), m, rule, state.oracle)


def take(tree: Tree, index: Tensor) -> Tree:
    """The rows at `index` of every tensor in nested (named) tuples."""
    if isinstance(tree, Tensor):
        return cast(Tree, tree[index])
    if isinstance(tree, tuple):
        parts = [take(part, index) for part in tree]
        return cast(Tree, type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts))
    return tree


class _Counted:
    """The problem's gradient query, counting how often each example went through the model."""

    def __init__(self, problem: Problem, *, logits: bool) -> None:
        self.problem = problem
        self.logits = logits
        self.count = 0

    def __call__(self, points: Tensor) -> Evaluation:
        self.count += len(points) // len(self.problem.labels)
        return self.problem.evaluate(points, logits=self.logits)


def _joined(pieces: list[Evaluation]) -> Evaluation:
    logits = [piece.logits for piece in pieces if piece.logits is not None]
    return Evaluation(
        torch.cat([piece.gradient for piece in pieces]),
        torch.cat(logits) if logits else None,
    )
