"""ENGM and its relatives: examplewise normalised gradients for adversarial training, from one backward.

    method = ENGM(model, alpha=5.0)
    losses = F.cross_entropy(model(x_adv), y, reduction="none")
    method.backward(losses, x_adv)  # was: losses.mean().backward()

The optimiser, its momentum and its schedule stay the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from firstorder.training.baselines import MGNC, MSGD, SNGM
from firstorder.training.criteria import Criterion, MARTLoss, TRADESLoss, VanillaLoss
from firstorder.training.examplewise import Examplewise, Limited
from firstorder.training.method import GradientMethod, Weighting
from firstorder.training.methods import AENGM, ENGM, FENGM, NENGM
from firstorder.training.objectives import AWP, MART, TRADES, Natural, Objective, Vanilla
from firstorder.training.per_example import Coupling, Gradients, PerExample
from firstorder.training.registry import METHODS, gradient_method, registry, takes_alpha
from firstorder.training.scaling import for_size
from firstorder.training.statistics import GradientStatistics, gradient_statistics

OBJECTIVES: dict[str, Callable[..., Objective]] = {"vanilla": Vanilla, "trades": TRADES, "mart": MART}
"""The objectives by the names that trainers take."""

CRITERIA: dict[str, Callable[..., Criterion]] = {"vanilla": VanillaLoss, "trades": TRADESLoss, "mart": MARTLoss}
"""What the objectives of these names minimise, for examples that come from elsewhere."""

__all__ = [
    "AENGM",
    "AWP",
    "CRITERIA",
    "Coupling",
    "Criterion",
    "ENGM",
    "Examplewise",
    "FENGM",
    "GradientMethod",
    "GradientStatistics",
    "Gradients",
    "Limited",
    "MART",
    "MARTLoss",
    "METHODS",
    "MGNC",
    "MSGD",
    "NENGM",
    "Natural",
    "OBJECTIVES",
    "Objective",
    "PerExample",
    "SNGM",
    "TRADES",
    "TRADESLoss",
    "Vanilla",
    "VanillaLoss",
    "Weighting",
    "for_size",
    "gradient_method",
    "gradient_statistics",
    "registry",
    "takes_alpha",
]
