"""What distinguishes a run from others: a state is resumed only by a run of the same identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from firstorder.fabric.batches import Order, Pairs, size
from firstorder.fabric.contents import fingerprint
from firstorder.fabric.recipe import Recipe
from firstorder.hosts.description import description
from firstorder.hosts.parts import contents, parts
from firstorder.training import GradientMethod

LATER = frozenset({"augment's contents", "schedule of all steps", "validate"})
"""What states of earlier versions lack; it is not compared with them."""


def identity(
    recipe: Recipe,
    model: nn.Module,
    method: GradientMethod,
    optimizer: Optimizer,
    order: Order,
    data: Mapping[str, Pairs],
    fabric: Fabric,
) -> dict[str, Any]:
    """What determines the result of a run, as plain values.

    Args:
        recipe: the run's.
        model: the bare module.
        method, optimizer: before the first step.
        order: of the training examples.
        data: the data sets by what they are for: "training", "validation" and others that belong to the run.
        fabric: for its precision; the number of processes may change as long as the parts of a batch do not.
    """
    return {
        "objective": description(recipe.objective),
        "method": type(method).__name__,
        "method's parameters": _plain(vars(method)),
        "optimizer": type(optimizer).__name__,
        "optimizer's parameters": _plain(optimizer.defaults),
        "schedule": [recipe.schedule(i / 16) for i in range(16)],
        "schedule of all steps": _rates(recipe, order.steps * recipe.epochs),
        "augment": getattr(recipe.augment, "__qualname__", type(recipe.augment).__name__),
        "augment's contents": contents(recipe.augment),
        "bounds": description(recipe.bounds),
        "judge": description(recipe.judge),
        "precision": fabric.strategy.precision.precision,
        "examples": order.examples,
        "validation examples": size(data["validation"]),
        **{f"{use} data": fingerprint(own) for use, own in data.items()},
        "epochs": recipe.epochs,
        "batch size": recipe.batch_size,
        "parts of a batch": order.parts,
        **({"groups": list(order.groups), "window": order.window} if order.groups else {}),
        "ramp": recipe.ramp,
        "validate": recipe.validate,
        **({"prepared": True} if recipe.prepare else {}),
        "seed": recipe.seed,
        "weights": [[name, list(value.shape)] for name, value in model.state_dict().items()],
        **{name: text for name, text in parts(model, tensors=False).items() if name.startswith("code of ")},
    }


def _rates(recipe: Recipe, steps: int) -> str:
    """A digest of the schedule's factors at every step, to as many digits as every machine agrees on."""
    digest = hashlib.sha256()
    for step in range(steps):
        digest.update(f"{float(recipe.schedule(step / steps)):.6g};".encode())
    return digest.hexdigest()[:32]


def _plain(values: Mapping[str, Any]) -> list[list[Any]]:
    """The public entries that are plain values, in order."""
    kept = {key: value for key, value in values.items() if not key.startswith("_")}
    return [[key, value] for key, value in sorted(kept.items()) if isinstance(value, (bool, int, float, str, tuple))]
