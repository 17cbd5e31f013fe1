"""The attacks along transformed copies, neighbours and members against their slow references, in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import references
import references_augmented as slow
from firstorder.attacks import (
    BSR,
    DEM,
    EMI,
    MIFGSM,
    PGN,
    SIA,
    SSA,
    SVRE,
    Admix,
    BlockShuffle,
    BoundedAttack,
    Copies,
    DiverseInput,
    DiversityEnsemble,
    Draw,
    EnhancedMomentum,
    Ensemble,
    Evaluation,
    GradientNormPenalty,
    LookAhead,
    Margin,
    Mixed,
    Parts,
    Problem,
    Quantised,
    ScaleCopies,
    SpectrumSimulation,
    Stateless,
    StructureInvariant,
    TorchModel,
    TranslationInvariant,
    VarianceReduction,
    VarianceTuning,
    ascend,
    blocks,
    chain,
)
from firstorder.attacks.projections import LinfBall
from references import Vector, attack_batch
from references_transfer import averaged, climb
from test_references import EPS, MODES, POWER, TOLERANCE, distance, label
from test_references_transfer import MODEL, OTHER, SHAPE, SIZE, aims, points, source, uniforms

N = 2
STEPS = 2
THIRD = type(MODEL)(SHAPE, seed=5).eval()
CHANNELS, HEIGHT, WIDTH = SHAPE
POOL = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
ENSEMBLE = [MODEL, OTHER, THIRD]
WEIGHTS = (0.5, 1.0, 1.5)
RATES = (1.0, 0.8, 1.5)


def cells(blocks: int) -> int:
    return HEIGHT - 1 + WIDTH - 1 + blocks**2 * (2 + CHANNELS) + SIZE


# Per attack: the class, its parameters, how many draws a copy takes, and the gradient for an example's draws of a step.

Gradient = Callable[[references.Problem, Vector, list[Vector]], Vector]


def over(transform: Callable[[Vector], slow.Transform], find: Any = None) -> Gradient:
    def gradient(p: references.Problem, a: Vector, u: list[Vector]) -> Vector:
        chosen = find or slow.transformed_gradient
        return slow.mean([chosen(p, a, transform(one)) for one in u])

    return gradient


def pgn(p: references.Problem, a: Vector, u: list[Vector]) -> Vector:
    near = [slow.neighbour(a, one, 2.0 * p.eps) for one in u]
    return slow.mean([slow.penalised(p, one, 0.2 * p.eps, 0.3) for one in near])


def admix(p: references.Problem, a: Vector, u: list[Vector]) -> Vector:
    return slow.admixed(p, a, POOL.flatten(1).tolist(), [one[0] for one in u], 0.5, 3)


TABLE: dict[str, tuple[type[BoundedAttack], dict[str, Any], int, Gradient]] = {
    "sia": (SIA, {"m": 2, "blocks": 2, "noise": 0.3}, cells(2), over(lambda u: slow.structure(u, SHAPE, 2, 0.3))),
    "bsr": (BSR, {"m": 2, "max_angle": 40.0}, 12, over(lambda u: slow.shuffled(u, SHAPE, 2, 40.0))),
    "ssa": (SSA, {"m": 2, "sigma": 0.2, "rho": 0.7}, 2 * SIZE, over(lambda u: slow.simulated(u, SHAPE, 0.2, 0.7))),
    "ssa straight": (
        SSA,
        {"m": 2, "sigma": 0.2, "rho": 0.7, "by": "transformed"},
        2 * SIZE,
        over(lambda u: slow.simulated(u, SHAPE, 0.2, 0.7), lambda *of: slow.straight_through(*of)),
    ),
    "pgn": (PGN, {"m": 3, "zeta": 2.0, "delta": 0.3, "direction": Quantised(levels=20)}, SIZE, pgn),
    "admix": (Admix, {"m1": 3, "m2": 2, "eta": 0.5, "pool": POOL}, 1, admix),
    "dem": (DEM, {"rates": RATES}, 4, lambda p, a, u: slow.diverse_ensemble(p, a, u, RATES)),
}
COPIES = {"admix": 2, "dem": len(RATES), "pgn": 3}
CASES = [(name, norm) for name in TABLE for norm in (("Linf",) if name == "pgn" else ("Linf", "L2"))]
cases = pytest.mark.parametrize(("name", "norm"), CASES, ids=[label(*case) for case in CASES])


def common(norm: str) -> dict[str, Any]:
    return {"steps": STEPS, "alpha": 0.2 * EPS[norm], "decay": 0.9}


@functools.cache
def drawn(name: str) -> Tensor:
    """(steps, copies, N, draws)."""
    generator, shape = source(), (COPIES.get(name, 2), N, TABLE[name][2])
    return torch.stack([uniforms(generator, *shape) for _ in range(STEPS)])


def reference(name: str, norm: str, targeted: bool, loss: Any = references.cross_entropy) -> Tensor:
    x = points(N)

    def one(p: references.Problem, index: int) -> Vector:
        find, rule = TABLE[name][3], references.quantised_rule(20) if name == "pgn" else None
        return climb(
            p, lambda t, a, point: find(p, point, drawn(name)[t, :, index].tolist()), rule=rule, **common(norm)
        )

    setup: dict[str, Any] = {"eps": EPS[norm], "norm": norm, "targeted": targeted, "loss": loss}
    return attack_batch(one, MODEL, x, aims(x, targeted=targeted), **setup)


expected = functools.cache(reference)


def package(name: str, norm: str, **more: Any) -> BoundedAttack:
    cls, parameters, *_ = TABLE[name]
    return cls(**{"eps": EPS[norm], "norm": norm, "memory_budget": None, **common(norm), **parameters, **more})


@MODES
@cases
def test_equals_reference(name: str, norm: str, targeted: bool) -> None:
    x = points(N)
    got = package(name, norm)(MODEL, x, aims(x, targeted=targeted), targeted=targeted, generator=source())
    assert distance(got, expected(name, norm, targeted)) <= TOLERANCE
    assert distance(got, x) > POWER


def test_the_loss_of_mean_logits_is_any_loss() -> None:
    x = points(N)
    got = package("dem", "Linf", loss=Margin())(MODEL, x, aims(x), generator=source())
    assert distance(got, reference("dem", "Linf", False, references.margin)) <= TOLERANCE


# What a deletion replaces, by what, and the attacks that it must change.


def same(image: Any, *_: Any) -> Any:
    return image


DELETIONS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "blocks": ("block_transform", lambda kind, block, *_: block, ("sia",)),
    "cuts": ("places", lambda u, count: [len(u) // 2 + 1] * count, ("sia",)),
    "adjoint": ("adjoint", lambda transform, shape, g: g, ("sia", "bsr", "ssa")),
    "rotation": ("rotated", same, ("bsr",)),
    "order": ("order", lambda u: list(range(len(u))), ("bsr",)),
    "lengths": ("lengths", lambda u, side: [side // 2, side - side // 2], ("bsr",)),
    "spectrum": ("both_ways", same, ("ssa", "ssa straight")),
    "neighbours": ("neighbour", same, ("pgn",)),
    "penalty": ("penalised", lambda p, near, *_: p.gradient(near), ("pgn",)),
    "other images": ("mix", same, ("admix",)),
    "mean logits": (
        "loss_of",
        lambda logits, loss, y: sum(loss(one, y) for one in logits) / len(logits),
        ("dem",),
    ),
    "resize and padding": ("warp", same, ("dem",)),
    "its adjoint": ("pull_back", lambda g, *_: g, ("dem",)),
}
DELETED = [(deletion, name) for deletion, (_, _, names) in DELETIONS.items() for name in names]


@pytest.mark.parametrize(("deletion", "name"), DELETED, ids=[label(*row) for row in DELETED])
def test_comparison_has_power(deletion: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, replacement, _ = DELETIONS[deletion]
    whole = expected(name, "L2" if name != "pgn" else "Linf", False)
    monkeypatch.setattr(slow, function, replacement)
    assert distance(reference(name, "L2" if name != "pgn" else "Linf", False), whole) > POWER


# The transforms on larger images, where blocks have a middle.

LARGE = (3, 15, 13)
IMAGES = torch.rand(40, *LARGE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TRANSFORMS: dict[str, tuple[Copies, Callable[[Vector], slow.Transform]]] = {
    "sia": (StructureInvariant(noise=0.3), lambda u: slow.structure(u, LARGE, 3, 0.3)),
    "sia, one block": (StructureInvariant(blocks=1), lambda u: slow.structure(u, LARGE, 1, 16 / 255)),
    "bsr": (BlockShuffle(), lambda u: slow.shuffled(u, LARGE, 2, 24.0)),
    "bsr, three blocks": (BlockShuffle(blocks=3, max_angle=90.0), lambda u: slow.shuffled(u, LARGE, 3, 90.0)),
    "ssa": (SpectrumSimulation(), lambda u: slow.simulated(u, LARGE, 16 / 255, 0.5)),
}


def transforms(name: str) -> tuple[Tensor, list[Vector]]:
    part = TRANSFORMS[name][0]
    draws = uniforms(source(), len(IMAGES), part.draws(IMAGES))
    return part.transform(IMAGES, draws, *part.constants(IMAGES)), draws.tolist()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    got, draws = transforms(name)
    few = len(IMAGES) if name != "ssa" else 4
    for image, found, u in zip(IMAGES[:few], got, draws, strict=False):
        slowly = torch.tensor(TRANSFORMS[name][1](u)(image.tolist()), dtype=torch.float64)
        assert distance(found, slowly) <= 1e-8
    assert distance(got, IMAGES) > 0.1


def test_whole_sides_filter_as_block_by_block() -> None:
    """What a GPU computes is what a CPU does, gradients too."""
    part = StructureInvariant()
    down, across = (part._cut(uniforms(source(), len(IMAGES), side - 1), side) for side in LARGE[1:])
    kinds = torch.randint(len(blocks.KINDS), (len(IMAGES), 3, 3), generator=torch.Generator().manual_seed(2))
    every = torch.arange(len(IMAGES))[:, None, None]
    pixels = kinds[every, down.strip[:, :, None], across.strip[:, None]]
    found = []
    for filtered, own in ((blocks._filtered, pixels), (blocks._filtered_blocks, kinds)):
        x = IMAGES.clone().requires_grad_()
        made = filtered(x, own, down, across)
        found.append((made.detach(), *torch.autograd.grad(made.square().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) <= 1e-12
    assert distance(found[0][0], IMAGES) > 0.1


@pytest.mark.parametrize("kind", slow.KINDS)
def test_every_kind_of_block_shows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = slow.block_transform
    got, draws = transforms("sia")
    monkeypatch.setattr(
        slow, "block_transform", lambda name, block, *of: block if name == kind else whole(name, block, *of)
    )
    pairs = zip(IMAGES.tolist(), draws, strict=True)
    slowly = torch.tensor([TRANSFORMS["sia"][1](u)(image) for image, u in pairs], dtype=torch.float64)
    assert distance(got, slowly) > 0.05


def test_a_spectrum_without_change_is_the_image() -> None:
    part = SpectrumSimulation(sigma=0.0, rho=0.0)
    draws = uniforms(source(), len(IMAGES), part.draws(IMAGES))
    assert distance(part.transform(IMAGES, draws, *part.constants(IMAGES)), IMAGES) <= 1e-12


# Enhanced momentum, which draws nothing.


def slow_emi(m: int, targeted: bool = False) -> Tensor:
    x = points(N)
    maker = slow.enhanced(m, 3.0, 0.2 * EPS["Linf"])
    setup = {"eps": EPS["Linf"], "targeted": targeted}
    options = {**common("Linf"), "steps": 4}
    return attack_batch(lambda p, _: climb(p, maker(p), **options), MODEL, x, aims(x, targeted=targeted), **setup)


@MODES
@pytest.mark.parametrize("m", [1, 4])
def test_enhanced_momentum(m: int, targeted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = points(N)
    attack = EMI(**{**common("Linf"), "steps": 4}, eps=EPS["Linf"], m=m, eta=3.0)
    got = attack(MODEL, x, aims(x, targeted=targeted), targeted=targeted)
    assert distance(got, slow_emi(m, targeted)) <= TOLERANCE
    monkeypatch.setattr(slow, "factors", lambda eta, m: [0.0] * m)
    assert (distance(got, slow_emi(m, targeted)) > POWER) == (m > 1)


# Variance reduced ensembles.


def slow_svre(norm: str, targeted: bool) -> Tensor:
    x, generator = points(N), source()
    members = [torch.randint(len(ENSEMBLE), (5,), generator=generator).tolist() for _ in range(3)]

    def one(p: references.Problem, _: int) -> Vector:
        singles = [dataclasses.replace(p, model=model) for model in ENSEMBLE]
        rule = references.steepest_rule(norm)
        return slow.svre(p, singles, members, rule=rule, **{**common(norm), "steps": 3})

    model = averaged(ENSEMBLE, WEIGHTS)
    y = aims(x, targeted=targeted, model=Ensemble(ENSEMBLE, weights=WEIGHTS))
    return attack_batch(one, model, x, y, eps=EPS[norm], norm=norm, targeted=targeted)


@MODES
@pytest.mark.parametrize("norm", EPS)
def test_variance_reduction(norm: str, targeted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = points(N)
    model = Ensemble(ENSEMBLE, weights=WEIGHTS)
    attack = SVRE(**{**common(norm), "steps": 3}, eps=EPS[norm], norm=norm, M=5)
    y = aims(x, targeted=targeted, model=model)
    got = attack(model, x, y, targeted=targeted, generator=source())
    assert distance(got, slow_svre(norm, targeted)) <= TOLERANCE
    with monkeypatch.context() as patch:
        patch.setattr(slow, "reduced", lambda inner, anchor, ensemble: inner)
        assert distance(got, slow_svre(norm, targeted)) > POWER
    monkeypatch.setattr(slow, "reduced", lambda inner, anchor, ensemble: ensemble)
    assert distance(got, slow_svre(norm, targeted)) > POWER


# An example among others and alone.


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("budget", [None, 1])
def test_a_batch_equals_its_examples(name: str, budget: int | None) -> None:
    """The same draws, whoever is there: those of the example's row."""
    x = points(4)
    y = aims(x)
    attack = package(name, "Linf")

    def run(index: Tensor | None) -> Tensor:
        here = x if index is None else x[index]
        low, high = torch.tensor(0.0, dtype=x.dtype), torch.tensor(1.0, dtype=x.dtype)
        ball = LinfBall.around(here, EPS["Linf"], low, high)
        labels = y if index is None else y[index]
        problem = Problem(model=TorchModel(MODEL), region=ball, labels=labels, memory_budget=budget)
        parts: Parts = attack.parts(SIZE)
        return ascend(problem, parts, here.clone(), STEPS, draw=Draw(source(), len(x), index)).a

    whole = run(None)
    alone = torch.cat([run(torch.tensor([i])) for i in range(len(x))])
    assert distance(whole, alone) <= 1e-12
    assert distance(whole, x) > POWER


