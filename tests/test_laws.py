"""Laws of the parts, and the reductions between attacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import BOUNDED, EPS, Case, Net, images, predicted
from firstorder.attacks import (
    BIM,
    BLOBQG,
    DAABLOB,
    DIFGSM,
    EMA,
    FGSM,
    MIFGSM,
    NGM,
    NIFGSM,
    PGD,
    PQGD,
    SINIDIM,
    SINIFGSM,
    SINITIDIM,
    SINITIM,
    TIDIM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    Accumulate,
    Clipped,
    ClippedNG,
    ClippedNGM,
    ClippedVMIFGSM,
    Constant,
    Cosine,
    Identity,
    InverseSqrt,
    L2Ball,
    LinfBall,
    Margin,
    Normalised,
    Quantised,
    Sign,
)
from firstorder.attacks.projections import norm

seeds = st.integers(0, 2**31)
BALLS = [LinfBall, L2Ball]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Projections


@pytest.mark.parametrize("ball", BALLS)
@given(seed=seeds, eps=st.floats(0.01, 2), low=st.floats(-1, 0.1), width=st.floats(0.1, 2))
def test_projections_are_feasible_idempotent_and_non_expansive(
    ball: Any, seed: int, eps: float, low: float, width: float
) -> None:
    lower, upper = torch.tensor(low, dtype=torch.float64), torch.tensor(low + width, dtype=torch.float64)
    x = lower + (upper - lower) * torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(seed)).double()
    region = ball.around(x, eps, lower, upper)
    a, b = x + normal(seed, *x.shape), x + normal(seed + 1, *x.shape)
    p, q = region.project_(a.clone()), region.project_(b.clone())
    order = torch.inf if ball is LinfBall else 2
    assert (torch.linalg.vector_norm((p - x).flatten(1), ord=order, dim=1) <= eps + 1e-12).all()
    assert (p >= lower).all()
    assert (p <= upper).all()
    torch.testing.assert_close(region.project_(p.clone()), p, rtol=0, atol=1e-12)
    assert (norm(p - q) <= norm(a - b) + 1e-12).all()


@pytest.mark.parametrize("ball", BALLS)
def test_a_projection_leaves_feasible_points_alone(ball: Any) -> None:
    x = images().double()
    region = ball.around(x, 0.5, torch.tensor(0.0), torch.tensor(1.0))
    inside = (x + 0.01 * normal(0, *x.shape)).clamp(0, 1)
    torch.testing.assert_close(region.project_(inside.clone()), inside, rtol=0, atol=1e-15)


def test_the_l2_projection_is_the_nearest_point() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    region = L2Ball.around(x, 1.0, torch.tensor(-9.0), torch.tensor(9.0))
    a = torch.tensor([[3.0, 0.0, 4.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(region.project_(a), torch.tensor([[0.6, 0.0, 0.8, 0.0]], dtype=torch.float64))


# Directions


@given(seed=seeds, levels=st.integers(1, 1000))
def test_quantised_components_are_integers_that_grow_with_the_gradient(seed: int, levels: int) -> None:
    m = normal(seed, 2, 3, 5)
    m[0, 0, 0] = 0
    zeta, _ = Quantised(levels=levels)(m, None, torch.empty_like(m))
    assert torch.equal(zeta, zeta.round())
    assert torch.equal(zeta.sign(), m.sign())
    assert (zeta.abs().flatten(1).amax(1) == levels).all()
    exact = levels * m.abs() / m.abs().flatten(1).amax(1)[:, None, None]
    assert ((zeta.abs() - exact).abs()[m != 0] <= 1).all()
    order = m[1].flatten().argsort()
    assert (zeta[1].flatten()[order].diff() >= 0).all()


@given(seed=seeds)
def test_one_level_is_the_sign(seed: int) -> None:
    m = normal(seed, 3, 7).float()
    m[:, 0] = 0
    assert torch.equal(Quantised(levels=1)(m, None, torch.empty_like(m))[0], Sign()(m, None, torch.empty_like(m))[0])


@pytest.mark.parametrize("scope", ["example", "element"])
@given(seed=seeds, gamma=st.floats(0.05, 5))
def test_the_clip_never_increases_and_bounds_the_step(scope: Any, seed: int, gamma: float) -> None:
    rule = Clipped(gamma=gamma, scope=scope)
    d = rule.init(normal(0, 2, 3, 4))
    assert (d == 1).all()
    for t in range(6):
        m = normal(seed + t, 2, 3, 4) * 3 * (t % 3)
        step, after = rule(m, d, torch.empty_like(m))
        assert after is not None
        assert (after <= d).all()
        assert (after > 0).all()
        limited = step.abs() if scope == "element" else norm(step)
        assert (limited <= gamma + 1e-12).all()
        torch.testing.assert_close(step, after * m)
        d = after


@given(seed=seeds, gamma=st.floats(0.1, 1))
def test_with_the_sum_normaliser_the_clip_lies_between_gamma_and_one(seed: int, gamma: float) -> None:
    """[NGM] Lemma 3.1: ||m_t||_2 <= ||m_t||_1 <= 1, so gamma <= d_t <= 1."""
    momentum, rule = EMA(normaliser="sum"), Clipped(gamma=gamma)
    m = torch.zeros(2, 3, 4, dtype=torch.float64)
    d: Tensor | None = rule.init(m)
    for t in range(1, 12):
        m = momentum(m, normal(seed + t, 2, 3, 4), t)
        assert (m.flatten(1).abs().sum(1) <= 1 + 1e-12).all()
        _, d = rule(m, d, torch.empty_like(m))
        assert d is not None
        assert (d >= gamma - 1e-12).all()
        assert (d <= 1).all()


@pytest.mark.parametrize(
    "rule", [Sign(), Normalised(), Identity(), Quantised(), Clipped(), Clipped(scope="element")], ids=repr
)
def test_zero_stays_zero(rule: Any) -> None:
    m = normal(0, 2, 4)
    m[0] = 0
    m[1, 2] = 0
    step, _ = rule(m.clone(), rule.init(m), torch.empty_like(m))
    assert (step[0] == 0).all()
    assert step[1, 2] == 0
    assert (step[1, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize(
    "rule", [Sign(), Normalised(), Identity(), Quantised(), Clipped(), Clipped(scope="element")], ids=repr
)
def test_rules_may_be_built_in_place_and_else_leave_the_momentum_alone(rule: Any) -> None:
    m = normal(0, 3, 4)
    kept = m.clone()
    fresh, _ = rule(m, rule.init(m), torch.empty_like(m))
    assert torch.equal(m, kept)
    assert torch.equal(rule(m, rule.init(m), m)[0], fresh)


# Momenta and schedules


def test_ema_weights_decay_by_lambda() -> None:
    momentum = EMA(beta1=0.8, lam=0.5, normaliser="sum")
    one = torch.ones(1, 1, dtype=torch.float64)
    m = torch.zeros(1, 1, dtype=torch.float64)
    for t, expected in ((1, 0.2), (2, 0.2 * 0.4 + 0.6), (3, (0.2 * 0.4 + 0.6) * 0.2 + 0.8)):
        m = momentum(m, one, t)
        assert m.item() == pytest.approx(expected)


def test_schedules() -> None:
    assert [Constant(size=2.0)(t, 4) for t in (1, 4)] == [2.0, 2.0]
    assert [InverseSqrt(size=2.0)(t, 9) for t in (1, 4, 9)] == pytest.approx([2.0, 1.0, 2 / 3])
    cosine = Cosine(size=1.0, end=0.01)
    assert [cosine(t, 4) for t in (1, 3, 5)] == pytest.approx([1.0, 0.505, 0.01])
    assert cosine(2, 3) == pytest.approx(0.01 + 0.99 * 0.75)


# Reductions: attacks that must coincide, on the same model and to the last bit

REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "PQGD(b=1) is PGD": (PQGD(b=1), PGD()),
    "PQGD(b=1) is PGD, fixed start": (PQGD(b=1, random_start=False), PGD(random_start=False)),
    "NI-FGSM(mu=0) is I-FGSM": (NIFGSM(decay=0), BIM(eps=16 / 255)),
    "MI-FGSM(mu=0) is I-FGSM": (MIFGSM(decay=0), BIM(eps=16 / 255)),
    "one scale copy is NI-FGSM": (SINIFGSM(m=1), NIFGSM()),
    "one step of I-FGSM is FGSM": (BIM(steps=1), FGSM()),
    "PGD from the input is I-FGSM": (PGD(random_start=False, alpha=0.003), BIM(alpha=0.003)),
    "clipped NGM(beta1=0) is clipped NG": (ClippedNGM(beta1=0.0), ClippedNG()),
    "clipped NGM with the identity is NGM": (ClippedNGM(direction=Identity()), NGM()),
    "PGD with a quantised direction is PQGD": (PGD(direction=Quantised(levels=50)), PQGD(b=50)),
    "an endless clip radius is NGM": (ClippedNGM(gamma=1e9, scope="example"), NGM()),
    "DI-FGSM(p=0) is MI-FGSM": (DIFGSM(diversity_prob=0), MIFGSM()),
    "a kernel of one is MI-FGSM": (TIFGSM(len_kernel=1), MIFGSM()),
    "TI-DIM(p=0) is TI-FGSM": (TIDIM(diversity_prob=0, len_kernel=3), TIFGSM(len_kernel=3)),
    "TI-FGSM(p) is TI-DIM": (TIFGSM(diversity_prob=0.5, resize_rate=0.8), TIDIM(resize_rate=0.8)),
    "SI-NI-DIM(m=1, mu=0) is DI-FGSM(mu=0)": (
        SINIDIM(m=1, decay=0, resize_rate=0.8),
        DIFGSM(decay=0, resize_rate=0.8),
    ),
    "SI-NI-TI-DIM(p=0) is SI-NI-TIM": (SINITIDIM(diversity_prob=0), SINITIM()),
    "SI-NI-TI-DIM with a kernel of one is SI-NI-DIM": (
        SINITIDIM(len_kernel=1, resize_rate=0.8),
        SINIDIM(resize_rate=0.8),
    ),
    "VMI-FGSM(beta=0, N=1) is MI-FGSM": (VMIFGSM(beta=0, N=1), MIFGSM()),
    "clipped VMI-FGSM(beta=0, N=1) is clipped NGM": (ClippedVMIFGSM(beta=0, N=1), ClippedNGM()),
    "VNI-FGSM(mu=0) is VMI-FGSM(mu=0)": (VNIFGSM(decay=0, N=2), VMIFGSM(decay=0, N=2)),
    "DAA-BLOB(c=0) is PGD": (DAABLOB(c=0), PGD()),
    "BLOB_QG(b=1) is DAA-BLOB": (BLOBQG(b=1), DAABLOB()),
    "BLOB_QG(c=0) is PQGD": (BLOBQG(c=0), PQGD()),
}


@pytest.mark.parametrize("law", REDUCTIONS)
@pytest.mark.parametrize("targeted", [False, True])
def test_reductions_are_exact(law: str, targeted: bool, model: Net) -> None:
    x = images()
    one, other = (
        attack(model, x, torch.arange(6), targeted=targeted, generator=torch.Generator().manual_seed(1))
        for attack in REDUCTIONS[law]
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, x)


DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "momentum matters": (MIFGSM(), BIM(eps=16 / 255)),
    "the look-ahead matters": (NIFGSM(), MIFGSM()),
    "scale copies matter": (SINIFGSM(), NIFGSM()),
    "levels matter": (PQGD(random_start=False, alpha=0.002), PGD(random_start=False, alpha=0.002)),
    "the clip matters": (ClippedNGM(), NGM()),
    "the EMA matters": (ClippedNGM(), ClippedNG()),
    "the normaliser matters": (NIFGSM(normaliser="sum"), NIFGSM()),
    "diverse inputs matter": (DIFGSM(resize_rate=0.6, diversity_prob=1), MIFGSM()),
    "the kernel matters": (TIFGSM(len_kernel=5, nsig=1), MIFGSM()),
    "variance tuning matters": (VMIFGSM(N=2, beta=8), MIFGSM()),
    "the look-ahead of VNI matters": (VNIFGSM(N=2, eps=0.2), VMIFGSM(N=2, eps=0.2)),
    "the interaction matters": (DAABLOB(c=30, alpha=0.003), PGD(alpha=0.003)),
    "the sign of the kernel's gradient matters": (
        DAABLOB(c=30, alpha=0.003),
        DAABLOB(c=30, alpha=0.003, kernel_gradient="add"),
    ),
    "the scope matters": (ClippedNGM(scope="element", gamma=0.1), ClippedNGM()),
}


@pytest.mark.parametrize("law", DIFFERENCES)
def test_parts_matter(law: str, model: Net) -> None:
    x = images()
    one, other = (a(model, x, torch.arange(6), generator=torch.Generator().manual_seed(1)) for a in DIFFERENCES[law])
    assert ((one - other).abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.name)
@pytest.mark.parametrize("rule", [Quantised(levels=200), Clipped(), Sign(), Identity()], ids=lambda r: type(r).__name__)
def test_any_rule_goes_into_any_attack(case: Case, rule: Any, model: Net) -> None:
    x = images()
    y = predicted(model, x)
    adversarial = case.build(direction=rule)(model, x, y)
    assert ((adversarial - x).abs() <= EPS["Linf"] + 1e-6).all()
    with torch.no_grad():
        assert (Margin()(model(adversarial), y) > Margin()(model(x), y)).all()


# Scale copies under a memory budget


class Recorder(nn.Module):
    """Keeps the batch sizes that reach the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.sizes = Net().double().eval(), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.net(x)
        return logits


