"""Hugging Face's Trainer with per-example gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from firstorder.attacks import validation
from firstorder.files import write_text
from firstorder.hosts.limits import backwards, warn_unlimited
from firstorder.hosts.scaling import Share
from firstorder.training import GradientMethod, Objective, Weighting, gradient_method
from firstorder.transformers.classifiers import PixelClassifier, Pixels

SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
"""Ways of training in which no process has the gradients of an example."""

STATE = "gradient_method.json"
"""The file of the method's state in a checkpoint."""


class ENGMTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer whose step differentiates per-example losses by ENGM, or by another gradient method.

    Without an objective it is the Trainer of any classifier with `labels` (N,), of text as of images, adapters (LoRA)
    included. With one it trains an image classifier on adversarial examples: `pixel_values` are brought back to [0, 1]
    by the processor's mean and std, and attacked there. Accumulation, clipping, mixed precision, several processes
    (DistributedDataParallel), checkpoints and callbacks stay the Trainer's; accumulated backwards weigh alike.

    Args:
        *args, **kwargs: the Trainer's.
        method: makes the gradient method from the model, or its registered name: "engm", partial(ENGM, alpha=1.0),
            partial(ENGM, alpha="auto"), whose first epoch is the Trainer's.
        objective: makes the adversarial examples and their losses: Vanilla(attack=PGD(...)), TRADES(...).
        pixels: how `pixel_values` are normalised; by default as `processing_class`, the image processor, does it.

    Attributes:
        weighting: what the last backward did.

    Raises:
        ValueError: a loss of the Trainer's own that is not per-example; an objective without a processor; sharded
            models. While training: with an objective, `pixel_values` of images outside [0, 1].

    Source: ENGM, Eq. 5b (with the default method).
    """

    def __init__(
        self,
        *args: Any,
        method: Callable[[nn.Module], GradientMethod] | str = "engm",
        objective: Objective | None = None,
        pixels: Pixels | None = None,
        **kwargs: Any,
    ) -> None:
        self.gradient_method = gradient_method(method)
        self.objective = objective
        self.weighting: Weighting | None = None
        self._engm: GradientMethod | None = None
        self._engm_state: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func returns one loss for a batch; leave it out and override example_losses")
        if self.accelerator.distributed_type in SHARDED or self.args.n_gpu > 1:
            raise ValueError(
                "the gradients of single examples are not to be had from a model that is sharded or replicated by one "
                "process; start one process for each GPU: torchrun --nproc_per_node ..."
            )
        if objective is None:
            return
        if self.args.label_smoothing_factor:
            raise ValueError("an objective has its own loss; set label_smoothing_factor=0")
        if pixels is None and not hasattr(self.processing_class, "image_mean"):
            raise ValueError("an objective attacks images; pass processing_class=the image processor, or pixels=")
        self.pixels = Pixels.of(self.processing_class) if pixels is None else pixels

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where alpha="auto" found no limit, its end warns.

        Raises:
            ValueError: alpha="auto" in a training that ends before it is known.
        """
        output = super().train(*args, **kwargs)
        warn_unlimited(self._engm)
        return output

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The loss (N,) of every example, and the tensor (N, ...) they were computed from, where there is one.

        Override it for another loss: of a language model, sum or average the tokens of each sequence.

        Args:
            model: as the Trainer wraps it, in training mode.
            inputs: a batch on the model's device.
        """
        labels = self._labels(inputs)
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        smoothing = self.args.label_smoothing_factor
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing), None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's, with the method's backward in place of its own."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        share = Share(self.current_gradient_accumulation_steps, self.accelerator.scaler)
        losses = self._plain(model, batch, share) if self.objective is None else self._attacked(model, batch, share)
        loss: Tensor = losses.detach().mean() / self.current_gradient_accumulation_steps
        return loss

    def _plain(self, model: nn.Module, batch: dict[str, Any], share: Share) -> Tensor:
        """The losses (N,) of a batch, differentiated."""
        with self.compute_loss_context_manager():
            losses, used = self.example_losses(model, batch)
        self.weighting = self._method(model).backward(losses, used, scaler=share)
        return losses

    def _attacked(self, model: nn.Module, batch: dict[str, Any], share: Share) -> Tensor:
        """The objective's losses (N,) of a batch of images, differentiated."""
        assert self.objective is not None
        labels, x = self._labels(batch), batch["pixel_values"]
        bare = self.accelerator.unwrap_model(model)
        target, trained = (PixelClassifier(m, self.pixels, resize=False).to(x.device) for m in (bare, model))
        x = self._images(target.pixels(x))
        method = self._method(model)
        with self.compute_loss_context_manager():
            adversarial = self.objective.adversarial(target, x, labels).requires_grad_(method.needs_inputs)
        with self.objective.perturbed(trained, x, adversarial, labels):
            with self.compute_loss_context_manager():
                losses = self.objective.losses(trained, x, adversarial, labels)
            self.weighting = method.backward(losses, adversarial, scaler=share)
        return losses

    def _images(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), within [0, 1] up to the rounding of normalisation, without it.

        Raises:
            ValueError: images further outside.
        """
        slack = max(validation.BOUNDS_TOLERANCE, 4 * torch.finfo(x.dtype).eps)
        low, high = torch.stack(x.aminmax()).tolist()
        if low < -slack or high > 1 + slack:
            raise ValueError(
                f"pixel_values are of images that span [{low:g}, {high:g}], outside [0, 1], if they were normalised by "
                f"mean={self.pixels.mean} and std={self.pixels.std}; pass pixels=Pixels(mean=..., std=...) with those "
                "that the transform used, which for values up to 255 are 0 and 1 / 255"
            )
        return x.clamp(0, 1)

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            raise ValueError(
                "the batch has no labels (N,), one class per example; override ENGMTrainer.example_losses to return "
                "one loss per example"
            )
        return labels

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._engm is not None and self.args.should_save:
            write_text(Path(output_dir) / STATE, json.dumps(self._engm.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STATE).is_file():
            self._engm_state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))

    def _method(self, model: nn.Module) -> GradientMethod:
        """The method of the model as the Trainer wraps it; its state goes on when that changes."""
        if self._engm is None or self._engm.model is not model:
            state = self._engm_state if self._engm is None else self._engm.state_dict()
            method = self.gradient_method(model)
            loader = self.callback_handler.train_dataloader
            if loader is not None and has_length(loader):
                steps, parts = self.state.max_steps, self.args.gradient_accumulation_steps
                total = backwards(steps, parts, len(loader)) if state is None else None  # what is measured goes on
                method.expect(len(loader), total)
            if state is not None:
                method.load_state_dict(state)
            self._engm = method
        return self._engm
