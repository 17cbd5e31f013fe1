"""What the attacks along transformed copies and members of ensembles promise beyond their transcriptions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Net, classifier, images, pool, predicted
from firstorder.attacks import (
    BSR,
    DEM,
    EMI,
    MIFGSM,
    PGN,
    SIA,
    SINIFGSM,
    SSA,
    SVRE,
    Admix,
    Batched,
    BoundedAttack,
    Clipped,
    ClippedDIFGSM,
    ClippedNGM,
    ClippedTIDIM,
    ClippedVMIDIM,
    DiverseInput,
    DiversityEnsemble,
    EnhancedMomentum,
    Ensemble,
    Expectation,
    Margin,
    ScaleCopies,
    TorchModel,
    VarianceReduction,
    chain,
    create,
    prepare,
)
from firstorder.attacks.blocks import KINDS, StructureInvariant
from firstorder.attacks.graphs import _kind
from firstorder.attacks.losses import MeanLogits

ATTACKS: dict[str, Any] = {
    "sia": SIA(m=5, blocks=2, steps=3),
    "bsr": BSR(m=5, steps=3),
    "ssa": SSA(m=5, steps=3),
    "pgn": PGN(m=5, steps=3),
    "admix": Admix(m1=2, m2=3, steps=3, pool=pool()),
    "dem": DEM(rates=(1.2, 1.4, 1.6), steps=3),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def members() -> list[Net]:
    return [Net(seed=seed).double().eval() for seed in range(3)]


def source(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Memory, counts, batches


@every_attack
def test_the_memory_budget_changes_the_forwards_only(name: str, model: Net) -> None:
    x, y = images().double(), torch.arange(6)
    seen: list[int] = []

    def forward(z: Tensor) -> Tensor:
        seen.append(len(z))
        return model(z)

    model = model.double().eval()
    large, largest = ATTACKS[name](forward, x, y, generator=source()), max(seen)
    seen.clear()
    small = dataclasses.replace(ATTACKS[name], memory_budget=1)(forward, x, y, generator=source())
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)
    assert largest >= 3 * 6
    assert max(seen) == (3 if name == "dem" else 6), "the copies of one example stay together in DEM"


def test_gradients_are_counted(model: Net) -> None:
    x, y = images(), torch.arange(6)
    per_step = {"sia": 5, "bsr": 5, "ssa": 5, "pgn": 10, "admix": 6, "dem": 3}
    for name, count in per_step.items():
        assert ATTACKS[name].run(model, x, y).gradients.tolist() == [3 * count] * 6
    assert EMI(m=4, steps=2).run(model, x, y).gradients.tolist() == [8] * 6
    assert SVRE(M=4, steps=2).run(model, x, y).gradients.tolist() == [10] * 6
    several = SVRE(M=40, steps=2).run(Ensemble([model, Net(seed=1)]), x, y)
    assert several.gradients.tolist() == [2 * (1 + 2 + 40)] * 6


def test_mean_logits_in_batches_and_with_rows_of_labels(model: Net) -> None:
    model = model.double().eval()
    x, y = images().double(), torch.arange(6)
    expected = ATTACKS["dem"](model, x, y, generator=source())
    for size in (1, 4, 7, 100):
        got = ATTACKS["dem"](Batched(TorchModel(model), size), x, y, generator=source())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    rows = F.one_hot(y, 10) * 0.8 + 0.02
    soft = ATTACKS["dem"](model, x, rows, generator=source())
    assert not torch.equal(soft, expected)
    stacked = dataclasses.replace(ATTACKS["dem"], memory_budget=1)(model, x, rows, generator=source())
    torch.testing.assert_close(stacked, soft, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stacked", [1, 3])
def test_mean_logits_of_an_expectation_over_draws(stacked: int, model: Net) -> None:
    """A model whose draws do not differ by much is attacked as it is; every stacked draw has means of its own."""
    model = model.double().eval()
    x, y = images().double(), torch.arange(6)

    def noisy(z: Tensor) -> Tensor:
        return model(z) + 1e-13 * torch.rand(len(z), 10)

    expected = ATTACKS["dem"](model, x, y, generator=source())
    got = ATTACKS["dem"](Expectation(noisy, samples=6, stacked=stacked), x, y, generator=source())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_mean_logits_need_an_estimator_with_logits(model: Net) -> None:
    from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier

    import firstorder.art

    class Own(PyTorchClassifier):  # type: ignore[misc]
        def loss_gradient(self, *of: Any, **words: Any) -> Any:
            return super().loss_gradient(*of, **words)

    estimator = Own(model, nn.CrossEntropyLoss(), (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    assert not isinstance(estimator, BlackBoxClassifier)
    x = images().numpy()
    with pytest.raises(ValueError, match="mean logits of copies; take a PyTorchClassifier"):
        firstorder.art.DEM(estimator, verbose=False).generate(x, np.arange(6))
    found = firstorder.art.SIA(estimator, m=2, blocks=2, max_iter=2, verbose=False).generate(x, np.arange(6))
    assert (found != x).any()


@every_attack
def test_half_precision_and_autocast(name: str, model: Net) -> None:
    """Transforms are computed in float32 at least."""
    x, y = images(), torch.arange(6)
    model.eval()
    low = ATTACKS[name](model.bfloat16(), x.bfloat16(), y, generator=source())
    assert low.dtype == torch.bfloat16
    assert low.isfinite().all()
    whole = model.float()
    apart = ATTACKS[name](lambda z: whole(z.float()), x, y, generator=source())
    with torch.autocast("cpu", dtype=torch.bfloat16):

        def exact(z: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return whole(z.float())

        inside = ATTACKS[name](exact, x, y, generator=source())
    assert torch.equal(apart, inside)


# Draws


@every_attack
def test_every_example_and_copy_has_draws_of_its_own(name: str, model: Net) -> None:
    """The same image twice in a batch is transformed in different ways."""
    x = images(1).expand(2, -1, -1, -1)
    y = torch.zeros(2, dtype=torch.long)
    one, two = ATTACKS[name](model.eval(), x, y, generator=source())
    assert not torch.equal(one, two)


def test_members_are_drawn_for_all_examples(model: Net) -> None:
    x = images(4).double()
    both = Ensemble(members())
    y = predicted(both, x)
    attack = SVRE(steps=3, eps=0.1)
    whole = attack(both, x, y, generator=source())
    alone = torch.cat([attack(both, x[i : i + 1], y[i : i + 1], generator=source()) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
    assert not torch.equal(whole, attack(both, x, y, generator=source(2)))


# Members


def test_a_member_of_an_ensemble_is_asked_alone() -> None:
    nets, x = members(), images().double()
    lambdas = [nets[0], lambda z: nets[1](z), nets[2]]
    model = Ensemble(lambdas, weights=[1.0, 2.0, 5.0], sizes=[None, None, (6, 5)])
    assert len(model) == 3
    with torch.no_grad():
        mean = model(x)
        for k, net in enumerate(nets):
            with model.only(k):
                assert torch.equal(model(x), net(x))
        with pytest.raises(ArithmeticError), model.only(1):
            raise ArithmeticError
        assert torch.equal(model(x), mean)


def test_members_are_found_through_wrappers_and_hosts() -> None:
    from firstorder.art.models import as_model as of_art

    model, x = Ensemble(members()).eval(), images().double()
    y = predicted(model, x)
    wrapped = nn.Sequential(nn.Identity(), model)
    prepared = prepare(wrapped, x)
    assert "folded BatchNorm" in prepared.parts
    attack = SVRE(steps=3, eps=0.1)
    expected = attack(model, x, y, generator=source())
    for other in (wrapped, Batched(TorchModel(model), 4), prepared, of_art(classifier(wrapped))):
        known = other if not isinstance(other, nn.Module) else TorchModel(other)
        assert known.members == 3
        torch.testing.assert_close(attack(other, x, y, generator=source()), expected, rtol=0, atol=1e-6)
    averaged = attack(lambda z: model(z), x, y, generator=source())
    assert not torch.allclose(averaged, expected, atol=1e-6), "the mean alone is another attack"


def test_graphs_of_members_are_distinguished(model: Net) -> None:
    x, y = images(), torch.arange(6)
    kinds = {_kind(x, y, None, member) for member in (None, 0, 1)}
    assert len(kinds) == 3
    means = [MeanLogits(loss=loss, copies=2, examples=3) for loss in (None, Margin())]
    assert len({_kind(x, y, loss, None) for loss in means}) == 2
    assert _kind(x, y, MeanLogits(loss=F.cross_entropy, copies=2, examples=3), None) is None
    both = TorchModel(Ensemble([model, Net(seed=1)]))
    with both.only(1):
        assert both.member == 1
    assert both.member is None


def test_one_model_has_no_variance_to_reduce(model: Net) -> None:
    """One inner step, then the outer one: two steps of sign from one gradient."""
    x, y = images().double(), torch.arange(6)
    model = model.double().eval()
    one = SVRE(M=1, steps=4)(model, x, y)
    assert torch.equal(one, MIFGSM(steps=4)(model, x, y))


def test_success_is_seen_at_the_iterate() -> None:
    model, x = Ensemble(members()), images(12).double()
    y = predicted(model, x)
    whole, stopped = (SVRE(steps=6, eps=0.1, early_stop=stop).run(model, x, y, generator=source()) for stop in (0, 1))
    assert stopped.success.any()
    assert (stopped.success >= whole.success).all()
    assert stopped.gradients.sum() < whole.gradients.sum()


def test_the_inner_walk_heeds_the_mask_and_the_ball() -> None:
    model, x = Ensemble(members()).eval(), images().double()
    y = predicted(model, x)
    mask = torch.zeros(6, 5)
    mask[2:4] = 1
    seen: list[Tensor] = []

    def watched(net: nn.Module) -> Any:
        return lambda z: seen.append(z.detach().clone()) or net(z)

    SVRE(steps=2, eps=0.05, M=6)(Ensemble([watched(net) for net in members()]), x, y, mask=mask, generator=source())
    for points in seen:
        assert torch.equal(points[..., mask == 0], x[..., mask == 0])
        assert float((points - x).abs().max()) <= 0.05 + 1e-12
    assert any(not torch.equal(points, x) for points in seen)

    def blind(net: nn.Module) -> Any:
        """Sees the pixels under the mask as they were."""
        return lambda z: net(torch.where(mask != 0, z, x))

    attack = SVRE(steps=3, eps=0.5, alpha=0.001, M=6, direction="quantised")
    masked = attack(Ensemble(members()), x, y, mask=mask, generator=source())
    unseen = attack(Ensemble([blind(net) for net in members()]), x, y, generator=source())
    torch.testing.assert_close(masked, unseen, rtol=0, atol=1e-12)


# The recipes


def test_clipped_recipes_are_the_oracle_with_clipped_ngm(model: Net) -> None:
    x, y = images(), torch.arange(6)
    plain = ClippedDIFGSM(diversity_prob=0, steps=4)(model, x, y)
    assert torch.equal(plain, ClippedNGM(scope="element", gamma=0.1, steps=4)(model, x, y))
    assert torch.equal(plain, ClippedTIDIM(diversity_prob=0, len_kernel=1, steps=4)(model, x, y))
    assert torch.equal(plain, ClippedVMIDIM(diversity_prob=0, beta=0, N=1, steps=4)(model, x, y))
    drawn = ClippedDIFGSM(resize_rate=0.7, steps=4)
    assert not torch.equal(drawn(model, x, y, generator=source()), plain)
    names: dict[str, tuple[Any, dict[str, Any]]] = {
        "clipped-di-fgsm": (ScaleCopies(m=1), {}),
        "clipped-si-dim": (ScaleCopies(m=3), {"m": 3}),
        "clipped-sia-dim": (StructureInvariant(m=3, blocks=2), {"m": 3, "blocks": 2}),
    }
    for name, (copies, own) in names.items():
        attack: Any = create(name, resize_rate=0.7, steps=4, **own)

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Composed(ClippedNGM):
            def oracle(self) -> Any:
                return chain(copies, DiverseInput(resize_rate=0.7))  # noqa: B023

        mine = Composed(scope="element", gamma=0.1, steps=4)
        found = [one(model, x, y, generator=source()) for one in (attack, mine)]
        assert torch.equal(*found)


def test_all_begin_with_the_radius_of_the_papers() -> None:
    made = {
        name: create(name, **({"pool": pool()} if name == "admix" else {})) for name in [*ATTACKS, "clipped-sia-dim"]
    }
    assert {attack.eps for attack in made.values()} == {MIFGSM().eps} == {16 / 255}


def test_admix_without_weight_is_the_scale_copies(model: Net) -> None:
    x, y = images().double(), torch.arange(6)
    model = model.double().eval()
    one = Admix(eta=0.0, m1=3, m2=2, pool=pool(), steps=3)(model, x, y)
    other = SINIFGSM(m=3, steps=3)(model, x, y)
    assert not torch.allclose(one, other)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Scaled(MIFGSM):
        def oracle(self) -> Any:
            return ScaleCopies(m=3)

    torch.testing.assert_close(one, Scaled(steps=3)(model, x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", [PGN(m=2, steps=3, alpha=None), EMI(m=3, steps=3)])
@pytest.mark.parametrize("direction", ["clipped", "quantised", "identity"])
def test_what_is_measured_in_steps_stays_near_under_every_rule(attack: Any, direction: str, model: Net) -> None:
    seen: list[float] = []
    x, y = images(), torch.arange(6)

    def forward(z: Tensor) -> Tensor:
        seen.append(float((z.unflatten(0, (-1, 6)) - x).abs().max()))
        return model(z)

    model.eval()
    dataclasses.replace(attack, direction=direction, eps=0.03, memory_budget=None)(forward, x, y)
    assert max(seen) < 1.0


def test_clipping_by_element_is_the_rule_of_the_recipe() -> None:
    assert ClippedDIFGSM().rule() == Clipped(scope="element", gamma=0.1)


# Refusals

ERRORS: dict[str, tuple[Any, str]] = {
    "copies": (lambda: SIA(m=0), "m=0"),
    "blocks": (lambda: BSR(blocks=0), "blocks=0"),
    "noise": (lambda: SIA(noise=-1), "noise=-1"),
    "kinds": (lambda: SIA(kinds=()), r"kinds=\(\) must be a tuple"),
    "kind": (lambda: SIA(kinds=("flip",)), "kinds='flip' is not supported"),
    "angle": (lambda: BSR(max_angle=-1), "max_angle=-1"),
    "sigma": (lambda: SSA(sigma=-1), "sigma=-1"),
    "rho": (lambda: SSA(rho=-1), "rho=-1"),
    "by": (lambda: SSA(by="image"), "by='image'"),
    "zeta": (lambda: PGN(zeta=-1), "zeta=-1"),
    "delta": (lambda: PGN(delta=1.5), "delta=1.5"),
    "eta": (lambda: EMI(eta=-1), "eta=-1"),
    "norm": (lambda: EMI(norm="L2"), "norm='L2'"),
    "rates": (lambda: DEM(rates=()), r"rates=\(\) must be a tuple"),
    "rate": (lambda: DEM(rates=(1.1, 0.0)), "rates=0.0"),
    "inner steps": (lambda: SVRE(M=0), "M=0"),
    "weight": (lambda: Admix(eta=-1), "eta=-1"),
    "scales": (lambda: Admix(m1=0), "m1=0"),
    "mixes": (lambda: Admix(m2=0), "m2=0"),
    "a pool of words": (lambda: Admix(pool="images"), "pool is a str"),
    "an empty pool": (lambda: Admix(pool=pool()[:0]), r"pool has shape \(0, 3, 6, 5\)"),
    "a pool of one image": (lambda: Admix(pool=pool()[0]), r"pool has shape \(3, 6, 5\)"),
    "a pool of bytes": (lambda: Admix(pool=torch.ones(2, 3, 6, 5, dtype=torch.uint8)), "dtype torch.uint8"),
    "a pool of nothing": (lambda: Admix(pool=pool() * torch.nan), "finite floating-point numbers"),
    "early stop": (lambda: SIA(early_stop=True), "early_stop"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_parameters_are_refused(case: str) -> None:
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_images_is_refused_before_work() -> None:
    def forward(z: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    attacks: dict[str, tuple[BoundedAttack, str]] = {
        "many": (SIA(blocks=6), "blocks=6 are more than images"),
        "no pool": (Admix(), r"pass pool=images, a tensor \(P, 3, 6, 5\)"),
        "other pool": (Admix(pool=pool((3, 5, 6))), r"pool has shape \(5, 3, 5, 6\), the images \(6, 3, 6, 5\)"),
        "rates": (DEM(rates=(1.1, 0.1)), r"resize_rate=0\.1 leaves nothing"),
    }
    for attack, message in attacks.values():
        with pytest.raises(ValueError, match=message):
            attack(forward, images(), torch.arange(6))
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\)"):
        SSA()(forward, torch.rand(6, 7), torch.arange(6))


@pytest.mark.parametrize("part", [EnhancedMomentum(m=2), VarianceReduction(M=2)])
def test_what_keeps_a_point_per_example_goes_first(part: Any, model: Net) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(MIFGSM):
        def oracle(self) -> Any:
            return chain(ScaleCopies(m=2), part)

    with pytest.raises(ValueError, match="before"):
        Wrong()(model, images(), torch.arange(6))


def test_parameters_as_files_and_arrays_have_them(model: Net) -> None:
    assert create("dem", rates=[1.2, 1.4]) == DEM(rates=(1.2, 1.4))
    assert create("sia", kinds=list(KINDS[:2])) == SIA(kinds=KINDS[:2])
    assert Admix(pool=pool().numpy()) == Admix(pool=pool())
    assert Admix(pool=pool()) != Admix(pool=pool() / 2)
    assert len({Admix(pool=pool()), Admix(pool=pool())}) == 1
    assert DiversityEnsemble() == DiversityEnsemble()


def test_a_command_line_says_that_it_has_no_images() -> None:
    from firstorder.evaluation.names.attacks import parse
    from firstorder.evaluation.runs.axes import attacks
    from firstorder.evaluation.runs.specification import specify

    with pytest.raises(ValueError, match=r"admix needs pool, .* or Admix\(pool=\.\.\.\) from Python"):
        parse("admix:eta=0.3")
    given = {"data": "mnist", "models": "mnist-cnn", "attacks": "all", "eps": 0.1, "budget": 20}
    found = {one.name for one in attacks(specify(given), (1, 28, 28)).found}
    assert {"sia", "clipped-di-fgsm"} <= found
    assert "admix" not in found
    assert parse("sia+quantised:m=3,blocks=2").build(eps=0.1) == SIA(m=3, blocks=2, eps=0.1, direction="quantised")
    assert parse("dem:rates=[1.2,1.4]").build() == DEM(rates=(1.2, 1.4))
