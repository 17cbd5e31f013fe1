"""A harness with AttackBench's interface: a model that counts and limits the queries of every image, and a loop.

It is called as AttackBench's is, and reports under the same names.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {"linf": math.inf, "l2": 2.0}


def length(delta: Tensor, threat_model: str) -> Tensor:
    """Norms (N,) of perturbations (N, ...)."""
    return torch.linalg.vector_norm(delta.flatten(1), NORMS[threat_model], dim=1)


class BenchModel(nn.Module):
    """Counts forwards and backwards by image, keeps the closest successes, and answers nothing beyond a budget.

    Args:
        model: from images (N, ...) to logits (N, K).
        num_max_propagations: how many forwards and backwards together an image may have; None for any number.
    """

    def __init__(self, model: nn.Module, num_max_propagations: int | None = None) -> None:
        super().__init__()
        self.model, self.num_max_propagations = model, num_max_propagations
        self.tracking = False
        model.register_full_backward_hook(self._backward)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K); what is out of budget gets constants that the attack fails at."""
        if not self.tracking:
            logits: Tensor = self.model(x)
            return logits
        apart = (x.detach()[:, None] - self.inputs[None]).flatten(2).norm(dim=2)
        self._whose = apart.argmin(1)
        self._allowed = self._open()
        self.num_forwards.index_add_(0, self._whose, self._allowed.long())
        refused = (-10.0 if self.targeted else 10.0) * F.one_hot(self.aims[self._whose], self.classes)
        refused = refused.to(x.dtype) + 0 * x.flatten(1)[:, :1]
        if not self._allowed.any():
            return refused
        logits = torch.where(self._allowed[:, None], self.model(x), refused)
        hit = logits.argmax(1) == self.aims[self._whose]
        sizes = length(x.detach() - self.inputs[self._whose], self.threat_model)
        sizes = sizes.masked_fill(~((hit if self.targeted else ~hit) & self._allowed), math.inf)
        self.min_dist.scatter_reduce_(0, self._whose, sizes, "amin")
        return logits

    def start_tracking(self, x: Tensor, y: Tensor, targets: Any, threat_model: str) -> None:
        """Begin with a batch of images (N, ...)."""
        with torch.no_grad():
            logits = self.model(x)
        self.inputs, self.classes, self.threat_model = x, logits.shape[1], threat_model
        self.targeted = targets is not None
        self.aims = y if targets is None else torch.as_tensor(targets).expand(len(y))
        self.num_forwards, self.num_backwards = torch.zeros_like(y), torch.zeros_like(y)
        hit = logits.argmax(1) == self.aims
        self.min_dist = torch.where(hit if self.targeted else ~hit, 0.0, math.inf).to(x.dtype)
        self.tracking = True

    def _open(self) -> Tensor:
        """Which rows of the batch may be answered, (N,)."""
        if self.num_max_propagations is None:
            return torch.ones_like(self._whose, dtype=torch.bool)
        spent = (self.num_forwards + self.num_backwards)[self._whose]
        before = (self._whose[:, None] == self._whose[None]).tril(-1).sum(1)
        return spent + before < self.num_max_propagations

    def _backward(self, module: nn.Module, given: Any, received: Any) -> Any:
        if not self.tracking:
            return None
        allowed = self._allowed & self._open()
        self.num_backwards.index_add_(0, self._whose, allowed.long())
        return tuple(g * allowed.reshape(-1, *[1] * (g.ndim - 1)) for g in given)


def run_attack(
    model: BenchModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[..., Tensor],
    targets: int | Tensor | None = None,
    threat_model: str = "l2",
) -> dict[str, Any]:
    """What an attack does on the batches of a loader; an exception is noted, and the inputs taken for its result."""
    found: dict[str, Any] = defaultdict(list)
    for inputs, labels in loader:
        model.start_tracking(inputs, labels, targets, threat_model)
        images = inputs.clone()
        try:
            adversarial = attack(
                model=model, inputs=images, labels=labels.clone(), targeted=targets is not None, targets=targets
            )
            found["batch_failures"].append(None)
        except Exception as error:  # as AttackBench
            found["batch_failures"].append(error)
            adversarial = inputs
        model.tracking = False
        assert torch.equal(images, inputs), "the attack wrote over its inputs"
        outside = ((adversarial < 0) | (adversarial > 1)).flatten(1).any(1)
        with torch.no_grad():
            hit = model(adversarial).argmax(1) == model.aims
        found["adv_success"] += (hit if model.targeted else ~hit).tolist()
        found["box_failures"] += outside.tolist()
        found["num_forwards"] += model.num_forwards.tolist()
        found["num_backwards"] += model.num_backwards.tolist()
        found["distances"] += length(adversarial - inputs, threat_model).tolist()
        found["best_optim_distances"] += model.min_dist.tolist()
        found["adv_inputs"].append(adversarial)
    return {**found, "ASR": sum(found["adv_success"]) / len(found["adv_success"])}


def collected(module: Any) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """The configurations and getters of a module, found as AttackBench finds them."""
    functions = inspect.getmembers(
        sys.modules[module.__name__], lambda f: inspect.isfunction(f) and f.__module__ == module.__name__
    )
    start = f"{module._prefix}_"
    configurations = {name: f for name, f in functions if name.startswith(start)}
    getters = {name.removeprefix(f"get_{start}"): f for name, f in functions if name.startswith(f"get_{start}")}
    return configurations, getters


def evaluated(configuration: Callable[..., Any], **changed: Any) -> dict[str, Any]:
    """The variables of a configuration, read from its text as Sacred reads it, with some changed."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(configuration))).body
    assert isinstance(function, ast.FunctionDef)
    found: dict[str, Any] = {}
    exec(compile(ast.Module(function.body, []), "<configuration>", "exec"), {}, found)
    assert changed.keys() <= found.keys()
    return {**found, **changed}


def get_attack(module: Any, values: dict[str, Any]) -> Callable[..., Tensor]:
    """The attack of a configuration, as AttackBench makes it: the getter gets what it names, the wrapper the rest."""
    getter = collected(module)[1][values["name"]]
    attack = getter(**{name: values[name] for name in inspect.signature(getter).parameters})
    return partial(module._wrapper, attack=attack)
