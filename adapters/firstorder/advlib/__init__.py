"""Every registered attack as a function, in the words of adversarial-library.

    from firstorder.advlib import pqgd
    adversarial = pqgd(model, inputs, labels, eps=8/255, steps=10)

The functions are made from the registry and named like it (`ni-fgsm` is `ni_fgsm`), so an attack that another
distribution registers is here too. Nothing but torch is needed. `firstorder.advlib.attackbench` has their
configurations for AttackBench.
"""

from __future__ import annotations

from typing import Any

from firstorder.advlib import functions


def __getattr__(name: str) -> Any:
    known = functions.identifiers()
    if name == "__all__":
        return sorted(known)
    if name not in known:
        raise AttributeError(f"no attack named {name!r} is registered; firstorder.advlib has {', '.join(known)}")
    return functions.attack_function(name)


def __dir__() -> list[str]:
    return __getattr__("__all__")  # type: ignore[no-any-return]
