"""Bounded attacks: recipes over the parts of `core`, run in one loop, restarted and merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from typing_extensions import Self

from firstorder.attacks import validation
from firstorder.attacks.base import Attack, Batch, R, Result
from firstorder.attacks.controls import Control
from firstorder.attacks.core import Parts, Problem, ascend, contradicted
from firstorder.attacks.directions import Direction, steepest
from firstorder.attacks.inspection import doubt
from firstorder.attacks.levels import Grid, Levels, grid
from firstorder.attacks.losses import named
from firstorder.attacks.models import Model
from firstorder.attacks.momenta import Momentum, NoMomentum
from firstorder.attacks.oracles import Draw, Oracle, Plain
from firstorder.attacks.projections import BALLS, Size, rows
from firstorder.attacks.registry import update_rule
from firstorder.attacks.roster import Outcome
from firstorder.attacks.schedules import Constant, Schedule
from firstorder.attacks.verdicts import lost

CLIP_LENGTH = 18 / ((16 / 255) * (299 * 299 * 3) ** 0.5)
"""[NGM]'s alpha = 18 at eps = 16/255 on 299 x 299 x 3 images, as a fraction of the L2 length eps * sqrt(d)."""

CLIP_COMPONENT = 0.45
"""alpha * gamma under the clip of single elements, as a fraction of eps: best on a grid (docs/numbers/transfer.md)."""


