"""Transfer attacks that average gradients over transformed copies, neighbours or the members of an ensemble.

MI-FGSM along the oracles of `copies`, `blocks` and `neighbourhoods`, which have the equations. Momentum and rule are
changed as in every attack, and oracles go into each other: a subclass with `oracle` returning
chain(StructureInvariant(m=5), DiverseInput()) is both in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from firstorder.attacks import validation
from firstorder.attacks.blocks import KINDS, BlockShuffle, StructureInvariant
from firstorder.attacks.bounded import IterativeAttack
from firstorder.attacks.catalogue import MIFGSM
from firstorder.attacks.copies import Mixed, SpectrumSimulation, as_pool
from firstorder.attacks.neighbourhoods import (
    DiversityEnsemble,
    EnhancedMomentum,
    GradientNormPenalty,
    VarianceReduction,
)
from firstorder.attacks.oracles import Oracle, ScaleCopies, chain
from firstorder.attacks.projections import Size


def _tuple(values: Any) -> Any:
    """A list, as command lines and files have it, as a tuple."""
    return tuple(values) if isinstance(values, list) else values


@dataclass(frozen=True, kw_only=True)
class Structured(IterativeAttack):
    """The mean gradient of copies whose blocks are each transformed at random.

    Args:
        m: number of copies, at least 1; a step takes as many gradients.
        blocks: along each side, the paper's s, at least 1.
        noise: largest value of the noise that a block may get, in the units of the images, at least 0.
        kinds: the transforms a block may get, of `firstorder.attacks.blocks.KINDS`.
    """

    m: int = 20
    blocks: int = 3
    noise: float = 16 / 255
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", _tuple(self.kinds))
        super().__post_init__()

    def oracle(self) -> Oracle:
        return self.structured()

    def structured(self) -> Oracle:
        """The mean gradient of transformed copies."""
        return StructureInvariant(m=self.m, blocks=self.blocks, noise=self.noise, kinds=self.kinds)


@dataclass(frozen=True, kw_only=True)
class SIA(MIFGSM, Structured):
    """Structure invariant attack: MI-FGSM on the mean gradient of copies whose blocks are each transformed at random.

    Args:
        m: number of copies, at least 1; a step takes as many gradients.
        blocks: along each side, the paper's s, at least 1.
        noise: largest value of the noise that a block may get, in the units of the images, at least 0.
        kinds: the transforms a block may get, of `firstorder.attacks.blocks.KINDS`.
    """

    paper: ClassVar[str] = "Wang et al. 2023 (ICCV), Sec. 3.3"


@dataclass(frozen=True, kw_only=True)
class BSR(MIFGSM):
    """Block shuffle and rotation: MI-FGSM on the mean gradient of copies with shuffled and rotated blocks.

    Args:
        m: number of copies, at least 1; a step takes as many gradients.
        blocks: along each side, at least 1.
        max_angle: of a rotation, in degrees, at least 0.
    """

    paper: ClassVar[str] = "Wang et al. 2024 (CVPR), Sec. 3.3"
    m: int = 20
    blocks: int = 2
    max_angle: float = 24.0

    def oracle(self) -> Oracle:
        return BlockShuffle(m=self.m, blocks=self.blocks, max_angle=self.max_angle)


@dataclass(frozen=True, kw_only=True)
class SSA(MIFGSM):
    """Spectrum simulation attack (S2I-MI-FGSM): the mean gradient of copies whose spectra are changed at random.

    Args:
        decay: of the momentum, at least 0; 0 is the paper's S2I-FGSM.
        m: number of copies, the paper's N, at least 1; a step takes as many gradients.
        sigma: standard deviation of the noise, in the units of the images, at least 0.
        rho: half the width of the range of factors, in [0, 1].
        by: "input" takes the gradient by the image, "transformed" by the transformed image, as the released code.
    """

    paper: ClassVar[str] = "Long et al. 2022 (ECCV), Eqs. 5-7, Alg. 1"
    m: int = 20
    sigma: float = 16 / 255
    rho: float = 0.5
    by: str = "input"

    def oracle(self) -> Oracle:
        return SpectrumSimulation(m=self.m, sigma=self.sigma, rho=self.rho, by=self.by)


@dataclass(frozen=True, kw_only=True)
class Admix(MIFGSM):
    """MI-FGSM on the mean gradient of scale copies with other images mixed in, drawn from a pool.

    The paper mixes the images of a batch with each other, so that examples depend on each other; here the caller gives
    the images, best of other classes than those attacked.

    Args:
        pool: images to mix in, a tensor (P, C, H, W) in the units of those attacked; without them the attack refuses
            to run.
        eta: their weight, at least 0.
        m1: number of scale copies, at least 1.
        m2: number of images mixed in, one after the other, at least 1; a step takes m1 * m2 gradients.
    """

    paper: ClassVar[str] = "Wang et al. 2021 (ICCV), Eqs. 3-4, with a pool of images"
    needs: ClassVar[tuple[str, ...]] = ("pool",)
    pool: Any = None
    eta: float = 0.2
    m1: int = 5
    m2: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", as_pool(self.pool))
        validation.count("m1", self.m1)
        validation.count("m2", self.m2)
        super().__post_init__()

    def oracle(self) -> Oracle:
        return chain(Mixed(m=self.m2, pool=self.pool, eta=self.eta), ScaleCopies(m=self.m1))


@dataclass(frozen=True, kw_only=True)
class DEM(MIFGSM):
    """Diversity ensemble: MI-FGSM on the loss of the mean logits of copies resized and padded at random.

    Args:
        rates: the resize rates, one copy for each; a step takes as many gradients.
    """

    paper: ClassVar[str] = "Zou et al. 2020 (ECCV), Eq. 6"
    rates: tuple[float, ...] = (1.14, 1.27, 1.4, 1.53, 1.66)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _tuple(self.rates))
        super().__post_init__()

    def oracle(self) -> Oracle:
        return DiversityEnsemble(rates=self.rates)


@dataclass(frozen=True, kw_only=True)
class _InSteps(MIFGSM):
    """An attack whose oracle measures in steps, also under rules whose own steps are lengths."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)

    def reach(self) -> Size | None:
        """What the oracle takes for a step: the attack's own where that is in the units of eps, else eps / T."""
        return None if self.chosen_rule().scale == "radius" else self.eps / self.steps


