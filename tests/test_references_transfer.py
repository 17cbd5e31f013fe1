"""The transfer attacks and the interacting ones against their slow references, in float64."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import references
import references_transfer as slow
from firstorder.attacks import (
    BLOBQG,
    DAABLOB,
    DIFGSM,
    MIFGSM,
    PGD,
    SINIDIM,
    SINITIDIM,
    SINITIM,
    TIDIM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    BoundedAttack,
    ClippedVMIFGSM,
    CrossEntropy,
    DiverseInput,
    Ensemble,
    Identity,
    IterativeAttack,
    Margin,
    Oracle,
    Plain,
    ScaleCopies,
    TranslationInvariant,
    VarianceTuning,
    chain,
)
from firstorder.attacks.directions import Direction
from references import Problem, Rule, Vector, attack_batch, identity_rule
from samples import sampled
from test_references import (
    CHANNEL_BOUNDS,
    DIRECTIONS,
    EPS,
    LENGTHS,
    MODES,
    POWER,
    TOLERANCE,
    Gated,
    Smooth,
    distance,
    images,
    label,
    labels,
)

SHAPE = (3, 7, 6)
SIZE = math.prod(SHAPE)
N = 3
SEED = 11
MODEL = Smooth(SHAPE).eval()
OTHER = Smooth(SHAPE, seed=8).eval()

PACKAGE: dict[str, type[BoundedAttack]] = {
    "difgsm": DIFGSM,
    "tifgsm": TIFGSM,
    "tidim": TIDIM,
    "sinidim": SINIDIM,
    "sinitim": SINITIM,
    "sinitidim": SINITIDIM,
    "vmifgsm": VMIFGSM,
    "vnifgsm": VNIFGSM,
    "clipped_vmifgsm": ClippedVMIFGSM,
    "daablob": DAABLOB,
    "blobqg": BLOBQG,
}
DIVERSE = ("difgsm", "tidim", "sinidim", "sinitidim")
SMOOTHED = ("tifgsm", "tidim", "sinitim", "sinitidim")
SCALED = ("sinidim", "sinitim", "sinitidim")
TUNED = ("vmifgsm", "vnifgsm", "clipped_vmifgsm")
LOOKING = (*SCALED, "vnifgsm")
BLOBS = ("daablob", "blobqg")
TRANSFER = tuple(name for name in PACKAGE if name not in BLOBS)


def points(n: int = N, low: Any = 0.0, high: Any = 1.0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return images(n, low, high, shape)


def aims(x: Tensor, *, targeted: bool = False, model: Any = MODEL) -> Tensor:
    return labels(x, targeted=targeted, model=model)


def source() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def uniforms(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def settings(name: str, norm: str, normaliser: str, variant: Any) -> dict[str, Any]:
    """Hyper-parameters under which every part matters. The variant is a resize rate, or a clip's scope."""
    if name == "clipped_vmifgsm":
        unit = 1 if normaliser == "mean" else SIZE
        clip = {"gamma": (0.7 if variant == "element" else 6.0) / unit, "scope": variant}
        return {"steps": 5, "alpha": 1.0 * unit, "beta1": 0.5, "lam": 0.6, "normaliser": normaliser, "N": 3} | clip
    chosen: dict[str, Any] = {"steps": 4, "alpha": 0.4 * EPS[norm], "decay": 0.9, "normaliser": normaliser}
    if name in DIVERSE:
        chosen |= {"resize_rate": variant, "diversity_prob": 0.7}
    if name in SMOOTHED:
        chosen |= {"len_kernel": 3, "nsig": 1.2}
    return chosen | ({"m": 3} if name in SCALED else {}) | ({"N": 3} if name in TUNED else {})


def reference(
    name: str,
    x: Tensor,
    y: Tensor,
    setup: dict[str, Any],
    *,
    make: Callable[[], Rule] | None = None,
    **options: Any,
) -> Tensor:
    """The reference of a batch, for the draws of `source`."""
    attack, draw, steps = getattr(slow, name), source(), options["steps"]
    neighbours = options.pop("N", 20)
    chances: dict[str, Tensor] = {}
    if name in DIVERSE:
        copies = options.get("m", 5) if name in SCALED else 1
        chances["draws"] = torch.stack([uniforms(draw, copies, len(x), 4) for _ in range(steps)])
    if name in TUNED:
        drawn = [uniforms(draw, neighbours, len(x), *x.shape[1:]).flatten(2) for _ in range(steps)]
        chances["offsets"] = torch.stack(drawn)

    def one(p: Problem, index: int) -> Vector:
        own: dict[str, Any] = {key: value[:, :, index].tolist() for key, value in chances.items()}
        return attack(p, **options, **own, **({} if make is None else {"rule": make()}))

    return attack_batch(one, **({"model": MODEL, "x": x, "y": y} | setup))


