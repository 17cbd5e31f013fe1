"""First-order adversarial attacks on PyTorch models: recipes over five interchangeable parts.

    from firstorder.attacks import SINIFGSM, Quantised
    adversarial = SINIFGSM(eps=16/255, steps=10, direction=Quantised(levels=200))(model, x, y)

This package imports torch and nothing else.
"""

from firstorder.attacks.base import Attack, Batch, Bounds, Result
from firstorder.attacks.bounded import BoundedAttack, IterativeAttack
from firstorder.attacks.catalogue import (
    BIM,
    FGSM,
    MIFGSM,
    NGM,
    NIFGSM,
    PGD,
    PQGD,
    SINIFGSM,
    ClippedNG,
    ClippedNGM,
)
from firstorder.attacks.core import Parts, StepHook
from firstorder.attacks.directions import Clipped, Direction, Identity, Normalised, Quantised, Sign, steepest
from firstorder.attacks.losses import DLR, CrossEntropy, Loss, Margin
from firstorder.attacks.minimum_norm import ANU, DDN, MinimumNormAttack, MinimumNormResult
from firstorder.attacks.models import Evaluation, Model, TorchModel, as_model, preserved
from firstorder.attacks.momenta import EMA, Accumulate, Momentum, NoMomentum
from firstorder.attacks.norm_updates import AdaptiveRate, FixedRate, NormUpdate
from firstorder.attacks.oracles import Chain, LookAhead, Oracle, Plain, Query, ScaleCopies, Step, chain
from firstorder.attacks.projections import L2Ball, LinfBall, Region
from firstorder.attacks.registry import Registry, create, get, registry
from firstorder.attacks.schedules import Constant, Cosine, InverseSqrt, Schedule

__all__ = [
    "ANU",
    "Accumulate",
    "AdaptiveRate",
    "Attack",
    "BIM",
    "Batch",
    "BoundedAttack",
    "Bounds",
    "Chain",
    "Clipped",
    "ClippedNG",
    "ClippedNGM",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "DDN",
    "DLR",
    "Direction",
    "EMA",
    "Evaluation",
    "FGSM",
    "FixedRate",
    "Identity",
    "InverseSqrt",
    "IterativeAttack",
    "L2Ball",
    "LinfBall",
    "LookAhead",
    "Loss",
    "MIFGSM",
    "Margin",
    "MinimumNormAttack",
    "MinimumNormResult",
    "Model",
    "Momentum",
    "NGM",
    "NIFGSM",
    "NoMomentum",
    "NormUpdate",
    "Normalised",
    "Oracle",
    "PGD",
    "PQGD",
    "Parts",
    "Plain",
    "Quantised",
    "Query",
    "Region",
    "Registry",
    "Result",
    "SINIFGSM",
    "ScaleCopies",
    "Schedule",
    "Sign",
    "Step",
    "StepHook",
    "TorchModel",
    "as_model",
    "chain",
    "create",
    "get",
    "preserved",
    "registry",
    "steepest",
]
