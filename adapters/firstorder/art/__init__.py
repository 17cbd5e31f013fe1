"""Every registered attack as an `art.attacks.EvasionAttack`, in ART's words.

    from firstorder.art import ClippedNGM
    x_adv = ClippedNGM(estimator=classifier, eps=16/255, max_iter=10).generate(x=x_test, y=y_test)

The classes are made from the registry, so an attack that another distribution registers is here too.
For training there are `AdversarialTrainerENGM` and `ENGMCriterion`; `prepare` makes an estimator's gradients cheaper.
Where ART has a class for the same attack, ours has its name too (`ProjectedGradientDescent` is `PGD`) and all of its
parameters in its order with its defaults.
Bounded attacks take any estimator with loss gradients, object detectors and regressors too; the others need classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from firstorder.attacks import registry
from firstorder.attacks.distribution import pip_install

try:
    from firstorder.art.attack import ARTAttack as ARTAttack
    from firstorder.art.classes import NAMES, host_class
    from firstorder.art.models import prepare as prepare
except ModuleNotFoundError as error:
    if error.name != "art":
        raise
    raise ModuleNotFoundError(
        f"firstorder.art needs adversarial-robustness-toolbox: {pip_install('art')}", name=error.name
    ) from error


if TYPE_CHECKING:
    from firstorder.art.criterion import ENGMCriterion as ENGMCriterion
    from firstorder.art.training import AdversarialTrainerENGM as AdversarialTrainerENGM

TRAINING = {"AdversarialTrainerENGM": "training", "ENGMCriterion": "criterion"}
"""The modules of what is for training, which attacks do not load."""


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_names(), *NAMES, *TRAINING, "ARTAttack", "prepare"])
    if name in TRAINING:
        return getattr(importlib.import_module(f"firstorder.art.{TRAINING[name]}"), name)
    attack = registry().by_class_name().get(NAMES.get(name, name))
    if attack is None:
        raise AttributeError(f"no attack named {name!r} is registered; firstorder.art has {', '.join(_names())}")
    return host_class(attack)


def __dir__() -> list[str]:
    return __getattr__("__all__")  # type: ignore[no-any-return]


def _names() -> list[str]:
    return list(registry().by_class_name())