def test_copies_are_stacked_as_far_as_the_budget_allows() -> None:
    x, y = images().double(), torch.arange(6)
    outputs, largest = [], []
    for budget in (None, 2**30, 1):
        model = Recorder()
        outputs.append(SINIFGSM(m=5, steps=3, memory_budget=budget)(model, x, y))
        largest.append(max(model.sizes))
    assert largest == [30, 30, 6]
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=0, atol=1e-12)


# Restarts and early stopping


def test_restarts_are_merged_to_the_worst(model: Net) -> None:
    x = images(40, seed=3)
    y = predicted(model, x)
    attack = PGD(eps=0.06, alpha=0.02, steps=2, restarts=6)
    result = attack.run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert result.success is not None
    assert result.restarts is not None
    assert result.restarts.shape == (6, 40)
    assert torch.equal(result.restarts.any(0), result.success)
    assert (result.gradients == 12).all()
    with torch.no_grad():
        assert torch.equal(model(result.adversarial).argmax(1) != y, result.success)
    generator = torch.Generator().manual_seed(0)
    single = dataclasses.replace(attack, restarts=1)
    margins, flags = [], []
    for _ in range(6):
        one = single.run(model, x, y, generator=generator)
        flags.append(one.success)
        with torch.no_grad():
            margins.append(Margin()(model(one.adversarial), y))
    assert torch.equal(torch.stack(flags), result.restarts)
    with torch.no_grad():
        torch.testing.assert_close(Margin()(model(result.adversarial), y), torch.stack(margins).amax(0))
    rates = result.restarts.float().mean(1)
    assert rates.min() < result.success.float().mean(), "the restarts must differ for the test to say anything"