@dataclass(frozen=True, kw_only=True)
class BoundedAttack(Attack[R]):
    """An attack within a ball of radius eps. A subclass is a recipe: it overrides the parts that make it what it is,
    `oracle`, `momentum`, `rule` and `schedule`; without any it is the steepest ascent with constant steps.

    Args:
        eps: radius of the ball in the units of the images, at least 0: one number; one for every example, a tensor
            (N, 1, ..., 1); or, under L-infinity, what broadcasts to one example.
        norm: "Linf" or "L2".
        loss: per-example loss, or its name, "ce", "dlr", "logit", "margin" or "probability-margin"; None for the
            model's own, cross-entropy unless a host says otherwise.
        direction: replaces the attack's update rule: a `Direction`, or the name of a registered one.
        random_start: start at a uniformly random point of the ball.
        restarts: independent runs, merged per example to the worst; more than one needs `random_start`.
        early_stop: stop attacking an example once it is broken: the same robust accuracy for fewer
            gradients. Not for transfer, nor for attacks that never evaluate at the iterate.
        patience: with `early_stop`, give an example up as well once this many iterates in a row have come no closer to
            success, by the margin of the logits that the gradient needed anyway. A heuristic that saves the gradients
            spent on robust examples: it can miss successes, so that robust accuracy comes out too high, never too
            low. None gives no example up.
        memory_budget: bytes of activations that stacked copies may take in one forward; None for no limit.
        levels: number of equidistant values between the bounds, 256 for 8-bit images: every iterate that the model sees
            and the result lie on them and in the ball, so that the result survives being stored. The walk itself is not
            rounded, steps shorter than a level add up. What a mask keeps stays as it is. None rounds nothing.
    """

    sizes: ClassVar[tuple[str, ...]] = ("eps", "alpha")
    """Parameters that may be tensors, placed against the images before a run."""
    starts: ClassVar[bool] = True

    inertia: ClassVar[float] = 0.0
    """The share of the move before in every move, see `Parts`."""
    surface: ClassVar[bool] = False
    """Whether random starts lie on the surface of the ball."""

    eps: Size = 8 / 255
    norm: str = "Linf"
    direction: Direction | str | None = None
    random_start: bool = False
    restarts: int = 1
    early_stop: bool = False
    patience: int | None = None
    memory_budget: int | None = 2**30
    levels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", update_rule(self.direction))
        object.__setattr__(self, "loss", named(self.loss))
        validation.switches(self)
        validation.size("eps", self.eps)
        validation.choice("norm", self.norm, self.norms)
        validation.count("restarts", self.restarts)
        if self.memory_budget is not None:
            validation.count("memory_budget", self.memory_budget)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} would all be the same run; set random_start=True")
        if self.levels is not None:
            validation.count("levels", self.levels, low=2)
        if self.patience is not None:
            validation.count("patience", self.patience)
            if not self.early_stop:
                raise ValueError(f"patience={self.patience} gives examples up, as early_stop does; set early_stop=True")
        if not self.parts(1).oracle.at_iterate and self.early_stop:
            raise ValueError(
                f"{type(self).__name__} never evaluates the model at the iterate itself, so early_stop=True "
                "cannot see success; leave it False"
            )

    def oracle(self) -> Oracle:
        """Which gradient the attack follows."""
        return Plain()

    def momentum(self) -> Momentum:
        """How it accumulates gradients."""
        return NoMomentum()

    def rule(self) -> Direction:
        """Its own update rule, which the caller's `direction` replaces."""
        return steepest(self.norm)

    def chosen_rule(self) -> Direction:
        """The caller's `direction`, or else the attack's own rule."""
        return update_rule(self.direction) or self.rule()

    def schedule(self, size: Size) -> Schedule:
        """How its step size, `size` at first, goes on."""
        return Constant(size=size)

    def control(self) -> Control | None:
        """How its steps follow the losses that it meets; None where they do not."""
        return None

    def parts(self, numel: int) -> Parts:
        """The attack's parts for examples of `numel` elements."""
        rule = self.chosen_rule()
        return Parts(
            oracle=self.oracle(),
            momentum=self.momentum(),
            direction=rule,
            schedule=self.schedule(self.step_size(rule, numel)),
            inertia=self.inertia,
            control=self.control(),
        )

    def iterations(self) -> int:
        """The number of steps T."""
        return 1

    def step_size(self, direction: Direction, numel: int) -> Size:
        """The step size for a rule.

        That is eps in the ball's units; [NGM]'s L2 length, which scales with eps and, under L-infinity, with
        sqrt(numel); or what moves no component further than `CLIP_COMPONENT` * eps, under L2 than its share of that.
        """
        if direction.scale == "radius":
            return self.eps
        if direction.scale == "component":
            gamma = getattr(direction, "gamma", None)
            if gamma is None:
                raise ValueError(
                    f"{direction!r} has the scale 'component' but no gamma, its limit; give it one, or alpha"
                )
            share = CLIP_COMPONENT * self.eps / float(gamma)
            return share if self.norm == "Linf" else share / numel**0.5
        return CLIP_LENGTH * self.eps * (numel**0.5 if self.norm == "Linf" else 1.0)

    def check(self, batch: Batch) -> None:
        if batch.start is not None and self.restarts > 1:
            raise ValueError(f"restarts={self.restarts} would all begin at the given start; set restarts=1")
        here = self._placed(batch.x)
        here.parts(batch.x[:1].numel()).oracle.check(batch.x)
        width = (batch.high - batch.low).expand(batch.x.shape[1:])
        limit = width if self.norm == "Linf" else torch.linalg.vector_norm(width)
        if bool((torch.as_tensor(here.eps, device=limit.device) > limit).any()):
            eps = f"{here.eps.max():g}" if isinstance(here.eps, Tensor) else f"{here.eps:g}"
            doubt(
                f"eps={eps} allows any image within the bounds [{batch.low.min():g}, {batch.high.max():g}]; for images "
                f"in [0, 1] write eps={eps}/255 if that was meant"
            )
        stored = here._grid(batch)
        if stored is not None and bool((empty := stored.empty()).any()):
            raise ValueError(
                f"levels={self.levels} has no image within eps of {int(empty.sum())} of the {len(empty)} images, which "
                "do not lie on the levels themselves; round them first, as (x * 255).round() / 255 does in [0, 1] for "
                "levels=256, or take a larger eps"
            )

    def _placed(self, x: Tensor) -> Self:
        """The attack with sizes that broadcast against x (N, ...)."""
        given = {name: value for name in self.sizes if isinstance(value := getattr(self, name, None), Tensor)}
        if not given:
            return self
        placed = {name: validation.spread(name, value, x) for name, value in given.items()}
        for name, value in placed.items():
            if self.norm == "L2" and value[0].numel() > 1:
                raise ValueError(f"{name} differs between features, which means nothing under L2; give one per example")
        return replace(self, **cast(dict[str, Any], placed))

    def _grid(self, batch: Batch) -> Grid | None:
        """Where the model sees the iterates, for sizes that are placed; None where it sees them as they are."""
        if self.levels is None:
            return None
        validation.finite(self.levels, batch.low, batch.high)
        return grid(self.norm, batch.x, self.eps, Levels(batch.low, batch.high, self.levels), batch.mask)

    def search(self, model: Model, batch: Batch, *, verify: bool) -> R:
        return cast(R, self._placed(batch.x)._search(model, batch, verify))

    def problem(self, model: Model, batch: Batch) -> Problem:
        """What is to be solved for a batch, with the attack's loss in its ball."""
        return Problem(
            model=model,
            region=BALLS[self.norm].around(batch.x, self.eps, batch.low, batch.high),
            labels=batch.labels,
            rows=batch.rows,
            targeted=batch.targeted,
            loss=named(self.loss),
            mask=batch.mask,
            grid=self._grid(batch),
            memory_budget=self.memory_budget,
        )

    def _search(self, model: Model, batch: Batch, verify: bool) -> Result:
        parts, problem = self.parts(batch.x[0].numel()), self.problem(model, batch)
        if self.restarts > 1:
            return self._worst(problem, parts, batch)
        result, outcome = self._run(problem, parts, batch)
        if not verify:
            return result
        verdict = _verdict(problem, result, outcome)
        return replace(result, success=verdict.success, restarts=verdict.success[None], doubtful=verdict.doubtful)

    def _run(self, problem: Problem, parts: Parts, batch: Batch, index: Tensor | None = None) -> tuple[Result, Outcome]:
        """One run on the examples at `index`, or on all. The start is drawn for the whole batch in
        either case, as are those of oracles, so that no example's draw depends on another's success.
        """
        draw = Draw(batch.generator, len(batch.x), index)
        outcome = ascend(
            problem,
            parts,
            self._start(batch, index),
            self.iterations(),
            draw=draw,
            drop=self.early_stop,
            patience=self.patience,
            hook=batch.hook,
        )
        bad = lost(outcome.a)
        if bad is not None:
            outcome = outcome._replace(a=torch.where(rows(bad, outcome.a), problem.region.center, outcome.a))
        return Result(adversarial=outcome.a, success=None, gradients=outcome.gradients, doubtful=bad), outcome

    def _start(self, batch: Batch, index: Tensor | None) -> Tensor:
        """The first iterates of the examples at `index`, or of all, in memory of their own."""
        if batch.start is not None:
            start = batch.start.clone() if batch.mask is None else torch.where(batch.mask, batch.start, batch.x)
            return start if index is None else start[index]
        if not self.random_start:
            return batch.x.clone() if index is None else batch.x[index]
        ball = BALLS[self.norm].around(batch.x, self.eps, batch.low, batch.high)
        start = ball.sample(batch.generator, surface=self.surface)
        start = start if batch.mask is None else torch.where(batch.mask, start, batch.x)
        return start if index is None else start[index]

    def _worst(self, problem: Problem, parts: Parts, batch: Batch) -> Result:
        """All restarts; per example a broken one if there is, of the largest margin ("worst" merging)."""
        n, device = len(batch.x), batch.x.device
        best, margin = batch.x.clone(), torch.full((n,), -torch.inf, dtype=batch.x.dtype, device=device)
        gradients = torch.zeros(n, dtype=torch.long, device=device)
        broken, doubtful = (torch.zeros(self.restarts, n, dtype=torch.bool, device=device) for _ in range(2))
        active = torch.arange(n, device=device)
        for r in range(self.restarts):
            here = problem.take(active)
            found, outcome = self._run(here, parts, batch, active)
            logits, now, doubtful[r, active] = _verdict(here, found, outcome)
            gap = -here.distance(logits).to(margin.dtype).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            before = broken[:r, active].any(0)
            broken[r, active] = now
            better = (now & ~before) | ((now == before) & (gap > margin[active]))
            best[active[better]], margin[active[better]] = found.adversarial[better], gap[better]
            gradients[active] += found.gradients
            if self.early_stop:
                active = active[~now]
                if not len(active):
                    break
        success = broken.any(0)
        return Result(
            adversarial=best,
            success=success,
            gradients=gradients,
            restarts=None if self.early_stop else broken,
            doubtful=doubtful.any(0) & ~success,
        )


