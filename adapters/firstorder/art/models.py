"""ART estimators as models to attack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from firstorder.attacks import Evaluation, Loss, Model, Prepared, TorchModel, preserved, validation
from firstorder.attacks import prepare as prepare_module
from firstorder.attacks.models import Wrapper
from firstorder.attacks.prepared import Precision
from firstorder.attacks.validation import Labels

PREPARED = "firstorder_prepared"
"""Where an estimator that `prepare` returned has its prepared model."""


def as_model(estimator: Any) -> Model:
    """An ART estimator as a model to attack.

    A PyTorch classifier whose preprocessing is differentiable in PyTorch stays on its device, without
    a NumPy round trip; every other estimator is asked for `loss_gradient` and `predict`.
    """
    if isinstance(known := getattr(estimator, PREPARED, None), Prepared):
        return known
    if _differentiable(estimator):
        return TorchModel(forward(estimator), module=estimator.model, loss=_OwnLoss(estimator))
    return EstimatorModel(estimator)


def prepare(estimator: PyTorchClassifier, example: np.ndarray[Any, Any], *, precision: Precision = "float32") -> Any:
    """A view of `estimator` whose gradients come, for the attacks of `firstorder.art`, from a faster copy of its model.

    It shares the model and everything else with `estimator`, predicts as that does, and the model itself decides on
    what an attack finds. See `firstorder.attacks.prepare`; later changes of the model are not seen by the copy.

    Args:
        estimator: a PyTorch classifier, its preprocessing differentiable in PyTorch.
        example: a few inputs as they will be attacked, shape (N, ...), channels first.
        precision: of the copy.

    Raises:
        ValueError: another kind of estimator, or a model that cannot be prepared.
    """
    if not _differentiable(estimator):
        raise ValueError(
            f"{type(estimator).__name__} cannot be prepared; take a PyTorchClassifier with preprocessing in PyTorch, "
            "neither recurrent nor with mixed precision of its own"
        )
    weight = next(estimator.model.parameters(), None)
    x = torch.as_tensor(example, dtype=None if weight is None else weight.dtype, device=estimator.device)
    view = object.__new__(type(estimator))  # copy.copy would have ART write the model to a file and read it again
    vars(view).update(vars(estimator))
    setattr(view, PREPARED, prepare_module(_Whole(estimator), x, precision=precision, loss=_OwnLoss(estimator)))
    return view


def _differentiable(estimator: Any) -> bool:
    return (
        isinstance(estimator, PyTorchClassifier)
        and estimator.all_framework_preprocessing
        and type(estimator).loss_gradient is PyTorchClassifier.loss_gradient
        and not estimator.is_rnn
        and not estimator.use_amp
        # An expectation over transformations makes several examples of each, for which the loop has no place.
        and all(getattr(step, "nb_samples", 1) == 1 for step in estimator.preprocessing_operations)
    )


def predictions(estimator: Any, x: np.ndarray[Any, Any], batch_size: int) -> np.ndarray[Any, Any]:
    """The estimator's predictions (N, K) of x (N, ...); the mean where its preprocessing makes several samples of x."""
    scores = np.asarray(estimator.predict(x, batch_size=batch_size))
    if len(scores) > len(x) > 0 and len(scores) % len(x) == 0:
        scores = scores.reshape(len(x), -1, *scores.shape[1:]).mean(1)
    return scores


