"""What a foolbox attack is asked: the module behind the model, tensors instead of eagerpy's, labels or targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import eagerpy as ep
import foolbox
import torch
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from foolbox.devutils import atleast_kd
from foolbox.distances import LpDistance
from torch import Tensor, nn

from firstorder.attacks import broken, predicted, validation


@dataclass(frozen=True, kw_only=True)
class Query:
    """A call of a foolbox attack, checked.

    Attributes:
        model: foolbox's model, callable on tensors.
        module: the module behind it.
        x: the inputs (N, ...), detached.
        labels: true labels, or targets where `targeted`: indices (N,) or rows (N, K).
        restored: turns a tensor into what the inputs were.
    """

    model: Any
    module: nn.Module
    x: Tensor
    labels: Any
    targeted: bool
    restored: Callable[[Tensor], Any]


def query(model: Any, inputs: Any, criterion: Any) -> Query:
    """The call in the core's words.

    Raises:
        ValueError: inputs, a criterion or a model that an attack cannot work with; the message names the remedy.
    """
    module = module_of(model)
    wrapped = isinstance(inputs, ep.Tensor)
    x = validation.tensor(inputs.raw if wrapped else inputs)
    _require_bounds(x, model)
    labels, targeted = _aim(criterion)
    validation.labels(labels, len(x), x.device)
    restored = ep.astensor if wrapped else _itself
    return Query(model=model, module=module, x=x, labels=labels, targeted=targeted, restored=restored)


def module_of(model: Any) -> nn.Module:
    """The module behind a `foolbox.PyTorchModel`, or behind foolbox's wrappers of one.

    foolbox keeps it in the closure of the function that it calls alone.
    """
    inner = model
    while isinstance(inner, foolbox.Model) and not isinstance(inner, foolbox.PyTorchModel):
        inner = getattr(inner, "_model", None)
    if not isinstance(inner, foolbox.PyTorchModel):
        raise ValueError(
            f"the model is a {type(model).__name__}; attacks need a PyTorch model: pass "
            "foolbox.PyTorchModel(module, bounds=(0, 1))"
        )
    cells = [cell.cell_contents for cell in getattr(inner._model, "__closure__", None) or ()]
    modules = [value for value in cells if isinstance(value, nn.Module)]
    if len(modules) != 1:
        raise ValueError(
            "the module behind the PyTorchModel cannot be seen, so that its state could not be preserved; make the "
            "model as foolbox.PyTorchModel(module, bounds=(0, 1))"
        )
    return modules[0]


def _require_bounds(x: Tensor, model: Any) -> None:
    """Require inputs within the model's bounds, without the slack that foolbox does not give either."""
    if not x.numel():
        raise ValueError(f"the inputs have shape {tuple(x.shape)}; foolbox needs at least one")
    infinity = x.new_tensor(torch.inf)
    validation.images(x, -infinity, infinity)
    low, high = model.bounds
    if float(x.amin()) < low or float(x.amax()) > high:
        raise ValueError(
            f"the inputs span [{x.amin():g}, {x.amax():g}], outside the bounds [{low:g}, {high:g}] of the model; "
            "rescale them, clamp them where that is rounding, or give foolbox.PyTorchModel the bounds they have"
        )


def _aim(criterion: Any) -> tuple[Any, bool]:
    """The labels or targets of a criterion, and whether they are targets."""
    kind = type(criterion)
    if kind is Broken:
        return criterion.labels, criterion.targeted
    if kind is Misclassification:
        return criterion.labels.raw, False
    if kind is TargetedMisclassification:
        return criterion.target_classes.raw, True
    if isinstance(criterion, Criterion):
        raise ValueError(
            f"the criterion {criterion!r} is not supported; pass foolbox.criteria.Misclassification(labels) or "
            "TargetedMisclassification(target_classes)"
        )
    return criterion.raw if isinstance(criterion, ep.Tensor) else criterion, False


class Broken(Criterion):  # type: ignore[misc]
    """Misclassified, or classified as the target, by logits that are all finite.

    Args:
        labels: true labels, or targets if `targeted`: indices (N,) or rows (N, K).
        targeted: whether they are targets.
    """

    def __init__(self, labels: Tensor, *, targeted: bool) -> None:
        super().__init__()
        self.labels, self.targeted = labels, targeted

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.labels!r}, targeted={self.targeted})"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        """Which are, (N,), of outputs (N, K)."""
        wrapped = isinstance(outputs, ep.Tensor)
        logits = outputs.raw if wrapped else outputs
        labels = validation.labels(self.labels, len(logits), logits.device).indices
        found = broken(predicted(logits), labels, targeted=self.targeted)
        return ep.astensor(found) if wrapped else found


class Within(LpDistance):  # type: ignore[misc]
    """foolbox's distance, whose clipping returns what is within the ball as it is and keeps to the bounds.

    foolbox's own adds the perturbation to the input again, which rounding can carry beyond both.
    """

    def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
        """Perturbed inputs (N, ...) moved towards the references (N, ...) into the ball of radius `epsilon`."""
        (x, a), restore = ep.astensors_(references, perturbed)
        clipped = super().clip_perturbation(x, a, epsilon)
        between = ep.minimum(ep.maximum(clipped, ep.minimum(x, a)), ep.maximum(x, a))
        return restore(ep.where(atleast_kd(self(x, a) <= epsilon, x.ndim), a, between))


def _itself(x: Tensor) -> Tensor:
    return x