@pytest.mark.parametrize("restarts", [1, 4])
def test_early_stop_finds_no_less_for_fewer_gradients(restarts: int, model: Net) -> None:
    x = images(40, seed=3)
    y = predicted(model, x)
    y[:5] = (y[:5] + 1) % 10
    full = PGD(eps=0.02, steps=5, restarts=restarts)
    stop = dataclasses.replace(full, early_stop=True)
    one, two = (a.run(model, x, y, generator=torch.Generator().manual_seed(0)) for a in (full, stop))
    assert one.success is not None
    assert two.success is not None
    assert (two.success >= one.success).all()
    assert (two.success == one.success).float().mean() >= 0.95
    assert (two.gradients[two.success] < 5 * restarts).any()
    assert (two.gradients[~two.success] == 5 * restarts).all()
    assert (two.gradients <= one.gradients).all()
    survivors = ~two.success & ~one.success
    if restarts == 1:
        torch.testing.assert_close(one.adversarial[survivors], two.adversarial[survivors])
    assert 0 < two.success.float().mean() < 1
    with torch.no_grad():
        assert torch.equal(model(two.adversarial).argmax(1) != y, two.success)


def test_early_stop_returns_what_is_broken_already(model: Net) -> None:
    x = images()
    y = (predicted(model, x) + 1) % 10
    result = BIM(early_stop=True).run(model, x, y)
    assert torch.equal(result.adversarial, x)
    assert (result.gradients == 1).all()


