"""The Fabric that training runs on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from firstorder.attacks import validation

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""The precisions of `Autocast`."""


class Autocast(Precision):
    """Forwards under autocast, with a scaler of the gradients for float16.

    Lightning's own plugin insists on one call of fabric.backward, which differentiates a scalar. Here the method's
    backward takes `scaler` instead.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device_type: "cuda", "cpu"...
    """

    def __init__(self, precision: Literal["16-mixed", "bf16-mixed"], device_type: str) -> None:
        validation.choice("precision", precision, tuple(MIXED))
        self.precision = precision
        self.device_type = device_type
        self.scaler = GradScaler(device_type) if precision == "16-mixed" else None

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=MIXED[self.precision])

    def convert_output(self, data: Any) -> Any:
        return data.float() if isinstance(data, Tensor) and data.is_floating_point() else data

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, **kwargs)
        result = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return result

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)


def make(
    *,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true",
    loggers: Iterable[Any] = (),
) -> Fabric:
    """A Fabric whose processes each train on their part of every batch (DistributedDataParallel).

    Args:
        accelerator: "cpu", "gpu"... ; "auto" takes a GPU where there is one.
        devices: processes per node.
        num_nodes: nodes.
        precision: full or mixed.
        loggers: get the rows of every `Trainer` on it, as the files of its folder do; see `loggers.logger`.
    """
    validation.choice("precision", precision, ("32-true", *MIXED))
    validation.count("devices", devices)
    validation.count("num_nodes", num_nodes)
    where = "cuda" if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available() else "cpu"
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            # Every process would otherwise overwrite BatchNorm's statistics between two forwards of one loss.
            strategy=DDPStrategy(broadcast_buffers=False) if devices * num_nodes > 1 else "auto",
            plugins=None if precision == "32-true" else [Autocast(precision, where)],
            loggers=list(loggers),
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator={accelerator!r} with devices={devices} is not there: {error}") from None


def summed(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The sum of every process' `tensor`, as a new one."""
    total = fabric.all_reduce(tensor.clone(), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def scaler(fabric: Fabric) -> GradScaler | None:
    """The scaler of a Fabric's `Autocast`; None where gradients are not scaled."""
    precision = fabric.strategy.precision
    return precision.scaler if isinstance(precision, Autocast) else None
