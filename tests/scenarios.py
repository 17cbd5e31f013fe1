"""Random scenarios: any attack on any model, with images, labels, bounds, masks and radii that are valid together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from firstorder.attacks import (
    ANU,
    DDN,
    DLR,
    EMA,
    Accumulate,
    Attack,
    Batched,
    BlobInteraction,
    BoundedAttack,
    Chain,
    Clipped,
    Constant,
    Copies,
    Cosine,
    CrossEntropy,
    Direction,
    DiverseInput,
    DiversityEnsemble,
    EnhancedMomentum,
    Ensemble,
    Evaluation,
    GradientNormPenalty,
    Identity,
    InverseSqrt,
    IterativeAttack,
    LookAhead,
    Margin,
    Model,
    Momentum,
    NoMomentum,
    Normalised,
    Oracle,
    Plain,
    Quantised,
    ScaleCopies,
    Schedule,
    Sign,
    Size,
    TorchModel,
    TranslationInvariant,
    VarianceReduction,
    VarianceTuning,
    Verdict,
    Wrapper,
    as_model,
    chain,
    prepare,
    registry,
)
from firstorder.attacks.blocks import KINDS as BLOCK_KINDS
from firstorder.attacks.transformations import OfImages

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

SHAPES: list[Shape] = [(1,), (7,), (2, 5), (1, 1, 1), (3, 1, 1), (1, 4, 4), (3, 5, 4), (2, 3, 7), (1, 3, 4, 3)]
DTYPES = [*[torch.float64] * 6, *[torch.float32] * 2, torch.bfloat16, torch.float16]
SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": Constant, "root": InverseSqrt, "cosine": Cosine}
MODELS = ["callable", "module", "entry", "prepared", "bfloat16", "ensemble", "wrapper", "approximate"]
OURS = {name: cls for name, cls in registry().attacks.items() if cls.__module__.startswith("firstorder.")}
LAYOUTS = ["plain", "plain", "turned", "channels last", "strided", "leaf", "expanded"]
LABELS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "one-hot", "one-hot float", "soft", "soft", "soft"]


# --- parts of a stranger


@dataclass(frozen=True)
class Saturated:
    """A rule of somebody else's: no component moves further than alpha times its `gamma`."""

    gamma: float = 0.5
    scale: ClassVar[Any] = "component"

    def init(self, x: Tensor) -> Tensor | None:
        return None

    def __call__(self, m: Tensor, state: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = m.abs().flatten(1).mean(1).clamp_min(1e-6).reshape(-1, *[1] * (m.ndim - 1))
        return self.gamma * torch.tanh(m / mean), state


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the probabilities from the labels."""
    rows = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) - rows.to(logits.dtype)).square().sum(1)


@dataclass(frozen=True, kw_only=True)
class Composed(IterativeAttack):
    """An attack of arbitrary parts. The radius of variance tuning is in units of eps."""

    follows: tuple[Oracle, ...] = ()
    accumulates: Momentum = field(default_factory=NoMomentum)
    moves: Direction = field(default_factory=Sign)
    goes_on: str = "constant"

    def oracle(self) -> Oracle:
        parts = [
            replace(part, radius=part.radius * self.eps) if isinstance(part, VarianceTuning) else part
            for part in self.follows
        ]
        return parts[0] if len(parts) == 1 else chain(*parts) if parts else Plain()

    def momentum(self) -> Momentum:
        return self.accumulates

    def rule(self) -> Direction:
        return self.moves

    def schedule(self, size: Size) -> Schedule:
        return SCHEDULES[self.goes_on](size=size)


class Approximate(Wrapper):
    """A model whose gradients are a rough copy's; the exact one decides."""

    def __init__(self, rough: Model, exact: Model) -> None:
        super().__init__(rough)
        self._decides = exact

    @property
    def exact(self) -> Model:
        return self._decides

    def logits(self, x: Tensor) -> Tensor:
        return self._decides.logits(x)

    def preserved(self) -> Any:
        return self._decides.preserved()


class Passing(Wrapper):
    """Passes everything on."""


class Counting(Wrapper):
    """Counts the points that gradients are asked at, the exact model's included."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.points = [0]

    def gradient(self, x: Tensor, labels: Tensor, loss: Any, *, logits: bool = True) -> Evaluation:
        self.points[0] += len(x)
        return super().gradient(x, labels, loss, logits=logits)


class Body(nn.Module):
    """A small network for examples of any shape, with BatchNorm and dropout, whose classes are all likely."""

    def __init__(self, shape: Shape, classes: int, seed: int, gain: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            numel = torch.Size(shape).numel()
            if len(shape) in (3, 4):
                layer, norm = (nn.Conv2d, nn.BatchNorm2d) if len(shape) == 3 else (nn.Conv3d, nn.BatchNorm3d)
                first = [layer(shape[0], 3, 3, padding=1), norm(3), nn.Softplus(4), nn.Flatten()]
                width = 3 * numel // shape[0]
            else:
                first, width = [nn.Flatten(), nn.Linear(numel, 6), nn.BatchNorm1d(6), nn.Tanh()], 6
            self.layers = nn.Sequential(*first, nn.Dropout(0.5), nn.Linear(width, classes))
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer))
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(gain)
                self.layers[-1].bias.sub_(self.eval()(torch.rand(32, *shape)).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Brittle(nn.Module):
    """NaN away from every other one of the clean images, as far as their mean element may move by 0.02."""

    def __init__(self, body: nn.Module, clean: Tensor) -> None:
        super().__init__()
        self.body, self.clean = body, clean.detach().double().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        distances, nearest = (x.detach().double().flatten(1)[:, None] - self.clean).abs().mean(2).min(1)
        lost = (distances > 0.02) & (nearest % 2 == 0)
        return torch.where(lost[:, None], torch.nan, self.body(x))


class Remembering(nn.Module):
    """Changes one buffer and replaces another at every forward."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = self.seen.clone()
        logits: Tensor = self.body(x)
        return logits


class Entry(nn.Module):
    """Returns the logits as an entry of a dictionary."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return {"loss": None, "logits": self.body(x)}


# --- a scenario


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is attacked with what; `make` turns it into tensors."""

    attack: Attack
    shape: Shape
    n: int
    dtype: torch.dtype
    classes: int
    bounds: str
    layout: str
    labels: str
    targeted: bool
    mask: str
    model: str
    chunk: int | None
    brittle: bool
    gain: float
    grad: bool
    seeded: bool
    seed: int

    @property
    def parts(self) -> list[Oracle]:
        """The oracles of a bounded attack, one by one."""
        return flat(self.attack.oracle()) if isinstance(self.attack, BoundedAttack) else []

    @property
    def draws(self) -> bool:
        """Whether the steps draw."""
        several = self.model == "ensemble"
        return any(
            (isinstance(part, DiverseInput) and part.diversity_prob > 0)
            or isinstance(part, Copies | DiversityEnsemble | GradientNormPenalty)
            or (isinstance(part, VarianceReduction) and several)
            or (isinstance(part, VarianceTuning) and bool((torch.as_tensor(part.radius) > 0).any()))
            for part in self.parts
        )

    @property
    def population(self) -> bool:
        """Whether the examples interact."""
        return any(isinstance(part, BlobInteraction) and part.c > 0 for part in self.parts)

    @property
    def price(self) -> int:
        """Gradients per step and example."""
        total = 1
        for part in self.parts:
            match part:
                case ScaleCopies() | Copies() | EnhancedMomentum():
                    total *= part.m
                case VarianceTuning():
                    total *= part.N + 1
                case GradientNormPenalty():
                    total *= 2 * part.m
                case DiversityEnsemble():
                    total *= len(part.rates)
                case VarianceReduction():
                    assert part.M is not None
                    total *= part.M + (3 if self.model == "ensemble" else 1)
        return total

    def make(self) -> Case:
        generator = torch.Generator().manual_seed(self.seed)
        like = {"generator": generator, "dtype": torch.float64}
        bounds, low, high = limits(self.bounds, self.shape, generator)
        x = low + (high - low) * (1.2 * torch.rand(self.n, *self.shape, **like) - 0.1).clamp(0, 1)
        lower, upper = low.to(self.dtype), high.to(self.dtype)
        x = torch.minimum(torch.maximum(x.to(self.dtype), lower), upper)
        x = laid_out(x, self.layout)
        first = Body(self.shape, self.classes, self.seed, self.gain).to(self.dtype)
        module: nn.Module = self._ensemble(first) if self.model == "ensemble" else first
        if self.brittle:
            module = Brittle(module, x)
        if self.model == "module":
            module = Remembering(module)
        reference = copy.deepcopy(module).eval()
        with torch.no_grad():
            own = reference(x).argmax(1)
        other = torch.randint(self.classes, (self.n,), generator=generator)
        own = torch.where(torch.rand(self.n, generator=generator) < (0.2 if self.targeted else 0.8), own, other)
        mask = None
        if self.mask != "none":
            trailing = torch.rand(self.shape[-1], generator=generator) < 0.6
            whole = torch.rand(self.n, *self.shape, generator=generator) < 0.6
            mask = {"broadcast": trailing.float(), "whole": whole, "zero": torch.zeros(1)}[self.mask]
        rough = self._rough(first)
        return Case(
            x=x,
            y=written(own, self.labels, self.classes, generator),
            classes=own,
            bounds=bounds,
            limits=None if bounds is None else (lower, upper),
            mask=mask,
            module=module,
            reference=reference,
            target=self._target(module, rough, x),
        )

    def _ensemble(self, body: Body) -> nn.Module:
        """Of two models, images larger for the second."""
        images = len(self.shape) == 3
        larger = (self.shape[1] + 1, self.shape[2] + 2) if images else None
        shape = self.shape if larger is None else (self.shape[0], *larger)
        other = Body(shape, self.classes, self.seed + 1, self.gain).to(self.dtype)
        return Ensemble([body, other], weights=[2, 1], sizes=[None, larger])

    def _rough(self, body: Body) -> nn.Module:
        rough = copy.deepcopy(body).eval()
        with torch.no_grad():
            for i, parameter in enumerate(rough.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(self.seed + i))
                parameter.mul_(1 + 0.3 * noise.to(parameter.dtype))
        return rough

    def _target(self, module: nn.Module, rough: nn.Module, x: Tensor) -> Any:
        target: Any = module
        if self.model == "callable":
            module.eval()
            target = lambda points: module(points)  # noqa: E731
        elif self.model == "entry":
            target = Entry(module)
        elif self.model in ("prepared", "bfloat16"):
            target = prepare(module, x, precision="bfloat16" if self.model == "bfloat16" else "float32")
        elif self.model == "wrapper":
            target = Passing(TorchModel(module))
        elif self.model == "approximate":
            target = Approximate(TorchModel(rough), TorchModel(module))
        if self.model != "callable":
            disturb(module)
        return target if self.chunk is None else Batched(as_model(target), self.chunk)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scenario as tensors: `classes` are the labels (N,) whatever `y` looks like, `limits` the bounds as tensors."""

    x: Tensor
    y: Tensor
    classes: Tensor
    bounds: Any
    limits: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    module: nn.Module
    reference: nn.Module
    target: Any


def flat(oracle: Oracle) -> list[Oracle]:
    return [part for each in oracle.oracles for part in flat(each)] if isinstance(oracle, Chain) else [oracle]


def limits(kind: str, shape: Shape, generator: torch.Generator) -> tuple[Any, Tensor, Tensor]:
    """The bounds as a caller writes them, and as tensors; without bounds those of the images."""
    if kind in ("channel", "feature"):
        wanted = shape if kind == "feature" else (shape[0], *[1] * (len(shape) - 1))
        low, width = torch.rand(2, *wanted, generator=generator, dtype=torch.float64)
        low, high = 0.3 * low, 0.3 * low + 0.2 + width
        written = (low, high) if kind == "feature" else (low.flatten().tolist(), high.flatten().tolist())
        return written, low, high
    low, high = (0.0, 1.0) if kind == "unit" else (-1.0, 2.0)
    return None if kind == "none" else (low, high), torch.tensor(low).double(), torch.tensor(high).double()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x (N, ...) with the same values in another layout of memory."""
    if layout == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and x.ndim in (4, 5):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x.requires_grad_(True) if layout == "leaf" else x


def written(classes: Tensor, kind: str, k: int, generator: torch.Generator) -> Tensor:
    """Label indices (N,) as rows, or integers of another width."""
    rows = F.one_hot(classes, k)
    if kind == "soft":
        noise = torch.rand(len(classes), k, generator=generator) * 0.9
        noise = 0.4 * noise / noise.sum(1, keepdim=True)
        return 0.6 * rows + noise
    if kind.startswith("one-hot"):
        return rows.float() if kind.endswith("float") else rows
    return classes.to(getattr(torch, kind))


def disturb(module: nn.Module) -> None:
    """Training mode, one part excepted; gradients; a frozen parameter."""
    module.train()
    list(module.modules())[-1].eval()
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25 * index)
    next(module.parameters()).requires_grad_(False)


