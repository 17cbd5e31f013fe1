"""Every registered attack as a `torchattacks.attack.Attack`, in torchattacks' words.

    from firstorder.torchattacks import PQGD
    adversarial = PQGD(model, eps=8/255, alpha=2/255, steps=10, b=200)(images, labels)

The classes are made from the registry, so an attack that another distribution registers is here too.
Where torchattacks has a class of the same name, its parameter order and defaults are kept.
"""

from __future__ import annotations

from typing import Any

from firstorder.attacks import registry
from firstorder.attacks.distribution import pip_install

try:
    from firstorder.torchattacks.attack import TorchattacksAttack as TorchattacksAttack
    from firstorder.torchattacks.attack import host_class
except ModuleNotFoundError as error:
    if error.name != "torchattacks":
        raise
    raise ModuleNotFoundError(
        f"firstorder.torchattacks needs torchattacks: {pip_install('torchattacks')}", name=error.name
    ) from error


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_names(), "TorchattacksAttack"])
    attack = registry().by_class_name().get(name)
    if attack is None:
        raise AttributeError(
            f"no attack named {name!r} is registered; firstorder.torchattacks has {', '.join(_names())}"
        )
    return host_class(attack)


def __dir__() -> list[str]:
    return __getattr__("__all__")  # type: ignore[no-any-return]


def _names() -> list[str]:
    return list(registry().by_class_name())