class EstimatorModel(Model):
    """Any ART classifier with loss gradients, through NumPy."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator

    def logits(self, x: Tensor) -> Tensor:
        """The estimator's predictions (N, K), logits or probabilities."""
        scores = predictions(self._estimator, _array(x), max(len(x), 1))
        return torch.as_tensor(scores, dtype=x.dtype, device=x.device)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        if loss is not None:
            raise ValueError(
                f"{type(self._estimator).__name__} has the gradient of its own loss at single images only, the attack "
                "asks for that of the mean logits of copies; take a PyTorchClassifier, or another attack"
            )
        targets = labels if labels.ndim == 2 else F.one_hot(labels, self._estimator.nb_classes)
        gradient = self.by_input(x, _array(targets.to(x.dtype)))
        return Evaluation(gradient, self.logits(x) if logits else None)

    def by_input(self, x: Tensor, y: Any) -> Tensor:
        """The gradient of every loss by its example of x (N, ...), for y as the estimator takes it."""
        with torch.enable_grad():
            gradient = self._estimator.loss_gradient(_array(x), y)
        gradient = torch.tensor(np.asarray(gradient), dtype=x.dtype, device=x.device)
        if getattr(getattr(self._estimator, "loss", None), "reduction", None) == "mean":
            gradient *= len(x)  # a PyTorch loss that averages over the batch
        return gradient.reshape(x.shape)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restores the modes, buffers and `.grad` of PyTorch modules, which `loss_gradient` overwrites."""
        members = [self._estimator, *getattr(self._estimator, "classifiers", [])]
        modules = [m for e in members if isinstance(m := getattr(e, "model", None), nn.Module)]
        gradients = [(p, p.grad) for module in modules for p in module.parameters()]
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(preserved(module))
            try:
                for parameter, _ in gradients:
                    parameter.grad = None
                yield
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        if loss is not None:
            raise ValueError(
                f"loss={loss!r}: {type(self._estimator).__name__} has the gradient of its own loss only; leave it None"
            )
        if labels.columns not in (None, self._estimator.nb_classes):
            raise ValueError(f"y has {labels.columns} columns, the estimator {self._estimator.nb_classes} classes")
        validation.classes(labels.indices, self._estimator.nb_classes)


class Cast(Wrapper):
    """A model whose weights have another dtype than the examples, which keep theirs.

    Args:
        model: the model.
        dtype: what it takes.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__(model)
        self._dtype = dtype

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x.to(self._dtype))

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        found = super().gradient(x.to(self._dtype), labels, loss, logits=logits)
        return found._replace(gradient=found.gradient.to(x.dtype))

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        super().check(x.to(self._dtype), labels, loss)

    def footprint(self, x: Tensor) -> int:
        return super().footprint(x.to(self._dtype))


class ChannelsLast(Wrapper):
    """A classifier of images (N, H, W, C), for attacks, whose images are (N, C, H, W)."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) at x (N, C, H, W)."""
        return super().logits(x.movedim(1, -1))

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        found = super().gradient(x.movedim(1, -1), labels, loss, logits=logits)
        return found._replace(gradient=found.gradient.movedim(-1, 1))

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        super().check(x.movedim(1, -1), labels, loss)

    def footprint(self, x: Tensor) -> int:
        return super().footprint(x.movedim(1, -1))


class GivenRows(Wrapper):
    """A model whose own loss gets rows of labels as they were given: of several classes at once, soft, or anything.

    Args:
        model: the model.
        rows: (N, K), for the N examples that are attacked.
    """

    def __init__(self, model: Model, rows: Tensor) -> None:
        super().__init__(model)
        self._rows = rows

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        rows = torch.cat([self._rows] * (len(x) // len(self._rows)))
        return super().gradient(x, rows, loss, logits=logits)

    def take(self, index: Tensor) -> Model:
        return GivenRows(self._model.take(index), self._rows[index])

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        super().check(x, Labels(labels.indices, self._rows, self._rows.shape[1]), loss)


class _OwnLoss:
    """The loss a PyTorch classifier was built with, per example."""

    def __init__(self, estimator: PyTorchClassifier) -> None:
        self._estimator = estimator
        self._criterion = copy.copy(estimator.loss)
        if hasattr(self._criterion, "reduction"):
            self._criterion.reduction = "none"

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
        values: Tensor = self._criterion(logits, self._estimator.reduce_labels(rows.to(logits.dtype)))
        # A criterion without a reduction to switch off is taken to average over the batch.
        return values.expand(len(logits)) if values.ndim == 0 else values.reshape(len(logits), -1).mean(1)


class _Whole(nn.Module):
    """The preprocessing and the model of a classifier, copied without the rest of it."""

    def __init__(self, estimator: PyTorchClassifier) -> None:
        super().__init__()
        self.model = estimator.model
        self.training = estimator.model.training
        self.preprocess: Callable[[Tensor], Tensor] = lambda x: estimator._apply_preprocessing(
            x, y=None, fit=False, no_grad=False
        )[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...)."""
        logits: Tensor = self.model(self.preprocess(x))
        return logits


def forward(estimator: PyTorchClassifier) -> Callable[[Tensor], Tensor]:
    """Inputs (N, ...) through the preprocessing to logits (N, K), differentiably."""

    def run(x: Tensor) -> Tensor:
        inputs, _ = estimator._apply_preprocessing(x, y=None, fit=False, no_grad=False)
        logits: Tensor = estimator._model(inputs)[-1]
        return logits

    return run


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = x.detach().cpu().numpy()
    return array
