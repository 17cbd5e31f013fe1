"""Every registered attack as a foolbox attack, in foolbox's words.

    from firstorder.foolbox import PQGD
    raw, clipped, success = PQGD(steps=10)(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=8/255)

Attacks within a ball are `FixedEpsilonAttack`s, those that search for the smallest norm `MinimizationAttack`s. The
classes are made from the registry, so an attack that another distribution registers is here too.
"""

from __future__ import annotations

from typing import Any

from firstorder.attacks import registry
from firstorder.attacks.distribution import pip_install

try:
    from firstorder.foolbox.attack import FoolboxAttack as FoolboxAttack
    from firstorder.foolbox.attack import host_class
except ModuleNotFoundError as error:
    if error.name not in ("foolbox", "eagerpy"):
        raise
    raise ModuleNotFoundError(f"firstorder.foolbox needs foolbox: {pip_install('foolbox')}", name=error.name) from error


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_names(), "FoolboxAttack"])
    attack = registry().by_class_name().get(name)
    if attack is None:
        raise AttributeError(f"no attack named {name!r} is registered; firstorder.foolbox has {', '.join(_names())}")
    return host_class(attack)


def __dir__() -> list[str]:
    return __getattr__("__all__")  # type: ignore[no-any-return]


def _names() -> list[str]:
    return list(registry().by_class_name())