Case = tuple[str, str, str, Any]


def variants(name: str) -> tuple[Any, ...]:
    if name in DIVERSE:
        return 0.7, 1.4
    return ("example", "element") if name == "clipped_vmifgsm" else ("",)


CASES: list[Case] = [
    (name, norm, normaliser, variant)
    for name in TRANSFER
    for norm in (("Linf",) if name in TUNED else ("Linf", "L2"))
    for normaliser in (("mean", "sum") if name in (*LOOKING, "clipped_vmifgsm") else ("mean",))
    for variant in variants(name)
    if (normaliser, variant) != ("sum", 1.4)
]
PLAIN_CASES = [case for case in CASES if case[2] != "sum" and case[3] not in ("element", 0.7)]


def cases(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=[label(*case) for case in chosen])


@functools.cache
def expected(case: Case, targeted: bool) -> Tensor:
    name, norm, _, _ = case
    x = points()
    setup = {"eps": EPS[norm], "norm": norm, "targeted": targeted}
    return reference(name, x, aims(x, targeted=targeted), setup, **settings(*case))


def package(name: str, **options: Any) -> BoundedAttack:
    return PACKAGE[name](**({"memory_budget": None} | options))


@MODES
@cases(CASES)
def test_equals_reference(case: Case, targeted: bool) -> None:
    name, norm, _, _ = case
    x = points()
    attack = package(name, eps=EPS[norm], norm=norm, **settings(*case))
    got = attack(MODEL, x, aims(x, targeted=targeted), targeted=targeted, generator=source())
    assert distance(got, expected(case, targeted)) <= TOLERANCE
    assert distance(got, x) > POWER


# What a deletion replaces, by what, and the attacks that it must change.

BILINEAR, KERNEL, NEIGHBOUR, VARIANCE = slow.bilinear, slow.kernel, slow.neighbour, slow.variance
LOOK_AHEAD = references.look_ahead


