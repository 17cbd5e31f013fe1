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
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.training.examplewise import Examplewise, Limited, gathered
from firstorder.training.per_example import Coupling


class ENGM(Limited):
    """w_i = min(alpha / ||grad_theta L_i||, 1), Eq. 5b.

    The paper prints max in Eq. 7 and Alg. 1; Eq. 5b and the theory need min.

    Args:
        alpha: the largest norm of an example's gradient; "auto", with `quantile` and `warmup`, as in `Limited`.
    """

    paper = "ENGM, Eqs. 5a, 5b"

    @property
    def needs_norms(self) -> bool:
        return not self.unlimited

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert norms is not None
        return self._limited(norms, norms)


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
        alpha: the largest norm of an input's gradient; "auto", with `quantile` and `warmup`, as in `Limited`.
    """

    paper = "ENGM, Sec. 2.5, Alg. 1, N-ENGM"

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float | Literal["auto"] = 0.5,
        quantile: float | None = None,
        warmup: int | None = None,
        coupling: Coupling = "ignore",
        memory_budget: int = 2**28,
    ) -> None:
        super().__init__(
            model, alpha=alpha, quantile=quantile, warmup=warmup, coupling=coupling, memory_budget=memory_budget
        )

    @property
    def needs_inputs(self) -> bool:
        return not self.unlimited

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert input_norms is not None
        return self._limited(input_norms, input_norms)


class AENGM(Limited):
    """w_i = min(alpha / (gamma1 ||grad_x L_i|| + gamma0), 1): the parameters' norm estimated from the input's.

    The first batch and every tau-th one after it (t mod tau = 0, Alg. 1) also measures ||grad_theta L_i||, fits
    it by least squares, gamma' = (gamma1', gamma0'), and sets gamma to beta gamma + (1 - beta) gamma' before it
    weighs; over all processes under DistributedDataParallel.

    Args:
        alpha: as in `ENGM`; "auto" measures ||grad_theta L_i|| itself in every batch of the first epoch.
        quantile, warmup: of alpha="auto", as in `Limited`.
        tau: the number of batches from fit to fit.
        beta: beta_gamma, the weight of the old coefficients, which start at gamma = (1, 0).
    """

    paper = "ENGM, Eqs. 6, 7, Alg. 1, A-ENGM"

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float | Literal["auto"] = 5.0,
        quantile: float | None = None,
        warmup: int | None = None,
        tau: int = 50,
        beta: float = 0.7,
        coupling: Coupling = "ignore",
        memory_budget: int = 2**28,
    ) -> None:
        super().__init__(
            model, alpha=alpha, quantile=quantile, warmup=warmup, coupling=coupling, memory_budget=memory_budget
        )
        validation.count("tau", tau)
        validation.number("beta", beta, low=0, high=1)
        self.tau, self.beta = tau, beta
        self.gamma1, self.gamma0, self.batches = 1.0, 0.0, 0

    @property
    def needs_norms(self) -> bool:
        return not self.unlimited and (self.measuring or self._fits)

    @property
    def needs_inputs(self) -> bool:
        return not self.unlimited

    @property
    def _fits(self) -> bool:
        return self.batches % self.tau == 0

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        assert input_norms is not None
        fits = self._fits
        self.batches += 1
        if fits:
            assert norms is not None
            pair = torch.stack([input_norms, norms]).double()
            fitted = _line(*gathered(self.model, pair))
            if fitted is not None:
                self.gamma1, self.gamma0 = (
                    self.beta * old + (1 - self.beta) * new
                    for old, new in zip((self.gamma1, self.gamma0), fitted, strict=True)
                )
        return self._limited(self.gamma1 * input_norms + self.gamma0, norms)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gamma1": self.gamma1, "gamma0": self.gamma0, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.gamma1, self.gamma0 = float(state["gamma1"]), float(state["gamma0"])
        self.batches = int(state["batches"])


def _line(x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line through points x, y (N,); None where they do not define one."""
    centred = x - x.mean()
    spread = float(centred.square().sum())
    if not 0 < spread < math.inf or not bool(y.isfinite().all()):
        return None
    slope = float((centred * y).sum()) / spread
    return slope, float(y.mean()) - slope * float(x.mean())
