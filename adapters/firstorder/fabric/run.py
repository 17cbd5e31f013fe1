"""A run of training: what changes from step to step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from firstorder.attacks import Prepared, prepare
from firstorder.attacks.models import preserved
from firstorder.attacks.validation import labels
from firstorder.fabric.batches import Order, Pairs, Purpose, generator, load, seeded, size
from firstorder.fabric.checkpoint import BEST, LAST, load_weights, save_state, save_weights
from firstorder.fabric.identity import identity
from firstorder.fabric.launch import scaler, summed
from firstorder.fabric.logs import EPOCHS, GRADIENTS, STEPS, Log
from firstorder.fabric.recipe import Recipe
from firstorder.fabric.robustness import Robustness, evaluate
from firstorder.hosts.predictions import Predictions
from firstorder.hosts.scaling import Share
from firstorder.hosts.transfer import ahead
from firstorder.training import GradientStatistics, gradient_method, gradient_statistics
from firstorder.training.baselines import Global

Progress = Callable[[Mapping[str, float]], None]
"""Called with `step` and `steps` after every step, and with the epoch's row too after every epoch."""


@dataclass(frozen=True)
class Best:
    """The epoch, counted from 1, of the highest robust accuracy on the validation examples; the first of equals."""

    epoch: int
    validation: Robustness


