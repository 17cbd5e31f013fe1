"""The public checks of an attack: ours pass, and every broken promise is found by the check that is for it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case
from firstorder.attacks import PGD, Attack, Batch, Model, Result
from firstorder.attacks.testing import CHECKS, check_attack, instance


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS)
def test_our_attacks(case: Case, check: str) -> None:
    CHECKS[check](instance(case.build()))


def test_an_attack_from_scratch() -> None:
    """Of another package, on the two abstract classes alone."""
    check_attack(Scratch)
    check_attack(PGD(eps=0.1, steps=3))


@dataclass(frozen=True, kw_only=True)
class Scratch(Attack):
    """One signed step, written against the public interface."""

    size: float = 0.05

    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        labels = batch.labels if batch.rows is None else batch.rows
        found = model.gradient(batch.x, labels, self.loss)
        step = self.size * found.gradient.sign() * (-1 if batch.targeted else 1)
        moved = self.bounded(batch.x + (step if batch.mask is None else step * batch.mask), batch)
        count = torch.ones(len(batch.x), dtype=torch.long)
        if not verify:
            return Result(adversarial=moved, success=None, gradients=count)
        logits = model.logits(moved)
        hit = (logits.argmax(1) == batch.labels) == batch.targeted
        return Result(adversarial=moved, success=self.verdict(hit, logits), gradients=count)

    def bounded(self, a: Tensor, batch: Batch) -> Tensor:
        return torch.minimum(torch.maximum(a, batch.low), batch.high)

    def verdict(self, hit: Tensor, logits: Tensor) -> Tensor:
        return hit & logits.isfinite().all(1)


@dataclass
class Thawed:
    pass


@dataclass(frozen=True, kw_only=True)
class Idle(Scratch):
    size: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Unbounded(Scratch):
    def bounded(self, a: Tensor, batch: Batch) -> Tensor:
        return a


@dataclass(frozen=True, kw_only=True)
class Far(PGD):
    """Leaves the ball."""

    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        found = super().search(model, batch, verify=verify)
        moved = (batch.x + 1.5 * (found.adversarial - batch.x)).clamp(0, 1)
        return Result(adversarial=moved, success=found.success, gradients=found.gradients)


@dataclass(frozen=True, kw_only=True)
class Boastful(Scratch):
    def verdict(self, hit: Tensor, logits: Tensor) -> Tensor:
        return torch.ones_like(hit)


@dataclass(frozen=True, kw_only=True)
class Credulous(Scratch):
    def verdict(self, hit: Tensor, logits: Tensor) -> Tensor:
        return hit | ~logits.isfinite().all(1)


@dataclass(frozen=True, kw_only=True)
class Averaging(Scratch):
    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        found = super().search(model, batch, verify=verify)
        mean = self.size * 0.2 * (found.adversarial - batch.x).mean(0, keepdim=True).sign()
        moved = found.adversarial + (mean if batch.mask is None else mean * batch.mask)
        return Result(adversarial=self.bounded(moved, batch), success=None, gradients=found.gradients)


@dataclass(frozen=True, kw_only=True)
class Drawing(Scratch):
    def bounded(self, a: Tensor, batch: Batch) -> Tensor:
        return super().bounded(a + 1e-3 * torch.rand_like(a) * (1 if batch.mask is None else batch.mask), batch)


@dataclass(frozen=True, kw_only=True)
class Untargeted(Scratch):
    """Moves away from targets too."""

    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        return super().search(model, Batch(**{**vars(batch), "targeted": False}), verify=verify)


@dataclass(frozen=True, kw_only=True)
class Maskless(Scratch):
    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        return super().search(model, Batch(**{**vars(batch), "mask": None}), verify=verify)


@dataclass(frozen=True, kw_only=True)
class Swallowing(Scratch):
    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        try:
            return super().search(model, batch, verify=verify)
        except ArithmeticError as error:
            raise ValueError("the model does not work") from error


@dataclass(frozen=True, kw_only=True)
class Chatty(Scratch):
    def search(self, model: Model, batch: Batch, *, verify: bool) -> Result:
        sys.stdout.write("step 1\n")
        return super().search(model, batch, verify=verify)


@dataclass(frozen=True, kw_only=True)
class Hasty(Scratch):
    """Asks the model before the input is checked."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        if isinstance(x, Tensor) and x.is_floating_point():
            model(x)
        return super().__call__(model, x, y, **options)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Scratch):
    """Leaves the model in evaluation mode."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        found = super().__call__(model, x, y, **options)
        model.eval()
        return found


BROKEN: dict[str, type[Attack[Any]]] = {
    "stays_feasible": Far,
    "does_something": Idle,
    "reports_what_it_found": Boastful,
    "leaves_the_model_as_it_was": Forgetful,
    "keeps_examples_apart": Averaging,
    "draws_from_the_generator": Drawing,
    "reads_labels": Untargeted,
    "respects_the_mask": Maskless,
    "refuses_bad_input": Hasty,
    "takes_no_nan_for_success": Credulous,
    "passes_the_models_own_exception": Swallowing,
    "prints_nothing": Chatty,
}


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_promise_is_found(check: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AssertionError):
            CHECKS[check](BROKEN[check]())
        with pytest.raises(AssertionError):
            check_attack(BROKEN[check])


def test_bounds_that_are_left() -> None:
    with pytest.raises(AssertionError, match="stays_feasible: the bounds are left"):
        check_attack(Unbounded)


def test_what_is_no_attack() -> None:
    with pytest.raises(AssertionError, match="no subclass"):
        check_attack(Thawed)  # type: ignore[arg-type]

    class Own(Scratch):
        """Not decorated: no dataclass parameters of its own."""

    with pytest.raises(AssertionError, match="is_a_frozen_dataclass: Own is not frozen"):
        check_attack(Own)


def test_every_promise_that_can_be_broken_is() -> None:
    left = {"is_a_frozen_dataclass", "works_where_gradients_are_off"}
    assert set(CHECKS) - set(BROKEN) == left