# Compositions.


def test_oracles_go_into_each_other() -> None:
    """Copies of copies: the pool's images, mixed in before or after the scale, and members asked through transforms."""
    x = points(N)
    y = aims(x)

    def run(*parts: Any, model: Any = MODEL) -> Tensor:
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Composed(MIFGSM):
            def oracle(self) -> Any:
                return chain(*parts)

        return Composed(eps=0.2, steps=STEPS)(model, x, y, generator=source())

    sharp = StructureInvariant(m=2, blocks=2)
    both = Ensemble(ENSEMBLE)
    found = [
        run(sharp),
        run(sharp, DiverseInput(resize_rate=0.7)),
        run(TranslationInvariant(len_kernel=3), sharp, ScaleCopies(m=2)),
        run(VarianceTuning(radius=0.1, N=2), sharp),
        run(LookAhead(), EnhancedMomentum(m=3), sharp),
        run(GradientNormPenalty(radius=0.2, m=2), BlockShuffle(m=2)),
        run(Mixed(m=2, pool=POOL), sharp),
        run(ScaleCopies(m=2), DiversityEnsemble(rates=(0.8, 1.5)), SpectrumSimulation(m=2)),
        run(VarianceReduction(M=3), sharp, model=both),
        run(VarianceReduction(M=3), DiversityEnsemble(rates=(0.8, 1.5)), model=both),
    ]
    for i, one in enumerate(found):
        assert all(distance(one, other) > POWER for other in found[:i])