def test_the_hook_sees_every_step(model: Net) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    x = images()
    BIM(steps=3)(model, x, torch.arange(6), hook=lambda t, g, a: seen.append((t, g.clone(), a.clone())))
    assert [t for t, _, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[0][2], x)
    expected = (x + BIM().eps / 3 * seen[0][1].sign()).clamp(0, 1)
    torch.testing.assert_close(seen[1][2], expected)


def test_per_channel_bounds_hold(model: Net) -> None:
    x = images() * 0.4 + 0.3
    low, high = [0.25, 0.3, 0.28], [0.75, 0.7, 0.72]
    adversarial = PGD(eps=0.2)(model, x, torch.arange(6), bounds=(low, high))
    for channel in range(3):
        assert adversarial[:, channel].min() == pytest.approx(low[channel])
        assert adversarial[:, channel].max() == pytest.approx(high[channel])


@settings(max_examples=20)
@given(seed=seeds)
def test_random_starts_fill_the_ball(seed: int) -> None:
    x = torch.full((400, 3), 0.5, dtype=torch.float64)
    for ball, order in ((LinfBall, torch.inf), (L2Ball, 2)):
        region = ball.around(x, 0.1, torch.tensor(0.0), torch.tensor(1.0))
        delta = region.sample(torch.Generator().manual_seed(seed)) - x
        radius = torch.linalg.vector_norm(delta, ord=order, dim=1) / 0.1
        assert radius.max() <= 1 + 1e-12
        # The radius of a uniform point in three dimensions is below r with probability r^3.
        assert abs(float((radius < 0.5 ** (1 / 3)).double().mean()) - 0.5) < 0.15
        assert delta.mean().abs() < 0.02


