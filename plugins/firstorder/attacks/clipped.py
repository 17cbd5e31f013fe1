"""Clipped NGM's momentum and rule on the oracles of the transfer papers, the clip of single elements by default.

No paper's: the rule loses to the sign on plain gradients and transferred better on stochastic ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from firstorder.attacks.augmented import Structured
from firstorder.attacks.catalogue import ClippedNGM
from firstorder.attacks.directions import Scope
from firstorder.attacks.oracles import Oracle, ScaleCopies, chain
from firstorder.attacks.transfer import Diverse, Smoothed, VarianceTuned


@dataclass(frozen=True, kw_only=True)
class ClippedDIFGSM(Diverse, ClippedNGM):
    """DI-FGSM's gradient with clipped NGM's momentum and rule.

    Args:
        resize_rate: far end of the random side relative to the image's.
        diversity_prob: probability that an example is transformed, in [0, 1]; 0 is clipped NGM.
        gamma: clipping radius, positive; 0.8 with scope="example".
        scope: "element" clips every component by itself, "example" by the L2 norm of an example.
    """

    paper: ClassVar[str] = "no paper's: Xie et al. 2019 with NGM (ICLR 2024 submission), Alg. 1, per element"
    gamma: float = 0.1
    scope: Scope = "element"


@dataclass(frozen=True, kw_only=True)
class ClippedTIDIM(Smoothed, ClippedDIFGSM):
    """TI-DIM's gradient with clipped NGM's momentum and rule.

    Args:
        diversity_prob: probability of a diverse input, in [0, 1].
        kernel_name: "gaussian", "linear" or "uniform".
        len_kernel: the kernel's side, odd; 1 is `ClippedDIFGSM`.
        nsig: standard deviations from the middle of the Gaussian kernel to its end.
    """

    paper: ClassVar[str] = "no paper's: Dong et al. 2019 with NGM (ICLR 2024 submission), Alg. 1, per element"


@dataclass(frozen=True, kw_only=True)
class ClippedSIDIM(ClippedDIFGSM):
    """The mean gradient of diverse scale copies with clipped NGM's momentum and rule.

    Args:
        m: number of scale copies, at least 1; 1 is `ClippedDIFGSM`.
    """

    paper: ClassVar[str] = "no paper's: Lin et al. 2020 with NGM (ICLR 2024 submission), Alg. 1, per element"
    m: int = 5

    def oracle(self) -> Oracle:
        return chain(ScaleCopies(m=self.m), self.diverse())


@dataclass(frozen=True, kw_only=True)
class ClippedSITIDIM(ClippedTIDIM):
    """The mean gradient of diverse scale copies, convolved, with clipped NGM's momentum and rule.

    Args:
        m: number of scale copies, at least 1; 1 is `ClippedTIDIM`.
    """

    paper: ClassVar[str] = "no paper's: Lin et al. 2020 with NGM (ICLR 2024 submission), Alg. 1, per element"
    m: int = 5

    def oracle(self) -> Oracle:
        return chain(self.smoothed(), ScaleCopies(m=self.m), self.diverse())


@dataclass(frozen=True, kw_only=True)
class ClippedSIADIM(ClippedDIFGSM, Structured):
    """SIA's gradient, of copies that are diverse inputs too, with clipped NGM's momentum and rule.

    Of the compositions that were searched it transferred best at 30 gradients (docs/numbers/transfer.md).

    Args:
        m: number of copies, at least 1; a step takes as many gradients.
        diversity_prob: probability that a copy is resized and padded, in [0, 1]; 0 is SIA's gradient.
    """

    paper: ClassVar[str] = "no paper's: Wang et al. 2023 with NGM (ICLR 2024 submission), Alg. 1, per element"

    def oracle(self) -> Oracle:
        return chain(self.structured(), self.diverse())


@dataclass(frozen=True, kw_only=True)
class ClippedVMIDIM(VarianceTuned, ClippedDIFGSM):
    """The variance-tuned gradient of diverse inputs with clipped NGM's momentum and rule.

    Args:
        N: number of neighbours, at least 1; a step takes N + 1 gradients.
        beta: the neighbourhood's radius relative to eps, at least 0.
    """

    paper: ClassVar[str] = "no paper's: Wang & He 2021 with NGM (ICLR 2024 submission), Alg. 1, per element"

    def oracle(self) -> Oracle:
        return chain(VarianceTuned.oracle(self), self.diverse())
