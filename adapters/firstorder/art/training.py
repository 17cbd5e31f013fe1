"""ENGM and its relatives as an ART trainer.

trainer = AdversarialTrainerENGM(classifier, PGD(classifier, eps=8 / 255, eps_step=2 / 255), objective="trades")
trainer.fit(x_train, y_train, nb_epochs=100)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from art.utils import check_and_transform_label_format
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import trange

from firstorder.art import sizes
from firstorder.art.labels import Array, checked
from firstorder.art.models import forward
from firstorder.attacks import validation
from firstorder.hosts.limits import warn_unlimited
from firstorder.hosts.predictions import Predictions
from firstorder.training import CRITERIA, Criterion, GradientMethod, Objective, gradient_method, takes_alpha

logger = logging.getLogger(__name__)


class AdversarialTrainerENGM(Trainer):  # type: ignore[misc]
    """Adversarial training by examplewise normalised gradients (ENGM, Eq. 5b), in the manner of ART's TRADES trainer.

    Args:
        classifier: a `PyTorchClassifier` with an optimizer. Its preprocessing and defences apply; the loss it was
            built with is left to attacks that use it, the objective's is cross-entropy on its logits.
        attack: any untargeted ART attack, ART's own or one of firstorder.art: `generate` makes x'. None where the
            objective has an attack.
        alpha: the largest norm of an example's gradient (of an input's for "n-engm"), for methods that have such a
            limit. None is the method's own default, 5 for "engm"; infinity is plain training; "auto" is a quantile of
            the norms of the first epoch, see `firstorder.training.Limited`. It is measured over several calls of
            `fit` where one is too short for it, and such a call warns.
        objective: "vanilla", "trades" or "mart" on the x' of `attack`; or an `Objective` of firstorder.training, for
            example AWP(base=TRADES(attack=PGD(...))), whose own attack runs on inputs within the `clip_values`.
        beta: the weight of the divergence in "trades" and "mart"; None is the objective's own default.
        method: "engm", "a-engm", "n-engm", "f-engm", "msgd", "mgnc", "sngm", or another registered name
            (`firstorder.training.registry`); or a `GradientMethod` of classifier.model.

    Raises:
        ValueError: another estimator; an attack missing, targeted or superfluous; an unknown objective or method.
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attack: EvasionAttack | None,
        alpha: float | Literal["auto"] | None = None,
        objective: Literal["vanilla", "trades", "mart"] | Objective = "trades",
        *,
        beta: float | None = None,
        method: str | GradientMethod = "engm",
    ) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise ValueError(f"the classifier is a {type(classifier).__name__}; wrap the model in a PyTorchClassifier")
        if classifier.use_amp:
            raise ValueError("use_amp=True is not supported; build the classifier with use_amp=False")
        super().__init__(classifier)
        self.attack = attack
        self.objective = _objective(objective, attack, beta)
        self.method = _method(method, classifier.model, alpha)
        if attack is None and not classifier.all_framework_preprocessing:
            raise ValueError(
                "the objective's attack differentiates through the preprocessing, but a defence of this classifier is "
                "not in PyTorch; use its PyTorch version, or an ART attack with objective='vanilla', 'trades' or 'mart'"
            )
        self._network = _Network(classifier)
        self._generator: torch.Generator | None = None

    def fit(
        self,
        x: Array,
        y: Array,
        validation_data: tuple[Array, Array] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: LRScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        """Train on arrays, shuffled by NumPy's global generator; the last batch may be smaller.

        Args:
            x: inputs (N, ...) as the classifier takes them.
            y: labels, indices (N,), one-hot rows or, for "vanilla" and "trades", probabilities (N, K).
            validation_data: (x, y) whose accuracy without attack is logged after every epoch.
            batch_size: the number of examples in a batch.
            nb_epochs: the number of passes over the data.
            scheduler: of the learning rate; it steps after every epoch.
            kwargs: `verbose=False` hides the progress bar; others have no effect, as in ART's TRADES trainer.

        Raises:
            ValueError: no optimizer; a scheduler that is not PyTorch's; no inputs; labels of another form, number or
                class; a batch size or a number of epochs below 1.
        """
        validation.count("batch_size", batch_size)
        y = self._rows(x, y)
        self._target(y)  # which refuses what cannot be trained on
        order = np.arange(len(x))

        def batches() -> Iterator[tuple[Array, Array]]:
            np.random.shuffle(order)
            for start in range(0, len(x), batch_size):
                chosen = order[start : start + batch_size]
                yield x[chosen], y[chosen]

        self.method.expect(-(-len(x) // batch_size))
        self._train(batches, nb_epochs, scheduler, validation_data, **kwargs)

    def fit_generator(
        self, generator: Any, nb_epochs: int = 20, scheduler: LRScheduler | None = None, **kwargs: Any
    ) -> None:
        """Train on the batches (x, y) of an `art.data_generators.DataGenerator` of known size; else as `fit`.

        Raises:
            ValueError: a generator without a size; no optimizer; a scheduler that is not PyTorch's; a number of epochs
                below 1; before its update, a batch as `fit` refuses it.
        """
        if generator.size is None:
            raise ValueError("the generator's size is None; give it the number of examples")
        count = -(-generator.size // generator.batch_size)
        self.method.expect(count)
        self._train(lambda: (generator.get_batch() for _ in range(count)), nb_epochs, scheduler, None, **kwargs)

    def predict(self, x: Array, **kwargs: Any) -> Array:
        """The classifier's predictions (N, K) for x (N, ...); `kwargs` go to its `predict`."""
        scores: Array = self._classifier.predict(x, **kwargs)
        return scores

    def _train(
        self,
        batches: Callable[[], Iterable[tuple[Array, Array]]],
        nb_epochs: int,
        scheduler: LRScheduler | None,
        validation_data: tuple[Array, Array] | None,
        *,
        verbose: bool = True,
        **_: Any,
    ) -> None:
        validation.count("nb_epochs", nb_epochs)
        if self._classifier.optimizer is None:
            raise ValueError("the classifier has no optimizer; build it with PyTorchClassifier(..., optimizer=...)")
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise ValueError(f"the scheduler is a {type(scheduler).__name__}; pass one of torch.optim.lr_scheduler")
        if self.attack is not None and "verbose" in self.attack.attack_params:
            self.attack.set_params(verbose=False)
        if validation_data is not None:
            rows = torch.as_tensor(self._rows(*validation_data))
            right = validation.labels(rows, len(rows), rows.device).indices.numpy()
        for epoch in trange(nb_epochs, desc="Adversarial Training ENGM - Epochs", disable=not verbose):
            start = time.time()
            total, correct, n = np.sum([self._batch(x, y) for x, y in batches()], axis=0)
            if scheduler is not None:
                scheduler.step()
            message = f"epoch: {epoch} time(s): {time.time() - start:.1f} loss: {total / n:.4f} acc: {correct / n:.4f}"
            if validation_data is not None:
                message += f" acc(val): {np.mean(self.predict(validation_data[0]).argmax(1) == right):.4f}"
            logger.info(message)
        warn_unlimited(self.method)

    def _batch(self, x: Array, y: Array) -> tuple[float, int, int]:
        """One update: the sum of the losses, the number of x' classified correctly, and that of the examples."""
        classifier, network = self._classifier, self._network
        y = self._rows(x, y)
        goals = self._target(y)
        classifier._model.train(mode=False)
        attacked = self._adversarial(x, y, goals)
        x, rows = classifier._apply_preprocessing(x.copy(), y, fit=True)
        attacked, _ = classifier._apply_preprocessing(attacked, y, fit=True)
        clean, adversarial = self._tensor(x), self._tensor(attacked).requires_grad_(self.method.needs_inputs)
        target = self._target(rows)
        inputs = (network, clean, adversarial, target)

        classifier._model.train(mode=True)
        classifier.optimizer.zero_grad()
        with self.objective.perturbed(*inputs) if isinstance(self.objective, Objective) else nullcontext():
            with Predictions(network, adversarial) as predictions:
                losses = self.objective.losses(*inputs)
            self.method.backward(losses, adversarial)
            predicted = predictions.classes()
        classifier.optimizer.step()
        classifier._model.train(mode=False)
        right = target if target.ndim == 1 else target.argmax(1)
        return float(losses.detach().sum()), int((predicted == right).sum()), len(losses)

    def _adversarial(self, x: Array, y: Array, goals: Tensor) -> Array:
        """x' (N, ...) for x (N, ...) and rows y (N, K), as `goals` for an objective, in the classifier's words."""
        classifier = self._classifier
        if self.attack is not None:
            generated: Array = self.attack.generate(x.copy(), y=y)
            return generated
        if self._generator is None or self._generator.device.type != classifier.device.type:
            self._generator = torch.Generator(classifier.device).manual_seed(torch.initial_seed())
        last = x.ndim == 4 and not classifier.channels_first
        images, bounds = self._tensor(x), sizes.bounds(classifier, last)
        assert isinstance(self.objective, Objective)
        found = self.objective.adversarial(
            _Whole(classifier, last),
            images.movedim(-1, 1) if last else images,
            goals,
            bounds=bounds,
            generator=self._generator,
        )
        array: Array = (found.movedim(1, -1) if last else found).cpu().numpy()
        return array

    def _rows(self, x: Array, y: Array) -> Array:
        """Rows (N, K) for labels of x (N, ...) of any form.

        Raises:
            ValueError: no x; y of another form or number, or that are no classes of the classifier.
        """
        if not len(x):
            raise ValueError(f"x has shape {np.shape(x)}; pass at least one example")
        classes, given = self._classifier.nb_classes, checked(y, len(x))
        if given.ndim == 1:
            validation.classes(torch.as_tensor(given), classes)
        elif given.shape[1] != classes:
            raise ValueError(
                f"y has shape {given.shape}, but the classifier has {classes} classes; pass one-hot rows "
                f"({len(x)}, {classes}) or indices ({len(x)},)"
            )
        rows: Array = check_and_transform_label_format(given, nb_classes=classes)
        return rows

    def _target(self, rows: Array) -> Tensor:
        """Class indices (N,) for one-hot rows (N, K), or rows of probabilities where the objective takes them."""
        y, device = torch.as_tensor(rows), self._classifier.device
        if isinstance(self.objective, Criterion):
            found = self.objective.labels(y, len(y), device)
        else:
            found = validation.labels(y, len(y), device, ties=True)
        return found.indices if found.rows is None else found.rows

    def _tensor(self, x: Array) -> Tensor:
        weight = next(self._classifier.model.parameters())
        return torch.as_tensor(x, dtype=weight.dtype, device=self._classifier.device)


class _Network(nn.Module):
    """The classifier's model, from preprocessed inputs to logits (N, K)."""

    def __init__(self, classifier: PyTorchClassifier) -> None:
        super().__init__()
        self.layers = classifier._model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)[-1]
        return logits


class _Whole(nn.Module):
    """The classifier with its preprocessing, from images with the channels in front where its own have them `last`."""

    def __init__(self, classifier: PyTorchClassifier, last: bool) -> None:
        super().__init__()
        self.layers, self._run, self._last = classifier._model, forward(classifier), last

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x.movedim(1, -1) if self._last else x)


def _objective(objective: str | Objective, attack: EvasionAttack | None, beta: float | None) -> Objective | Criterion:
    if isinstance(objective, Objective):
        if attack is not None or beta is not None:
            raise ValueError("the objective has an attack and parameters of its own; leave attack and beta None")
        return objective
    validation.choice("objective", objective, tuple(CRITERIA))
    if not isinstance(attack, EvasionAttack):
        raise ValueError(f"the attack is a {type(attack).__name__}; objective={objective!r} needs an ART EvasionAttack")
    if getattr(attack, "targeted", False):
        raise ValueError("the attack is targeted; training needs targeted=False")
    if objective == "vanilla" and beta is not None:
        raise ValueError("objective='vanilla' has no beta; leave it None")
    return CRITERIA[objective](**({} if beta is None else {"beta": beta}))


def _method(method: str | GradientMethod, model: nn.Module, alpha: float | Literal["auto"] | None) -> GradientMethod:
    if isinstance(method, GradientMethod):
        if method.model is not model or alpha is not None:
            raise ValueError("a method that is given whole must be of classifier.model and have its own alpha")
        return method
    return gradient_method(method)(model, **({} if alpha is None or not takes_alpha(method) else {"alpha": alpha}))
