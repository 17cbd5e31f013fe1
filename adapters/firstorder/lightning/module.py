"""The mixin. It imports neither `lightning` nor `pytorch_lightning`, and so serves modules of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from firstorder.hosts.limits import backwards, warn_unlimited
from firstorder.hosts.scaling import Share
from firstorder.training import GradientMethod, Weighting, gradient_method

STATE = "firstorder.gradient_method"
"""The key of the method's state in a checkpoint."""


class ENGMModule:
    """A LightningModule that differentiates per-example losses by ENGM, or by another gradient method.

    Put it before LightningModule among the bases. `training_step` returns one loss per example, (N,), alone or as
    `loss` of a dictionary; everything else stays Lightning's: automatic or manual optimisation, accumulation, clipping,
    mixed precision, several processes (DistributedDataParallel), checkpoints, loggers. Mixed precision and accumulation
    scale the losses before the backward; the weights do not depend on either.

    Attributes:
        gradient_method: makes the method from the model, or its registered name: "engm", partial(ENGM, alpha=1.0),
            partial(ENGM, alpha="auto"), whose first epoch is Lightning's. Set it in the class or in `__init__`.
        weighting: what the last backward did, for logging: `self.weighting.weights.mean()`.

    Source: ENGM, Eq. 5b (with the default method).
    """

    gradient_method: Callable[[nn.Module], GradientMethod] | str = "engm"
    weighting: Weighting | None = None
    _engm: GradientMethod | None = None
    _engm_state: dict[str, Any] | None = None
    _engm_inputs: Tensor | Sequence[Tensor] | None = None

    def per_example(self, losses: Tensor, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """The losses (N,) themselves, for `training_step` to return where the method needs the inputs too.

        Args:
            losses: one per example, (N,).
            inputs: the tensors (N, ...) that they were computed from; `AENGM` and `NENGM` differentiate by them: call
                requires_grad_() on them before the forward.
        """
        self._engm_inputs = inputs
        return losses

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: fill the gradients from the losses (N,).

        Raises:
            ValueError: a loss that is not per-example; a strategy that shards the model; alpha="auto" in a training
                that ends before it is known.
        """
        inputs, self._engm_inputs = self._engm_inputs, None
        if loss.ndim != 1:
            raise ValueError(
                f"training_step returned a loss of shape {tuple(loss.shape)}; return one loss per example, (N,): "
                "F.cross_entropy(logits, y, reduction='none')"
            )
        host: Any = self
        scaler = getattr(host.trainer.precision_plugin, "scaler", None)
        parts = int(host.trainer.accumulate_grad_batches) if host.automatic_optimization else 1
        share = Share(parts, scaler)
        scale = float(share.scale(loss.new_ones(())))
        losses = loss if scale == 1 else loss / scale  # Lightning has scaled them already
        self.weighting = self._differentiator().backward(losses, inputs, scaler=share)

    def on_train_end(self) -> None:
        """Lightning's hook: a training in which alpha="auto" found no limit warns."""
        warn_unlimited(self._engm)
        above: Any = super()
        above.on_train_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: the method's state goes with the checkpoint."""
        if self._engm is not None:
            checkpoint[STATE] = self._engm.state_dict()
        above: Any = super()
        above.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: the method goes on from the checkpoint's state."""
        self._engm, self._engm_state = None, checkpoint.get(STATE)
        above: Any = super()
        above.on_load_checkpoint(checkpoint)

    def _differentiator(self) -> GradientMethod:
        """The method of the model as the strategy holds it."""
        host: Any = self
        model = host.trainer.strategy.model
        if self._engm is None or self._engm.model is not model:
            if model is not self and not isinstance(model, DistributedDataParallel):
                raise ValueError(
                    f"{type(host.trainer.strategy).__name__} wraps the model in a {type(model).__name__}, whose "
                    'examples have no gradients of their own; train with strategy="auto" or "ddp"'
                )
            state = self._engm_state if self._engm is None else self._engm.state_dict()
            method = gradient_method(self.gradient_method)(model)
            if host.trainer.num_training_batches != math.inf:
                total = self._total() if state is None else None  # what has been measured goes on
                method.expect(int(host.trainer.num_training_batches), total)
            if state is not None:
                method.load_state_dict(state)
            self._engm = method
        return self._engm

    def _total(self) -> int | None:
        """How many backwards of this process the training has at most, in epochs of known length; None if unknown."""
        host: Any = self
        trainer = host.trainer
        if trainer.fast_dev_run or not host.automatic_optimization:  # manual backwards are the user's to count
            return None
        epoch, limits = int(trainer.num_training_batches), []
        if trainer.max_epochs != -1:
            limits.append(epoch * trainer.max_epochs)
        if trainer.max_steps != -1:
            schedules = [getattr(callback, "scheduling", {}).values() for callback in trainer.callbacks]
            most = max([trainer.accumulate_grad_batches, *(parts for schedule in schedules for parts in schedule)])
            limits.append(backwards(trainer.max_steps, most, epoch))
        return min(limits, default=None)
