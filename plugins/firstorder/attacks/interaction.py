"""Distributional attacks: the examples of a batch move as particles that interact through a kernel.

[DAA] Zheng et al. 2018, Distributionally adversarial attack, arXiv 1808.05537; [QG] Liu & Tsang, Towards sharper
first-order adversary with quantized gradients. Here the result for an example depends on the batch it is in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.catalogue import PGD
from firstorder.attacks.directions import Direction, Quantised
from firstorder.attacks.losses import Margin
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Oracle, Query, Stateless, Step

KernelGradient = Literal["add", "subtract"]


@dataclass(frozen=True, kw_only=True)
class BlobInteraction(Stateless):
    """Every gradient with those of the other examples, and the kernel's own between them ([QG], Eq. 8; [DAA]).

    e_i = g_i + (c/M) sum_j [K(a_i, a_j) g_j +- grad_{a_j} K(a_i, a_j)] over the M examples of the batch, + as Eq. 8
    prints, - as in the code of [DAA], which is the default.

    K is the RBF kernel exp(-||a_i - a_j||^2 / (2 h^2)) with h^2 = median(||a_i - a_j||^2) / (2 ln M) over all pairs,
    those of an example with itself included. One example alone gets its own gradient.

    Args:
        c: weight of the interaction, at least 0.
        kernel_gradient: "subtract" the kernel's gradient, which draws examples together, as the code of [DAA]
            does; or "add" it, which drives them apart, as Eq. 8 prints. Only subtracted it is sharper than PGD, as the
            papers report (docs/numbers/bounded.md).
    """

    c: float = 1.1
    kernel_gradient: KernelGradient = "subtract"

    def __post_init__(self) -> None:
        validation.number("c", self.c, low=0)
        validation.choice("kernel_gradient", self.kernel_gradient, ("add", "subtract"))

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        evaluation = query(a)
        m = len(step.iterate)
        populations = zip(a.split(m), evaluation.gradient.split(m), strict=True)
        driven = [self._interact(*each) for each in populations]
        return evaluation._replace(gradient=driven[0] if len(driven) == 1 else torch.cat(driven)), state

    def _interact(self, a: Tensor, g: Tensor) -> Tensor:
        """The driving directions of one population a (M, ...) with gradients g (M, ...)."""
        m = len(a)
        if m == 1:
            return g
        points = a.flatten(1).to(torch.promote_types(a.dtype, torch.float32))
        points = points - points.mean(0)  # distances do not change, their rounding shrinks
        squares = points.square().sum(1)
        distances = torch.addmm(squares[:, None] + squares, points, points.T, alpha=-2).clamp_min_(0)
        distances.fill_diagonal_(0)
        width = _median(distances.flatten())
        width = torch.where(width > 0, width, distances.mean()) / (2 * math.log(m))
        width = torch.where(width > 0, width, 1.0)  # all examples at one point
        kernel = distances.div_(-2 * width).exp_()
        # sum_j grad_{a_j} K_ij = sum_j K_ij (a_i - a_j) / h^2
        push = points / (width if self.kernel_gradient == "add" else -width)
        pulled = torch.addmm(kernel.sum(1, keepdim=True) * push, kernel, g.flatten(1).to(points.dtype) - push)
        return g + (pulled.reshape(g.shape) * (self.c / m)).to(g.dtype)


def _median(values: Tensor) -> Tensor:
    """The median of values (N,), between the two middle ones for even N; many times faster than `quantile`."""
    lower = values.median()  # the lower of the two
    if len(values) % 2:
        return lower
    upper = torch.where(values > lower, values, torch.inf).amin()
    tied = (values <= lower).sum() > len(values) // 2
    return torch.where(tied, lower, (lower + upper) / 2)


@dataclass(frozen=True, kw_only=True)
class DAABLOB(PGD):
    """Distributionally adversarial attack, blob method: PGD along the gradient of an interacting population.

    The batch is the population, of [DAA] 100 to 200 examples: results depend on it.
    `firstorder.evaluation.studies.population` reshuffles populations across a data set as [DAA] does. With `early_stop`
    the population is what is still unbroken.

    Args:
        c: weight of the interaction, at least 0; None takes 10 for the margin loss and 1.1 for every other.
        kernel_gradient: "subtract" the kernel's gradient (the code of [DAA]) or "add" it ([QG], Eq. 8).
    """

    paper: ClassVar[str] = "Zheng et al. 2018, Sec. 4.2; Liu & Tsang, Eqs. 8-9"
    population: ClassVar[bool] = True
    c: float | None = None
    kernel_gradient: KernelGradient = "subtract"

    def oracle(self) -> Oracle:
        c = self.c if self.c is not None else 10.0 if isinstance(self.loss, Margin) else 1.1
        return BlobInteraction(c=c, kernel_gradient=self.kernel_gradient)


@dataclass(frozen=True, kw_only=True)
class BLOBQG(DAABLOB):
    """DAA-BLOB with the sign replaced by b levels of the quantised gradient; b = 1 is DAA-BLOB.

    Args:
        b: number of levels, at least 1; 100 to 1000 work best.
        c: weight of the interaction, at least 0; None takes 10 for the margin loss and 1.1 for every other.
        kernel_gradient: "subtract" the kernel's gradient (the code of [DAA]) or "add" it ([QG], Eq. 8).
    """

    paper: ClassVar[str] = "Liu & Tsang, Eqs. 8, 10, 11"
    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    b: int = 200

    def __post_init__(self) -> None:
        validation.count("b", self.b)
        super().__post_init__()

    def rule(self) -> Direction:
        return Quantised(levels=self.b)
