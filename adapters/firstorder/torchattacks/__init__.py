"""Every registered attack as a `torchattacks.attack.Attack`, in torchattacks' words.

    from firstorder.torchattacks import PQGD
    adversarial = PQGD(model, eps=8/255, alpha=2/255, steps=10, b=200)(images, labels)

The classes are made from the registry, so an attack that another distribution registers is here too.
Where torchattacks has a class of the same name, its parameter order and defaults are kept.
Every other name is torchattacks' own, its submodules included, so a script for torchattacks needs one line changed:

    import firstorder.torchattacks as torchattacks
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from firstorder.attacks import registry
from firstorder.attacks.distribution import pip_install

try:
    import torchattacks as _host

    from firstorder.torchattacks.interface import TorchattacksAttack as TorchattacksAttack
    from firstorder.torchattacks.interface import host_class
except ModuleNotFoundError as error:
    if error.name != "torchattacks":
        raise
    raise ModuleNotFoundError(
        f"firstorder.torchattacks needs torchattacks: {pip_install('torchattacks')}", name=error.name
    ) from error


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_names(), *_host_names(), "TorchattacksAttack"})
    attack = registry().by_class_name().get(name)
    if attack is not None:
        return host_class(attack)
    handed_on = sys.modules.get(f"{__name__}.{name}")
    if handed_on is not None:
        return handed_on
    try:
        return getattr(_host, name)
    except AttributeError:
        raise AttributeError(
            f"no attack named {name!r} is registered, and torchattacks has none; "
            f"firstorder.torchattacks has {', '.join(_names())}"
        ) from None


def __dir__() -> list[str]:
    return __getattr__("__all__")  # type: ignore[no-any-return]


def _names() -> list[str]:
    return list(registry().by_class_name())


def _host_names() -> list[str]:
    """What torchattacks offers: its `__all__`, or the public classes of a version that has none."""
    classes = (name for name, value in vars(_host).items() if isinstance(value, type) and not name.startswith("_"))
    return list(getattr(_host, "__all__", classes))


class _HandedOn(ModuleType):
    """A submodule of torchattacks under this package's name, where a class of ours takes the place of its namesake."""

    def __init__(self, name: str, module: ModuleType) -> None:
        super().__init__(name, module.__doc__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._module, name)
        if isinstance(found, ModuleType):
            return sys.modules.get(f"{self.__name__}.{name}", found)
        attack = registry().by_class_name().get(name)
        return found if attack is None else host_class(attack)

    def __dir__(self) -> list[str]:
        return dir(self._module)


for _name, _module in list(sys.modules.items()):
    if _name.startswith("torchattacks."):
        _own = f"{__name__}.{_name.removeprefix('torchattacks.')}"
        sys.modules.setdefault(_own, _HandedOn(_own, _module))