class _Verdict(NamedTuple):
    logits: Tensor
    success: Tensor
    doubtful: Tensor


def _verdict(problem: Problem, found: Result, outcome: Outcome) -> _Verdict:
    """What the model says of the examples (N, ...) that a run found, in a forward of its own."""
    logits = problem.model.logits(found.adversarial)
    success = problem.adversarial(logits)
    contradicted(problem, logits, outcome.broken)
    doubtful = ~logits.isfinite().all(1)
    return _Verdict(logits, success, doubtful if found.doubtful is None else doubtful | (found.doubtful & ~success))


@dataclass(frozen=True, kw_only=True)
class IterativeAttack(BoundedAttack):
    """A bounded attack of T steps.

    Args:
        alpha: step size, a number or a tensor as `eps`. None takes eps / T where the rule moves in the units of eps,
            [NGM]'s length alpha = 18 * (eps / (16/255)) * sqrt(d / 268203) where it moves an L2 length, and
            0.45 * eps / gamma under the clip of single elements.
        steps: the number of steps T.
    """

    alpha: Size | None = None
    steps: int = 10

    def __post_init__(self) -> None:
        if self.alpha is not None:
            validation.size("alpha", self.alpha, above=True)
        validation.count("steps", self.steps)
        super().__post_init__()

    def iterations(self) -> int:
        return self.steps

    def step_size(self, direction: Direction, numel: int) -> Size:
        if self.alpha is not None:
            return self.alpha
        return super().step_size(direction, numel) / (self.steps if direction.scale == "radius" else 1)
