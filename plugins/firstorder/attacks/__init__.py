"""First-order adversarial attacks on PyTorch models: recipes over five interchangeable parts.

    from firstorder.attacks import SINIFGSM, Quantised
    adversarial = SINIFGSM(eps=16/255, steps=10, direction=Quantised(levels=200))(model, x, y)

This package imports torch and nothing else.
"""

from firstorder.attacks.base import Attack, Batch, Bounds, Result, Target
from firstorder.attacks.batched import Batched
from firstorder.attacks.bounded import BoundedAttack, IterativeAttack
from firstorder.attacks.catalogue import APGD, BIM, FGSM, MIFGSM, NGM, PGD, PQGD, ClippedNG, ClippedNGM
from firstorder.attacks.controls import Control, Halving, Turn
from firstorder.attacks.core import Parts, Problem, StepHook, ascend
from firstorder.attacks.directions import (
    Clipped,
    Direction,
    Identity,
    Normalised,
    Quantised,
    Scale,
    Scope,
    Sign,
    steepest,
)
from firstorder.attacks.ensemble import Ensemble
from firstorder.attacks.expectation import Average, Expectation
from firstorder.attacks.inspection import RobustnessWarning
from firstorder.attacks.interaction import BLOBQG, DAABLOB, BlobInteraction
from firstorder.attacks.losses import (
    DLR,
    CrossEntropy,
    LogitDirection,
    Loss,
    Margin,
    ProbabilityMargin,
    TargetedMargin,
)
from firstorder.attacks.minimum_norm import ANU, DDN, MinimumNormAttack, MinimumNormResult
from firstorder.attacks.models import Evaluation, Model, TorchModel, Wrapper, as_model
from firstorder.attacks.modes import preserved
from firstorder.attacks.momenta import EMA, Accumulate, Momentum, NoMomentum, Normaliser
from firstorder.attacks.norm_updates import AdaptiveRate, FixedRate, NormUpdate, Rate
from firstorder.attacks.oracles import (
    Chain,
    Draw,
    LookAhead,
    Oracle,
    Plain,
    Query,
    ScaleCopies,
    Stateless,
    Step,
    VarianceTuning,
    chain,
)
from firstorder.attacks.outputs import Select, TwoLogits
from firstorder.attacks.prepared import Prepared, prepare
from firstorder.attacks.projections import BALLS, Bound, L2Ball, LinfBall, Region, Size, bound, norm, rows
from firstorder.attacks.registry import Attacks, Registry, create, get, registry, rules
from firstorder.attacks.roster import Best, Outcome
from firstorder.attacks.schedules import Constant, Cosine, InverseSqrt, Schedule
from firstorder.attacks.stages import Annealed, Stage
from firstorder.attacks.transfer import (
    DIFGSM,
    NIFGSM,
    SINIDIM,
    SINIFGSM,
    SINITIDIM,
    SINITIM,
    TIDIM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    ClippedVMIFGSM,
)
from firstorder.attacks.transformations import DiverseInput, TranslationInvariant
from firstorder.attacks.validation import Labels
from firstorder.attacks.verdict import Verdict, VerdictResult
from firstorder.attacks.verdicts import UNDECIDED, broken, predicted

__all__ = [
    "ANU",
    "APGD",
    "Accumulate",
    "AdaptiveRate",
    "Annealed",
    "Attack",
    "Attacks",
    "Average",
    "BALLS",
    "BIM",
    "BLOBQG",
    "Batch",
    "Batched",
    "Best",
    "BlobInteraction",
    "Bound",
    "BoundedAttack",
    "Bounds",
    "Chain",
    "Clipped",
    "ClippedNG",
    "ClippedNGM",
    "ClippedVMIFGSM",
    "Constant",
    "Control",
    "Cosine",
    "CrossEntropy",
    "DAABLOB",
    "DDN",
    "DIFGSM",
    "DLR",
    "Direction",
    "DiverseInput",
    "Draw",
    "EMA",
    "Ensemble",
    "Evaluation",
    "Expectation",
    "FGSM",
    "FixedRate",
    "Halving",
    "Identity",
    "InverseSqrt",
    "IterativeAttack",
    "L2Ball",
    "Labels",
    "LinfBall",
    "LogitDirection",
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
    "Normaliser",
    "Oracle",
    "Outcome",
    "PGD",
    "PQGD",
    "Parts",
    "Plain",
    "Prepared",
    "ProbabilityMargin",
    "Problem",
    "Quantised",
    "Query",
    "Rate",
    "Region",
    "Registry",
    "Result",
    "RobustnessWarning",
    "SINIDIM",
    "SINIFGSM",
    "SINITIDIM",
    "SINITIM",
    "Scale",
    "ScaleCopies",
    "Schedule",
    "Scope",
    "Select",
    "Sign",
    "Size",
    "Stage",
    "Stateless",
    "Step",
    "StepHook",
    "TIDIM",
    "TIFGSM",
    "Target",
    "TargetedMargin",
    "TorchModel",
    "TranslationInvariant",
    "Turn",
    "TwoLogits",
    "UNDECIDED",
    "VMIFGSM",
    "VNIFGSM",
    "VarianceTuning",
    "Verdict",
    "VerdictResult",
    "Wrapper",
    "as_model",
    "ascend",
    "bound",
    "broken",
    "chain",
    "create",
    "get",
    "norm",
    "predicted",
    "prepare",
    "preserved",
    "registry",
    "rows",
    "rules",
    "steepest",
]
