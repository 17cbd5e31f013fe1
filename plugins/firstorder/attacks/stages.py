"""Attacks one after the other, each on the examples that those before it left unbroken.

A stage is an attack with what a single attack cannot know: the class it aims at, of those that come next by the
logits found so far, and a start along random directions of the logits. What is learned is carried from stage to
stage: the iterate of every example that came nearest to success, its margin and its logits, who is broken and by
whom, and at what price.

[ODI] Tashiro et al. 2020, Diversity can be transferred: output diversification for white- and black-box attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.base import Batch
from firstorder.attacks.bounded import BoundedAttack, IterativeAttack
from firstorder.attacks.core import Problem, ascend
from firstorder.attacks.directions import Direction
from firstorder.attacks.losses import LogitDirection, named
from firstorder.attacks.oracles import Draw
from firstorder.attacks.projections import Size
from firstorder.attacks.roster import Best, Outcome
from firstorder.attacks.schedules import Cosine, Schedule, Section
from firstorder.attacks.squares import SquareSearch
from firstorder.attacks.verdicts import lost

Fit: TypeAlias = Callable[[BoundedAttack, Tensor | None], BoundedAttack]
"""From a stage's attack to that on the examples at an index, None for all: in their ball, with the caller's options."""


@dataclass(frozen=True, kw_only=True)
class Annealed(IterativeAttack):
    """Steepest ascent with steps of cosine size: 2 eps at first, 0 after the last.

    Args:
        alpha: size of the first step; None takes `first` times eps where the rule moves in the units of eps.
        first: see there.
    """

    first: float = 2.0

    def __post_init__(self) -> None:
        validation.number("first", self.first, low=0, above=True)
        super().__post_init__()

    def step_size(self, direction: Direction, numel: int) -> Size:
        if self.alpha is None and direction.scale == "radius":
            return self.first * self.eps
        return super().step_size(direction, numel)

    def schedule(self, size: Size) -> Schedule:
        return Cosine(size=size)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One attack of a cascade.

    Attributes:
        name: unique among the stages.
        attack: its parts, loss, number of steps and whether it starts at random; in the ball of the cascade, whatever
            its own. It must evaluate at the iterate.
        rank: of the wrong class that its loss aims at, from 1 for the one of the largest logit; the loss then gets
            rows [y, k], as `TargetedMargin` does. None for a loss of the label alone.
        diversify: how many steps along random weights of the logits, uniform on [-1, 1], go before it ([ODI], Eq. 3);
            the schedule of step sizes is that of both together.
        resume: start at the iterate of every example that came nearest to success so far.
    """

    name: str
    attack: IterativeAttack
    rank: int | None = None
    diversify: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        validation.count("diversify", self.diversify, low=0)
        validation.switch("resume", self.resume)
        if self.rank is not None:
            validation.count("rank", self.rank)

    @property
    def gradients(self) -> int:
        """How many gradients it takes for an example at most."""
        return self.diversify + (0 if isinstance(self.attack, SquareSearch) else self.attack.steps)


@dataclass
class Knowledge:
    """What stages have learned of N examples; it is added to in place.

    Attributes:
        stage: the number of the stage that broke each, (N,), -1 for none.
        best: the iterates nearest to success, None before the first stage.
        backwards, forwards: the passes each example was part of, (N,).
        doubtful: whose iterates became NaN, (N,).
    """

    stage: Tensor
    best: Best | None
    backwards: Tensor
    forwards: Tensor
    doubtful: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Knowledge:
        """Of examples x (N, ...), nothing."""
        count = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return cls(count - 1, None, count, count.clone(), count.bool())

    @property
    def broken(self) -> Tensor:
        """Who is broken, (N,)."""
        return self.stage >= 0

    def add(self, index: Tensor, outcome: Outcome, number: Tensor) -> None:
        """Add what a run on the examples at `index` (M,) found, of the stage with this number, (M,)."""
        best = outcome.best
        assert best is not None
        if self.best is None:
            assert len(index) == len(self.stage), "the first stage is on all"
            self.best = best
        else:
            better = (best.distance < self.best.distance[index]) | outcome.broken
            chosen = index[better]
            for mine, found in zip(self.best, best, strict=True):
                mine[chosen] = found[better]
        self.stage[index] = torch.where(outcome.broken, number, self.stage[index])
        self.backwards[index] += outcome.gradients
        self.forwards[index] += outcome.forwards
        bad = lost(outcome.a)
        if bad is not None:
            self.doubtful[index] |= bad


