"""What is compared: the same attack, PGD (L-infinity), by this package and by others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import ANU, PGD, Model, broken, predicted, prepare
from firstorder.evaluation.bench.scenes import ADV_LIB, ART, FOOLBOX, TORCHATTACKS, Case, Scene, Setting
from firstorder.evaluation.runs.memory import keep_memory

BARE = "bare step"
PATIENCE = 10
"""Iterates without progress after which an example is given up, in the rows that say so."""

PLAIN, PREPARED, PATIENT = (
    "firstorder PGD",
    "firstorder PGD, prepared",
    f"firstorder PGD, prepared, patience {PATIENCE}",
)
NEEDS = {ART: "art", "firstorder.art": "art", TORCHATTACKS: "torchattacks", FOOLBOX: "foolbox", ADV_LIB: "adv_lib"}
"""The module that a contender needs, by the beginning of its name."""


class Found(NamedTuple):
    """A verdict.

    Attributes:
        broken: which images the contender says it broke, (N,).
        adversarial: the images it left, (N, C, H, W).
        gradients: gradients per image.
    """

    broken: np.ndarray[Any, Any]
    adversarial: np.ndarray[Any, Any]
    gradients: float


def missing(name: str) -> str | None:
    """The module that the contender needs and that is not installed, if there is one."""
    needed = next((module for start, module in NEEDS.items() if name.startswith(start)), None)
    return needed if needed is not None and find_spec(needed) is None else None


# --- the cost of a step


def step(scene: Scene, name: str) -> Callable[[], None]:
    """The contender `STEPS[name]` on the scene's step: a run of that many steps, none left out.

    What it finds is dropped there: to send images to another process takes memory and time that are not the attack's.
    """
    contender = STEPS[name](scene.case(scene.step))

    def run() -> None:
        contender()

    return run


def _bare(case: Case) -> Callable[[], object]:
    def run() -> None:
        for _ in range(case.steps):
            point = case.x.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(case.module(point), case.y), point)

    return run


def _pgd(case: Case, *, prepared: bool = False, kept: bool = False) -> Callable[[], object]:
    if kept:
        keep_memory()
    model = prepare(case.module, case.x[:4]) if prepared else case.module
    return partial(PGD(eps=case.eps, alpha=case.alpha, steps=case.steps), model, case.x, case.y)


def _anu(case: Case, *, prepared: bool = False) -> Callable[[], object]:
    model = prepare(case.module, case.x[:4]) if prepared else case.module
    return partial(ANU(steps=case.steps), model, case.x, case.y)


def _inner(case: Case) -> Callable[[], object]:
    """As in training: the weights are new whenever the attack begins."""
    model, attack = prepare(case.module, case.x[:4]), PGD(eps=case.eps, alpha=case.alpha, steps=case.steps)

    def run() -> None:
        model.refresh()
        attack(model, case.x, case.y)

    return run


def _torchattacks(case: Case) -> Callable[[], object]:
    import torchattacks

    attack = torchattacks.PGD(case.module, eps=case.eps, alpha=case.alpha, steps=case.steps)
    return partial(attack, case.x, case.y)


def _estimator(case: Case) -> Any:
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = case.module(case.x[:1]).shape[1]
    shape = tuple(case.x.shape[1:])
    return PyTorchClassifier(case.module, nn.CrossEntropyLoss(), shape, classes, clip_values=(0, 1), device_type="cpu")


def _art_words(case: Case) -> dict[str, Any]:
    return {
        "eps": case.eps,
        "eps_step": case.alpha,
        "max_iter": case.steps,
        "num_random_init": 1,
        "batch_size": len(case.x),
        "verbose": False,
    }


def _art(case: Case) -> Callable[[], object]:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(_estimator(case), **_art_words(case))
    return partial(attack.generate, case.x.numpy(), case.y.numpy())


def _art_attack(case: Case, *, prepared: bool = False) -> Callable[[], object]:
    import firstorder.art

    estimator = _estimator(case)
    if prepared:
        estimator = firstorder.art.prepare(estimator, case.x[:4].numpy())
    attack = firstorder.art.PGD(estimator, **_art_words(case))
    return partial(attack.generate, case.x.numpy(), case.y.numpy())


def _foolbox(case: Case) -> Callable[[], object]:
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=case.alpha, steps=case.steps)
    interface = foolbox.PyTorchModel(case.module, bounds=(0, 1), device="cpu")
    return partial(attack.run, interface, case.x, foolbox.criteria.Misclassification(case.y), epsilon=case.eps)


def _adv_lib(case: Case) -> Callable[[], object]:
    from adv_lib.attacks import pgd_linf

    return partial(pgd_linf, case.module, case.x, case.y, case.eps, steps=case.steps, absolute_step_size=case.alpha)


STEPS: dict[str, Callable[[Case], Callable[[], object]]] = {
    BARE: _bare,
    PLAIN: _pgd,
    PREPARED: partial(_pgd, prepared=True),
    f"{PREPARED}, memory kept": partial(_pgd, prepared=True, kept=True),
    "firstorder.art PGD": _art_attack,
    "firstorder.art PGD, prepared": partial(_art_attack, prepared=True),
    "firstorder ANU": _anu,
    "firstorder ANU, prepared": partial(_anu, prepared=True),
    "inner PGD of ENGM, prepared, refreshed": _inner,
    TORCHATTACKS: _torchattacks,
    ART: _art,
    FOOLBOX: _foolbox,
    ADV_LIB: _adv_lib,
}
"""Contenders of the cost of a step by name, the unit first."""


# --- until robust accuracy is known


def verdict(scene: Scene, setting: Setting, name: str) -> Callable[[], Found]:
    """The contender `VERDICTS[name]`: from the module and the images to what is broken, its preparation included."""
    case, contender = scene.case(setting), VERDICTS[name]
    contender(case._replace(x=case.x[:4], y=case.y[:4], steps=1))  # what every first call has to do
    return partial(contender, case)


def verified(case: Case, adversarial: Tensor) -> Tensor:
    """Which images (N,) the module itself takes for another class, within the ball and the bounds."""
    inside = ((adversarial - case.x).abs() <= case.eps + 1e-6) & (adversarial >= 0) & (adversarial <= 1)
    with torch.no_grad():
        wrong = broken(predicted(case.module(adversarial)), case.y)
    return wrong & inside.flatten(1).all(1)


def _found(broken: Any, adversarial: Any, gradients: float) -> Found:
    return Found(np.asarray(broken), np.asarray(adversarial), gradients)


def _pgd_verdict(case: Case, *, prepared: bool = False, patience: int | None = None) -> Found:
    model: nn.Module | Model = prepare(case.module, case.x[:4]) if prepared else case.module
    attack = PGD(eps=case.eps, alpha=case.alpha, steps=case.steps, early_stop=True, patience=patience)
    result = attack.run(model, case.x, case.y)
    assert result.success is not None
    return _found(result.success, result.adversarial, float(result.gradients.double().mean()))


def _torchattacks_verdict(case: Case) -> Found:
    adversarial: Any = _torchattacks(case)()
    with torch.no_grad():
        hits = broken(predicted(case.module(adversarial)), case.y)
    return _found(hits, adversarial, case.steps)


def _art_verdict(case: Case) -> Found:
    estimator = _estimator(case)
    adversarial: Any = _art(case)()
    hits = broken(predicted(torch.from_numpy(estimator.predict(adversarial, batch_size=len(case.x)))), case.y)
    return _found(hits, adversarial, case.steps)


def _foolbox_verdict(case: Case) -> Found:
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=case.alpha, steps=case.steps)
    interface = foolbox.PyTorchModel(case.module, bounds=(0, 1), device="cpu")
    _, adversarial, hits = attack(interface, case.x, case.y, epsilons=case.eps)
    return _found(hits, adversarial, case.steps)


def _adv_lib_verdict(case: Case) -> Found:
    adversarial: Any = _adv_lib(case)()
    with torch.no_grad():
        hits = broken(predicted(case.module(adversarial)), case.y)
    return _found(hits, adversarial, case.steps)


VERDICTS: dict[str, Callable[[Case], Found]] = {
    PLAIN: _pgd_verdict,
    PREPARED: partial(_pgd_verdict, prepared=True),
    PATIENT: partial(_pgd_verdict, prepared=True, patience=PATIENCE),
    TORCHATTACKS: _torchattacks_verdict,
    ART: _art_verdict,
    FOOLBOX: _foolbox_verdict,
    ADV_LIB: _adv_lib_verdict,
}
"""Contenders until the verdict by name. Those of this package stop early."""