class Run:
    """What changes during a run."""

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        folder: Path,
        model: nn.Module,
        train: Pairs,
        validation: Pairs,
        others: Mapping[str, Pairs],
        *,
        workers: int,
        log_every: int,
    ) -> None:
        self.fabric, self.recipe, self.folder = fabric, recipe, folder
        self.train, self.validation, self.workers, self.log_every = train, validation, workers, log_every
        self.order = Order(
            examples=size(train),
            batch_size=recipe.batch_size,
            parts=fabric.world_size * recipe.accumulate,
            seed=recipe.seed,
            groups=getattr(train, "groups", ()) if hasattr(train, "window") else (),
            window=getattr(train, "window", 1),
        )
        self.bare = model
        self.model: Any
        self.model, self.optimizer = fabric.setup(model, recipe.optimizer(model.parameters()))
        self.scaler = scaler(fabric)
        self.method = gradient_method(recipe.method)(self.model)
        if isinstance(self.method, Global) and recipe.accumulate > 1:
            raise ValueError(
                f"{type(self.method).__name__} needs the norm of the whole batch's gradient; set accumulate=1"
            )
        self.total = self.order.steps * recipe.epochs
        self.method.expect(self.order.steps * recipe.accumulate, self.total * recipe.accumulate)
        self.schedule = LambdaLR(self.optimizer.optimizer, lambda step: recipe.schedule(step / self.total))
        self.step = 0
        self.copy: Prepared | None = None
        self.best: Best | None = None
        self.sums = torch.zeros(4, dtype=torch.float64, device=fabric.device)
        if not size(validation):
            raise ValueError("there are no validation examples; hold some out of the training set")
        self.probe = next(load(validation, [torch.arange(min(size(validation), 8))]))[0].to(fabric.device)
        used = {**others, "training": train, "validation": validation}
        self.identity = identity(recipe, model, self.method, self.optimizer.optimizer, self.order, used, fabric)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take up what a state file holds.

        Raises:
            ValueError: the weights of the best epoch are missing or damaged.
        """
        if state is None:
            return
        if state["best"] is not None:
            load_weights(self.folder / BEST)  # which the run gives back if no later epoch is better
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.method.load_state_dict(state["method"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = state["step"]
        if state["best"] is not None:
            self.best = Best(state["best"]["epoch"], Robustness(**state["best"]["validation"]))
        if self.fabric.is_global_zero:
            self.sums.copy_(state["sums"])

    def go(self, progress: Progress, *, tensorboard: bool) -> Best:
        """Train to the end."""
        zero = self.fabric.is_global_zero
        loggers = self.fabric.loggers
        log = Log(self.folder, step=self.step, tensorboard=tensorboard, loggers=loggers) if zero else None
        try:
            while self.step < self.total:
                epoch, first = divmod(self.step, self.order.steps)
                start = time.monotonic()
                for row in self._epoch(epoch, first):
                    if log is not None and row is not None:
                        log.scalars(STEPS, row)
                    progress({"step": self.step, "steps": self.total})
                    if self.recipe.save and self.step % self.recipe.save == 0 and self.step % self.order.steps:
                        self._save(log)
                found = self._finish(epoch, log)
                if log is not None:
                    log.scalars(EPOCHS, {**found, "seconds": time.monotonic() - start})
                self._save(log)
                progress({"steps": self.total, **found})
            if zero:
                save_weights(self.folder / LAST, self.bare)
        finally:
            if log is not None:
                log.close()
        self.fabric.barrier()
        assert self.best is not None
        return self.best

    def _epoch(self, epoch: int, first: int) -> Iterator[dict[str, float] | None]:
        """Run the steps of an epoch from `first` on; a row of the log, or None, after each."""
        accumulate, rank = self.recipe.accumulate, self.fabric.global_rank
        mine = self.order.indices(epoch)[first:, rank * accumulate : (rank + 1) * accumulate]
        batches = ahead(load(self.train, list(mine.flatten(0, 1)), workers=self.workers), self.fabric.device)
        for _ in range(len(mine)):
            self.model.train()
            self.optimizer.zero_grad()
            rate = self.optimizer.optimizer.param_groups[0]["lr"]
            sums = torch.zeros_like(self.sums)
            for part in range(accumulate):
                x, y = next(batches)
                sums += self._part(x, y, part)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            self.sums += sums
            yield self._row(sums, epoch, rate) if self.step % self.log_every == 0 else None

    def _part(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """One backward; the sums of losses, correct predictions and weights, and the count of weights below 1."""
        recipe, fabric, device = self.recipe, self.fabric, self.fabric.device
        slot = fabric.global_rank * recipe.accumulate + part
        key = (recipe.seed, Purpose.STEP, self.step, slot)
        source = generator(device, *key)
        if recipe.augment is not None:
            x = recipe.augment(x, source)
        objective = recipe.objective.scaled(recipe.budget((self.step + 1) / self.total))
        with seeded(device, recipe.seed, Purpose.LAYERS, self.step, slot):
            with self._attacking(), self._finite():
                adversarial = objective.adversarial(self._attacked(), x, y, bounds=recipe.bounds, generator=source)
            adversarial.requires_grad_(self.method.needs_inputs)
            with (
                fabric.no_backward_sync(self.model, enabled=part + 1 < recipe.accumulate),
                objective.perturbed(self.model, x, adversarial, y),
            ):
                with Predictions(self.model, adversarial) as predictions:
                    losses = objective.losses(self.model, x, adversarial, y)
                outcome = self.method.backward(losses, adversarial, scaler=Share(recipe.accumulate, self.scaler))
                correct = predictions.classes() == labels(y, len(x), device, ties=True).indices
        columns = (losses.detach(), correct, outcome.weights, outcome.weights < 1)
        return torch.stack([column.sum(dtype=torch.float64) for column in columns])

    def _attacked(self) -> nn.Module | Prepared:
        """What the inner attack sees: the model, or its copy with the weights of this step."""
        if not self.recipe.prepare:
            return self.bare
        if self.copy is None:
            self.copy = prepare(self.bare, self.probe)
        else:
            self.copy.refresh()
        return self.copy

    def _attacking(self) -> AbstractContextManager[Any]:
        """Autocast for the inner attack, except in float16, where gradients by the input vanish."""
        return self.fabric.autocast() if self.scaler is None else nullcontext()

    def _row(self, sums: Tensor, epoch: int, rate: float) -> dict[str, float]:
        loss, robust, weight, clipped = self._shares(sums, self.recipe.batch_size)
        row = {"epoch": epoch + 1, "lr": rate, "loss": loss, "robust": robust, "weight": weight, "clipped": clipped}
        state = {key: value for key, value in self.method.state_dict().items() if not isinstance(value, list)}
        return {"step": self.step, **row, **state}

    def _shares(self, sums: Tensor, examples: int) -> list[float]:
        shares: list[float] = (summed(self.fabric, sums) / examples).tolist()
        return shares

    def _finish(self, epoch: int, log: Log | None) -> dict[str, float]:
        """What is measured after an epoch, and the best weights so far."""
        recipe = self.recipe
        loss, robust, weight, clipped = self._shares(self.sums, self.order.steps * recipe.batch_size)
        self._agree()
        self._require_finite()
        self.sums.zero_()
        row: dict[str, float] = {"step": self.step, "epoch": epoch + 1, "loss": loss, "robust": robust}
        row |= {"weight": weight, "clipped": clipped}
        found: Robustness | None = None
        if (epoch + 1) % recipe.validate == 0 or epoch + 1 == recipe.epochs:
            found = self._validated()
            if self.best is None or found.certain > self.best.validation.certain:
                self.best = Best(epoch + 1, found)
                if self.fabric.is_global_zero:
                    save_weights(self.folder / BEST, self.bare)
        row["validation_natural"], row["validation_robust"] = (
            (math.nan, math.nan) if found is None else (found.natural, found.robust)
        )
        if recipe.diagnose and log is not None:
            statistics, other = self._diagnose()
            row |= {"mu": statistics.mean, "sigma2": statistics.variance, "correlation": statistics.correlation}
            row |= {"mu_training": other.mean, "sigma2_training": other.variance}
            row["correlation_training"] = other.correlation
            pairs = zip(statistics.norms.tolist(), statistics.input_norms.tolist(), strict=True)
            log.rows(GRADIENTS, [{"step": self.step, "norm": norm, "input_norm": size} for norm, size in pairs])
        return row

    def _validated(self) -> Robustness:
        recipe = self.recipe
        with self._finite():
            return evaluate(
                self.fabric,
                self.bare,
                self.validation,
                recipe.judge,
                bounds=recipe.bounds,
                seed=recipe.seed,
                workers=self.workers,
            )

    @contextmanager
    def _finite(self) -> Iterator[None]:
        """A context in which an attack's refusal of a diverged network is a `FloatingPointError`."""
        try:
            yield
        except ValueError:
            self._require_finite()
            raise

    def _require_finite(self) -> None:
        """Refuse a network that has diverged, so that no state or weights of it are saved."""
        with preserved(self.bare), torch.no_grad():
            logits = self.bare(self.probe)
        if not bool(logits.isfinite().all() & self.sums.isfinite().all()):
            raise FloatingPointError(
                f"the network has diverged at step {self.step} of {self.total}; train into another folder with a lower "
                f"learning rate or a longer ramp ({self.folder} has the last good state)"
            )

    def _diagnose(self) -> tuple[GradientStatistics, GradientStatistics]:
        """Of the first training examples, at the full budget, in evaluation and in training mode."""
        recipe, device = self.recipe, self.fabric.device
        first = torch.arange(min(recipe.diagnose, size(self.train)))
        x, y = (part.to(device) for part in next(load(self.train, [first])))
        source = generator(device, recipe.seed, Purpose.DIAGNOSE)
        adversarial = recipe.objective.adversarial(self.bare, x, y, bounds=recipe.bounds, generator=source)
        given = (self.bare, recipe.objective, x, adversarial, y)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
            return gradient_statistics(*given), gradient_statistics(*given, training=True)

    def _agree(self) -> None:
        """Average BatchNorm's running statistics over the processes, which saw different examples."""
        if self.fabric.world_size > 1:
            for buffer in self.bare.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(summed(self.fabric, buffer) / self.fabric.world_size)

    def _save(self, log: Log | None) -> None:
        self._agree()
        self._require_finite()
        sums = summed(self.fabric, self.sums)
        self.sums.zero_()
        if self.fabric.is_global_zero:
            self.sums.copy_(sums)
        if log is None:
            return
        log.flush()
        best = None if self.best is None else {"epoch": self.best.epoch, "validation": vars(self.best.validation)}
        save_state(
            self.folder,
            {
                "identity": self.identity,
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "method": self.method.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "step": self.step,
                "best": best,
                "sums": self.sums.cpu(),
            },
        )
