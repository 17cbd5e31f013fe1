"""The one function of every registered attack."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import cache
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import DLR, Attack, CrossEntropy, Margin, registry, validation
from firstorder.hosts import Host, relative_step, signature

HOST = Host(
    first="model",
    renames={"alpha": "absolute_step_size", "random_start": "random_init", "loss": "loss_function"},
    extras={"relative_step_size": None, "bounds": (0.0, 1.0), "mask": None, "generator": None},
)
"""adversarial-library's words."""

GREEK = {"ε": "eps", "γ": "gamma"}
"""Words that adversarial-library spells in Greek, which are understood too."""

NORMS = {float("inf"): "Linf", 2: "L2"}

LOSSES = {"ce": CrossEntropy(), "dl": Margin(), "dlr": DLR()}
"""adversarial-library's names of losses."""

PEERS: dict[str, dict[str, Any]] = {"ddn": {"levels": 256}}
"""Defaults of adversarial-library's own function for an attack, where they are not ours."""

CALL = """
Called as attack(model, inputs, labels, targets=None, targeted=False, **parameters).

`inputs` are a tensor (N, ...) within `bounds`, `labels` indices (N,) or one-hot rows (N, K). With targeted=True the
model is to find `targets`, given like labels or as one class for all, or where they are None `labels`, as
adversarial-library has it. `absolute_step_size` is the step size; where it is None it is `relative_step_size` times
`eps`, and where both are None the attack's own. `eps` may be a tensor (N,), a radius for every example. `norm` is inf
or 2. `loss_function` is "ce", "dl", "dlr", a loss of firstorder, or None for the model's own, cross-entropy. `mask` is
nonzero where inputs may change. `generator` is the source of the random draws, on the device of the inputs; None uses a
fresh one seeded with `torch.initial_seed()`. ε and γ are other spellings of `eps` and `gamma`.

Returns the adversarial examples (N, ...).

Raises:
    ValueError: a bad input or parameter, before any work; the message names the value and the remedy.
"""

AttackFunction = Callable[..., Tensor]


def identifiers() -> dict[str, type[Attack]]:
    """The functions' names and their attacks, sorted. Of two registry names that are one identifier the first stays."""
    found: dict[str, type[Attack]] = {}
    for name, attack in sorted(registry().attacks.items()):
        found.setdefault(re.sub(r"\W|^(?=\d)", "_", name.lower()), attack)
    return found


@cache
def attack_function(name: str) -> AttackFunction:
    """The function of this name; the same one at every call."""
    attack = identifiers()[name]
    shown = _signature(name, attack)

    def function(
        model: Any,
        inputs: Tensor,
        labels: Any,
        targets: Any = None,
        targeted: bool = False,
        **parameters: Any,
    ) -> Tensor:
        words = {GREEK.get(word, word): value for word, value in parameters.items()}
        if len(words) < len(parameters):
            raise TypeError(f"{name}() got a parameter in two spellings: {', '.join(parameters)}")
        call = shown.bind(model, inputs, labels, targets, targeted, **words)
        call.apply_defaults()
        given = call.arguments
        return _core(attack, given, inputs)(
            model,
            inputs,
            _aim(inputs, labels, targets, targeted),
            targeted=targeted,
            bounds=given["bounds"],
            mask=given["mask"],
            generator=given["generator"],
        )

    function.__name__ = function.__qualname__ = name
    function.__module__ = "firstorder.advlib"
    function.__doc__ = f"{inspect.getdoc(attack)}\n{CALL}"
    function.__signature__ = shown  # type: ignore[attr-defined]
    return function


def _signature(name: str, attack: type[Attack]) -> Signature:
    own = {f.name: f.default for f in dataclasses.fields(attack)}
    steps = {"relative_step_size"} if not {"alpha", "eps"} <= own.keys() else set()
    host = dataclasses.replace(HOST, extras={key: value for key, value in HOST.extras.items() if key not in steps})
    defaults = dict(PEERS.get(name, {}))
    if "norm" in own:
        defaults["norm"] = next(norm for norm, ours in NORMS.items() if ours == own["norm"])
    model, *parameters = signature(host, attack, **defaults).parameters.values()
    kind = Parameter.POSITIONAL_OR_KEYWORD
    data = [
        Parameter("inputs", kind),
        Parameter("labels", kind),
        Parameter("targets", kind, default=None),
        Parameter("targeted", kind, default=False),
    ]
    return Signature([model, *data, *parameters])


def _core(attack: type[Attack], given: dict[str, Any], inputs: Any) -> Attack:
    """The attack with the parameters of a call."""
    own = {f.name: HOST.word(f.name) for f in dataclasses.fields(attack)}
    parameters = {name: given[word] for name, word in own.items() if word in given}
    eps = parameters.get("eps")
    if isinstance(eps, Tensor) and eps.ndim == 1 and isinstance(inputs, Tensor):
        parameters["eps"] = eps.reshape(-1, *[1] * (inputs.ndim - 1))
    share = given.get("relative_step_size")
    if share is not None and parameters["alpha"] is None:
        parameters["alpha"] = relative_step("relative_step_size", share, parameters["eps"])
    if "norm" in parameters:
        norm = parameters["norm"]
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not supported; use float('inf') or 2")
        parameters["norm"] = NORMS[norm]
    loss = parameters.get("loss")
    if isinstance(loss, str):
        validation.choice("loss_function", loss, tuple(LOSSES))
        parameters["loss"] = LOSSES[loss]
    return attack(**parameters)


def _aim(inputs: Any, labels: Any, targets: Any, targeted: bool) -> Any:
    """The labels or targets of a call."""
    if isinstance(targets, bool):
        raise ValueError(f"targets={targets} are no classes; pass targeted={targets} by name")
    if targets is None:
        return labels
    if not targeted:
        raise ValueError("there are targets but targeted=False; pass targeted=True, or targets=None")
    return torch.full((len(inputs),), targets, device=inputs.device) if isinstance(targets, int) else targets
