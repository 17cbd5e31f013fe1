"""The bounded attacks against their slow references, in float64."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import references
from firstorder.attacks import (
    BIM,
    DLR,
    FGSM,
    MIFGSM,
    NGM,
    NIFGSM,
    PGD,
    PQGD,
    SINIFGSM,
    BoundedAttack,
    Clipped,
    ClippedNG,
    ClippedNGM,
    CrossEntropy,
    Direction,
    Identity,
    Loss,
    Margin,
    Normalised,
    Quantised,
    Sign,
)
from references import (
    Problem,
    Rule,
    Vector,
    attack_batch,
    clip_rule,
    identity_rule,
    quantised_rule,
    sign_rule,
    unit_rule,
)
from samples import sampled

TOLERANCE = 1e-9
POWER = 1e-3
SHAPE = (3, 5, 4)
SIZE = math.prod(SHAPE)
CLASSES = 10
N = 4
EPS = {"Linf": 0.2, "L2": 1.2}
CHANNEL_BOUNDS = ((-0.3, 0.0, 0.2), (0.4, 1.5, 0.9))
MODES = pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])

PACKAGE: dict[str, type[BoundedAttack]] = {
    "fgsm": FGSM,
    "bim": BIM,
    "pgd": PGD,
    "pqgd": PQGD,
    "mifgsm": MIFGSM,
    "nifgsm": NIFGSM,
    "sinifgsm": SINIFGSM,
    "ngm": NGM,
    "clipped_ng": ClippedNG,
    "clipped_ngm": ClippedNGM,
}
CLIPPED = ("clipped_ng", "clipped_ngm")
AVERAGED = ("ngm", "clipped_ngm")
DECAYED = ("ngm", *CLIPPED)
ACCUMULATED = ("mifgsm", "nifgsm", "sinifgsm")
LOOKING = ("nifgsm", "sinifgsm")
SIGNED = ("fgsm", "bim", "pgd", *ACCUMULATED)
NORMALISED = (*ACCUMULATED, *DECAYED)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small lose all their time in waiting for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Smooth(nn.Module):
    """A small smooth classifier that ignores one pixel, so exact zeros occur in its gradients."""

    def __init__(self, shape: tuple[int, int, int] = SHAPE, seed: int = 3) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        size = shape[1] * shape[2]
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, dtype=torch.float64)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, dtype=torch.float64)
        self.linear = nn.Linear(6 * size, CLASSES, dtype=torch.float64)
        last = 0.3 * math.sqrt(20 / size)
        for parameter, scale in zip(self.parameters(), (0.7, 0.7, 0.6, 0.5, last, 0.3), strict=True):
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        seen = torch.ones(shape[1:], dtype=torch.float64)
        seen[2, 1] = 0
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv1(x * self.seen))
        h = torch.tanh(self.conv2(h))
        return self.linear(nn.functional.softplus(2 * h).flatten(1))


class Gated(Smooth):
    """Blind to an image of zeros: its logits there are constant."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x.flatten(1).abs().amax(1, keepdim=True) > 0)


MODEL = Smooth().eval()


def images(n: int = N, low: Any = 0.0, high: Any = 1.0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    u = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (low, high))
    return low + (high - low) * u


def labels(x: Tensor, *, targeted: bool, model: nn.Module = MODEL) -> Tensor:
    """The predicted classes, or others to aim at."""
    with torch.no_grad():
        return (model(x).argmax(1) + 3 * targeted) % CLASSES


def settings(name: str, norm: str, normaliser: str, scope: str) -> dict[str, Any]:
    """Hyper-parameters under which every part of an attack matters: the steps are long enough to hit the ball."""
    if name == "fgsm":
        return {}
    if name in ("bim", "pgd"):
        return {"steps": 5, "alpha": 0.4 * EPS[norm]}
    if name == "pqgd":
        return {"steps": 5, "alpha": 0.02 * EPS[norm], "b": 20}
    if name in ACCUMULATED:
        chosen = {"steps": 5, "alpha": 0.4 * EPS[norm], "decay": 0.9, "normaliser": normaliser}
        return chosen | ({"m": 3} if name == "sinifgsm" else {})
    unit = 1 if normaliser == "mean" else SIZE
    chosen = {"steps": 6, "alpha": {"ngm": 0.3, "clipped_ng": 0.6, "clipped_ngm": 1.0}[name] * unit}
    if name in AVERAGED:
        chosen |= {"beta1": 0.5, "lam": 0.6}
    if name in CLIPPED:
        radius = 0.7 if scope == "element" else {"clipped_ng": 10.0, "clipped_ngm": 6.0}[name]
        chosen |= {"gamma": radius / unit, "scope": scope}
    return chosen | {"normaliser": normaliser}