def test_the_mean_of_logits_is_that_of_the_copies_asked_for() -> None:
    """Outer copies have a mean each; inner copies have one for every scale."""
    x = points(N)
    y = aims(x)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pair(Stateless):
        """The loss of the mean logits of a and a + 0.1."""

        def __call__(self, query: Any, a: Tensor, state: Any, step: Any) -> tuple[Evaluation, Any]:
            found = query(torch.cat([a, a + 0.1]), mean=2).gradient
            return Evaluation(found[: len(a)] + found[len(a) :], None), state

    def gradient(oracle: Any, budget: int | None) -> Tensor:
        low, high = torch.tensor(0.0, dtype=x.dtype), torch.tensor(1.0, dtype=x.dtype)
        ball = LinfBall.around(x, 0.2, low, high)
        problem = Problem(model=TorchModel(MODEL), region=ball, labels=y, memory_budget=budget)
        return oracle(lambda a, **how: problem.evaluate(a, logits=False, **how), x, oracle.init(x), None)[0].gradient

    def by_hand(outer: bool) -> Tensor:
        point = x.clone().requires_grad_()
        losses = []
        for scale in (1.0, 0.5):
            shifted = [(point + 0.1) * scale if outer else point * scale + 0.1, point * scale]
            logits = torch.stack([MODEL(one) for one in shifted]).mean(0)
            losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
        return torch.autograd.grad(sum(losses) / 2, point)[0]

    for budget in (None, 1):
        for outer, oracle in ((True, chain(Pair(), ScaleCopies(m=2))), (False, chain(ScaleCopies(m=2), Pair()))):
            assert distance(gradient(oracle, budget), by_hand(outer)) <= 1e-12
    assert distance(by_hand(True), by_hand(False)) > POWER