# --- strategies


def sizes(draw: Draw, shape: Shape, n: int, norm: str, crowd: bool, numbers: list[float]) -> Size:
    """A radius or a step: one of the numbers, or a tensor."""
    kinds = ["number", "number", "scalar", *["example"] * (4 if crowd else 1)]
    if norm == "Linf":
        kinds.append("full")
        if not (len(shape) == 1 and shape[0] == n > 1):
            kinds.append("feature")
    kind = draw(st.sampled_from(kinds))
    if kind == "number":
        return float(draw(st.sampled_from(numbers)))
    wanted: Shape = {"scalar": (), "example": (n, *[1] * len(shape)), "feature": shape, "full": (n, *shape)}[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = 0.02 * (1 + 9 * torch.rand(wanted, generator=generator, dtype=torch.float64))
    return values.to(draw(st.sampled_from([torch.float64, torch.float32])))


RULES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([Sign(), Normalised(), Identity(), Saturated(), Saturated(gamma=2.0)]),
    st.builds(Quantised, levels=st.sampled_from([1, 2, 200])),
    st.builds(Clipped, gamma=st.sampled_from([0.1, 0.8]), scope=st.sampled_from(["example", "element"])),
)
NORMALISERS = st.sampled_from(["mean", "sum"])
MOMENTA: st.SearchStrategy[Any] = st.one_of(
    st.just(NoMomentum()),
    st.builds(Accumulate, decay=st.sampled_from([0.0, 0.7, 1.0]), normaliser=NORMALISERS),
    st.builds(EMA, beta1=st.sampled_from([0.0, 0.9]), lam=st.sampled_from([0.99, 1.0]), normaliser=NORMALISERS),
)
KERNELS = st.sampled_from(["gaussian", "linear", "uniform"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "decay": st.sampled_from([0.0, 0.5, 1.0]),
    "normaliser": NORMALISERS,
    "beta1": st.sampled_from([0.0, 0.9]),
    "lam": st.sampled_from([0.5, 1.0]),
    "rho": st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    "gamma": st.sampled_from([0.05, 0.3, 0.8]),
    "alpha_gamma": st.sampled_from([None, 0.0, 0.3]),
    "annealed": st.booleans(),
    "preset": st.sampled_from(["mnist", "cifar10", "imagenet"]),
    "scope": st.sampled_from(["example", "element"]),
    "memory": st.booleans(),
    "b": st.sampled_from([1, 3, 200]),
    "m": st.integers(1, 3),
    "N": st.integers(1, 3),
    "beta": st.sampled_from([0.0, 1.5]),
    "c": st.sampled_from([None, 0.0, 1.0]),
    "kernel_gradient": st.sampled_from(["add", "subtract"]),
    "resize_rate": st.sampled_from([1.0, 1.3, 2.0]),
    "diversity_prob": st.sampled_from([0.0, 0.5, 1.0]),
    "kernel_name": KERNELS,
    "len_kernel": st.sampled_from([1, 3, 5]),
    "nsig": st.sampled_from([1.0, 3.0]),
    "blocks": st.integers(1, 3),
    "noise": st.sampled_from([0.0, 0.1]),
    "kinds": st.lists(st.sampled_from(BLOCK_KINDS), min_size=1, max_size=3).map(tuple),
    "max_angle": st.sampled_from([0.0, 24.0]),
    "sigma": st.sampled_from([0.0, 0.1]),
    "by": st.sampled_from(["input", "transformed"]),
    "zeta": st.sampled_from([0.0, 3.0]),
    "delta": st.sampled_from([0.0, 0.5, 1.0]),
    "eta": st.sampled_from([0.0, 0.2, 7.0]),
    "m1": st.integers(1, 3),
    "m2": st.integers(1, 2),
    "rates": st.sampled_from([(1.0,), (1.3, 2.0)]),
    "M": st.just(24),  # so many that both members of an ensemble are drawn
    "init_norm": st.sampled_from([0.05, 1.0]),
    "direction": st.one_of(st.none(), st.none(), RULES),
}
"""How the parameters of a registered attack are drawn; those below are drawn together."""
TOGETHER = {
    "pool",
    *("loss", "eps", "alpha", "norm", "steps", "random_start", "restarts", "early_stop", "patience", "memory_budget"),
    *("max_norm", "levels"),
}


BOUNDED = [cls for cls in OURS.values() if issubclass(cls, BoundedAttack) and cls is not Verdict]
KINDS: dict[str, list[type[Attack]]] = {
    "crowd": [*[Composed] * len(BOUNDED), *BOUNDED],
    "bounded": [*[Composed] * len(BOUNDED), *BOUNDED],
    "minimum": [DDN, ANU],
}
"""Which attacks are drawn for scenarios of a kind. A crowd are many examples that leave one after the other, as they
are broken."""


def oracles(draw: Draw, shape: Shape, *, crowd: bool) -> tuple[Oracle, ...]:
    """Some oracles in any order that is valid: what tunes the variance before what stacks copies.

    In a crowd those that keep a state and draw most of the time, and none that cannot see success.
    """
    pool: list[st.SearchStrategy[Any]] = [
        st.builds(LookAhead, decay=st.sampled_from([0.0, 1.0]), along=st.sampled_from(["momentum", "step"])),
        st.builds(VarianceTuning, radius=st.sampled_from([0.0, 1.5, 1.5]), N=st.integers(1, 3)),
        st.builds(ScaleCopies, m=st.integers(1, 3)),
        st.builds(BlobInteraction, c=st.sampled_from([0.0, 1.0])),
        st.just(Plain()),
    ]
    if len(shape) == 3:
        pool.append(st.builds(DiverseInput, resize_rate=FIELDS["resize_rate"], diversity_prob=FIELDS["diversity_prob"]))
        pool.append(st.builds(TranslationInvariant, kernel_name=KERNELS, len_kernel=st.sampled_from([1, 3, 5])))
    chosen = draw(st.lists(st.sampled_from(range(len(pool))), max_size=3, unique=True))
    if crowd and 1 not in chosen and draw(st.booleans()):
        chosen.append(1)
    if 1 in chosen and 2 in chosen:
        chosen.sort(key=lambda i: 1 if i == 1 else 2 if i == 2 else 0)
    return tuple(part for part in (draw(pool[i]) for i in chosen) if part.at_iterate or not crowd)


@st.composite
def scenarios(draw: Draw, kind: str) -> Scenario:
    """A valid scenario of a kind."""
    cls, bounded, crowd = draw(st.sampled_from(KINDS[kind])), kind != "minimum", kind == "crowd"
    transforms = bounded and any(isinstance(o, OfImages) for o in flat(cls().oracle()))
    shape = draw(st.sampled_from([s for s in SHAPES if len(s) == 3 or not transforms]))
    n, classes, dtype = (
        8 if crowd else draw(st.sampled_from([1, 2, 3, 4, 5, 6, 6])),
        draw(st.integers(2, 5)),
        torch.float64 if crowd else draw(st.sampled_from(DTYPES)),
    )
    bounds = draw(
        st.sampled_from(["unit", "unit", "wide", "feature", "none", *(["channel"] if len(shape) > 1 else [])])
    )
    targeted = draw(st.booleans())
    losses = [None, None, CrossEntropy(), own_loss, Margin(), *([DLR()] if classes > 2 else [])]
    values: dict[str, Any] = {"loss": draw(st.sampled_from(losses))}
    for part in dataclasses.fields(cls):
        if part.name in FIELDS:
            values[part.name] = 0.0 if crowd and part.name == "diversity_prob" else draw(FIELDS[part.name])
    if "kinds" in values:
        values["blocks"] = min(values["blocks"], *shape[1:])
    if "pool" in cls.needs:
        values["pool"] = torch.rand(2, *shape, generator=torch.Generator().manual_seed(7))
    labels = draw(st.sampled_from([kind for kind in LABELS if kind != "soft" or not targeted]))
    if isinstance(values["loss"], (Margin, DLR)) and labels == "soft":
        labels = "int64"
    if cls is Composed:
        values["follows"] = oracles(draw, shape, crowd=crowd)
        values |= {
            "accumulates": draw(MOMENTA),
            "moves": draw(RULES),
            "goes_on": draw(st.sampled_from(list(SCHEDULES))),
        }
    if bounded:
        attack = _bounded(draw, cls, values, shape, n, crowd)
    else:
        values["steps"] = draw(st.sampled_from([1, 2, 5, 10, 20]))
        end = draw(st.sampled_from(["", "max_norm", "levels"]))
        if end == "max_norm":
            values["max_norm"] = draw(st.sampled_from([0.0, 0.1, 0.5, 10.0]))
        elif end and bounds != "none":
            values["levels"] = draw(st.sampled_from([2, 8, 256]))
        attack = cls(**values)
    model = draw(st.sampled_from([*MODELS, *["approximate"] * (3 if crowd else 0)]))
    if model == "bfloat16" and dtype != torch.float32:
        model = "prepared"
    return Scenario(
        attack=attack,
        shape=shape,
        n=n,
        dtype=dtype,
        classes=classes,
        bounds=bounds,
        layout=draw(st.sampled_from([kind for kind in LAYOUTS if kind != "expanded" or not crowd])),
        labels=labels,
        targeted=targeted,
        mask=draw(st.sampled_from(["none", "none", "broadcast", "whole", "zero"])),
        model=model,
        chunk=draw(st.sampled_from([None, None, 1, 2, 4])),
        brittle=model in ("callable", "module", "ensemble", "wrapper") and not crowd and draw(st.integers(0, 3)) == 3,
        gain=draw(st.sampled_from([1.0, 2.0])),
        grad=draw(st.booleans()),
        seeded=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def _bounded(draw: Draw, cls: type[Any], values: dict[str, Any], shape: Shape, n: int, crowd: bool) -> Attack:
    norm = draw(st.sampled_from(cls.norms))
    values |= {"norm": norm, "eps": sizes(draw, shape, n, norm, crowd, [0.0, 1e-3, 0.01, 0.06, 0.1, 0.3, 0.3, 5.0])}
    if issubclass(cls, IterativeAttack):
        values["steps"] = draw(st.integers(4, 7) if crowd else st.integers(1, 6))
        if draw(st.booleans()):
            values["alpha"] = sizes(draw, shape, n, norm, crowd, [1e-3, 0.01, 0.1, *([] if crowd else [0.3, 5.0])])
    values["memory_budget"] = draw(st.sampled_from([None, 1, 4000, 2**30]))
    values["random_start"] = draw(st.booleans())
    if values["random_start"]:
        values["restarts"] = draw(st.integers(1, 3))
    attack: BoundedAttack = cls(**values)
    if attack.oracle().at_iterate and (crowd or draw(st.booleans())):
        attack = replace(attack, early_stop=True, patience=draw(st.sampled_from([None, None, None, 1, 3])))
    return attack
