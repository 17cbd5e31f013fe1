"""Attacks made to transfer to unseen models: momentum along transformed gradients, a recipe each.

[NI] Lin et al. 2020, arXiv 1908.06281; [DI] Xie et al. 2019; [TI] Dong et al. 2019; [VT] Wang & He 2021. Any of them
attacks several models at once through `Ensemble`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from firstorder.attacks import validation
from firstorder.attacks.bounded import IterativeAttack
from firstorder.attacks.catalogue import MIFGSM, TRANSFER_EPS, ClippedNGM
from firstorder.attacks.oracles import LookAhead, Oracle, ScaleCopies, VarianceTuning, chain
from firstorder.attacks.projections import Size
from firstorder.attacks.transformations import DiverseInput, Kernel, TranslationInvariant


@dataclass(frozen=True, kw_only=True)
class NIFGSM(MIFGSM):
    """Nesterov iterative FGSM: MI-FGSM with the gradient at the look-ahead point a + alpha mu m.

    With a `direction` that moves an L2 length, and under norm="L2", the point is where the rule would carry the
    iterate along the momentum alone (see `LookAhead`).

    Args:
        decay: the paper's mu, at least 0; 0 is I-FGSM.
        normaliser: "mean" divides gradients by mean|g|, as the released code. With "sum", ||g||_1, the
            look-ahead shrinks by the number of elements and the attack is all but MI-FGSM.
    """

    paper: ClassVar[str] = "Lin et al. 2020, Eqs. 6-8"

    def oracle(self) -> Oracle:
        componentwise = self.norm == "Linf" and self.chosen_rule().scale == "radius"
        return LookAhead(decay=self.decay, along="momentum" if componentwise else "step")


@dataclass(frozen=True, kw_only=True)
class SINIFGSM(NIFGSM):
    """Scale-invariant Nesterov FGSM: NI-FGSM on the mean gradient of m copies scaled by 1/2^i.

    Args:
        m: number of scale copies, at least 1; 1 is NI-FGSM.
    """

    paper: ClassVar[str] = "Lin et al. 2020, Eqs. 6-9, Alg. 1"
    m: int = 5

    def oracle(self) -> Oracle:
        return chain(super().oracle(), ScaleCopies(m=self.m))


@dataclass(frozen=True, kw_only=True)
class Diverse(IterativeAttack):
    """The gradient through a random resize and padding.

    Args:
        resize_rate: far end of the random side relative to the image's.
        diversity_prob: probability that an example is transformed, in [0, 1].
    """

    eps: Size = TRANSFER_EPS
    resize_rate: float = 1.1
    diversity_prob: float = 0.5

    def oracle(self) -> Oracle:
        return self.diverse()

    def diverse(self) -> Oracle:
        """The gradient through the random transformation."""
        return DiverseInput(resize_rate=self.resize_rate, diversity_prob=self.diversity_prob)


@dataclass(frozen=True, kw_only=True)
class Smoothed(Diverse):
    """The gradient, of diverse inputs with some probability, convolved with a kernel.

    Args:
        kernel_name: "gaussian", "linear" or "uniform".
        len_kernel: the kernel's side, odd; 1 does not convolve.
        nsig: standard deviations from the middle of the Gaussian kernel to its end.
    """

    kernel_name: Kernel = "gaussian"
    len_kernel: int = 7
    nsig: float = 3.0

    def oracle(self) -> Oracle:
        return chain(self.smoothed(), self.diverse())

    def smoothed(self) -> Oracle:
        """The convolved gradient."""
        return TranslationInvariant(kernel_name=self.kernel_name, len_kernel=self.len_kernel, nsig=self.nsig)


@dataclass(frozen=True, kw_only=True)
class DIFGSM(Diverse, MIFGSM):
    """Diverse-input FGSM with momentum (DIM, M-DI2-FGSM): the gradient through a random resize and padding.

    Args:
        decay: of the momentum, at least 0; 0 is DI2-FGSM.
        resize_rate: far end of the random side relative to the image's.
        diversity_prob: probability that an example is transformed, in [0, 1]; 0 is MI-FGSM.
    """

    paper: ClassVar[str] = "Xie et al. 2019, Eqs. 4-5"


@dataclass(frozen=True, kw_only=True)
class TIFGSM(Smoothed, DIFGSM):
    """Translation-invariant FGSM with momentum (TIM): the gradient convolved with a kernel.

    Args:
        decay: of the momentum, at least 0.
        diversity_prob: probability of a diverse input, as in `DIFGSM`; above 0 this is TI-DIM.
        kernel_name: "gaussian", "linear" or "uniform".
        len_kernel: the kernel's side, odd; 1 does not convolve.
        nsig: standard deviations from the middle of the Gaussian kernel to its end.
    """

    paper: ClassVar[str] = "Dong et al. 2019, Eqs. 8-10"
    diversity_prob: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TIDIM(TIFGSM):
    """Translation-invariant attack on diverse inputs with momentum: TI-FGSM and DI-FGSM in one."""

    paper: ClassVar[str] = "Dong et al. 2019, Sec. 3.3"
    diversity_prob: float = 0.5


@dataclass(frozen=True, kw_only=True)
class SINIDIM(SINIFGSM, DIFGSM):
    """SI-NI-FGSM on diverse inputs: every scale copy is transformed by itself."""

    paper: ClassVar[str] = "Lin et al. 2020, App. A, Alg. 2"

    def oracle(self) -> Oracle:
        return chain(SINIFGSM.oracle(self), self.diverse())


@dataclass(frozen=True, kw_only=True)
class SINITIDIM(SINIFGSM, TIDIM):
    """SI-NI-FGSM on diverse inputs with the averaged gradient convolved: all four parts."""

    paper: ClassVar[str] = "Lin et al. 2020, App. A, Alg. 2"

    def oracle(self) -> Oracle:
        return chain(self.smoothed(), SINIFGSM.oracle(self), self.diverse())


@dataclass(frozen=True, kw_only=True)
class SINITIM(SINITIDIM):
    """SI-NI-FGSM with the averaged gradient convolved."""

    paper: ClassVar[str] = "Lin et al. 2020, App. A, Alg. 2"
    diversity_prob: float = 0.0


@dataclass(frozen=True, kw_only=True)
class VarianceTuned(IterativeAttack):
    """The gradient plus what the mean over N neighbours differed by at the step before.

    Args:
        N: number of neighbours, at least 1; a step takes N + 1 gradients.
        beta: the neighbourhood's radius relative to eps, at least 0.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    eps: Size = TRANSFER_EPS
    N: int = 20
    beta: float = 1.5

    def __post_init__(self) -> None:
        validation.number("beta", self.beta, low=0)
        super().__post_init__()

    def oracle(self) -> Oracle:
        return VarianceTuning(radius=self.beta * self.eps, N=self.N)