@given(seed=seeds, gamma=st.floats(0.05, 5))
def test_the_regular_clip_forgets(seed: int, gamma: float) -> None:
    """[NGM], Eq. 8: min(1, gamma / ||m_t||) at every step by itself."""
    rule = Clipped(gamma=gamma, memory=False)
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(3, 2, 4)
    state = rule.init(x)
    for size in (5.0, 0.1, 1.0):
        m = size * torch.randn(3, 2, 4, generator=generator)
        expected = m * (gamma / m.flatten(1).norm(dim=1)).clamp(max=1).reshape(3, 1, 1)
        found, state = rule(m, state, torch.empty_like(m))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "momentum", [Accumulate(normaliser="none", decay=0.5), EMA(normaliser="none", beta1=0.5, lam=0.8)]
)
def test_gradients_may_be_accumulated_as_they_are(momentum: Any) -> None:
    g = (
        torch.randn(3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1, 1e3])[:, None, None, None]
    )
    m, expected = momentum.init(g[:, 0]), torch.zeros(3, 2, 5)
    for t in (1, 2):
        m = momentum(m, g[:, t - 1].clone(), t)
        beta = 0.5 if isinstance(momentum, Accumulate) else 0.5 * 0.8 ** (t - 1)
        expected = beta * expected + (1 if isinstance(momentum, Accumulate) else 1 - beta) * g[:, t - 1]
    torch.testing.assert_close(m, expected)
