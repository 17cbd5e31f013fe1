"""The verdict: what AutoAttack would find, at a fraction of its passes.

    result = Verdict(eps=8 / 255).run(model, x, y)
    1 - result.success.double().mean()                       # robust accuracy
    [result.stages[i] for i in result.stage if i >= 0]       # what broke them

A cascade of short and diverse attacks, each on what those before it left. It is composed of published parts: the
margin and its targets (Carlini & Wagner 2017), steps of cosine size, restarts along random directions of the logits
(Tashiro et al. 2020), search in blocks (Andriushchenko et al. 2020), and for the last stages a rule that gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from firstorder.attacks import validation
from firstorder.attacks.base import Batch, Bounds, Result, Target
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.core import Problem, StepHook, contradicted
from firstorder.attacks.losses import Loss, Margin, named
from firstorder.attacks.models import Model
from firstorder.attacks.plans import Plan, lengthened, plan
from firstorder.attacks.projections import narrowed
from firstorder.attacks.roster import Best
from firstorder.attacks.stages import Cascade, Knowledge

BLOCK, QUIET = 10, 20
"""The closing stages take a population in blocks, and give up after so many examples in a row that stay robust."""


@dataclass(frozen=True, kw_only=True)
class VerdictResult(Result):
    """What a verdict found for a batch of N; see `Result`. `gradients` are the backward passes.

    Attributes:
        stages: names of the stages; the first, "input", is for examples that are misclassified as they are.
        stage: which of them broke each example, shape (N,); -1 where none did.
        margin: the smallest margin found, shape (N,), in units of the logits: how far the label is above every
            other class, negative where broken. `adversarial` is where it was found.
        logits: the logits there, shape (N, K).
        forwards: how many forward passes were spent on each example, shape (N,); those that an estimator needs beside
            them to report logits are not counted.
        complete: which examples were attacked to the end, shape (N,): broken, or robust against every stage. The
            others were given up by the closing stages, or are still to be closed.
    """

    stages: tuple[str, ...]
    stage: Tensor
    margin: Tensor
    logits: Tensor
    forwards: Tensor
    complete: Tensor

    def take(self, index: Tensor) -> Self:
        """The result of the examples at `index`."""
        return self._with({name: value[index] for name, value in self._rows().items()})

    @classmethod
    def joined(cls, results: Sequence[Self]) -> Self:
        """The result of batches, one after the other, of one verdict and one model."""
        if not results:
            raise ValueError("there are no results to join; pass at least one")
        parts = [result._rows() for result in results]
        return results[0]._with({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _rows(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self, values: dict[str, Any]) -> Self:
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class Verdict(BoundedAttack[VerdictResult]):
    """Robust accuracy near AutoAttack's for a small part of its passes: a cascade of short, diverse attacks.

    First every example by itself, with early stop: the margin, cross-entropy, and the margin towards one wrong class
    after the other. Then the closing stages, for those that are left: the second class, cross-entropy, restarts along
    random directions of the logits, and under L-infinity random search from the best point found. What is found for a
    batch is an upper bound on robust accuracy, as with any attack. See docs/attacks.md for what each effort costs and
    finds.

    `run` does both. For data in batches `explore` does the first part of each batch, and `close` the second once over
    all that is left.

    Args:
        effort: 0 is the cheapest, 1 the default, 2 is to be sharper than AutoAttack.
        population: the closing stages treat the batch as a population: its survivors in blocks, nearest to success
            first, until 20 in a row stay robust; the others are given up, see `VerdictResult.complete`. An example's
            result then depends on its batch. False gives the closing stages to every survivor.
        loss: of the stages that look for any wrong class; the other stages have theirs. None takes the model's own
            loss alone, for models that give gradients of no other, and leaves out the stages that need logits.
        direction: replaces the update rule of every stage.
        random_start: False leaves out all that is random, for a comparison: stages start at the input, without
            restarts along random directions.
        restarts: how many of these the closing stages have.
        stages: how many stages are run, the cheapest first and none of them closing; None for all. 1 is 20 steps on the
            margin.
        early_stop: always; an example that is broken is not attacked any further.

    Targeted, the stages that aim at other classes are left out.
    """

    paper: ClassVar[str] = "firstorder; Carlini & Wagner 2017, f_6; Tashiro et al. 2020, Eq. 3"
    starts: ClassVar[bool] = False
    effort: int = 1
    population: bool = False  # type: ignore[misc]  # a fact of the class elsewhere, a choice here
    loss: Loss | str | None = field(default_factory=Margin)
    random_start: bool = True
    restarts: int = 10
    stages: int | None = None
    early_stop: bool = True

    def __post_init__(self) -> None:
        validation.count("effort", self.effort, low=0)
        if self.effort > 2:
            raise ValueError(f"effort={self.effort} is not known; choose 0, 1 or 2")
        if self.stages is not None:
            validation.count("stages", self.stages)
        validation.switch("population", self.population)
        super().__post_init__()
        if not self.early_stop:
            raise ValueError(
                "early_stop=False: a verdict is done with an example once it is broken; leave it True, or take PGD"
            )

    def plan(self, *, targeted: bool = False) -> Plan:
        """The stages, in order."""
        whole = plan(
            effort=self.effort,
            loss=named(self.loss),
            norm=self.norm,
            restarts=self.restarts if self.random_start else 0,
            targeted=targeted,
        )
        return whole if self.stages is None else whole.cut(self.stages)

    def explore(
        self,
        model: Target,
        x: Tensor,
        y: Tensor,
        *,
        targeted: bool = False,
        bounds: Bounds = (0.0, 1.0),
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        hook: StepHook | None = None,
    ) -> VerdictResult:
        """The stages before the closing ones, which treat every example by itself. Arguments are those of `run`.

        Returns:
            what they found; survivors are not `complete`.
        """
        return self._attack(self._explored, model, x, y, targeted, bounds, mask, generator, hook)

    def close(
        self,
        model: Target,
        x: Tensor,
        y: Tensor,
        found: VerdictResult,
        *,
        targeted: bool = False,
        bounds: Bounds = (0.0, 1.0),
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        hook: StepHook | None = None,
    ) -> VerdictResult:
        """The closing stages for the survivors of `found`; with `population` they stop once nothing more falls.

        Args:
            found: by `explore` for x (N, ...), or that of its batches, joined.

        Returns:
            `found` with what they added. The other arguments are those of `run`.

        Raises:
            ValueError: also where `found` is not for N examples.
        """
        if len(found.stage) != len(x):
            raise ValueError(f"found is about {len(found.stage)} examples, there are {len(x)}; pass the same ones")
        return self._attack(partial(self._closed, found=found), model, x, y, targeted, bounds, mask, generator, hook)

    def nothing(self, x: Tensor) -> VerdictResult:
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return VerdictResult(
            adversarial=x.clone(),
            success=none.bool(),
            gradients=none,
            doubtful=none.bool(),
            stages=self.plan().names,
            stage=none - 1,
            margin=none.to(x.dtype),
            logits=x.new_zeros(len(x), 0),
            forwards=none,
            complete=none.bool(),
        )

    def _search(self, model: Model, batch: Batch, verify: bool) -> VerdictResult:
        known, problem = Knowledge.none(batch.x), self.problem(model, batch)
        self._explore(problem, batch, known)
        complete = self._close(problem, batch, known)
        return self._result(
            problem, known, complete, torch.arange(len(batch.x), device=batch.x.device) if verify else None
        )

    def _explored(self, model: Model, batch: Batch) -> VerdictResult:
        here, known = self._placed(batch.x), Knowledge.none(batch.x)
        problem = here.problem(model, batch)
        here._explore(problem, batch, known)
        return here._result(problem, known, known.broken, _all(batch))

    def _closed(self, model: Model, batch: Batch, found: VerdictResult) -> VerdictResult:
        here = self._placed(batch.x)
        problem = here.problem(model, batch)
        known = Knowledge(
            found.stage.clone(),
            Best(found.adversarial.clone(), found.margin.clone(), found.logits.clone()),
            found.gradients.clone(),
            found.forwards.clone(),
            torch.zeros_like(found.complete) if found.doubtful is None else found.doubtful.clone(),
        )
        left = (~known.broken).nonzero()[:, 0]
        complete = here._close(problem, batch, known)
        return here._result(problem, known, complete, left)

    def _explore(self, problem: Problem, batch: Batch, known: Knowledge) -> None:
        """The stages before the closing ones."""
        cascade = Cascade(problem, batch, known, self._fit)
        for number, stage in enumerate(self.plan(targeted=batch.targeted).first, 1):
            cascade.run(stage, number)

    def _close(self, problem: Problem, batch: Batch, known: Knowledge) -> Tensor:
        """The closing stages; who was attacked to the end, (N,)."""
        chosen = self.plan(targeted=batch.targeted)
        cascade = Cascade(problem, batch, known, self._fit)
        blocks: Sequence[Tensor | None] = [None]
        closing = chosen.closing
        if self.population:
            assert known.best is not None
            left = (~known.broken).nonzero()[:, 0]
            closing = lengthened(closing, len(left))
            blocks = left[known.best.distance[left].argsort(stable=True)].split(BLOCK)
        complete, quiet = known.broken.clone(), 0
        for block in blocks:
            if quiet >= QUIET:
                break
            for number, stage in enumerate(closing, 1 + len(chosen.first)):
                cascade.run(stage, number, block)
            if block is None:
                complete[:] = True
                break
            complete[block] = True
            fallen = known.broken[block].nonzero()[:, 0].tolist()
            quiet = len(block) - 1 - fallen[-1] if fallen else quiet + len(block)
        return complete

    def _fit(self, attack: BoundedAttack, among: Tensor | None) -> BoundedAttack:
        """A stage's attack with the options of the verdict, on the examples at an index."""
        return replace(
            attack,
            eps=self.eps if among is None else narrowed(self.eps, among),
            norm=self.norm,
            direction=attack.direction if self.direction is None else self.direction,
            random_start=attack.random_start and self.random_start,
            early_stop=True,
            patience=self.patience,
            memory_budget=self.memory_budget,
        )

    def _result(self, problem: Problem, known: Knowledge, complete: Tensor, index: Tensor | None) -> VerdictResult:
        """What is known, with the examples at `index` decided by a forward of their own."""
        best = known.best
        assert best is not None
        success, doubtful = known.broken, known.doubtful & ~known.broken
        if index is not None and len(index):
            here = problem.take(index)
            logits = here.model.logits(best.a[index])
            found = here.adversarial(logits)
            contradicted(here, logits, success[index])
            success = success.index_copy(0, index, found)
            doubtful[index] |= ~logits.isfinite().all(1)
            known.forwards[index] += 1
        return VerdictResult(
            adversarial=best.a,
            success=success,
            gradients=known.backwards,
            doubtful=doubtful,
            stages=self.plan(targeted=problem.targeted).names,
            stage=torch.where(success, known.stage, -1),
            margin=best.distance,
            logits=best.logits,
            forwards=known.forwards,
            complete=complete,
        )


def _all(batch: Batch) -> Tensor:
    return torch.arange(len(batch.x), device=batch.x.device)