def nearest(size: int, side: int) -> slow.Matrix:
    return [[float(j == i * size // side) for j in range(size)] for i in range(side)]


def aligned(size: int, side: int) -> slow.Matrix:
    """Corners on corners instead of half-pixel centres."""
    rows = [[max(0.0, 1 - abs(i * (size - 1) / (side - 1) - j)) for j in range(size)] for i in range(side)]
    return rows if side > 1 else BILINEAR(size, side)


DELETIONS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "diverse input": ("diverse_gradient", lambda p, a, *_: p.gradient(a), DIVERSE),
    "adjoint": ("pull_back", lambda g, *_: g, DIVERSE),
    "resize back": ("resized_back", lambda padded, size: padded[:size], DIVERSE),
    "half pixels": ("bilinear", aligned, DIVERSE),
    "interpolation": ("bilinear", nearest, DIVERSE),
    "each its place": ("axis_draws", lambda d: ((d[1], d[3]), (d[1], d[2])), DIVERSE),
    "one draw for both sides": ("axis_draws", lambda d: ((d[1], d[2]), (d[3], d[3])), DIVERSE),
    "order of draws": ("axis_draws", lambda d: ((d[2], d[1]), (d[2], d[3])), DIVERSE),
    "probability": ("is_diverse", lambda d, p: True, DIVERSE),
    "complement": ("is_diverse", lambda d, p: d[0] >= p, DIVERSE),
    "draws of a copy": ("copy_draw", lambda draws, i: draws[0], ("sinidim", "sinitidim")),
    "chain-rule factor": ("copy_factor", lambda i: 1.0, SCALED),
    "copies": ("scaled", lambda a, m, find: find(0, a), SCALED),
    "kernel": ("convolve", lambda g, *_: g, SMOOTHED),
    "nsig": ("kernel", lambda name, side, nsig: KERNEL(name, side, 3.0), SMOOTHED),
    "look-ahead": ("look_ahead", lambda p, a, *_: a, LOOKING),
    "look-ahead decay": ("look_ahead", lambda p, a, step, *rest: LOOK_AHEAD(p, a, step / 0.9, *rest), LOOKING),
    "accumulation": ("accumulate", lambda m, g, decay, k: references.normalised(g, k), TRANSFER[:-1]),
    "variance": ("variance", lambda near, here: [0.0] * len(here), TUNED),
    "minus the gradient": ("variance", lambda near, here: VARIANCE(near, [0.0] * len(here)), TUNED),
    "of the step before": ("tuned", lambda here, before, now: references.add(here, 1.0, now), TUNED),
    "radius": ("neighbour", lambda centre, u, radius: NEIGHBOUR(centre, u, radius / 1.5), TUNED),
    "symmetry": ("neighbour", lambda centre, u, radius: references.add(centre, radius, u), TUNED),
    "around the iterate": ("centre_of_neighbours", lambda a, point: point, ("vnifgsm",)),
    "inverse square root": ("decayed", lambda alpha, t: alpha, ("clipped_vmifgsm",)),
}
DELETED = [
    (deletion, case)
    for deletion, (_, _, attacks) in DELETIONS.items()
    for case in CASES
    if case[0] in attacks and case[2] != "sum" and (deletion, case[3]) != ("resize back", 0.7)
]


@pytest.mark.parametrize(
    ("deletion", "case"),
    sampled(DELETED, 4, lambda row: row[0]),
    ids=[label(deletion, *case) for deletion, case in DELETED],
)
def test_comparison_has_power(deletion: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting an ingredient from the reference moves it visibly, so the comparison notices its absence."""
    name, norm, _, _ = case
    function, replacement, _ = DELETIONS[deletion]
    x = points()
    for targeted in (False, True):
        setup = {"eps": EPS[norm], "norm": norm, "targeted": targeted}
        with monkeypatch.context() as patch:
            patch.setattr(slow, function, replacement)
            part = reference(name, x, aims(x, targeted=targeted), setup, **settings(*case))
        if distance(expected(case, targeted), part) > POWER:
            return
    pytest.fail("nothing moved")


LARGE = (3, 22, 25)
LARGE_MODEL = Smooth(LARGE).eval()


@pytest.mark.parametrize("name", TRANSFER)
def test_default_hyperparameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images large enough that a rate of 1.1 leaves a choice."""
    x = points(2, shape=LARGE)
    y = aims(x, model=LARGE_MODEL)
    got = package(name, eps=0.1, steps=2)(LARGE_MODEL, x, y, generator=source())
    find = functools.partial(reference, name, x, y, {"model": LARGE_MODEL, "eps": 0.1}, steps=2)
    assert distance(got, find()) <= TOLERANCE
    if name in DIVERSE:
        monkeypatch.setattr(slow, "axis_draws", lambda d: ((0.0, d[2]), (0.0, d[3])))
        assert distance(got, find()) > POWER


def test_diverse_inputs_of_a_smoothed_gradient() -> None:
    """`TIFGSM` with a probability is `TIDIM`."""
    x = points()
    y = aims(x)
    chosen = settings("tidim", "Linf", "mean", 0.7)
    got = package("tifgsm", eps=0.2, **chosen)(MODEL, x, y, generator=source())
    assert distance(got, expected(("tidim", "Linf", "mean", 0.7), False)) <= TOLERANCE


# Any direction in any of them.


@pytest.mark.parametrize("direction", [name for name in DIRECTIONS if name not in ("sign", "unit")])
@cases(PLAIN_CASES)
def test_any_direction(case: Case, direction: str) -> None:
    name, norm, _, _ = case
    part, make, alpha = DIRECTIONS[direction]
    x = points()
    y = aims(x)
    chosen: dict[str, Any] = {"steps": 3, "alpha": alpha}
    kept = ("m", "N", "resize_rate", "diversity_prob", "len_kernel", "beta1", "lam")
    chosen |= {key: value for key, value in settings(*case).items() if key in kept}
    got = package(name, eps=EPS[norm], norm=norm, direction=part, **chosen)(MODEL, x, y, generator=source())
    if name != "clipped_vmifgsm":
        chosen["along_step"] = norm == "L2" or direction in LENGTHS
    find = functools.partial(reference, name, x, y, {"eps": EPS[norm], "norm": norm}, **chosen)
    assert distance(got, find(make=make)) <= TOLERANCE
    assert distance(got, x) > POWER
    if direction != "identity":
        assert distance(got, find(make=identity_rule)) > POWER


@pytest.mark.parametrize("direction", LENGTHS)
@pytest.mark.parametrize("name", LOOKING)
def test_look_ahead_of_a_length_has_power(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make, alpha = DIRECTIONS[direction]
    x = points()
    y = aims(x)
    chosen = settings(name, "Linf", "mean", 0.7) | {"alpha": alpha, "along_step": True}
    find = functools.partial(reference, name, x, y, {"eps": 0.2}, make=make, **chosen)
    whole = find()
    assert distance(whole, find(along_step=False)) > POWER
    monkeypatch.setattr(slow, "look_ahead", lambda p, a, *_: a)
    assert distance(whole, find()) > POWER


# Bounds and zero gradients.


@cases(PLAIN_CASES)
def test_bounds_per_channel(case: Case) -> None:
    name, norm, _, _ = case
    low, high = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in CHANNEL_BOUNDS)
    x = points(N, low, high)
    y = aims(x)
    attack = package(name, eps=EPS[norm], norm=norm, **settings(*case))
    got = attack(MODEL, x, y, bounds=CHANNEL_BOUNDS, generator=source())
    setup = {"eps": EPS[norm], "norm": norm, "bounds": CHANNEL_BOUNDS}
    assert distance(got, reference(name, x, y, setup, **settings(*case))) <= TOLERANCE
    assert (got == low).any()
    assert (got == high).any()


@cases(PLAIN_CASES)
def test_blind_example(case: Case) -> None:
    """No gradient at an image of zeros: it stays, unless neighbours show a way out."""
    name, norm, _, _ = case
    model = Gated(SHAPE).eval()
    x = points()
    x[1] = 0
    y = aims(x)
    attack = package(name, eps=EPS[norm], norm=norm, **settings(*case))
    got = attack(model, x, y, generator=source())
    assert bool(got[1].eq(0).all()) == (name not in TUNED)
    setup = {"model": model, "eps": EPS[norm], "norm": norm}
    assert distance(got, reference(name, x, y, setup, **settings(*case))) <= TOLERANCE


# The parts without a momentum that normalises: the size of the gradient shows.


@dataclass(frozen=True, kw_only=True)
class Recipe(IterativeAttack):
    part: Oracle = field(default_factory=Plain)

    def oracle(self) -> Oracle:
        return self.part

    def rule(self) -> Direction:
        return Identity()


def straight(p: Problem, find: slow.Find, steps: int, alpha: float) -> Vector:
    a = p.x
    for t in range(steps):
        a = references.project(p, references.add(a, alpha, find(t, a, a)))
    return a


STEPS, ALPHA, COPIES, NEIGHBOURS, RADIUS = 3, 0.3, 3, 2, 0.3
DIVERSITY = DiverseInput(resize_rate=1.4, diversity_prob=0.7)
KERNELS = [("gaussian", 7, 3.0), ("gaussian", 5, 1.5), ("linear", 3, 3.0), ("linear", 9, 3.0), ("uniform", 5, 3.0)]


def compare(part: Oracle, maker: Callable[[Problem, int], slow.Find]) -> None:
    """A recipe of the part equals its reference, and not one of other step sizes."""
    x = points()
    y = aims(x)
    for targeted in (False, True):
        attack = Recipe(eps=0.2, part=part, steps=STEPS, alpha=ALPHA, memory_budget=None)
        got = attack(MODEL, x, y, targeted=targeted, generator=source())
        for alpha in (ALPHA, 0.9 * ALPHA):
            slowly = attack_batch(
                lambda p, index, alpha=alpha: straight(p, maker(p, index), STEPS, alpha),
                MODEL, x, y, eps=0.2, targeted=targeted,
            )  # fmt: skip
            assert (distance(got, slowly) <= TOLERANCE) == (alpha == ALPHA)


@pytest.mark.parametrize("of", KERNELS, ids=[label(*of) for of in KERNELS])
def test_kernel(of: tuple[Any, int, float]) -> None:
    weights = slow.kernel(*of)
    assert sum(map(sum, weights)) == pytest.approx(1)
    name, side, nsig = of
    compare(
        TranslationInvariant(kernel_name=name, len_kernel=side, nsig=nsig),
        lambda p, index: lambda t, a, point: slow.convolve(p.gradient(point), p.shape, weights),
    )


def test_kernel_by_hand() -> None:
    """The released code's kernel: the density at seven places from -3 to 3."""
    density = [math.exp(-(z**2) / 2) for z in (-3, -2, -1, 0, 1, 2, 3)]
    for u, row in enumerate(slow.kernel("gaussian", 7, 3.0)):
        assert row == pytest.approx([density[u] * d / sum(density) ** 2 for d in density])
    assert slow.kernel("linear", 3, 3.0)[0] == pytest.approx([1 / 16, 1 / 8, 1 / 16])


def test_diverse_input_alone() -> None:
    draw = source()
    draws = torch.stack([uniforms(draw, N, 4) for _ in range(STEPS)])
    compare(
        DIVERSITY,
        lambda p, index: lambda t, a, point: slow.diverse_gradient(p, point, draws[t, index].tolist(), 1.4, 0.7),
    )


def test_smoothed_diverse_copies() -> None:
    draw = source()
    draws = torch.stack([uniforms(draw, COPIES, N, 4) for _ in range(STEPS)])
    weights = slow.kernel("gaussian", 5, 2.0)
    compare(
        chain(TranslationInvariant(len_kernel=5, nsig=2.0), ScaleCopies(m=COPIES), DIVERSITY),
        lambda p, index: (
            lambda t, a, point: slow.convolve(
                slow.diverse_copies(p, point, draws[t, :, index].tolist(), COPIES, 1.4, 0.7), p.shape, weights
            )
        ),
    )


def test_variance_of_diverse_copies() -> None:
    """The point's copies are drawn first, then its neighbours, then their copies, scale after scale."""
    draw = source()
    here, near, offsets = [], [], []
    for _ in range(STEPS):
        here.append(uniforms(draw, COPIES, N, 4))
        offsets.append(uniforms(draw, NEIGHBOURS, N, *SHAPE).flatten(2))
        near.append(uniforms(draw, COPIES, NEIGHBOURS, N, 4))

    def maker(p: Problem, index: int) -> slow.Find:
        before = [0.0] * SIZE

        def find(t: int, a: Vector, point: Vector) -> Vector:
            nonlocal before
            g = slow.diverse_copies(p, point, here[t][:, index].tolist(), COPIES, 1.4, 0.7)
            around = [
                slow.diverse_copies(
                    p,
                    slow.neighbour(a, offsets[t][i, index].tolist(), RADIUS),
                    near[t][:, i, index].tolist(), COPIES, 1.4, 0.7,
                )
                for i in range(NEIGHBOURS)
            ]  # fmt: skip
            result, before = references.add(g, 1.0, before), slow.variance(around, g)
            return result

        return find

    compare(chain(VarianceTuning(radius=RADIUS, N=NEIGHBOURS), ScaleCopies(m=COPIES), DIVERSITY), maker)


# Several models as one.


@pytest.mark.parametrize("weights", [None, (0.3, 1.2)])
@pytest.mark.parametrize("name", ["tifgsm", "sinitidim"])
def test_ensemble_of_logits(name: str, weights: tuple[float, float] | None) -> None:
    x = points()
    y = aims(x)
    chosen = settings(name, "Linf", "mean", 1.4)
    got = package(name, eps=0.2, **chosen)(Ensemble([MODEL, OTHER], weights=weights), x, y, generator=source())
    for others in (weights or (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.6)):
        model = slow.averaged([MODEL, OTHER], others)
        found = reference(name, x, y, {"model": model, "eps": 0.2}, **chosen)
        assert (distance(got, found) <= TOLERANCE) == (others == (weights or (1.0, 1.0)))


def test_ensemble_of_models_for_other_sizes() -> None:
    """The second model sees the images resized, bilinear."""
    sides = (10, 5)
    second = Smooth((3, *sides), seed=8).eval()
    rows, columns = (torch.tensor(slow.bilinear(*of), dtype=torch.float64) for of in zip(SHAPE[1:], sides, strict=True))
    x = points()
    y = aims(x)
    got = MIFGSM(eps=0.2, steps=4, alpha=0.08)(Ensemble([MODEL, second], sizes=[None, sides]), x, y)
    model = slow.averaged([MODEL, lambda z: second(torch.einsum("pi,qj,ncij->ncpq", rows, columns, z))], (1.0, 1.0))
    slowly = functools.partial(references.mifgsm, steps=4, alpha=0.08)
    assert distance(got, attack_batch(lambda p, _: slowly(p), model, x, y, eps=0.2)) <= TOLERANCE


# The interacting attacks.


def slow_blob(name: str, x: Tensor, y: Tensor, setup: dict[str, Any], **options: Any) -> Tensor:
    """The reference of a population."""
    population: list[Problem] = []

    def keep(p: Problem, index: int) -> Vector:
        population.append(p)
        return p.x

    attack_batch(keep, **({"model": MODEL, "x": x, "y": y} | setup))
    found = getattr(slow, name)(population, **options)
    return torch.tensor(found, dtype=x.dtype).reshape(x.shape)


def start(x: Tensor, *, eps: float, norm: str = "Linf") -> slow.Matrix:
    """The random start of PGD, seen through one step too small to move it."""
    attack = PGD(eps=eps, norm=norm, steps=1, alpha=1e-300)
    return attack(MODEL, x, torch.zeros(len(x), dtype=torch.long), generator=source()).flatten(1).tolist()


BlobCase = tuple[str, str, str]
BLOB_CASES: list[BlobCase] = [
    (name, norm, sign)
    for name, norm in (("daablob", "Linf"), ("daablob", "L2"), ("blobqg", "Linf"))
    for sign in ("add", "subtract")
]
BLOB = pytest.mark.parametrize("case", BLOB_CASES, ids=[label(*case) for case in BLOB_CASES])


def blob_settings(case: BlobCase) -> dict[str, Any]:
    name, norm, sign = case
    alpha = {"alpha": 0.02 * EPS[norm], "b": 20} if name == "blobqg" else {"alpha": 0.4 * EPS[norm]}
    return {"steps": 4, "kernel_gradient": sign, "c": 2.0, **alpha}


@functools.cache
def expected_blob(case: BlobCase, m: int, targeted: bool) -> Tensor:
    name, norm, _ = case
    x = points(m)
    setup = {"eps": EPS[norm], "norm": norm, "targeted": targeted}
    begin = start(x, eps=EPS[norm], norm=norm)
    return slow_blob(name, x, aims(x, targeted=targeted), setup, starts=begin, **blob_settings(case))


@MODES
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
@BLOB
def test_population_equals_reference(case: BlobCase, m: int, targeted: bool) -> None:
    name, norm, _ = case
    x = points(m)
    attack = package(name, eps=EPS[norm], norm=norm, **blob_settings(case))
    got = attack(MODEL, x, aims(x, targeted=targeted), targeted=targeted, generator=source())
    assert distance(got, expected_blob(case, m, targeted)) <= TOLERANCE
    assert distance(got, x) > POWER


PUSH, BANDWIDTH = slow.push, slow.bandwidth


def of_others(points: slow.Matrix) -> float:
    """h^2 without the diagonal."""
    n = len(points)
    pairs = [slow.squared_distance(points[i], points[j]) for i in range(n) for j in range(n) if i != j]
    return slow.median(pairs) / (2 * math.log(n))


BLOB_DELETIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "interaction": ("weight", lambda c, m: 0.0),
    "mean": ("weight", lambda c, m: c),
    "pull": ("pull", lambda value, g: [0.0] * len(g)),
    "push": ("push", lambda value, a, *_: [0.0] * len(a)),
    "sign of the push": ("push", lambda value, a, b, h2: PUSH(value, b, a, h2)),
    "h^2 of the push": ("push", lambda value, a, b, h2: PUSH(value, a, b, 1.0)),
    "diagonal": ("bandwidth", of_others),
    "lower median": ("median", lambda values: sorted(values)[(len(values) - 1) // 2]),
    "mean distance": ("median", lambda values: sum(values) / len(values)),
    "two": ("bandwidth", lambda points: 2 * BANDWIDTH(points)),
    "logarithm": ("bandwidth", lambda points: BANDWIDTH(points) * math.log(len(points))),
}


@pytest.mark.parametrize("deletion", BLOB_DELETIONS)
@BLOB
def test_population_comparison_has_power(case: BlobCase, deletion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, norm, _ = case
    x = points(4)
    monkeypatch.setattr(slow, *BLOB_DELETIONS[deletion])
    setup = {"eps": EPS[norm], "norm": norm}
    part = slow_blob(name, x, aims(x), setup, starts=start(x, eps=EPS[norm], norm=norm), **blob_settings(case))
    assert distance(expected_blob(case, 4, False), part) > POWER


@pytest.mark.parametrize("direction", [name for name in DIRECTIONS if name not in ("sign", "unit")])
@pytest.mark.parametrize("name", BLOBS)
def test_any_direction_of_a_population(name: str, direction: str) -> None:
    part, make, alpha = DIRECTIONS[direction]
    x = points()
    chosen: dict[str, Any] = {"steps": 3, "alpha": alpha}
    got = package(name, eps=0.2, direction=part, random_start=False, **chosen)(MODEL, x, aims(x))
    find = functools.partial(slow_blob, name, x, aims(x), {"eps": 0.2}, **chosen)
    assert distance(got, find(make=make)) <= TOLERANCE
    if direction != "identity":
        assert distance(got, find(make=identity_rule)) > POWER


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
@pytest.mark.parametrize("name", BLOBS)
def test_default_hyperparameters_of_a_population(name: str, loss: str) -> None:
    """c = 1.1, and 10 for the margin loss."""
    part, formula = {
        "cross-entropy": (None, references.cross_entropy),
        "margin": (Margin(), references.margin),
    }[loss]
    x = points(6)
    y = aims(x)
    begin = start(x, eps=0.2)
    found = package(name, eps=0.2, steps=3, loss=part)(MODEL, x, y, generator=source())
    for c in (1.1, 10.0):
        slowly = slow_blob(name, x, y, {"eps": 0.2, "loss": formula}, starts=begin, steps=3, c=c)
        assert (distance(found, slowly) <= TOLERANCE) == (c == (10.0 if loss == "margin" else 1.1))
    if loss == "cross-entropy":
        same = package(name, eps=0.2, steps=3, loss=CrossEntropy())(MODEL, x, y, generator=source())
        assert torch.equal(same, found)


@BLOB
def test_population_with_bounds_per_channel_and_a_blind_example(case: BlobCase) -> None:
    """The others move the blind one."""
    name, norm, _ = case
    model = Gated(SHAPE).eval()
    bounds = ((-0.3, 0.0, -0.1), (0.4, 1.5, 0.9))
    low, high = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in bounds)
    x = points(N, low, high)
    x[1] = 0
    y = aims(x)
    attack = package(name, eps=EPS[norm], norm=norm, random_start=False, **blob_settings(case))
    got = attack(model, x, y, bounds=bounds)
    setup = {"model": model, "eps": EPS[norm], "norm": norm, "bounds": bounds}
    assert distance(got, slow_blob(name, x, y, setup, **blob_settings(case))) <= TOLERANCE
    assert distance(got[1], x[1]) > POWER


@pytest.mark.parametrize("m", [1, N])
def test_population_at_one_point(m: int) -> None:
    """K = 1 everywhere: only the mean gradient is added, and nothing to one example alone."""
    x = points(1).repeat(m, 1, 1, 1)
    y = torch.arange(m)
    got = package("daablob", eps=0.2, steps=1, alpha=0.3, random_start=False, direction=Identity())(MODEL, x, y)
    slowly = slow_blob("daablob", x, y, {"eps": 0.2}, steps=1, alpha=0.3, make=identity_rule)
    assert distance(got, slowly) <= TOLERANCE
    assert distance(got, x) > POWER


def test_kernel_gradient_is_the_derivative() -> None:
    a, b = points(2).flatten(1)
    b.requires_grad_()
    torch.exp(-((a - b) ** 2).sum() / (2 * 5.0)).backward()
    value = math.exp(-float((a - b.detach()).square().sum()) / 10)
    assert b.grad is not None
    assert slow.push(value, a.tolist(), b.tolist(), 5.0) == pytest.approx(b.grad.tolist())
