"""Examplewise methods: every example's gradient has a weight of its own.

[ENGM] Examplewise normalised gradients for adversarial training: (1/N) sum_i w_i grad_theta L_i, every w_i a constant.
The optimiser, its momentum, its weight decay and its schedule stay what they are.

    method = ENGM(model, alpha=5.0)
    losses = F.cross_entropy(model(x_adv), y, reduction="none")
    optimizer.zero_grad()
    method.backward(losses, x_adv)      # was: losses.mean().backward()
    optimizer.step()
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firstorder.attacks import validation
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

    Args:
        model, coupling, memory_budget: as in `Examplewise`.
        alpha: the largest n_i that keeps its weight of 1. The paper's 5 is for ResNet-18 with 64 channels; it grows
            with the square root of the number of parameters. Infinity is plain SGD, bit for bit; a large number is
            too, up to the order of summation.
    """

    def __init__(
        self, model: nn.Module, *, alpha: float = 5.0, coupling: Coupling = "ignore", memory_budget: int = 2**28
    ) -> None:
        super().__init__(model, coupling=coupling, memory_budget=memory_budget)
        self.alpha = limit(alpha)

    @property
    def unlimited(self) -> bool:
        return self.alpha == math.inf

    def _limited(self, norms: Tensor) -> Tensor:
        """The weights (N,) of norms (N,); 1 for those that are not positive."""
        return torch.where(norms <= self.alpha, 1.0, self.alpha / norms)


class ENGM(Limited):
    """w_i = min(alpha / ||grad_theta L_i||, 1), Eq. 5b.

    The paper prints max in Eq. 7 and Alg. 1; Eq. 5b and the theory need min.

    Args:
        alpha: the largest norm of an example's gradient, see `Limited`.
    """

    paper = "ENGM, Eqs. 5a, 5b"

    @property
    def needs_norms(self) -> bool:
        return not self.unlimited

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert norms is not None
        return self._limited(norms)


class FENGM(Examplewise):
    """w_i = alpha / ||grad_theta L_i||: every example has a gradient of norm alpha.

    The paper's words normalise to alpha, its formula (Sec. 3.1) to one.

    Args:
        model, coupling, memory_budget: as in `Examplewise`.
        alpha: the norm of every example's gradient; finite.
    """

    paper = "ENGM, Sec. 3.1, F-ENGM"

    def __init__(
        self, model: nn.Module, *, alpha: float = 1.0, coupling: Coupling = "ignore", memory_budget: int = 2**28
    ) -> None:
        super().__init__(model, coupling=coupling, memory_budget=memory_budget)
        validation.number("alpha", alpha, low=0, above=True)
        self.alpha = float(alpha)

    @property
    def needs_norms(self) -> bool:
        return True

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert norms is not None
        return torch.where(norms > 0, self.alpha / norms, 1.0)


class NENGM(Limited):
    """w_i = min(alpha / ||grad_x L_i||, 1): the input's gradient in place of the parameters'.

    Args:
        alpha: the largest norm of an input's gradient.
    """

    paper = "ENGM, Sec. 2.5, Alg. 1, N-ENGM"

    def __init__(
        self, model: nn.Module, *, alpha: float = 0.5, coupling: Coupling = "ignore", memory_budget: int = 2**28
    ) -> None:
        super().__init__(model, alpha=alpha, coupling=coupling, memory_budget=memory_budget)

    @property
    def needs_inputs(self) -> bool:
        return not self.unlimited

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert input_norms is not None
        return self._limited(input_norms)


class AENGM(Limited):
    """w_i = min(alpha / (gamma1 ||grad_x L_i|| + gamma0), 1): the parameters' norm estimated from the input's.

    The first batch and every tau-th one after it (t mod tau = 0, Alg. 1) also measures ||grad_theta L_i||, fits
    it by least squares, gamma' = (gamma1', gamma0'), and sets gamma to beta gamma + (1 - beta) gamma' before it
    weighs; over all processes under DistributedDataParallel.

    Args:
        alpha: as in `ENGM`.
        tau: the number of batches from fit to fit.
        beta: beta_gamma, the weight of the old coefficients, which start at gamma = (1, 0).
    """

    paper = "ENGM, Eqs. 6, 7, Alg. 1, A-ENGM"

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 5.0,
        tau: int = 50,
        beta: float = 0.7,
        coupling: Coupling = "ignore",
        memory_budget: int = 2**28,
    ) -> None:
        super().__init__(model, alpha=alpha, coupling=coupling, memory_budget=memory_budget)
        validation.count("tau", tau)
        validation.number("beta", beta, low=0, high=1)
        self.tau, self.beta = tau, beta
        self.gamma1, self.gamma0, self.batches = 1.0, 0.0, 0

    @property
    def needs_norms(self) -> bool:
        return not self.unlimited and self.batches % self.tau == 0

    @property
    def needs_inputs(self) -> bool:
        return not self.unlimited

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert input_norms is not None
        self.batches += 1
        if norms is not None:
            pair = torch.stack([input_norms, norms]).double()
            fitted = _line(*_gathered(self.model, pair))
            if fitted is not None:
                self.gamma1, self.gamma0 = (
                    self.beta * old + (1 - self.beta) * new
                    for old, new in zip((self.gamma1, self.gamma0), fitted, strict=True)
                )
        return self._limited(self.gamma1 * input_norms + self.gamma0)

    def state_dict(self) -> dict[str, float]:
        return {"gamma1": self.gamma1, "gamma0": self.gamma0, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.gamma1, self.gamma0 = float(state["gamma1"]), float(state["gamma0"])
        self.batches = int(state["batches"])


def _gathered(model: nn.Module, pair: Tensor) -> Tensor:
    """Columns (2, N) of all processes side by side, where the model is distributed."""
    wrapped = parallel(model)
    if wrapped is None:
        return pair
    parts = [torch.empty_like(pair) for _ in range(dist.get_world_size(wrapped.process_group))]
    dist.all_gather(parts, pair.contiguous(), group=wrapped.process_group)
    return torch.cat(parts, 1)


def _line(x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line through points x, y (N,); None where they do not define one."""
    centred = x - x.mean()
    spread = float(centred.square().sum())
    if not 0 < spread < math.inf or not bool(y.isfinite().all()):
        return None
    slope = float((centred * y).sum()) / spread
    return slope, float(y.mean()) - slope * float(x.mean())
