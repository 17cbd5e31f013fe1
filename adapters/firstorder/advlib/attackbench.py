"""The configurations of every registered attack for AttackBench.

AttackBench finds configurations and getters by their names in the modules that it is given. One line in its
`attacks/ingredient.py` adds this one:

    library_modules["firstorder"] = firstorder.advlib.attackbench

Then `attack.firstorder_pqgd`, `attack.firstorder_pgd_l2` and so on are named configurations there.
`firstorder_NAME`, or `firstorder_NAME_linf` and `firstorder_NAME_l2` of an attack that knows both norms, is a function
whose local variables are the parameters. `get_firstorder_NAME` makes the attack of them, which is called as
attack(model, inputs, labels, targets, targeted).

No configuration measures memory, so the model sees the forwards of the attack alone. AttackBench's model keeps the best
of all iterates and ends what exceeds its query budget by itself; `early_stop=True` saves passes besides.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from functools import cache, partial
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor

from firstorder.advlib.functions import NORMS, AttackFunction, attack_function, identifiers

RENAMES = {"eps": "epsilon", "steps": "num_steps", "restarts": "num_restarts", "norm": "threat_model"}
"""AttackBench's words where they are not adversarial-library's."""

THREATS = {"linf": float("inf"), "l2": 2}
"""AttackBench's threat models as norms."""

RADII = {"l2": 1.0}
"""AttackBench's radius where an attack's own is meant for another norm."""

PLAIN = (bool, int, float, str, type(None))
"""The types of what a configuration can hold, alone or in tuples."""

LEFT_OUT = ("model", "inputs", "labels", "targets", "targeted", "bounds", "mask", "generator")

_prefix = "firstorder"


def _wrapper(
    attack: AttackFunction,
    model: Any,
    inputs: Tensor,
    labels: Tensor,
    targets: Any = None,
    targeted: bool = False,
) -> Tensor:
    """What AttackBench calls: the examples (N, ...) that `attack` finds."""
    return attack(model, inputs, labels, targets, targeted)


def __getattr__(name: str) -> Any:
    made = _functions()
    if name == "__all__":
        return sorted(made)
    if name not in made:
        raise AttributeError(f"AttackBench has no configuration {name!r} of a registered attack")
    return made[name]


def __dir__() -> list[str]:
    return [*globals(), *_functions()]


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """All configurations and getters by name."""
    made: dict[str, Callable[..., Any]] = {}
    for name, attack in identifiers().items():
        words = _words(name)
        made[f"get_{_prefix}_{name}"] = _getter(name, tuple(words))
        threats = [threat for threat, norm in THREATS.items() if NORMS[norm] in attack.norms]
        for threat in threats:
            key = f"{_prefix}_{name}" + (f"_{threat}" if len(threats) > 1 else "")
            values = {"name": name, "source": _prefix, **words, "threat_model": threat}
            values |= {"epsilon": RADII[threat]} if "epsilon" in words and threat in RADII else {}
            made[key] = _configuration(key, values)
    return made


def _words(name: str) -> dict[str, Any]:
    """The parameters of an attack in AttackBench's words, with their defaults."""
    shown = inspect.signature(attack_function(name)).parameters.values()
    found = {p.name: p.default for p in shown if p.name not in LEFT_OUT and _plain(p.default)}
    found |= {"memory_budget": None} if "memory_budget" in found else {}
    return {RENAMES.get(word, word): value for word, value in found.items()}


def _plain(value: object) -> bool:
    return all(isinstance(one, PLAIN) for one in (value if isinstance(value, tuple) else (value,)))


def _getter(name: str, words: tuple[str, ...]) -> Callable[..., AttackFunction]:
    """The function that makes an attack from a configuration."""
    theirs = {word: ours for ours, word in RENAMES.items()}

    def getter(**values: Any) -> AttackFunction:
        parameters = {theirs.get(word, word): value for word, value in values.items()}
        if "norm" in parameters:
            threat = parameters["norm"]
            if threat not in THREATS:
                raise ValueError(f"threat_model={threat!r} is not supported; use {' or '.join(map(repr, THREATS))}")
            parameters["norm"] = THREATS[threat]
        return partial(attack_function(name), **parameters)

    getter.__name__ = getter.__qualname__ = f"get_{_prefix}_{name}"
    getter.__doc__ = f"The attack {name} with these parameters."
    getter.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(word, Parameter.POSITIONAL_OR_KEYWORD) for word in words]
    )
    return getter


def _configuration(key: str, values: dict[str, Any]) -> Callable[[], None]:
    """A function whose local variables are `values`.

    Sacred, which AttackBench is configured with, evaluates the text of the function, so there has to be one.
    """
    lines = [f"def {key}():\n", *(f"    {word} = {value!r}\n" for word, value in values.items())]
    text, file = "".join(lines), f"<configuration {key} of {__name__}>"
    scope: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    linecache.cache[file] = (len(text), None, lines, file)
    made: Callable[[], None] = scope[key]
    return made
