"""Minimum-norm attacks under L2: one loop that decouples the direction of the perturbation from its norm.

    for k = 1..K:   delta = delta + alpha_k g / ||g||           g the gradient at a: the direction
                    eps = update(eps, a is adversarial)         how far: smaller once adversarial
                    a = P(x + eps delta / ||delta||)            P onto the bounds
                    delta = a - x
    return the adversarial a of the smallest ||a - x||

[DDN] Rony et al. 2019, Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and
defenses; [ANU] Liu & Cao, Self-adaptive norm update for faster gradient-based L2 adversarial attacks and
defenses.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.base import Attack, Batch, Result
from firstorder.attacks.core import Problem, StepHook, contradicted
from firstorder.attacks.directions import Normalised
from firstorder.attacks.levels import Levels
from firstorder.attacks.losses import named
from firstorder.attacks.models import Model
from firstorder.attacks.norm_updates import AdaptiveRate, FixedRate, NormUpdate
from firstorder.attacks.projections import LinfBall, norm, rows
from firstorder.attacks.schedules import Cosine

PRESETS = {
    "mnist": ((0.4, 0.15), (0.05, 0.05)),
    "cifar10": ((0.2, 0.1), (0.15, 0.06)),
    "imagenet": ((0.1, 0.08), (0.05, 0.05)),
}
"""[ANU]'s (gamma_0, alpha_gamma) by data set: untargeted, targeted."""


@dataclass(frozen=True, kw_only=True)
class MinimumNormResult(Result):
    """What a minimum-norm attack found for a batch of N; see `Result`.

    Attributes:
        norm: ||adversarial - x||_2, infinite where the example is not adversarial, shape (N,).
        iterations: the iteration that found the example, shape (N,): 0 for the input itself, -1 where the
            example is not adversarial.
    """

    norm: Tensor
    iterations: Tensor

    def broken(self, eps: float) -> Tensor:
        """Which examples are broken within the L2 ball of radius eps, shape (N,)."""
        return self.norm <= eps


class Found(NamedTuple):
    """The adversarial iterates of smallest norm so far; where there is none, x, infinity and -1; who met NaN."""

    a: Tensor
    norm: Tensor
    iteration: Tensor
    lost: Tensor