class Cascade:
    """Stages on one batch.

    Args:
        problem: of the whole batch; the loss is the stages' own.
        batch: the batch.
        known: of it, to be added to.
        fit: gives a stage's attack the ball and the options of the cascade.
    """

    def __init__(self, problem: Problem, batch: Batch, known: Knowledge, fit: Fit) -> None:
        self.known = known
        self._problem, self._batch, self._fit = problem, batch, fit
        self._order = self._ranked()

    def run(self, stage: Stage, number: int, among: Tensor | None = None) -> None:
        """Attack who is not yet broken.

        Args:
            stage: the stage.
            number: under which its successes are entered; those found at the input itself under 0.
            among: the examples (M,) that it is about, each with draws of its own; None for all.
        """
        known, best, n = self.known, self.known.best, len(self._batch.x)
        if stage.rank is not None and best is not None and stage.rank >= best.logits.shape[1]:
            return
        pool = torch.arange(n, device=known.stage.device) if among is None else among
        left = (~known.broken[pool]).nonzero()[:, 0]
        if not len(left):
            return
        attack = self._fit(stage.attack, among)
        start = self._start(attack, among, left) if best is None or not stage.resume else best.a[pool[left]]
        draw, total = Draw(self._batch.generator, len(pool), left), stage.diversify + stage.attack.steps
        if stage.diversify:
            outcome = self._diversified(attack, pool[left], start, (0, stage.diversify, total), draw)
            known.add(pool[left], outcome, torch.full_like(left, number))
            kept = (~outcome.broken).nonzero()[:, 0]
            left, start, draw = left[kept], outcome.a[kept], draw.take(kept)
            if not len(left):
                return
        index = pool[left]
        problem = replace(self._problem.take(index), loss=named(attack.loss))
        if stage.rank is not None:
            problem = replace(problem, rows=self._pairs(index, stage.rank))
        elif not getattr(attack.loss, "soft", True):
            problem = replace(problem, rows=None)
        outcome = self._ascend(attack, problem, start, (stage.diversify, total, total), draw, last=True)
        untouched = (outcome.gradients == 1) & (best is None) & (not attack.random_start)
        known.add(index, outcome, torch.where(untouched, 0, number))
        if best is None:
            self._order = self._ranked()

    def _diversified(
        self, attack: BoundedAttack, index: Tensor, start: Tensor, span: tuple[int, int, int], draw: Draw
    ) -> Outcome:
        """Steps of an attack from `start` (M, ...) along random weights of the logits, on the examples at `index`."""
        assert self.known.best is not None, "the first stage is not one with random weights"
        weights = draw.uniform(start, (self.known.best.logits.shape[1],)) * 2 - 1
        problem = replace(self._problem.take(index), loss=LogitDirection(), rows=weights)
        return self._ascend(attack, problem, start, span, draw, last=False)

    def _start(self, attack: BoundedAttack, among: Tensor | None, left: Tensor) -> Tensor:
        """The first iterates of those that are left."""
        x, mask, region = self._batch.x, self._batch.mask, self._problem.region
        if among is not None:
            x, mask = x[among], None if mask is None else mask[among]
            region = region.take(among) if attack.random_start else region
        if not attack.random_start:
            return x[left]
        start = region.sample(self._batch.generator, surface=attack.surface)
        return (start if mask is None else torch.where(mask, start, x))[left]

    def _pairs(self, index: Tensor, rank: int) -> Tensor:
        """Rows [y, k] of the examples at `index`, k the wrong class of this rank, (M, 2).

        The order of the classes is that of the logits when the cascade began, or after its first stage, so that no
        class comes twice.
        """
        assert self._order is not None, "the first stage is not one that aims at a class"
        return torch.stack([self._problem.labels[index], self._order[index, rank - 1]], 1)

    def _ranked(self) -> Tensor | None:
        """The wrong classes of every example by their logits, largest first, then its label, (N, K)."""
        if self.known.best is None:
            return None
        wrong = self.known.best.logits.scatter(1, self._problem.labels[:, None], -torch.inf)
        return wrong.argsort(dim=1, descending=True, stable=True)

    def _ascend(
        self,
        attack: BoundedAttack,
        problem: Problem,
        start: Tensor,
        span: tuple[int, int, int],
        draw: Draw,
        *,
        last: bool,
    ) -> Outcome:
        """The steps of an attack after the first and up to the second of the numbers in `span`, of the third."""
        after, until, total = span
        parts = attack.parts(start[0].numel())
        if until - after < total:
            parts = replace(parts, schedule=Section(schedule=parts.schedule, after=after, of=total))
        return ascend(
            problem,
            parts,
            start,
            until - after,
            draw=draw,
            drop=True,
            patience=attack.patience if last else None,
            best=True,
            last=last,
            hook=self._batch.hook,
        )