@dataclass(frozen=True, kw_only=True)
class PGN(_InSteps):
    """Penalising the gradient norm: MI-FGSM towards flat maxima, along gradients of neighbours and of points below.

    Args:
        m: number of neighbours, the paper's N, at least 1; a step takes 2 m gradients.
        zeta: the neighbourhood's radius relative to eps, at least 0.
        delta: the weight of the second gradient of each, in [0, 1].
    """

    paper: ClassVar[str] = "Ge et al. 2023 (NeurIPS), Eq. 9, Alg. 1"
    m: int = 20
    zeta: float = 3.0
    delta: float = 0.5

    def __post_init__(self) -> None:
        validation.number("zeta", self.zeta, low=0)
        super().__post_init__()

    def oracle(self) -> Oracle:
        return GradientNormPenalty(radius=self.zeta * self.eps, m=self.m, delta=self.delta, size=self.reach())


@dataclass(frozen=True, kw_only=True)
class EMI(_InSteps):
    """Enhanced momentum (EMI-FGSM): MI-FGSM on the mean gradient of points along the gradient of the step before.

    Args:
        m: number of points, the paper's N, at least 1; a step takes as many gradients.
        eta: the farthest of them, in steps, at least 0.
    """

    paper: ClassVar[str] = "Wang et al. 2021 (BMVC), Eqs. 7-8"
    m: int = 11
    eta: float = 7.0

    def oracle(self) -> Oracle:
        return EnhancedMomentum(m=self.m, eta=self.eta, size=self.reach())


@dataclass(frozen=True, kw_only=True)
class SVRE(MIFGSM):
    """Stochastic variance reduced ensemble attack: inner steps on single members of an `Ensemble` find the gradient.

    Args:
        M: number of inner steps, at least 1; None for four times the members. A step takes a gradient of the ensemble,
            one of every member drawn and M of members.
    """

    paper: ClassVar[str] = "Xiong et al. 2022 (CVPR), Alg. 1"
    M: int | None = None

    def oracle(self) -> Oracle:
        return VarianceReduction(M=self.M)
