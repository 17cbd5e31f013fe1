"""What examplewise methods share: weights, a limit, and the measurement of a limit."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.training.automatic import QUANTILE, FirstEpoch
from firstorder.training.backward import check
from firstorder.training.method import (
    GradientMethod,
    Inputs,
    Scaler,
    Weighting,
    accumulate,
    factor,
    limit,
    parallel,
    plain,
)
from firstorder.training.per_example import Coupling, Gradients, PerExample

logger = logging.getLogger(__name__)


class Examplewise(GradientMethod):
    """(1/N) sum_i w_i grad_theta L_i. A subclass says which norms it needs and what the weights are.

    Args:
        model: the module whose trainable parameters get gradients. Frozen parameters, shared parameters, channels_last,
            autocast and several forwards in one loss are served; so is a DistributedDataParallel module, whose
            reduction runs as usual. Under it every process weighs its own examples.
        coupling: what the gradient of one example is under BatchNorm in training mode, see `PerExample`.
        memory_budget: bytes that temporaries of one layer may take.
    """

    def __init__(self, model: nn.Module, *, coupling: Coupling = "ignore", memory_budget: int = 2**28) -> None:
        super().__init__(model)
        self.coupling = coupling
        self._differentiate = PerExample(model, coupling=coupling, memory_budget=memory_budget)

    def backward(self, losses: Tensor, inputs: Inputs = None, *, scaler: Scaler | None = None) -> Weighting:
        if self.unlimited:
            return plain(losses, scaler)
        gradients = self._gradients(losses, inputs, keep=True, scale=factor(scaler, losses))
        outcome = self._weighting(gradients, losses)
        accumulate(gradients.parameters, gradients.weighted(outcome.weights))
        return outcome

    def weights(self, losses: Tensor, inputs: Inputs = None) -> Tensor:
        if self.unlimited:
            check(losses, ())
            return torch.ones_like(losses.detach())
        return self._weighting(self._gradients(losses, inputs, keep=False), losses).weights

    @property
    def unlimited(self) -> bool:
        """Whether every weight is 1 whatever the gradients are: the plain backward serves, bit for bit."""
        return False

    @property
    def needs_norms(self) -> bool:
        """Whether the next batch needs ||grad_theta L_i||."""
        return False

    @abstractmethod
    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        """Weights (N,) from the norms (N,) that this batch needed."""

    def _gradients(self, losses: Tensor, inputs: Inputs, *, keep: bool, scale: float = 1.0) -> Gradients:
        given = () if inputs is None or not self.needs_inputs else (inputs,) if isinstance(inputs, Tensor) else inputs
        if self.needs_inputs and not given:
            raise ValueError(f"{type(self).__name__} needs the inputs; call backward(losses, inputs)")
        return self._differentiate(losses, given, norms=self.needs_norms, keep=keep, scale=scale)

    def _weighting(self, gradients: Gradients, losses: Tensor) -> Weighting:
        weights = self.weigh(gradients.norms, gradients.input_norms)
        return Weighting(weights.to(losses.dtype), gradients.norms, gradients.input_norms)


class Limited(Examplewise):
    """w_i = min(alpha / n_i, 1), n_i a norm of example i or an estimate of one.

    With alpha="auto", which is no rule of the paper's, the first epoch is plain training, or as many first epochs as
    have 100 backwards. Then alpha is the `quantile` of the norms of its examples, over all processes: ||grad_theta
    L_i|| for `ENGM` and `AENGM`, ||grad_x L_i|| for `NENGM`. The attribute `alpha` is infinite until then.

    Args:
        model, coupling, memory_budget: as in `Examplewise`.
        alpha: the largest n_i that keeps its weight of 1. The paper's 5 is for ResNet-18 with 64 channels; it grows
            with the square root of the number of parameters. Infinity is plain SGD, bit for bit; a large number is
            too, up to the order of summation. "auto" is as above.
        quantile: of alpha="auto", in (0, 1]; 0.25 by default.
        warmup: of alpha="auto": how many backwards of this process to measure, in place of whole epochs. The trainers
            of firstorder know how long an epoch is; a loop of your own passes `warmup`.

    Raises:
        ValueError: a limit that is none; `quantile` or `warmup` where alpha is a number.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float | Literal["auto"] = 5.0,
        quantile: float | None = None,
        warmup: int | None = None,
        coupling: Coupling = "ignore",
        memory_budget: int = 2**28,
    ) -> None:
        super().__init__(model, coupling=coupling, memory_budget=memory_budget)
        self._first: FirstEpoch | None = None
        if alpha == "auto":
            self.quantile = QUANTILE if quantile is None else quantile  # public, and so part of a run's identity
            self.warmup = warmup
            self._first = FirstEpoch(self.quantile, warmup)
        elif quantile is not None or warmup is not None:
            name, value = ("warmup", warmup) if quantile is None else ("quantile", quantile)
            raise ValueError(f'{name}={value!r} belongs to alpha="auto", and alpha={alpha!r}; leave out one of them')
        self.alpha = math.inf if alpha == "auto" else limit(alpha)

    @property
    def unlimited(self) -> bool:
        return self.alpha == math.inf and not self.measuring

    @property
    def measuring(self) -> bool:
        """Whether the norms of the first epoch are still being collected, for alpha="auto"."""
        return self._first is not None and self.alpha == math.inf

    def expect(self, backwards: int, total: int | None = None) -> None:
        if self._first is None:
            return
        self._first.epoch = backwards
        own = self._first.length(processes(self.model))
        if total is not None and own is not None and own >= total:
            raise ValueError(
                f'alpha="auto" measures the first {own} backwards, and the training has {total}: nothing would be '
                "limited; train for more epochs, lower warmup, or pass a number for alpha"
            )

    def state_dict(self) -> dict[str, Any]:
        if self._first is None:
            return super().state_dict()
        return {"alpha": self.alpha, "measured": self._first.parts, "norms": self._first.norms()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._first is not None:
            self.alpha = float(state["alpha"])
            self._first.restore(int(state["measured"]), state["norms"])

    def _gradients(self, losses: Tensor, inputs: Inputs, *, keep: bool, scale: float = 1.0) -> Gradients:
        if self._first is not None and self.measuring:
            self._first.require()
        return super()._gradients(losses, inputs, keep=keep, scale=scale)

    def _limited(self, estimates: Tensor, norms: Tensor | None) -> Tensor:
        """The weights (N,) of norms or their estimates (N,); 1 for those that are not positive.

        Args:
            estimates: what the limit is for.
            norms: what alpha="auto" measures; None where this batch did not need them.
        """
        weights = torch.where(estimates <= self.alpha, 1.0, self.alpha / estimates)
        if self._first is None or not self.measuring:
            return weights
        assert norms is not None
        found = self._first.add(gathered(self.model, norms.detach()[None])[0], processes(self.model))
        if found is not None:
            self.alpha = found
            logger.info("alpha=%g: the %g-quantile of the norms of the first epoch", found, self.quantile)
        return torch.ones_like(weights)


def processes(model: nn.Module) -> int:
    """How many processes train the model."""
    wrapped = parallel(model)
    return 1 if wrapped is None else dist.get_world_size(wrapped.process_group)


def gathered(model: nn.Module, columns: Tensor) -> Tensor:
    """Columns (rows, N) of all processes side by side, where the model is distributed; N may differ between them."""
    wrapped = parallel(model)
    if wrapped is None:
        return columns
    group, rows = wrapped.process_group, len(columns)
    own = torch.tensor([columns.shape[1]], device=columns.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    widest = int(torch.cat(counts).max())  # a collective takes equal shapes
    parts = [columns.new_empty(rows, widest) for _ in counts]
    dist.all_gather(parts, F.pad(columns, (0, widest - columns.shape[1])), group=group)
    return torch.cat([part[:, : int(count)] for part, count in zip(parts, counts, strict=True)], 1)
