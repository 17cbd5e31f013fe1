"""A user's program, of every package. `tests/test_typing.py` has it checked against an installed wheel.

An ignored error is a mistake that has to be found: where nothing is found, the comment is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

from firstorder import advlib, art, foolbox, torchattacks
from firstorder.attacks import (
    ANU,
    PGD,
    SINIFGSM,
    Attack,
    IterativeAttack,
    LookAhead,
    MinimumNormResult,
    Quantised,
    Result,
    Sign,
    Verdict,
    VerdictResult,
    create,
    prepare,
    registry,
)
from firstorder.attacks.surrogates import sgm
from firstorder.attacks.testing import check_attack
from firstorder.autoattack import Audit, AutoAttack, Record
from firstorder.evaluation import Evaluation, evaluate
from firstorder.fabric import Recipe, Robustness, Trainer, cosine, make
from firstorder.fabric import evaluate as measured
from firstorder.files import write_text
from firstorder.hosts import Host, signature
from firstorder.lightning import ENGMModule
from firstorder.robustbench import benchmark, load_model
from firstorder.training import AENGM, ENGM, TRADES, GradientMethod, Vanilla, Weighting, gradient_method
from firstorder.transformers import ENGMTrainer, PixelClassifier, classifier


@dataclass(frozen=True, kw_only=True)
class Mine(IterativeAttack):
    """An attack of one's own."""

    paper: ClassVar[str] = "none"
    decay: float = 1.0

    def oracle(self) -> LookAhead:
        return LookAhead(decay=self.decay)

    def rule(self) -> Quantised:
        return Quantised(levels=100)


class Lit(ENGMModule):
    """Trained by Lightning."""

    gradient_method = partial(ENGM, alpha=5.0)


class Fitted(ENGMTrainer):
    """Trained by Hugging Face's trainer."""

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        return super().example_losses(model, inputs)


def attacked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    attack = SINIFGSM(eps=16 / 255, steps=10, direction=Quantised(levels=200))
    assert_type(attack(model, x, y), Tensor)
    result = PGD(eps=8 / 255, steps=20, restarts=5, early_stop=True, direction=Sign()).run(model, x, y)
    assert_type(result, Result)
    assert_type(result.success, Tensor | None)
    smallest = ANU(steps=100).run(prepare(model, x), x, y)
    assert_type(smallest, MinimumNormResult)
    ANU(steps="100")  # type: ignore[arg-type]
    assert_type(smallest.broken(0.5), Tensor)
    return result.adversarial


def verdict(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = Verdict(eps=8 / 255, effort=2).run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert_type(found, VerdictResult)
    assert_type(found.stages, tuple[str, ...])
    assert found.stagez  # type: ignore[attr-defined]
    adversary = AutoAttack(model, eps=8 / 255, version="fast", audit=200, device="cpu")
    adversary.run_standard_evaluation(x, y, bs=250)
    record = adversary.record
    assert_type(record, Record | None)
    if record is None:
        return 0.0
    assert_type(record.audits, list[Audit])
    assert_type(record.bound, float | None)
    return found.forwards.double().mean().item()


def kept(attack: type[Attack[Result]], path: Path, host: Host) -> None:
    check_attack(attack)
    check_attack(Mine(steps=5))
    write_text(path, str(signature(host, attack)))


def by_name(name: str) -> Attack[Result]:
    assert_type(sorted(registry().attacks), list[str])
    return create(name, eps=0.3)


def in_frameworks(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torchattacks.PQGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(x, y)
    art.ClippedNGM(estimator=None, eps=16 / 255, max_iter=10)
    foolbox.PGD(steps=10)
    advlib.si_ni_fgsm(model, x, y, eps=16 / 255, steps=10)
    benchmark(sgm(load_model("Wong2020Fast", threat_model="Linf"), gamma=0.5), eps=8 / 255, attacks=["pqgd"], x=x, y=y)
    assert_type(classifier("FOLDER"), PixelClassifier)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> Weighting:
    method = ENGM(model, alpha=5.0)
    losses = F.cross_entropy(model(attacked(model, x, y)), y, reduction="none")
    others: list[GradientMethod] = [gradient_method("a-engm")(model), AENGM(model)]
    assert_type(others[0].weights(losses, x), Tensor)
    return method.backward(losses, x)


def fitted(model: nn.Module, data: torch.utils.data.TensorDataset, folder: Path) -> float:
    attack = PGD(eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)
    recipe = Recipe(
        objective=TRADES(attack=attack) if folder.exists() else Vanilla(attack=attack),
        method=ENGM,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        judge=attack,
        epochs=1,
        batch_size=128,
        schedule=cosine,
    )
    fabric = make(accelerator="cpu")
    Trainer(fabric, recipe, folder).fit(model, data, data)
    robustness = measured(fabric, model, data, attack)
    assert_type(robustness, Robustness)
    return robustness.robust


def evaluated(folder: Path) -> Path:
    run = evaluate({"models": "mnist-cnn", "data": "mnist", "eps": 0.3, "attacks": ["pgd", "pqgd"]}, folder)
    assert_type(run, Evaluation)
    assert_type(run.trust(), dict[str, tuple[str, ...]])
    pages = run.report()
    assert_type(pages, list[Path])
    return pages[0]
