"""The loop of every bounded attack, and the parts it is made of.

    for t = 1..T:   g = oracle(query, a)                        which gradient
                    m = momentum(m, g, t)                       how gradients are accumulated
                    a = P(a + step(t) * direction(m))           rule, schedule and projection

A control may scale the steps of an example, or send it back to an iterate before, by the losses it has met; with
inertia every move keeps a share of the one before.

State is explicit: a run starts from `init` and leaves nothing behind, so a restart cannot leak.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import verdicts
from firstorder.attacks.averaging import together
from firstorder.attacks.controls import Control, Kept
from firstorder.attacks.directions import Direction
from firstorder.attacks.inspection import doubt
from firstorder.attacks.levels import Grid
from firstorder.attacks.losses import Loss, Margin
from firstorder.attacks.models import Evaluation, Model, stacked
from firstorder.attacks.momenta import Momentum, NoMomentum
from firstorder.attacks.oracles import Draw, Oracle, Plain, Step
from firstorder.attacks.projections import Region, Size, narrowed
from firstorder.attacks.roster import Outcome, Roster, take
from firstorder.attacks.schedules import Schedule

StepHook = Callable[[int, Tensor, Tensor], None]
"""Called after every gradient with t, the gradient and the iterate, (M, ...) for the M examples still attacked.

