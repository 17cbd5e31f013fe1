"""The models of a run: loaded on its device, alone or as ensembles, and what attacks see of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from firstorder.attacks import Ensemble, Model, TorchModel, prepare
from firstorder.evaluation.names import data, models
from firstorder.evaluation.runs.classes import exhausted
from firstorder.evaluation.runs.measure import predictions
from firstorder.evaluation.runs.specification import ModelEntry, Specification

T = TypeVar("T")

logger = logging.getLogger(__name__)


def module(entry: ModelEntry, specification: Specification) -> nn.Module:
    """The model of an entry, in evaluation mode, its weights frozen.

    Raises:
        ValueError: no such model, or no torch module.
        FileNotFoundError: weights that are not there.
    """
    members = specification.members(entry.label)
    if len(members) > 1:
        parts = {one.label: one for one in specification.models}
        return models.ready(Ensemble([module(parts[name], specification) for name in members]))
    zoo = specification.zoo
    made = models.finder(
        entry.model,
        zoo=models.Zoo(folder=Path(zoo.folder), dataset=zoo.dataset, threat=zoo.threat or specification.norm),
    )()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{entry.model!r} returned a {type(made).__name__}; a torch module is needed")
    if entry.mean is not None and entry.std is not None:
        made = models.Normalised(made, mean=entry.mean, std=entry.std, side=None)
    return models.ready(made)


def interface(network: nn.Module, first: Tensor, specification: Specification, precision: str) -> Model:
    """What attacks see of a model: its gradients from a faster copy where one can be made."""
    if not specification.prepare:
        return TorchModel(network)
    try:
        return prepare(network, first, precision=precision)  # type: ignore[arg-type]
    except ValueError as error:
        logger.warning("attacked as it is: %s", error)
        return TorchModel(network)


def all_correct(specification: Specification, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Which images (N, ...) every model classifies as labelled (N,), as a function that returns (N,)."""
    networks = [usable(entry, lambda one: module(one, specification).to(device)) for entry in specification.models]

    def correct(x: Tensor, y: Tensor) -> Tensor:
        right = torch.ones_like(y, dtype=torch.bool)
        for network, entry in zip(networks, specification.models, strict=True):
            here = data.pixels(x[right]).to(device)

            def found(_: ModelEntry, network: nn.Module = network, here: Tensor = here) -> Tensor:
                return predictions(network, here, batch_size=specification.batch_size).cpu()

            if len(here):
                right[right.clone()] = usable(entry, found) == y[right]
        return right

    return correct


def chosen(specification: Specification, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """Which images (N, ...) with labels (N,) a run takes: as a function that returns (N,), None for all; in words."""
    right = None if specification.select == "all" else all_correct(specification, device)
    words = "" if right is None else "classified correctly by all models"
    if not specification.targeted.isdecimal():
        return right, words
    goal = int(specification.targeted)

    def other(x: Tensor, y: Tensor) -> Tensor:
        return y != goal if right is None else right(x, y) & (y != goal)

    own = f"of another class than {goal}"
    return other, f"{words} and {own}" if words else own


def usable(entry: ModelEntry, use: Callable[[ModelEntry], T]) -> T:
    """What `use` makes of the model, or one line that says why it fails."""
    try:
        return use(entry)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise ValueError(f"model {entry.label!r}: {error}") from None
    except Exception as error:  # a model of the user's can fail in any way
        logger.debug("model %r", entry.label, exc_info=True)
        message = " ".join(" ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]).split())
        remedy = "a run looks at 8 images together; take a device with more memory" if exhausted(error) else "mend it"
        raise ValueError(f"model {entry.label!r} fails: {message}; {remedy}, or leave it out") from None