@dataclass(frozen=True, kw_only=True)
class MinimumNormAttack(Attack[MinimumNormResult]):
    """A search for the closest adversarial example under L2. A subclass is a recipe: it defines `update`.

    An example that is already misclassified is returned as it is, with norm 0; one that was never
    broken likewise, with norm infinity and without success.

    Lengths of the walk, eps_0 and alpha_k, are in units of the width of the bounds (of 1 without bounds), so that
    images in [0, 255] are attacked as in [0, 1]; `max_norm` and the norms found are in those of the images. eps never
    exceeds the distance to the farthest corner of the bounds, as in the released code of DDN and in foolbox.

    Args:
        steps: the number of iterations K, and of gradients.
        init_norm: the initial norm eps_0.
        max_norm: project the result onto the L2 ball of this radius, for adversarial training; the
            result's success is then that of the projected example. None leaves it where it is.
        levels: round every iterate to so many equidistant values between the bounds, 256 for 8-bit
            images, so that the result survives being stored. The input itself is not rounded. None rounds nothing.
    """

    norms: ClassVar[tuple[str, ...]] = ("L2",)
    steps: int = 100
    init_norm: float = 1.0
    max_norm: float | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        validation.switches(self)
        validation.count("steps", self.steps)
        validation.number("init_norm", self.init_norm, low=0, above=True)
        if self.max_norm is not None:
            validation.number("max_norm", self.max_norm, low=0)
        if self.levels is not None:
            validation.count("levels", self.levels, low=2)
            if self.max_norm is not None:
                raise ValueError(f"levels={self.levels} cannot be kept by max_norm={self.max_norm}; give one of them")
        for targeted in (False, True):
            self.update(targeted=targeted)

    @abstractmethod
    def update(self, *, targeted: bool) -> NormUpdate:
        """How the norm changes from step to step."""

    def check(self, batch: Batch) -> None:
        if self.levels is not None:
            validation.finite(self.levels, batch.low, batch.high)

    def search(self, model: Model, batch: Batch, *, verify: bool) -> MinimumNormResult:
        x, wide = batch.x, torch.promote_types(batch.x.dtype, torch.float32)
        box = LinfBall.around(x.to(wide), math.inf, batch.low.to(wide), batch.high.to(wide))
        problem = Problem(
            model=model,
            region=box,
            labels=batch.labels,
            rows=batch.rows,
            targeted=batch.targeted,
            loss=named(self.loss),
            mask=batch.mask,
        )
        width = (batch.high - batch.low).amax().to(wide)
        unit = torch.where(width.isfinite(), width, 1.0)
        update = self.update(targeted=batch.targeted)
        found = self._minimise(problem, box, x.dtype, unit, update, batch.hook)
        spent = torch.full_like(found.iteration, self.steps)
        if model.exact is not model:
            found, again = self._confirmed(problem, box, x.dtype, unit, update, found)
            spent[again] *= 2
        adversarial, size, iterations, _ = found
        if self.max_norm is not None:
            shrink = torch.where(size.isfinite(), (self.max_norm / size).clamp_max(1.0), 1.0)
            inner = torch.addcmul(box.center, adversarial.to(wide) - box.center, rows(shrink, x))
            adversarial = torch.where(rows(shrink < 1, x), box.project_(inner).to(x.dtype), adversarial)
        success, doubtful = None, found.lost & ~size.isfinite()
        if verify:
            logits = model.logits(adversarial)
            success = problem.adversarial(logits)
            if self.max_norm is None:
                contradicted(problem, logits, size.isfinite())
            doubtful |= ~logits.isfinite().all(1)
            size = torch.where(success, norm(adversarial.to(wide) - box.center).flatten(), torch.inf)
            iterations = torch.where(success, iterations.clamp_min(0), -1)  # what was never found is the input
        return MinimumNormResult(
            adversarial=adversarial,
            success=success,
            gradients=spent,
            norm=size,
            iterations=iterations,
            doubtful=doubtful,
        )

    def nothing(self, x: Tensor) -> MinimumNormResult:
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return MinimumNormResult(
            adversarial=x.clone(),
            success=none.bool(),
            gradients=none,
            norm=none + torch.inf,
            iterations=none - 1,
            doubtful=none.bool(),
        )

    def _minimise(
        self,
        problem: Problem,
        box: LinfBall,
        dtype: torch.dtype,
        unit: Tensor,
        update: NormUpdate,
        hook: StepHook | None,
    ) -> Found:
        """The loop, in at least float32, on iterates of the given dtype.

        The success of every iterate comes from the forward of its own gradient, the last by one more.
        """
        x, length, direction = box.center, Cosine(size=1.0, end=0.01), Normalised()
        walk, delta, scratch = x.clone(), torch.zeros_like(x), torch.empty_like(x)
        largest = torch.finfo(x.dtype).max ** 0.5
        farthest = norm(torch.maximum(x - box.lower, box.upper - x)).flatten().clamp_max(largest)
        eps = (unit * min(self.init_norm, largest)).clamp_max(largest).repeat(len(x))
        size, rate = torch.zeros_like(eps), update.init(eps)
        a = box.project_(walk).to(dtype)
        never = torch.full_like(problem.labels, -1)
        found = Found(a.clone(), torch.full_like(eps, torch.inf), never, never > 0)
        for k in range(1, self.steps + 1):
            gradient, logits, _ = problem.evaluate(a, logits=True)
            assert logits is not None
            if hook is not None:
                hook(k, gradient, a)
            adversarial = problem.adversarial(logits)
            found = _closest(found, a, size, adversarial, k - 1)
            g = (gradient if problem.mask is None else torch.where(problem.mask, gradient, 0.0)).to(x.dtype)
            delta.addcmul_(direction(g, None, scratch)[0], unit, value=length(k, self.steps))
            eps, rate = update(eps, adversarial, rate, k, self.steps)
            eps = torch.minimum(eps, farthest)
            span = norm(delta)
            scale = torch.where(span > 0, rows(eps, x) / span, 0.0)
            box.project_(torch.addcmul(x, delta, scale, out=walk))
            if self.levels is not None:
                self._round_(walk, box, problem.mask)
            a = walk.to(dtype)
            size = norm(torch.sub(a.to(x.dtype), x, out=delta)).flatten()
        return _closest(found, a, size, problem.adversarial(problem.model.logits(a)), self.steps)

    def _confirmed(
        self, problem: Problem, box: LinfBall, dtype: torch.dtype, unit: Tensor, update: NormUpdate, found: Found
    ) -> tuple[Found, Tensor]:
        """`found`, with another search by the exact model for what that does not break, and the indices of these."""
        exact = replace(problem, model=problem.model.exact)
        wrong = found.norm.isfinite() & ~problem.adversarial(exact.model.logits(found.a))
        index = wrong.nonzero()[:, 0]
        if not len(index):
            return found, index
        again = self._minimise(exact.take(index), box.take(index), dtype, unit, update, None)
        return Found(*(old.index_copy(0, index, new) for old, new in zip(found, again, strict=True))), index

    def _round_(self, a: Tensor, box: LinfBall, mask: Tensor | None) -> None:
        """Round what may change of a (N, ...) to the levels, in place."""
        assert self.levels is not None
        levels = Levels(box.lower, box.upper, self.levels)
        rounded = levels.value(levels.place(a).round_())
        a.copy_(rounded if mask is None else torch.where(mask, rounded, a))


