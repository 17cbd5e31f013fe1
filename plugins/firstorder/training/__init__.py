"""ENGM and its relatives: examplewise normalised gradients for adversarial training, from one backward.

from firstorder.training import ENGM

method = ENGM(model, alpha=5.0)
losses = F.cross_entropy(model(x_adv), y, reduction="none")
method.backward(losses, x_adv)  # was: losses.mean().backward()
"""

from __future__ import annotations

from firstorder.training.baselines import MGNC, MSGD, SNGM
from firstorder.training.methods import AENGM, ENGM, FENGM, NENGM, GradientMethod, Weighting
from firstorder.training.objectives import AWP, MART, TRADES, Objective, Vanilla
from firstorder.training.per_example import Coupling, Gradients, PerExample

__all__ = [
    "AENGM",
    "AWP",
    "Coupling",
    "ENGM",
    "FENGM",
    "Gradients",
    "GradientMethod",
    "MART",
    "MGNC",
    "MSGD",
    "NENGM",
    "Objective",
    "PerExample",
    "SNGM",
    "TRADES",
    "Vanilla",
    "Weighting",
]