@dataclass(frozen=True, kw_only=True)
class VMIFGSM(VarianceTuned, MIFGSM):
    """Variance-tuned MI-FGSM: the gradient plus what the mean over N neighbours differed by at the step before.

    Args:
        N: number of neighbours, at least 1; a step takes N + 1 gradients.
        beta: the neighbourhood's radius relative to eps, at least 0.
    """

    paper: ClassVar[str] = "Wang & He 2021, Alg. 1"


@dataclass(frozen=True, kw_only=True)
class VNIFGSM(VarianceTuned, NIFGSM):
    """Variance-tuned NI-FGSM: the gradient at the look-ahead point, the neighbours around the iterate.

    Args:
        N: number of neighbours, at least 1; a step takes N + 1 gradients.
        beta: the neighbourhood's radius relative to eps, at least 0.
    """

    paper: ClassVar[str] = "Wang & He 2021, Sec. 3.2"

    def oracle(self) -> Oracle:
        return chain(NIFGSM.oracle(self), VarianceTuned.oracle(self))


@dataclass(frozen=True, kw_only=True)
class ClippedVMIFGSM(VarianceTuned, ClippedNGM):
    """Clipped NGM along the variance-tuned gradient.

    Args:
        N: number of neighbours, at least 1; a step takes N + 1 gradients.
        beta: the neighbourhood's radius relative to eps, at least 0.
    """

    paper: ClassVar[str] = "NGM (ICLR 2024 submission), App. A.2, Alg. 2; Wang & He 2021"
