"""A verdict as the attack of a run.

Its first stages treat every example by itself, shard by shard. What follows is about all examples of the run: the
closing stages, once over everything that is left, each phase a cell of its own that goes on from those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from firstorder.attacks import Model, Verdict, VerdictResult
from firstorder.attacks.batched import Batched
from firstorder.evaluation.runs.adversaries import Course, Found, Registered
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import Store

CLOSE = "close"
"""The phase of the closing stages."""

Row = dict[str, Any]
"""An example's row, by column."""


@dataclass(frozen=True, kw_only=True)
class Cascade(Registered):
    """A verdict; with `population`, as by default here, its closing stages are a phase of their own."""

    @property
    def later(self) -> Mapping[str, Mapping[str, Any]]:
        return {CLOSE: {}} if self._verdict(1.0).population else {}

    def price(self, phase: str) -> int | None:
        plan = self._verdict(1.0).plan()
        stages = plan.closing if phase == CLOSE else plan.first if self.later else (*plan.first, *plan.closing)
        return sum(stage.diversify + stage.attack.steps for stage in stages)

    def run(
        self,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        attack, generator = self._verdict(eps), torch.Generator(x.device).manual_seed(seed)
        run = attack.explore if attack.population else attack.run
        return _found(run(Batched(model, size), x, y, targeted=targeted, generator=generator), carry=attack.population)

    def chosen(self, phase: str, rows: Sequence[Row], seed: int) -> list[int]:
        """The places of the rows whose examples a phase is about, in order."""
        return [i for i, row in enumerate(rows) if row["stage"] is None]

    def follow(
        self,
        phase: str,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        rows: Sequence[Row],
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        """A later phase, on the examples x (N, ...) that it is about; `rows` are theirs. Otherwise as `run`."""
        attack, generator = self._verdict(eps), torch.Generator(x.device).manual_seed(seed)
        before = _before(rows, x, attack.plan(targeted=targeted).names)
        return _found(attack.close(Batched(model, size), x, y, before, targeted=targeted, generator=generator))

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return {**found, "stages": list(self._verdict(1.0).plan().names)}

    def _verdict(self, eps: float) -> Verdict:
        attack = self.build(eps)
        assert isinstance(attack, Verdict)
        return attack


def _found(result: VerdictResult, *, carry: bool = False) -> Found:
    """What a run has from a verdict; with `carry`, also what its closing stages go on from."""
    assert result.success is not None
    assert result.doubtful is not None
    course = Course(
        stage=[result.stages[i] if i >= 0 else None for i in result.stage.tolist()],
        margin=result.margin.double(),
        complete=result.complete,
        carried=torch.cat([result.adversarial.flatten(1), result.logits], 1).float() if carry else None,
    )
    forwards, backwards = result.forwards.double(), result.gradients.double()
    return Found(result.adversarial, forwards, backwards, result.doubtful, result.success, course)


def _before(rows: Sequence[Row], x: Tensor, stages: tuple[str, ...]) -> VerdictResult:
    """What the first stages found of the survivors x (N, ...), from their rows."""
    numel = x[0].numel()
    carried = torch.from_numpy(np.stack([np.frombuffer(row["carried"], "<f4") for row in rows])).to(x.device)
    none = torch.zeros(len(rows), dtype=torch.bool, device=x.device)

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=dtype, device=x.device)

    return VerdictResult(
        adversarial=carried[:, :numel].reshape(x.shape).to(x.dtype),
        success=none,
        gradients=column("backwards", torch.long),
        doubtful=column("doubtful", torch.bool),
        stages=stages,
        stage=torch.full_like(none, -1, dtype=torch.long),
        margin=column("margin", torch.float64).to(x.dtype),
        logits=carried[:, numel:].to(x.dtype),
        forwards=column("forwards", torch.long),
        complete=none.clone(),
    )


def before(store: Store, cell: Cell) -> list[Row]:
    """The rows that a cell goes on from, in order: of each example the first, with what an earlier cell carried.

    Raises:
        ValueError: a cell that is not finished.
    """
    found: dict[int, Row] = {}
    for key in cell.after:
        if not store.done(key):
            raise ValueError("a cell that it goes on from has failed, or its file is damaged")
        for row in store.read(key).to_pylist():
            known = found.setdefault(row["example"], row)
            known["carried"] = known["carried"] or row["carried"]
    return [found[i] for i in sorted(found)]


def spread(course: Course | None, right: Tensor) -> Course:
    """The course of all examples, from that of those that are attacked, (N,); the others are input."""
    stage: list[str | None] = ["input"] * len(right)
    margin = torch.full(right.shape, torch.nan, dtype=torch.float64, device=right.device)
    complete, carried = torch.ones_like(right), None
    if course is not None:
        for i, one in zip(right.nonzero()[:, 0].tolist(), course.stage, strict=True):
            stage[i] = one
        margin[right], complete[right] = course.margin, course.complete
        if course.carried is not None:
            carried = margin.new_zeros(len(right), course.carried.shape[1], dtype=torch.float32)
            carried[right] = course.carried
    return Course(stage, margin, complete, carried)