def package(name: str, **options: Any) -> BoundedAttack:
    return PACKAGE[name](**({"random_start": False} | options))


def reference(
    name: str, x: Tensor, y: Tensor, setup: dict[str, Any], *, make: Callable[[], Rule] | None = None, **options: Any
) -> Tensor:
    """The reference of a batch. `setup` goes to `attack_batch`; `make` makes the rule of an example."""
    attack = getattr(references, name)

    def one(p: Problem, index: int) -> Vector:
        own: dict[str, Any] = {} if make is None else {"rule": make()}
        if "start" in options:
            own["start"] = options["start"][index].flatten().tolist()
        return attack(p, **(options | own))

    return attack_batch(one, **({"model": MODEL, "x": x, "y": y} | setup))


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).abs().max())


Case = tuple[str, str, str, str]
CASES: list[Case] = [
    (name, norm, normaliser, scope)
    for name in PACKAGE
    for norm in ("Linf", "L2")
    for normaliser in (("mean", "sum") if name in NORMALISED else ("",))
    for scope in (("example", "element") if name in CLIPPED else ("",))
    if (name, norm) != ("pqgd", "L2")
]
PLAIN_CASES = [case for case in CASES if case[2] != "sum" and case[3] != "element"]


def label(*values: Any) -> str:
    return "-".join(str(v) for v in values if v)


def cases(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=[label(*case) for case in chosen])


@functools.cache
def expected(case: Case, targeted: bool) -> Tensor:
    name, norm, _, _ = case
    x = images()
    y = labels(x, targeted=targeted)
    return reference(name, x, y, {"eps": EPS[norm], "norm": norm, "targeted": targeted}, **settings(*case))


@MODES
@cases(CASES)
def test_equals_reference(case: Case, targeted: bool) -> None:
    name, norm, _, _ = case
    x = images()
    y = labels(x, targeted=targeted)
    got = package(name, eps=EPS[norm], norm=norm, **settings(*case))(MODEL, x, y, targeted=targeted)
    assert distance(got, expected(case, targeted)) <= TOLERANCE
    assert distance(got, x) > POWER


# What a deletion replaces, by what, and the attacks and norms that it must change.

CLIP_RULE, LOOK_AHEAD = references.clip_rule, references.look_ahead
ITERATED = tuple(name for name in PACKAGE if name != "fgsm")
BOTH = ("Linf", "L2")
DELETIONS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "ball": ("onto_ball", lambda p, a: a, ITERATED, BOTH),
    "bounds": ("onto_bounds", lambda p, a: a, tuple(PACKAGE), BOTH),
    "ball before bounds": (
        "project",
        lambda p, a: references.onto_ball(p, references.onto_bounds(p, a)),
        ITERATED,
        ("L2",),
    ),
    "sign": ("sign", lambda g: g, SIGNED, ("Linf",)),
    "unit": ("unit_l2", lambda g: g, SIGNED, ("L2",)),
    "rounding": ("quantise", lambda g, b: [b * c / max(map(abs, g)) for c in g], ("pqgd",), BOTH),
    "levels": ("quantise", lambda g, b: references.sign(g), ("pqgd",), BOTH),
    "accumulation": ("accumulate", lambda m, g, decay, k: references.normalised(g, k), ACCUMULATED, BOTH),
    "average": ("average", lambda m, g, beta, k: references.normalised(g, k), AVERAGED, BOTH),
    "normaliser": ("normalised", lambda g, k: g, NORMALISED, BOTH),
    "lambda": ("beta", lambda beta1, lam, t: beta1, AVERAGED, BOTH),
    "lambda power": ("beta", lambda beta1, lam, t: beta1 * lam**t, AVERAGED, BOTH),
    "look-ahead": ("look_ahead", lambda p, a, *_: a, LOOKING, BOTH),
    "look-ahead decay": ("look_ahead", lambda p, a, step, *rest: LOOK_AHEAD(p, a, step / 0.9, *rest), LOOKING, BOTH),
    "look-ahead along the step": (
        "look_ahead",
        lambda p, a, step, m, rule, along: LOOK_AHEAD(p, a, step, m, rule, not along),
        LOOKING,
        BOTH,
    ),
    "look-ahead projection": (
        "look_ahead",
        lambda p, a, step, m, rule, _: references.add(a, step, rule(m)),
        LOOKING,
        ("L2",),
    ),
    "chain-rule factor": ("copy_factor", lambda i: 1.0, ("sinifgsm",), BOTH),
    "copies": ("copies_gradient", lambda p, a, m: p.gradient(a), ("sinifgsm",), BOTH),
    "inverse square root": ("decayed", lambda alpha, t: alpha, DECAYED, BOTH),
    "non-increasing": ("shrink", lambda radius, size, d: min(radius / size, 1.0) if size else 1.0, CLIPPED, BOTH),
    "clip": ("shrink", lambda radius, size, d: 1.0, CLIPPED, BOTH),
    "d_0": ("clip_rule", lambda gamma, scope: CLIP_RULE(gamma, scope, 1e3), CLIPPED, ("Linf",)),
}
# With the sum, NGM and its clips are given alpha and gamma that retrace the mean's path: once is enough.
DELETED = [
    (deletion, case)
    for deletion, (_, _, attacks, norms) in DELETIONS.items()
    for case in CASES
    if case[0] in attacks and case[1] in norms and not (case[0] in DECAYED and case[2] == "sum")
]