def _closest(found: Found, a: Tensor, size: Tensor, adversarial: Tensor, iteration: int) -> Found:
    """The better of `found` and the iterates a (N, ...) of norms `size` (N,), without a host synchronisation."""
    better = adversarial & (size < found.norm)
    return Found(
        torch.where(rows(better, a), a, found.a, out=found.a),
        torch.where(better, size, found.norm),
        torch.where(better, iteration, found.iteration),
        found.lost | ~size.isfinite(),
    )


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNormAttack):
    """Decoupled direction and norm: the norm shrinks by 1 - gamma once adversarial and grows by 1 + gamma until then.

    Args:
        gamma: the rate, in (0, 1).
    """

    paper: ClassVar[str] = "Rony et al. 2019, Alg. 1"
    gamma: float = 0.05

    def update(self, *, targeted: bool) -> NormUpdate:
        return FixedRate(gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class ANU(MinimumNormAttack):
    """Self-adaptive norm update: DDN whose rate grows while the iterate's status stays and shrinks where it changes.

    Args:
        preset: the data set whose published gamma_0 and alpha_gamma are used where they are not
            given: "mnist", "cifar10" or "imagenet"; they differ between targeted and untargeted runs.
        gamma: the initial rate gamma_0, in (0, 0.9].
        alpha_gamma: the initial rate of its change, in [0, 1); 0 is DDN.
        annealed: anneal alpha_gamma to 0, as the paper does. With annealed=False gamma goes on shrinking at the
            boundary: recommended, as the norms found were smaller in all columns but one of
            docs/numbers/minimum-norm.md, and equal in that.
    """

    paper: ClassVar[str] = "Liu & Cao, Alg. 2"
    preset: str = "cifar10"
    gamma: float | None = None
    alpha_gamma: float | None = None
    annealed: bool = True

    def __post_init__(self) -> None:
        validation.choice("preset", self.preset, tuple(PRESETS))
        super().__post_init__()

    def update(self, *, targeted: bool) -> NormUpdate:
        gamma, alpha_gamma = PRESETS[self.preset][targeted]
        return AdaptiveRate(
            gamma=gamma if self.gamma is None else self.gamma,
            alpha_gamma=alpha_gamma if self.alpha_gamma is None else self.alpha_gamma,
            annealed=self.annealed,
        )
