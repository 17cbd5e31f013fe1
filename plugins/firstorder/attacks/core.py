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
from firstorder.attacks.losses import Loss, Margin
from firstorder.attacks.models import Evaluation, Model
from firstorder.attacks.momenta import Momentum, NoMomentum
from firstorder.attacks.oracles import Draw, Oracle, Plain, Step
from firstorder.attacks.projections import Region
from firstorder.attacks.schedules import Schedule

StepHook = Callable[[int, Tensor, Tensor], None]
"""Called after every gradient with t, the gradient and the iterate, (M, ...) for the M examples still attacked.

Both are the loop's own memory: clone what is to be kept.
"""

Tree = TypeVar("Tree")

ROUNDING = 1e-5
"""What a difference of logits must exceed to count as progress, as a share of the largest: more than rounding, which
depends on who else is in the batch."""


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
        disputed: examples (N,) that `model` took for broken and `model.exact` did not: they get the latter's gradients.
    """

    model: Model
    region: Region
    labels: Tensor
    targeted: bool = False
    loss: Loss | None = None
    mask: Tensor | None = None
    memory_budget: int | None = None
    disputed: Tensor | None = None

    def take(self, index: Tensor) -> Problem:
        """The problem of the examples at `index`."""
        mask = None if self.mask is None else self.mask[index]
        disputed = None if self.disputed is None else self.disputed[index]
        return replace(self, region=self.region.take(index), labels=self.labels[index], mask=mask, disputed=disputed)

    def adversarial(self, logits: Tensor) -> Tensor:
        """Which examples are broken by their logits (N, K), shape (N,)."""
        hit = logits.argmax(1) == self.labels
        return hit if self.targeted else ~hit

    def distance(self, logits: Tensor) -> Tensor:
        """How far from success examples are by their logits (N, K): a margin, negative once they are broken, (N,)."""
        margin = Margin()(logits, self.labels)
        return margin if self.targeted else -margin

    def evaluate(self, points: Tensor, *, logits: bool) -> Evaluation:
        """The objective to ascend, J or -J at the target, and its gradient at stacked points (k * N, ...)."""
        if self.disputed is not None and bool(self.disputed.any()):
            return self._divided(points, self.disputed, logits)
        copies = len(points) // len(self.labels)
        if copies == 1:
            result = self.model.gradient(points, self.labels, self.loss, logits=logits)
        else:
            result = self._stacked(points, copies, logits)
        return Evaluation(-result.gradient, result.logits) if self.targeted else result

    def confirm(self, points: Tensor, broken: Tensor) -> tuple[Tensor, Problem]:
        """Which of the `broken` (N,) at points (N, ...) the exact model breaks; the problem, the others disputed."""
        if self.model.exact is self.model:
            return broken, self
        known = torch.zeros_like(broken) if self.disputed is None else self.disputed
        asked = (broken & ~known).nonzero()[:, 0]
        confirmed = broken.clone()
        if not len(asked):
            return confirmed, self
        confirmed[asked] = self.take(asked).adversarial(self.model.exact.logits(points[asked]))
        return confirmed, replace(self, disputed=known | (broken & ~confirmed))

    def _divided(self, points: Tensor, disputed: Tensor, logits: bool) -> Evaluation:
        """The disputed examples by the exact model, the others by the model."""
        copies = len(points) // len(self.labels)
        rows = disputed.repeat(copies)
        gradient, scores = torch.empty_like(points), None
        for chosen, model in ((disputed, self.model.exact), (~disputed, self.model)):
            index = chosen.nonzero()[:, 0]
            if not len(index):
                continue
            where = (rows if chosen is disputed else ~rows).nonzero()[:, 0]
            part = replace(self.take(index), model=model, disputed=None)
            found = part.evaluate(points[where], logits=logits)
            gradient[where] = found.gradient
            if found.logits is not None:
                scores = found.logits.new_empty(len(points), found.logits.shape[1]) if scores is None else scores
                scores[where] = found.logits.to(scores.dtype)
        return Evaluation(gradient, scores)

    def _stacked(self, points: Tensor, copies: int, logits: bool) -> Evaluation:
        labels = torch.cat([self.labels] * copies)
        limit = self.limit(points)
        chunk = len(points) if limit is None else max(limit, len(self.labels))
        pieces = [
            self.model.gradient(part, chosen, self.loss, logits=logits)
            for part, chosen in zip(points.split(chunk), labels.split(chunk), strict=True)
        ]
        found = [piece.logits for piece in pieces if piece.logits is not None]
        return Evaluation(torch.cat([piece.gradient for piece in pieces]), torch.cat(found) if found else None)

    def limit(self, points: Tensor) -> int | None:
        """How many examples like points (M, ...) one forward takes within the memory budget; None for any number."""
        return None if self.memory_budget is None else self.memory_budget // self.model.footprint(points)


class State(NamedTuple):
    """All that the loop carries from step to step; every tensor has a row per example."""

    a: Tensor
    momentum: Tensor
    direction: Tensor | None
    oracle: Any


class Progress(NamedTuple):
    """The smallest distance of every example (N,) from success so far, and for how many iterates it has been that."""

    best: Tensor
    stalled: Tensor

    def after(self, distance: Tensor, least: Tensor, doubtful: Tensor) -> Progress:
        """After another iterate.

        Args:
            distance: from success, (N,).
            least: what counts as progress, (N,).
            doubtful: those (N,) that begin anew, as another model judges them from now on.
        """
        closer = distance < self.best - least
        best = torch.where(doubtful, torch.inf, torch.where(closer, distance, self.best))
        return Progress(best, torch.where(closer | doubtful, 0, self.stalled + 1))


class Outcome(NamedTuple):
    """The end of one run: the last iterates (N, ...), and the gradients each example was part of (N,)."""

    a: Tensor
    gradients: Tensor


def ascend(
    problem: Problem,
    parts: Parts,
    start: Tensor,
    steps: int,
    *,
    draw: Draw,
    drop: bool = False,
    patience: int | None = None,
    hook: StepHook | None = None,
) -> Outcome:
    """Run `steps` steps of the attack made of `parts` from `start` (N, ...).

    Args:
        draw: the random draws of oracles.
        drop: take an example out of the batch at the first iterate that is adversarial; the oracle
            must evaluate at the iterate.
        patience: with `drop`, take an example out too when this many iterates in a row came no closer to success
            than those before.
        hook: called after every gradient.
    """
    start = problem.region.project_(start.clone())
    state = State(start.clone(), torch.zeros_like(start), parts.direction.init(start), parts.oracle.init(start))
    scratch = torch.empty_like(start)
    active = torch.arange(len(start), device=start.device)
    final, gradients = start, torch.zeros_like(active)
    query = _Counted(problem, logits=drop)
    progress = Progress(start.new_full((len(start),), torch.inf), torch.zeros_like(active))
    for t in range(1, steps + 1):
        size = parts.schedule(t, steps)
        evaluation, oracle = parts.oracle(
            query, state.a, state.oracle, _step(query.problem, parts, state, t, size, draw)
        )
        state = state._replace(oracle=oracle)
        if hook is not None:
            hook(t, evaluation.gradient, state.a)
        if drop:
            assert evaluation.logits is not None
            leaving = claimed = query.problem.adversarial(evaluation.logits)
            if bool(claimed.any()):
                leaving, query.problem = query.problem.confirm(state.a, claimed)
            if patience is not None:
                least = ROUNDING * evaluation.logits.abs().amax(1)
                progress = progress.after(query.problem.distance(evaluation.logits), least, claimed & ~leaving)
                leaving = leaving | (progress.stalled >= patience)
            if bool(leaving.any()):
                gone, left = active[leaving], (~leaving).nonzero()[:, 0]
                final, gradients[gone] = final.index_copy(0, gone, state.a[leaving]), query.count
                active, query.problem, draw = active[left], query.problem.take(left), draw.take(left)
                state, evaluation, progress = take(state, left), take(evaluation, left), take(progress, left)
                if not len(active):
                    return Outcome(final, gradients)
        state = advance(query.problem, parts, state, evaluation.gradient, t, size, scratch[: len(active)])
    gradients[active] = query.count
    return Outcome(state.a if len(active) == len(final) else final.index_copy(0, active, state.a), gradients)


def _step(problem: Problem, parts: Parts, state: State, t: int, size: float, draw: Draw) -> Step:
    """What an oracle may know of the loop; what costs time only when it is asked for."""

    def coast(factor: float) -> Tensor:
        direction, _ = parts.direction(state.momentum, state.direction, torch.empty_like(state.a))
        return problem.region.project_(state.a.add(direction, alpha=factor * size)).sub_(state.a)

    def copies() -> int | None:
        limit = problem.limit(state.a)
        return None if limit is None else max(limit // len(state.a), 1)

    return Step(t, size, state.a, state.momentum, draw, coast, copies)


def advance(
    problem: Problem, parts: Parts, state: State, gradient: Tensor, t: int, size: float, scratch: Tensor
) -> State:
    """One step: accumulate the gradient, choose the direction, move and project.

    The iterate and the momentum are updated in place and the direction is built in `scratch`: fresh memory
    at every step costs more than the arithmetic. A momentum that is the gradient itself is not carried.
    """
    g = gradient if problem.mask is None else torch.where(problem.mask, gradient, 0.0)
    m = parts.momentum(state.momentum, g, t)
    direction, rule = parts.direction(m, state.direction, scratch)
    carried = state.momentum if m is g else m
    return State(problem.region.project_(state.a.add_(direction, alpha=size)), carried, rule, state.oracle)


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