@pytest.mark.parametrize(
    ("deletion", "case"),
    sampled(DELETED, 4, lambda row: row[0]),
    ids=[label(deletion, *case) for deletion, case in DELETED],
)
def test_comparison_has_power(deletion: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting an ingredient from the reference moves it visibly, so the comparison notices its absence."""
    name, norm, _, _ = case
    function, replacement, _, _ = DELETIONS[deletion]
    x = images()
    moved = 0.0
    for targeted in (False, True):
        whole = expected(case, targeted)
        setup = {"eps": EPS[norm], "norm": norm, "targeted": targeted}
        with monkeypatch.context() as patch:
            patch.setattr(references, function, replacement)
            part = reference(name, x, labels(x, targeted=targeted), setup, **settings(*case))
        moved = max(moved, distance(whole, part))
        if moved > POWER:
            return
    assert moved > POWER


@cases([case for case in PLAIN_CASES if case[0] != "fgsm"])
def test_default_hyperparameters(case: Case) -> None:
    name, norm, _, _ = case
    x = images()
    y = labels(x, targeted=False)
    got = package(name, eps=EPS[norm], norm=norm, steps=4)(MODEL, x, y)
    assert distance(got, reference(name, x, y, {"eps": EPS[norm], "norm": norm}, steps=4)) <= TOLERANCE


# Any direction in any attack: the part, its reference, and a step size that suits it.

DIRECTIONS: dict[str, tuple[Direction, Callable[[], Rule], float]] = {
    "sign": (Sign(), sign_rule, 0.07),
    "unit": (Normalised(), unit_rule, 0.5),
    "identity": (Identity(), identity_rule, 0.15),
    "quantised": (Quantised(levels=200), lambda: quantised_rule(200), 0.002),
    "clip": (Clipped(gamma=4.0), lambda: clip_rule(4.0, "example"), 0.2),
    "element clip": (Clipped(gamma=0.5, scope="element"), lambda: clip_rule(0.5, "element"), 0.2),
}


LENGTHS = ("identity", "clip", "element clip")


def looking(name: str, norm: str, direction: str) -> dict[str, Any]:
    """Where a reference looks ahead under a direction: along the step if that is an L2 length."""
    return {"along_step": norm == "L2" or direction in LENGTHS} if name in LOOKING else {}


@pytest.mark.parametrize("direction", DIRECTIONS)
@cases([case for case in PLAIN_CASES if case[0] != "fgsm"])
def test_any_direction(case: Case, direction: str) -> None:
    name, norm, _, _ = case
    part, make, alpha = DIRECTIONS[direction]
    x = images()
    y = labels(x, targeted=False)
    shared = {"steps": 3, "alpha": alpha}
    got = package(name, eps=EPS[norm], norm=norm, direction=part, **shared)(MODEL, x, y)
    shared |= looking(name, norm, direction)
    assert distance(got, reference(name, x, y, {"eps": EPS[norm], "norm": norm}, make=make, **shared)) <= TOLERANCE
    assert distance(got, x) > POWER


@pytest.mark.parametrize("deletion", ["look-ahead", "look-ahead along the step", "look-ahead projection"])
@pytest.mark.parametrize("direction", LENGTHS)
@pytest.mark.parametrize("name", LOOKING)
def test_look_ahead_of_a_length_has_power(
    name: str, direction: str, deletion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, make, alpha = DIRECTIONS[direction]
    x = images()
    y = labels(x, targeted=False)
    shared = {"steps": 4, "alpha": alpha, "decay": 0.9}
    got = package(name, eps=0.2, direction=part, **shared)(MODEL, x, y)
    find = functools.partial(reference, name, x, y, {"eps": 0.2}, make=make, along_step=True, **shared)
    assert distance(got, find()) <= TOLERANCE
    monkeypatch.setattr(references, *DELETIONS[deletion][:2])
    assert distance(got, find()) > POWER


@pytest.mark.parametrize("direction", ["sign", "unit", "quantised"])
def test_any_direction_in_one_step(direction: str) -> None:
    part, make, _ = DIRECTIONS[direction]
    x = images()
    y = labels(x, targeted=False)
    got = package("fgsm", eps=0.2, direction=part)(MODEL, x, y)
    assert distance(got, reference("fgsm", x, y, {"eps": 0.2}, make=make)) <= TOLERANCE


def test_replaced_direction_brings_its_default_step() -> None:
    """eps / T for the sign in NGM, [NGM]'s length for the clip in MI-FGSM."""
    x = images()
    y = labels(x, targeted=False)
    got = package("ngm", eps=0.2, steps=4, direction=Sign())(MODEL, x, y)
    assert distance(got, reference("ngm", x, y, {"eps": 0.2}, make=sign_rule, steps=4, alpha=0.05)) <= TOLERANCE
    got = package("mifgsm", eps=0.2, steps=4, direction=Clipped(gamma=0.3))(MODEL, x, y)
    alpha = references.ngm_alpha(0.2, "Linf", SIZE)
    rule = functools.partial(clip_rule, 0.3, "example")
    assert distance(got, reference("mifgsm", x, y, {"eps": 0.2}, make=rule, steps=4, alpha=alpha)) <= TOLERANCE


# Bounds, losses, zero gradients.


@cases(PLAIN_CASES)
def test_bounds_per_channel(case: Case) -> None:
    name, norm, _, _ = case
    low, high = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in CHANNEL_BOUNDS)
    x = images(N, low, high)
    y = labels(x, targeted=False)
    got = package(name, eps=EPS[norm], norm=norm, **settings(*case))(MODEL, x, y, bounds=CHANNEL_BOUNDS)
    setup = {"eps": EPS[norm], "norm": norm, "bounds": CHANNEL_BOUNDS}
    assert distance(got, reference(name, x, y, setup, **settings(*case))) <= TOLERANCE
    at_low, at_high = (got == low).flatten(2).any(2), (got == high).flatten(2).any(2)
    assert (at_low | at_high).any(0).all()
    assert at_low.any()
    assert at_high.any()
    assert (got >= low).all()
    assert (got <= high).all()


