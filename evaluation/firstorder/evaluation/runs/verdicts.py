"""A verdict as the attack of a run.

Its first stages treat every example by itself, shard by shard. What follows is about all examples of the run: the
closing stages, once over everything that is left, and an audit of what they gave up: AutoAttack on a random sample.
Each phase is a cell of its own that goes on from those before. Where the audit breaks something, the closing stages are
reopened for all that was given up, and a fresh sample is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from firstorder.attacks import Model, Verdict, VerdictResult
from firstorder.attacks.batched import Batched
from firstorder.evaluation.runs.adversaries import Auto, Course, Found, Registered
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import Store

CLOSE, AUDIT, REOPEN, AGAIN = "close", "audit", "reopen", "audit again"
"""The phases after the first."""

SAMPLES = {AUDIT: 1, AGAIN: 2}
"""The number of the sample that is drawn in a phase."""

KEPT = ("seconds", "audit", "audit_passes")
"""Columns of a row that later phases leave alone."""

AUTOATTACK = "autoattack"
"""What broke an example in an audit, among stages."""

Row = dict[str, Any]
"""An example's row, by column."""


class Followed(NamedTuple):
    """What a phase finds of N examples.

    Attributes:
        places: for which of them there is something new, (M,).
        found: that, of M examples.
        notes: values of columns to be entered into all N rows.
    """

    places: Tensor
    found: Found
    notes: Row


@dataclass(frozen=True, kw_only=True)
class Cascade(Registered):
    """A verdict; with `population`, as by default here, its closing stages are a phase of their own.

    Attributes:
        audit: how many of the examples that it gave up AutoAttack is run on; None for none.
    """

    audit: int | None = None

    @property
    def later(self) -> Mapping[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {CLOSE: {}} if self._verdict(1.0).population else {}
        if self.audit is not None:
            sample = {"size": self.audit, "attack": self._auto().facts()}
            found |= {AUDIT: sample, REOPEN: {}, AGAIN: sample}
        return found

    def price(self, phase: str) -> int | None:
        if phase in SAMPLES:
            return None
        attack = self._verdict(1.0)
        plan = attack.plan()
        first = plan.first if attack.population else (*plan.first, *plan.closing)
        return sum(stage.gradients for stage in (first if phase == "" else plan.closing))

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
        robust = [i for i, row in enumerate(rows) if row["stage"] is None]
        if phase == CLOSE:
            return robust
        given_up = [i for i in robust if not rows[i]["complete"]]
        if phase == AUDIT:
            return drawn(given_up or robust, self.audit, seed)
        broken = [row for row in rows if row["audit"] == SAMPLES[AUDIT] and row["stage"] is not None]
        if all(row["complete"] for row in broken):
            return []
        return given_up if phase == REOPEN else drawn([i for i in robust if not rows[i]["audit"]], self.audit, seed)

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
    ) -> Followed:
        """A later phase, on the examples x (N, ...) that it is about; `rows` are theirs. Otherwise as `run`."""
        if phase in SAMPLES:
            return self._audited(SAMPLES[phase], model, module, x, y, rows, eps, seed, size)
        attack, generator = self._verdict(eps), torch.Generator(x.device).manual_seed(seed)
        known = _known(rows, x, attack.plan(targeted=targeted).names)
        attack = replace(attack, population=phase == CLOSE)
        result = attack.close(Batched(model, size), x, y, known, targeted=targeted, generator=generator)
        return Followed(torch.arange(len(x), device=x.device), _found(result), {})

    def _audited(
        self,
        number: int,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        rows: Sequence[Row],
        eps: float,
        seed: int,
        size: int,
    ) -> Followed:
        """What AutoAttack finds of a sample. What a verdict took for its examples, and margins, stay as they are."""
        found = self._auto().run(model, module, x, y, eps, seed, size)
        index = found.claimed.nonzero()[:, 0].to(x.device)
        own = [rows[i] for i in index.tolist()]

        def column(name: str) -> Tensor:
            return torch.tensor([row[name] for row in own], dtype=torch.float64, device=x.device)

        course = Course([AUTOATTACK] * len(own), column("margin"), column("complete").bool(), None)
        forwards, backwards = column("forwards"), column("backwards")
        at = index.to(found.claimed.device)
        broken = Found(found.adversarial[index], forwards, backwards, found.doubtful[at], found.claimed[at], course)
        passes = float((found.forwards + found.backwards).sum()) / len(x)
        return Followed(index, broken, {"audit": number, "audit_passes": passes})

    def _auto(self) -> Auto:
        return Auto(name=AUTOATTACK, norm=self.norm, version="standard")

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


def _known(rows: Sequence[Row], x: Tensor, stages: tuple[str, ...]) -> VerdictResult:
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


def drawn(pool: Sequence[int], size: int | None, seed: int) -> list[int]:
    """A random sample of the pool in order, all of it where it is smaller."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]
    return sorted(pool[i] for i in order.tolist())


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
