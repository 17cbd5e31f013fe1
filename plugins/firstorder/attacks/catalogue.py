"""The published attacks on one model, a recipe each: the parts of the paper with the paper's defaults.

[FGSM] Goodfellow et al. 2015; [BIM] Kurakin et al. 2017; [PGD] Madry et al. 2018; [MI] Dong et al. 2018;
[NGM] Provable convergence of clipped normalized-gradient heavy-ball momentum for adversarial attacks, ICLR 2024
submission; [QG] Liu & Tsang, Towards sharper first-order adversary with quantized gradients; [APGD] Croce & Hein
2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks.

Under norm="L2" the sign of the rules becomes the unit L2 vector, the steepest ascent of that norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from firstorder.attacks import validation
from firstorder.attacks.bounded import BoundedAttack, IterativeAttack
from firstorder.attacks.controls import Control, Halving
from firstorder.attacks.directions import Clipped, Direction, Identity, Quantised, Scope
from firstorder.attacks.momenta import EMA, NORMALISERS, Accumulate, Momentum, Normaliser
from firstorder.attacks.projections import Size
from firstorder.attacks.schedules import InverseSqrt, Schedule

TRANSFER_EPS = 16 / 255
"""The radius of the transfer papers, for images in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class FGSM(BoundedAttack):
    """Fast gradient sign method: one step of length eps along the sign of the gradient.

    With a `direction` whose step is not in the units of eps (`Clipped`, `Identity`) the step is that rule's default.
    """

    paper: ClassVar[str] = "Goodfellow et al. 2015, Sec. 4"


@dataclass(frozen=True, kw_only=True)
class BIM(IterativeAttack):
    """Basic iterative method, or I-FGSM: sign steps from the clean input, alpha = eps / T by default."""

    paper: ClassVar[str] = "Kurakin et al. 2017, Eq. 2"


@dataclass(frozen=True, kw_only=True)
class PGD(IterativeAttack):
    """Projected gradient descent: sign steps from a random start, alpha = 2.5 eps / T by default."""

    paper: ClassVar[str] = "Madry et al. 2018, Sec. 2.1"
    random_start: bool = True

    def step_size(self, direction: Direction, numel: int) -> Size:
        wider = 2.5 if self.alpha is None and direction.scale == "radius" else 1.0
        return wider * super().step_size(direction, numel)


@dataclass(frozen=True, kw_only=True)
class PQGD(PGD):
    """Projected quantised-gradient descent: PGD with the sign replaced by b levels; b = 1 is PGD.

    Args:
        b: number of levels, at least 1; 100 to 1000 work best.
    """

    paper: ClassVar[str] = "Liu & Tsang, Eqs. 4, 7"
    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    b: int = 200

    def __post_init__(self) -> None:
        validation.count("b", self.b)
        super().__post_init__()

    def rule(self) -> Direction:
        return Quantised(levels=self.b)


@dataclass(frozen=True, kw_only=True)
class MIFGSM(IterativeAttack):
    """Momentum iterative FGSM: sign steps along normalised gradients accumulated with decay mu.

    Args:
        decay: the paper's mu, at least 0.
        normaliser: "mean" divides gradients by mean|g|, as the released code, "sum" by ||g||_1; these
            differ only where the length of the momentum matters. "none" takes them as they are.
    """

    paper: ClassVar[str] = "Dong et al. 2018, Alg. 1"
    eps: float = TRANSFER_EPS
    decay: float = 1.0
    normaliser: Normaliser = "mean"

    def __post_init__(self) -> None:
        validation.number("decay", self.decay, low=0)
        validation.choice("normaliser", self.normaliser, NORMALISERS)
        super().__post_init__()

    def momentum(self) -> Momentum:
        return Accumulate(decay=self.decay, normaliser=self.normaliser)


@dataclass(frozen=True, kw_only=True)
class NGM(IterativeAttack):
    """Normalised-gradient heavy-ball momentum without the clip: steps alpha / sqrt(t) along the momentum.

    Args:
        beta1: initial momentum weight, in [0, 1).
        lam: its decay per step, the paper's lambda, in (0, 1].
        normaliser: "mean" divides gradients by mean|g|, "sum" by ||g||_1, the paper's theory, "none" by nothing.
    """

    paper: ClassVar[str] = "NGM (ICLR 2024 submission), Eq. 20"
    eps: float = TRANSFER_EPS
    beta1: float = 0.9
    lam: float = 0.99
    normaliser: Normaliser = "mean"

    def __post_init__(self) -> None:
        validation.number("beta1", self.beta1, low=0, high=1, below=True)
        validation.number("lam", self.lam, low=0, above=True, high=1)
        validation.choice("normaliser", self.normaliser, NORMALISERS)
        super().__post_init__()

    def momentum(self) -> Momentum:
        return EMA(beta1=self.beta1, lam=self.lam, normaliser=self.normaliser)

    def rule(self) -> Direction:
        return Identity()

    def schedule(self, size: Size) -> Schedule:
        return InverseSqrt(size=size)


@dataclass(frozen=True, kw_only=True)
class ClippedNGM(NGM):
    """Clipped NGM: the momentum is scaled by d_t = min(gamma / size of m_t, d_{t-1}), which never increases.

    By default the L2 norm of a whole example is clipped, as the paper's text has it. Clipping every component by
    itself, ClippedNGM(scope="element", gamma=0.1), is no paper's and transferred better (docs/numbers/transfer.md):
    recommended.

    Args:
        gamma: clipping radius, positive; 0.1 with scope="element".
        scope: "example" clips by the L2 norm of an example, "element" every component by itself.
        memory: whether d_t never increases; without it the clip is the regular one, min(1, gamma / size of m_t).
    """

    paper: ClassVar[str] = "NGM (ICLR 2024 submission), Alg. 1"
    gamma: float = 0.8
    scope: Scope = "example"
    memory: bool = True

    def rule(self) -> Direction:
        return Clipped(gamma=self.gamma, scope=self.scope, memory=self.memory)


@dataclass(frozen=True, kw_only=True)
class ClippedNG(ClippedNGM):
    """Clipped normalised gradient: clipped NGM without momentum, beta1 = 0."""

    paper: ClassVar[str] = "NGM (ICLR 2024 submission), Eq. 19"
    beta1: float = 0.0


@dataclass(frozen=True, kw_only=True)
class APGD(IterativeAttack):
    """Auto-PGD: sign steps with inertia from 2 eps on, halved where the loss does not rise, with a return to the best
    iterate.

    Iterates are those of the released code, see `Halving`; `loss` "ce" and "dlr" are its two. As there, the example
    returned is the last iterate that was broken, here else the one of the best margin (there the input), and random
    starts lie on the surface of the ball. T steps take T gradients and a forward for the last iterate, there T + 1
    gradients. The L1 version is another algorithm and not here.

    Args:
        alpha: the first step size; None takes 2 eps.
        rho: the share of steps that must raise the loss for the step to stay, in [0, 1].
    """

    paper: ClassVar[str] = "Croce & Hein 2020, Alg. 1"
    inertia: ClassVar[float] = 0.25
    surface: ClassVar[bool] = True
    steps: int = 100
    rho: float = 0.75
    random_start: bool = True

    def control(self) -> Control:
        return Halving(rho=self.rho)

    def step_size(self, direction: Direction, numel: int) -> Size:
        first = self.alpha is None and direction.scale == "radius"
        return 2.0 * self.eps if first else super().step_size(direction, numel)
