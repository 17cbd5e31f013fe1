"""First-order adversarial attacks on PyTorch models: recipes over five interchangeable parts.

    from firstorder.attacks import SINIFGSM, Quantised
    adversarial = SINIFGSM(eps=16/255, steps=10, direction=Quantised(levels=200))(model, x, y)

This package imports torch and nothing else.
"""

from firstorder.attacks.augmented import BSR, DEM, EMI, PGN, SIA, SSA, SVRE, Admix
from firstorder.attacks.base import Attack, Batch, Bounds, Result, Target
from firstorder.attacks.batched import Batched
from firstorder.attacks.blocks import BlockShuffle, StructureInvariant
from firstorder.attacks.bounded import BoundedAttack, IterativeAttack
from firstorder.attacks.catalogue import APGD, BIM, FGSM, MIFGSM, NGM, PGD, PQGD, ClippedNG, ClippedNGM
from firstorder.attacks.clipped import (
    ClippedDIFGSM,
    ClippedSIADIM,
    ClippedSIDIM,
    ClippedSITIDIM,
    ClippedTIDIM,
    ClippedVMIDIM,
)
from firstorder.attacks.controls import Control, Halving, Turn
from firstorder.attacks.copies import Copies, Mixed, SpectrumSimulation
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
    Logit,
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
from firstorder.attacks.neighbourhoods import (
    DiversityEnsemble,
    EnhancedMomentum,
    GradientNormPenalty,
    VarianceReduction,
)
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
    Walk,
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
    "Admix",
    "Annealed",
    "Attack",
    "Attacks",
    "Average",
    "BALLS",
    "BIM",
    "BLOBQG",
    "BSR",
    "Batch",
    "Batched",
    "Best",
    "BlobInteraction",
    "BlockShuffle",
    "Bound",
    "BoundedAttack",
    "Bounds",
    "Chain",
    "Clipped",
    "ClippedDIFGSM",
    "ClippedNG",
    "ClippedNGM",
    "ClippedSIADIM",
    "ClippedSIDIM",
    "ClippedSITIDIM",
    "ClippedTIDIM",
    "ClippedVMIDIM",
    "ClippedVMIFGSM",
    "Constant",
    "Control",
    "Copies",
    "Cosine",
    "CrossEntropy",
    "DAABLOB",
    "DDN",
    "DEM",
    "DIFGSM",
    "DLR",
    "Direction",
    "DiverseInput",
    "DiversityEnsemble",
    "Draw",
    "EMA",
    "EMI",
    "EnhancedMomentum",
    "Ensemble",
    "Evaluation",
    "Expectation",
    "FGSM",
    "FixedRate",
    "GradientNormPenalty",
    "Halving",
    "Identity",
    "InverseSqrt",
    "IterativeAttack",
    "L2Ball",
    "Labels",
    "LinfBall",
    "Logit",
    "LogitDirection",
    "LookAhead",
    "Loss",
    "MIFGSM",
    "Margin",
    "MinimumNormAttack",
    "MinimumNormResult",
    "Mixed",
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
    "PGN",
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
    "SIA",
    "SINIDIM",
    "SINIFGSM",
    "SINITIDIM",
    "SINITIM",
    "SSA",
    "SVRE",
    "Scale",
    "ScaleCopies",
    "Schedule",
    "Scope",
    "Select",
    "Sign",
    "Size",
    "SpectrumSimulation",
    "Stage",
    "Stateless",
    "Step",
    "StepHook",
    "StructureInvariant",
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
    "VarianceReduction",
    "VarianceTuning",
    "Verdict",
    "VerdictResult",
    "Walk",
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
