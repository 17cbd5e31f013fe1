"""How a minimum-norm attack changes the norm of the perturbation: smaller once adversarial, larger until then.

All tensors hold one value per example, shape (N,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.schedules import Cosine

CEILING = 0.9
"""The largest rate gamma_k: at 1 an adversarial step would shrink the norm to zero."""


class Rate(NamedTuple):
    """What an update carries from step to step, each of shape (N,)."""

    gamma: Tensor
    adversarial: Tensor
    """Whether the previous iterate was adversarial."""


class NormUpdate(Protocol):
    """An update rule of the norm with explicit per-example state."""

    def init(self, eps: Tensor) -> Rate:
        """The state before the first step, for norms eps (N,)."""

    def __call__(self, eps: Tensor, adversarial: Tensor, rate: Rate, k: int, steps: int) -> tuple[Tensor, Rate]:
        """The norm eps_k from eps_{k-1}, and the new state.

        Args:
            eps: eps_{k-1}.
            adversarial: whether the iterate a_{k-1} is adversarial.
            k: step number, from 1 to `steps`.
        """


@dataclass(frozen=True, kw_only=True)
class FixedRate:
    """eps_k = (1 - gamma) eps_{k-1} if adversarial, else (1 + gamma) eps_{k-1} ([DDN], Alg. 1).

    Args:
        gamma: the rate, in (0, 1).
    """

    gamma: float = 0.05

    def __post_init__(self) -> None:
        validation.number("gamma", self.gamma, low=0, above=True, high=1, below=True)

    def init(self, eps: Tensor) -> Rate:
        return Rate(torch.full_like(eps, self.gamma), torch.zeros_like(eps, dtype=torch.bool))

    def __call__(self, eps: Tensor, adversarial: Tensor, rate: Rate, k: int, steps: int) -> tuple[Tensor, Rate]:
        return _scaled(eps, adversarial, rate.gamma), rate._replace(adversarial=adversarial)


@dataclass(frozen=True, kw_only=True)
class AdaptiveRate(FixedRate):
    """The self-adaptive rate: gamma_k = (1 + a_k) gamma_{k-1} while the status stays, (1 - a_k) gamma_{k-1}
    where it changes ([ANU], Alg. 2).

    The status before the first step counts as not adversarial, gamma_k is held at most at `CEILING`.
    alpha_gamma = 0 is `FixedRate`.

    Args:
        gamma: the initial rate gamma_0, in (0, 0.9].
        alpha_gamma: the rate of its change, the initial one if `annealed`, in [0, 1).
        annealed: let a_k fall from alpha_gamma towards 0 along half a cosine, as the paper does, which freezes
            gamma_k at the boundary; False keeps a_k = alpha_gamma.
    """

    gamma: float = 0.2
    alpha_gamma: float = 0.1
    annealed: bool = True

    def __post_init__(self) -> None:
        validation.number("gamma", self.gamma, low=0, above=True, high=CEILING)
        validation.number("alpha_gamma", self.alpha_gamma, low=0, high=1, below=True)
        validation.switch("annealed", self.annealed)

    def __call__(self, eps: Tensor, adversarial: Tensor, rate: Rate, k: int, steps: int) -> tuple[Tensor, Rate]:
        change = Cosine(size=self.alpha_gamma)(k, steps) if self.annealed else self.alpha_gamma
        same = adversarial == rate.adversarial
        gamma = torch.where(same, rate.gamma * (1 + change), rate.gamma * (1 - change)).clamp_max_(CEILING)
        return _scaled(eps, adversarial, gamma), Rate(gamma, adversarial)


def _scaled(eps: Tensor, adversarial: Tensor, gamma: Tensor) -> Tensor:
    return eps * torch.where(adversarial, 1 - gamma, 1 + gamma)