Both are the loop's own memory: clone what is to be kept.
"""

RANDOM = 1e-3
"""By how much of the largest logit two forwards of one point may differ in rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an attack is made of; any combination is a valid attack.

    Attributes:
        inertia: the weight w of the move before in a move to (1 - w) P(a + step * direction) + w (a + last move).
        control: how step sizes follow the losses, or the margins of a model that does not give its losses; needs an
            oracle that evaluates at the iterate.
    """

    oracle: Oracle = field(default_factory=Plain)
    momentum: Momentum = field(default_factory=NoMomentum)
    direction: Direction
    schedule: Schedule
    inertia: float = 0.0
    control: Control | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch to attack.

    Attributes:
        labels: true labels (N,), or the targets where `targeted`.
        rows: what the loss gets in place of the labels, (N, ...): probabilities (N, K) where labels are no single
            classes, a class beside the label (N, 2), weights of the logits (N, K). Success is decided by the labels.
        loss: the per-example loss, None for the model's own.
        mask: True where the input may change, shape (N, ...); None frees all of it.
        grid: the points at which the model sees the iterates; None for the iterates themselves.
        memory_budget: bytes of activations that stacked copies may take in one forward; None for no limit.
    """

    model: Model
    region: Region
    labels: Tensor
    rows: Tensor | None = None
    targeted: bool = False
    loss: Loss | None = None
    mask: Tensor | None = None
    grid: Grid | None = None
    memory_budget: int | None = None

    def take(self, index: Tensor) -> Problem:
        """The problem of the examples at `index`."""
        return replace(
            self,
            model=self.model.take(index),
            region=self.region.take(index),
            labels=self.labels[index],
            rows=None if self.rows is None else self.rows[index],
            mask=None if self.mask is None else self.mask[index],
            grid=None if self.grid is None else self.grid.take(index),
        )

    def seen(self, a: Tensor) -> Tensor:
        """Iterates a (N, ...) as the model sees them."""
        return a if self.grid is None else self.grid.nearest(a)

    def adversarial(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Which examples (of those at `index`, or all) are broken by their logits (N, K), shape (N,).

        Logits that are NaN or infinite break nothing.
        """
        labels = self.labels if index is None else self.labels[index]
        return verdicts.broken(verdicts.predicted(logits), labels, targeted=self.targeted)

    def distance(self, logits: Tensor) -> Tensor:
        """How far from success examples are by their logits (N, K): a margin, negative once they are broken, (N,)."""
        margin = Margin()(logits, self.labels)
        return margin if self.targeted else -margin

    def evaluate(
        self, points: Tensor, *, logits: bool, member: int | None = None, mean: int = 1, rows: int = 0
    ) -> Evaluation:
        """The objective to ascend, J or -J at the target, and its gradient at stacked points (k * N, ...).

        The other arguments are those of `Query`.
        """
        with nullcontext() if member is None else self.model.only(member):
            if mean == 1:
                return self._evaluate(points, logits)
            gradient = together(self, points, mean, rows or len(points) // mean)
            return Evaluation(-gradient if self.targeted else gradient, None)

    def _evaluate(self, points: Tensor, logits: bool) -> Evaluation:
        labels = self.labels if self.rows is None else self.rows
        copies = len(points) // len(labels)
        if copies == 1:
            result = self.model.gradient(points, labels, self.loss, logits=logits)
        else:
            result = self._stacked(points, torch.cat([labels] * copies), logits)
        if not self.targeted:
            return result
        losses = None if result.losses is None else -result.losses
        return Evaluation(-result.gradient, result.logits, losses)

    def _stacked(self, points: Tensor, labels: Tensor, logits: bool) -> Evaluation:
        limit, n = self.limit(points), len(self.labels)
        chunk = len(points) if limit is None else max(limit // n, 1) * n
        pieces = [
            self.model.gradient(part, chosen, self.loss, logits=logits)
            for part, chosen in zip(points.split(chunk), labels.split(chunk), strict=True)
        ]
        return stacked(pieces)

    def limit(self, points: Tensor) -> int | None:
        """How many examples like points (M, ...) one forward takes within the memory budget; None for any number."""
        return None if self.memory_budget is None else self.memory_budget // self.model.footprint(points)


def contradicted(problem: Problem, logits: Tensor, broken: Tensor) -> None:
    """Say where logits (N, K) contradict a forward before at the same points, which found `broken` (N,)."""
    margin = problem.distance(logits) / logits.abs().amax(1).clamp_min(torch.finfo(logits.dtype).tiny)
    undone = int((broken & (margin > RANDOM)).sum())
    if undone:
        doubt(
            f"the model takes {undone} of {len(logits)} examples for another class than a forward before did: it is "
            "random, so that a single forward is no verdict; attack firstorder.attacks.Expectation(model, samples=20), "
            "or with more samples"
        )


class State(NamedTuple):
    """All that the loop carries from step to step; every tensor has a row per example."""

    a: Tensor
    momentum: Tensor
    direction: Tensor | None
    oracle: Any
    previous: Tensor | None = None
    """With inertia the iterate before the last step, at first `a`."""
    control: Any = None
    kept: Kept | None = None


def ascend(
    problem: Problem,
    parts: Parts,
    start: Tensor,
    steps: int,
    *,
    draw: Draw,
    drop: bool = False,
    patience: int | None = None,
    best: bool = False,
    last: bool = True,
    hook: StepHook | None = None,
) -> Outcome:
    """Run `steps` steps of the attack made of `parts` from `start` (N, ...), which is written over.

    Args:
        draw: the random draws of oracles.
        drop: take an example out of the batch at the first iterate that is adversarial; the oracle
            must evaluate at the iterate.
        patience: with `drop`, take an example out too when this many iterates in a row came no closer to success
            than those before.
        best: keep the iterate of every example that came nearest to success, with its margin and its logits, which
            come with the gradient; the oracle must evaluate at the iterate.
        last: with `best`, look at the last iterate too, in a forward of its own; False where another run goes on from
            there.
        hook: called after every gradient.
    """
    a = problem.region.project_(start)
    state, controlled = _initial(parts, a), parts.control is not None
    roster = Roster(a, drop=drop, patience=patience, best=best)
    query = _Counted(problem, logits=drop or best or controlled)
    for t in range(1, steps + 1):
        size = _size(parts, state, draw, t, steps)
        seen = query.problem.seen(state.a)
        step = _step(query, parts, state._replace(a=seen), t, size, draw)
        evaluation, oracle = parts.oracle(query, seen, state.oracle, step)
        roster.spend(query.spent())
        state = state._replace(oracle=oracle)
        if hook is not None:
            hook(t, evaluation.gradient, seen)
        if drop or best:
            assert evaluation.logits is not None
            leaving, query.problem = roster.look(query.problem, query.count, seen, evaluation.logits)
            if leaving is not None:
                left = (~leaving).nonzero()[:, 0]
                roster.keep(left)
                query.problem, draw, size = query.problem.take(left), draw.take(left), narrowed(size, left)
                state, evaluation = take(state, left), take(evaluation, left)
                if not len(left):
                    break
        if controlled:
            state, evaluation = _turned(query.problem, parts, state, evaluation, t, steps)
            size = _size(parts, state, draw, t, steps)
        state = advance(query.problem, parts, state, evaluation.gradient, t, size)
        del evaluation
    a = query.problem.seen(state.a)
    if len(a) and ((best and last) or controlled):
        logits = query.problem.model.logits(a)
        roster.last(query.problem, a, logits)
        a = a if state.kept is None else _returned(query.problem, state.kept, a, logits)
    return roster.outcome(a, query.count)


def _initial(parts: Parts, a: Tensor) -> State:
    state = State(a, parts.momentum.init(a), parts.direction.init(a), parts.oracle.init(a))
    state = state._replace(previous=a) if parts.inertia else state
    return state if parts.control is None else state._replace(control=parts.control.init(a), kept=Kept.init(a))


def _size(parts: Parts, state: State, draw: Draw, t: int, steps: int) -> Size:
    """The step size of the examples still attacked."""
    size = draw.rows(parts.schedule(t, steps))
    return size if parts.control is None else size * parts.control.factor(state.control)


def _turned(
    problem: Problem, parts: Parts, state: State, evaluation: Evaluation, t: int, steps: int
) -> tuple[State, Evaluation]:
    """From where the control goes on after an evaluation of the iterate."""
    a = problem.seen(state.a)
    logits = problem.model.logits(a) if evaluation.logits is None else evaluation.logits
    assert parts.control is not None
    assert state.kept is not None
    distance = problem.distance(logits)
    kept = state.kept.after(a, logits, distance, problem.adversarial(logits))
    losses = -distance if evaluation.losses is None else evaluation.losses
    if losses.shape != distance.shape:
        raise ValueError(
            f"the losses of {len(distance)} examples have shape {tuple(losses.shape)}, and the attack follows each: "
            "take a loss that does not average, as with reduction='none'"
        )
    turn = parts.control(state.control, state.a, evaluation.gradient, losses, t, steps)
    return state._replace(a=turn.a, control=turn.state, kept=kept), evaluation._replace(gradient=turn.gradient)


def _returned(problem: Problem, kept: Kept, a: Tensor, logits: Tensor) -> Tensor:
    """What the examples still attacked end at, (N, ...), after the last iterates a (N, ...)."""
    return kept.after(a, logits, problem.distance(logits), problem.adversarial(logits)).result()


def _step(query: _Counted, parts: Parts, state: State, t: int, size: Size, draw: Draw) -> Step:
    """What an oracle may know of the loop; what costs time only when it is asked for."""
    problem = query.problem

    def coast(factor: float) -> Tensor:
        direction, _ = parts.direction(state.momentum, state.direction, torch.empty_like(state.a))
        return problem.region.project_(moved_(state.a.clone(), direction, factor * size)).sub_(state.a)

    def copies() -> int | None:
        limit = problem.limit(state.a)
        return None if limit is None else max(limit // len(state.a), 1)

    def walk(points: Tensor) -> _Walk:
        return _Walk(problem, parts, points, size)

    return Step(t, size, state.a, state.momentum, draw, coast, copies, problem.model.members, walk, query.scores)


class _Walk:
    """As `oracles.Walk`, from points (N, ...)."""

    def __init__(self, problem: Problem, parts: Parts, points: Tensor, size: Size) -> None:
        self._problem, self._size, self._steps = problem, size, 0
        self._momentum, self._past = parts.momentum, parts.momentum.init(points)
        self._parts = replace(parts, momentum=NoMomentum(), oracle=Plain(), control=None)
        self._state = _initial(self._parts, points.clone())

    def __call__(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        self._steps += 1
        mask = self._problem.mask
        g = gradient if mask is None else torch.where(mask, gradient, 0.0)
        m = self._momentum(self._past, g, self._steps)
        self._past = self._past if m is g else m
        self._state = advance(self._problem, self._parts, self._state, m, self._steps, self._size)
        return self._state.a, m


def advance(problem: Problem, parts: Parts, state: State, gradient: Tensor, t: int, size: Size) -> State:
    """One step: accumulate the gradient, choose the direction, move and project.

    The momentum, and without inertia the iterate, are updated in place. A momentum that is the gradient itself is not
    carried.
    """
    g = gradient if problem.mask is None else torch.where(problem.mask, gradient, 0.0)
    m = parts.momentum(state.momentum, g, t)
    direction, rule = parts.direction(m, state.direction, torch.empty_like(state.a))
    state = state._replace(momentum=state.momentum if m is g else m, direction=rule)
    if not parts.inertia:
        return state._replace(a=problem.region.project_(moved_(state.a, direction, size)))
    assert state.previous is not None
    w = parts.inertia if t > 1 else 0.0
    ahead = problem.region.project_(moved_(state.a.clone(), direction, size))
    moved = ahead.sub_(state.a).mul_(1 - w).add_(state.a).add_(state.a - state.previous, alpha=w)
    return state._replace(a=problem.region.project_(moved), previous=state.a)


def moved_(a: Tensor, direction: Tensor, size: Size) -> Tensor:
    """a (N, ...) moved by `size` along a direction (N, ...), in place."""
    return a.addcmul_(direction, size) if isinstance(size, Tensor) else a.add_(direction, alpha=size)


class _Counted:
    """The problem's gradient query, counting how often each example went through the model."""

    def __init__(self, problem: Problem, *, logits: bool) -> None:
        self.problem = problem
        self.logits = logits
        self.count = 0
        self._forwards = 0

    def __call__(self, points: Tensor, *, member: int | None = None, mean: int = 1, rows: int = 0) -> Evaluation:
        self.count += len(points) // len(self.problem.labels)
        return self.problem.evaluate(points, logits=self.logits, member=member, mean=mean, rows=rows)

    def scores(self, points: Tensor) -> Tensor:
        """The logits at points (k * N, ...), without a gradient."""
        self._forwards += len(points) // len(self.problem.labels)
        return self.problem.model.logits(points)

    def spent(self) -> int:
        """How many forwards without a gradient each example went through since this was last asked."""
        forwards, self._forwards = self._forwards, 0
        return forwards