@cases(PLAIN_CASES)
def test_wide_scalar_bounds(case: Case) -> None:
    name, norm, _, _ = case
    x = images()
    y = labels(x, targeted=False)
    got = package(name, eps=EPS[norm], norm=norm, **settings(*case))(MODEL, x, y, bounds=(-9.0, 9.0))
    setup = {"eps": EPS[norm], "norm": norm, "bounds": (-9.0, 9.0)}
    assert distance(got, reference(name, x, y, setup, **settings(*case))) <= TOLERANCE
    assert float(got.min()) < 0
    assert float(got.max()) > 1


LOSSES: dict[str, tuple[Loss, references.Loss]] = {
    "cross-entropy": (CrossEntropy(), references.cross_entropy),
    "margin": (Margin(), references.margin),
    "dlr": (DLR(), references.dlr),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_values(loss: str) -> None:
    """Every class is the label once, so also the best, the second and the third."""
    part, formula = LOSSES[loss]
    z = 3 * torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for y in range(CLASSES):
        got = part(z, torch.full((5,), y))
        assert distance(got, torch.stack([formula(row, y) for row in z])) <= TOLERANCE


def test_loss_values_by_hand() -> None:
    z = torch.tensor([[1.0, 5.0, 3.0, 2.0]], dtype=torch.float64)
    for y, gap in ((1, -2.0), (2, 2.0), (0, 4.0)):
        assert Margin()(z, torch.tensor([y])).tolist() == [gap]
        assert DLR()(z, torch.tensor([y])).tolist() == pytest.approx([gap / 3])


@MODES
@pytest.mark.parametrize("loss", ["margin", "dlr"])
@pytest.mark.parametrize("name", ["bim", "ngm"])
def test_loss_in_an_attack(name: str, loss: str, targeted: bool) -> None:
    """Few steps: where the label comes third DLR is constant, and rounding would decide the direction."""
    part, formula = LOSSES[loss]
    x = images()
    y = labels(x, targeted=targeted)
    chosen = settings(name, "Linf", "mean", "") | {"steps": 4}
    got = package(name, eps=0.2, loss=part, **chosen)(MODEL, x, y, targeted=targeted)
    setup = {"eps": 0.2, "targeted": targeted, "loss": formula}
    assert distance(got, reference(name, x, y, setup, **chosen)) <= TOLERANCE
    assert distance(got, reference(name, x, y, {"eps": 0.2, "targeted": targeted}, **chosen)) > POWER


@cases(CASES)
def test_zero_gradient_gives_zero_direction(case: Case) -> None:
    """One blind example among others stays where it is and disturbs none of them."""
    name, norm, _, _ = case
    model = Gated().eval()
    x = images()
    x[1] = 0
    y = labels(x, targeted=False)
    got = package(name, eps=EPS[norm], norm=norm, **settings(*case))(model, x, y)
    setup = {"model": model, "eps": EPS[norm], "norm": norm}
    assert got[1].eq(0).all()
    assert distance(got, reference(name, x, y, setup, **settings(*case))) <= TOLERANCE


# The random start, seen through one step too small to move it.


def start(name: str, x: Tensor, *, eps: float, norm: str = "Linf", seed: int = 0, bounds: Any = (0.0, 1.0)) -> Tensor:
    attack = PACKAGE[name](eps=eps, norm=norm, steps=1, alpha=1e-300)
    y = torch.zeros(len(x), dtype=torch.long)
    return attack(MODEL, x, y, bounds=bounds, generator=torch.Generator().manual_seed(seed))


STARTS = pytest.mark.parametrize(("name", "norm"), [("pgd", "Linf"), ("pgd", "L2"), ("pqgd", "Linf")])


@STARTS
def test_random_start_equals_reference(name: str, norm: str) -> None:
    x = images()
    y = labels(x, targeted=False)
    setup = {"eps": EPS[norm], "norm": norm}
    for seed in range(3):
        begin = start(name, x, seed=seed, **setup)
        attack = PACKAGE[name](steps=4, **setup)
        got = attack(MODEL, x, y, generator=torch.Generator().manual_seed(seed))
        assert distance(begin, x) > POWER
        assert distance(got, reference(name, x, y, setup, start=begin, steps=4)) <= TOLERANCE


@STARTS
def test_random_start_follows_the_seed(name: str, norm: str) -> None:
    x = images()
    first, again, other = (start(name, x, eps=EPS[norm], norm=norm, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert distance(first, other) > POWER
    same = start(name, x[:1].repeat(4, 1, 1, 1), eps=EPS[norm], norm=norm)
    assert distance(same[0], same[1]) > POWER


@STARTS
def test_random_start_lies_in_ball_and_bounds(name: str, norm: str) -> None:
    x = images(50)
    delta = start(name, x, eps=EPS[norm], norm=norm) - x
    assert float((x + delta).min()) >= 0
    assert float((x + delta).max()) <= 1
    sizes = delta.flatten(1).abs().amax(1) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert float(sizes.max()) <= EPS[norm] + 1e-12


def uniform_deviation(u: Tensor) -> float:
    """The Kolmogorov distance of a sample from U[0, 1], times the root of its size."""
    u = u.flatten().sort().values
    grid = torch.arange(1, len(u) + 1, dtype=u.dtype) / len(u)
    return float((u - grid).abs().max()) * math.sqrt(len(u))


@pytest.mark.parametrize("name", ["pgd", "pqgd"])
def test_random_start_is_uniform_in_the_box(name: str) -> None:
    x = images(400)
    delta = start(name, x, eps=0.2, bounds=(-9.0, 9.0)) - x
    assert uniform_deviation((delta / 0.2 + 1) / 2) < 1.7
    assert abs(float((delta[:, 0] * delta[:, 1]).mean())) < 4 * 0.2**2 / 3 / math.sqrt(delta[:, 0].numel())


def test_random_start_is_uniform_in_the_l2_ball() -> None:
    """The d-th power of the relative radius is uniform, and no direction is preferred."""
    x = images(2000)
    delta = (start("pgd", x, eps=1.0, norm="L2", bounds=(-9.0, 9.0)) - x).flatten(1)
    assert uniform_deviation(delta.norm(dim=1) ** SIZE) < 1.7
    unit = nn.functional.normalize(delta)
    assert float(unit.mean(0).abs().max()) < 4.5 / math.sqrt(SIZE * len(x))
    assert float((unit.square().mean(0) * SIZE - 1).abs().max()) < 4.5 * math.sqrt(2 / len(x))


def test_quantised_attack_is_for_linf_only() -> None:
    with pytest.raises(ValueError, match="norm"):
        PQGD(norm="L2")(MODEL, images(), labels(images(), targeted=False))
