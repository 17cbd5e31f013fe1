"""What every gradient method is: a way to fill the gradients of a training step from per-example losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from firstorder.attacks import validation
from firstorder.training.backward import check

Inputs = Tensor | Sequence[Tensor] | None


class Scaler(Protocol):
    """What is used of torch.amp.GradScaler."""

    def scale(self, outputs: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Weighting:
    """What a backward did with a batch of N.

    Attributes:
        weights: w (N,).
        norms: ||grad_theta L_i||_2 (N,); None where the method did not need it.
        input_norms: ||grad_x L_i||_2 (N,); None where the method did not need it.
    """

    weights: Tensor
    norms: Tensor | None = None
    input_norms: Tensor | None = None


class GradientMethod(ABC):
    """A way to combine the gradients of a batch, in place of losses.mean().backward().

    Args:
        model: the module whose trainable parameters get gradients; a DistributedDataParallel module reduces as usual.
    """

    paper: ClassVar[str] = ""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model is a {type(model).__name__}; pass the torch module that is trained")
        self.model = model

    @abstractmethod
    def backward(self, losses: Tensor, inputs: Inputs = None, *, scaler: Scaler | None = None) -> Weighting:
        """Add (1/N) sum_i w_i grad_theta L_i to the `.grad` of every trainable parameter and free the graph.

        Args:
            losses: one loss per example, (N,), for example with reduction="none".
            inputs: the tensors (N, ...) that the losses were computed from. `AENGM` and `NENGM` differentiate by them:
                call requires_grad_() on them before the forward.
            scaler: scales the losses, as in scaler.scale(loss).backward(); the weights do not depend on it.

        Raises:
            ValueError: losses that are not per-example; inputs that cannot be differentiated by; for `Examplewise`
                methods also a model whose layers are hidden (compiled, checkpointed).
        """

    @abstractmethod
    def weights(self, losses: Tensor, inputs: Inputs = None) -> Tensor:
        """The weights w (N,) alone, detached; the graph is kept for (weights * losses).mean().backward()."""

    @property
    def needs_inputs(self) -> bool:
        """Whether the losses need inputs that require a gradient."""
        return False

    def expect(self, backwards: int, total: int | None = None) -> None:  # noqa: B027 - most need not know
        """What a trainer says before the first backward. Only alpha="auto" needs it.

        Args:
            backwards: how many an epoch has, in this process.
            total: how many the training has, where that is known.

        Raises:
            ValueError: a training that is too short for the method.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from batch to batch, as plain numbers and lists of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"the state has {sorted(state)}, {type(self).__name__} needs {sorted(own)}")


def limit(value: float, name: str = "alpha") -> float:
    """Require a number greater than 0, or infinity."""
    if value != math.inf:
        validation.number(name, value, low=0, above=True)
    return float(value)


def parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The part of the model whose gradients several processes average; None for one process."""
    return next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)


def factor(scaler: Scaler | None, losses: Tensor) -> float:
    """What `scaler` multiplies a loss by; 1 without one."""
    return 1.0 if scaler is None else float(scaler.scale(losses.new_ones((), dtype=torch.float32)))


def accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Run autograd's own accumulation, with the hooks that hang on it."""
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])


def averaged(model: nn.Module, gradients: Sequence[Tensor | None]) -> None:
    """Average gradients in place over the processes of a distributed model."""
    wrapped = parallel(model)
    if wrapped is None:
        return
    for g in gradients:
        if g is not None:
            dist.all_reduce(g, group=wrapped.process_group)
            g /= dist.get_world_size(wrapped.process_group)


def plain(losses: Tensor, scaler: Scaler | None) -> Weighting:
    """The mean gradient by autograd alone."""
    check(losses, ())
    loss = losses.mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return Weighting(torch.ones_like(losses.detach()))
