"""The objectives against slow transcriptions, in float64, and what they leave behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from firstorder.attacks import ANU, BIM, PGD, PQGD, VMIFGSM, Attack
from firstorder.attacks.losses import Margin
from firstorder.training import AWP, CRITERIA, MART, TRADES, Criterion, Natural, Objective, Vanilla
from firstorder.training.criteria import divergence

N, CLASSES = 6, 4
BOUNDS = (-0.5, 0.8)
Reference = Callable[[Tensor, Tensor, Tensor], Tensor]


def data() -> tuple[Tensor, Tensor, Tensor]:
    """x within BOUNDS, other points there and labels."""
    x, other = (1.3 * torch.rand(2, N, 2, 5, 4, generator=seeded(0), dtype=torch.float64) - 0.5).unbind()
    return x, other, torch.arange(N) % CLASSES


def network() -> nn.Module:
    """A smooth one of large weights, with BatchNorm and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(30, 24))
    model.append(nn.Tanh()).append(nn.Linear(24, CLASSES)).double()
    for p in model.parameters():
        p.data.mul_(2)
    model[1].running_mean.uniform_(-0.5, 0.5)
    model[4].requires_grad_(False)
    return model


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([a * (a / b).log() for a, b in zip(p, q, strict=True)]).sum()


def bce(q: Tensor, y: int) -> Tensor:
    return -q[y].log() - (1 - torch.cat([q[:y], q[y + 1 :]]).max()).log()


def by_row(loss: Callable[[Tensor, Tensor, int], Tensor]) -> Reference:
    """A loss of p(x), p(x') and a label, row by row of the logits."""
    return lambda clean, attacked, y: torch.stack(
        [loss(softmax(z), softmax(w), k) for z, w, k in zip(clean, attacked, y.tolist(), strict=True)]
    )


INNER = PGD(eps=0.2, alpha=0.08, steps=3)
OBJECTIVES: dict[str, tuple[Objective, Reference]] = {
    "vanilla": (Vanilla(attack=INNER), by_row(lambda p, q, y: -q[y].log())),
    "trades": (TRADES(attack=INNER), by_row(lambda p, q, y: -p[y].log() + 6 * kl(p, q))),
    "mart": (MART(attack=INNER), by_row(lambda p, q, y: bce(q, y) + 6 * kl(p, q) * (1 - p[y]))),
    "mart-0.7": (MART(attack=INNER, beta=0.7), by_row(lambda p, q, y: bce(q, y) + 0.7 * kl(p, q) * (1 - p[y]))),
}
AWPS = {name: AWP(base=OBJECTIVES[name][0], gamma=0.02) for name in ("vanilla", "trades", "mart")}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_their_gradients_are_the_papers(name: str, train: bool) -> None:
    model, (x, other, y) = network().train(train), data()
    objective, reference = OBJECTIVES[name]
    rest, before = copy.deepcopy(model), snapshot(model)
    with objective.perturbed(model, x, other, y):
        assert same(model, before)
        found, expected = objective.losses(model, x, other, y), reference(rest(x), rest(other), y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    share = torch.linspace(1, 2, N, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss @ share, trainable(m)) for loss, m in ((found, model), (expected, rest))]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_natural_training_attacks_nothing() -> None:
    model, (x, _, y) = network().train(), data()
    objective = Natural()
    found = objective.scaled(0.5).adversarial(model, x, y, bounds=BOUNDS)
    assert torch.equal(found, x)
    assert found is not x
    rest = copy.deepcopy(model)
    torch.testing.assert_close(objective.losses(model, x, found, y), F.cross_entropy(rest(x), y, reduction="none"))
    with pytest.raises(ValueError, match="labels"):
        objective.adversarial(model, x, y[:2], bounds=BOUNDS)


# Labels

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
EVERY = {**{name: objective for name, (objective, _) in OBJECTIVES.items()}, "awp": AWPS["mart"]}


@pytest.mark.parametrize("name", EVERY)
def test_labels_of_every_integer_type_and_one_hot_rows_are_the_same(name: str) -> None:
    model, (x, other, y), objective = network().eval(), data(), EVERY[name]
    hot = F.one_hot(y, CLASSES)
    for form in (*(y.to(kind) for kind in INTEGERS), hot, hot.double(), hot.half(), hot.bool()):
        assert torch.equal(objective.losses(model, x, other, form), objective.losses(model, x, other, y))
        found = [objective.adversarial(model, x, v, bounds=BOUNDS, generator=seeded(1)) for v in (form, y)]
        assert torch.equal(*found)
        before, moved = snapshot(model), []
        for v in (form, y):
            with objective.perturbed(model, x, other, v):
                moved.append(snapshot(model))
        assert all(torch.equal(moved[0][key], moved[1][key]) for key in before)


def mixed(y: Tensor) -> Tensor:
    """Mixup: 0.7 of the label's class and 0.3 of the next."""
    hot = F.one_hot(y, CLASSES).double()
    return 0.7 * hot + 0.3 * hot.roll(1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_takes_probabilities(dtype: torch.dtype) -> None:
    model, (x, other, y) = network().eval(), data()
    rows = mixed(y).to(dtype)
    for name, at in (("vanilla", other), ("trades", x)):
        found = EVERY[name].losses(model, x, other, rows)
        logs = model(at).log_softmax(1)
        expected = -(rows.double() * logs).sum(1)
        if name == "trades":
            expected = expected + 6 * divergence(model(x), model(other))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for kind in (Vanilla(attack=INNER), AWP(base=Vanilla(attack=INNER))):
        made = [kind.adversarial(model, x, v, bounds=BOUNDS, generator=seeded(1)) for v in (rows, y)]
        assert torch.equal(made[0], INNER(model, x, rows, bounds=BOUNDS, generator=seeded(1)))
        assert not torch.equal(*made)
    trades = [EVERY["trades"].adversarial(model, x, v, bounds=BOUNDS, generator=seeded(1)) for v in (rows, y)]
    assert torch.equal(*trades)
    even = torch.full((N, CLASSES), 0.25)  # a loss has no need of one largest entry
    logs = model(other).log_softmax(1)
    torch.testing.assert_close(EVERY["vanilla"].losses(model, x, other, even), -logs.mean(1))


class Counted(nn.Module):
    """A model that must not be called."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a forward before the labels were checked")


@pytest.mark.parametrize("name", EVERY)
def test_labels_that_mean_nothing_are_refused_before_any_forward(name: str) -> None:
    model, (x, other, y), objective = Counted(), data(), EVERY[name]
    several = F.one_hot(y, CLASSES)
    several[2, :2] = 1
    wrong: list[tuple[Tensor, str]] = [
        (several, "neither one-hot nor probabilities.*pass one-hot rows"),
        (several.double(), "neither one-hot nor probabilities"),
        (torch.zeros(N, CLASSES), "neither one-hot nor"),
        (mixed(y) * 2, "neither one-hot nor"),
        (mixed(y) - 0.1, "neither one-hot nor"),
        (mixed(y) * torch.nan, "neither one-hot nor"),
        (y.double(), r"y\.long\(\)"),
        (y.bool(), r"y\.long\(\)"),
        (y[:-1], f"{N} images but {N - 1} labels"),
        (y[:, None], "shape"),
        (y.tolist(), "are a list"),  # type: ignore[list-item]
    ]
    if "mart" in name or name == "awp":
        wrong.append((mixed(y), "MARTLoss is defined for single classes.*one-hot rows"))
    for labels, message in wrong:
        for call in (objective.losses, lambda model, x, other, y: objective.adversarial(model, x, y, bounds=BOUNDS)):
            with pytest.raises(ValueError, match=message):
                call(model, x, other, labels)


@pytest.mark.parametrize("name", EVERY)
def test_labels_beyond_the_classes_are_refused(name: str) -> None:
    model, (x, other, y), objective = network().eval(), data(), EVERY[name]
    for beyond in (y + 1, y - 1, y - 100):
        for call in (objective.losses, lambda model, x, other, y: objective.adversarial(model, x, y, bounds=BOUNDS)):
            with pytest.raises(ValueError, match="labels span"):
                call(model, x, other, beyond)
    with pytest.raises(ValueError, match=f"have {CLASSES + 1} classes, the model has {CLASSES}"):
        objective.losses(model, x, other, F.one_hot(y, CLASSES + 1))


# Criteria


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_its_objective_without_an_attack(name: str) -> None:
    model, (x, other, y) = network().train(), data()
    criterion, objective = CRITERIA[name](), OBJECTIVES[name][0]
    assert getattr(objective, "criterion", None) == criterion
    rest = copy.deepcopy(model)
    expected = objective.losses(rest, x, other, y)
    assert torch.equal(criterion.losses(model, x, other, y), expected)
    assert same(model, rest.state_dict())  # the forwards were the same, in the same order
    clean, attacked = model.eval()(x), model(other)
    found = criterion(clean if criterion.natural else None, attacked, y.to(torch.uint8))
    assert torch.equal(found, objective.losses(model, x, other, y))


def test_a_criterion_of_ones_own_needs_its_values_alone() -> None:
    class Squared(Criterion):
        natural = False

        def values(self, natural: Tensor | None, attacked: Tensor, y: Any) -> Tensor:
            assert natural is None
            return (attacked - F.one_hot(y.indices, CLASSES)).square().sum(1)

    model, (x, other, y) = network().eval(), data()
    expected = (model(other) - F.one_hot(y, CLASSES)).square().sum(1)
    torch.testing.assert_close(Squared().losses(model, x, other, F.one_hot(y, CLASSES)), expected)
    for wrong in (-1.0, math.nan):
        for kind in ("trades", "mart"):
            with pytest.raises(ValueError, match="beta="):
                CRITERIA[kind](beta=wrong)


def test_mart_is_finite_where_a_probability_is_one_to_rounding() -> None:
    right, wrong = torch.tensor([200.0, 0.0, 0.0]), torch.tensor([0.0, 200.0, 0.0])
    clean = torch.stack([right, wrong, right, wrong])
    attacked = torch.stack([right, wrong, wrong, right]).requires_grad_()
    losses = MART(attack=INNER, beta=2.0).losses(nn.Identity(), clean, attacked, torch.zeros(4, dtype=torch.long))
    sure = 400 - math.log(2)  # -log p_y = 200 and -log(1 - p_1) = -log(2 exp(-200))
    torch.testing.assert_close(losses, torch.tensor([0.0, sure, sure, 2.0 * 200]))
    (g,) = torch.autograd.grad(losses.sum(), attacked)
    assert bool(g.isfinite().all())


LOGITS = st.lists(st.floats(-20, 20), min_size=8, max_size=8).map(lambda row: torch.tensor(row).double().reshape(2, 4))


@given(LOGITS, LOGITS, st.floats(-10, 10))
def test_the_divergence_is_one(z: Tensor, w: Tensor, shift: float) -> None:
    found = divergence(z, w)
    assert bool((found >= (z.softmax(1) - w.softmax(1)).abs().sum(1) ** 2 / 2 - 1e-12).all())  # Pinsker
    torch.testing.assert_close(divergence(z, z + shift), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.stack([kl(softmax(a), softmax(b)) for a, b in zip(z, w, strict=True)]))


@given(LOGITS, LOGITS, st.floats(0, 10))
def test_beta_weighs_the_divergence_and_zero_removes_it(z: Tensor, w: Tensor, beta: float) -> None:
    y, one = torch.tensor([1, 3]), nn.Identity()
    clean = TRADES(attack=INNER, beta=0.0).losses(one, z, w, y)
    torch.testing.assert_close(clean, F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(TRADES(attack=INNER, beta=beta).losses(one, z, w, y), clean + beta * divergence(z, w))
    boosted = MART(attack=INNER, beta=0.0).losses(one, z, w, y)
    assert bool((boosted >= F.cross_entropy(w, y, reduction="none")).all())
    sure = z + 100 * F.one_hot(y, 4)
    torch.testing.assert_close(MART(attack=INNER, beta=beta).losses(one, sure, w, y), boosted)


CLOSEST = ANU(steps=15, max_norm=0.3)
LABELLED: list[tuple[Objective, Attack]] = [(TRADES(attack=CLOSEST), CLOSEST)]
for inner in (INNER, PQGD(eps=0.1, steps=2), CLOSEST):
    LABELLED += [(base, inner) for base in (Vanilla(attack=inner), MART(attack=inner), AWP(base=Vanilla(attack=inner)))]


@pytest.mark.parametrize(("objective", "attack"), LABELLED)
def test_an_attack_by_labels_is_called_as_it_is(objective: Objective, attack: Attack) -> None:
    model, (x, _, _) = network().eval(), data()
    y = model(x).argmax(1)
    found = objective.adversarial(model.train(), x, y, bounds=BOUNDS, generator=seeded(3))
    assert torch.equal(found, attack(model, x, y, bounds=BOUNDS, generator=seeded(3)))
    assert float(found.min()) < 0 < float((found - x).flatten(1).norm(dim=1).min())
    with pytest.raises(ValueError, match="bounds"):
        objective.adversarial(model, x, y)
    again = objective.adversarial(model, x, y, bounds=BOUNDS, generator=seeded(4))
    assert torch.equal(found, again) == (attack is CLOSEST)
    assert bool(objective.losses(model, x, found, y).isfinite().all())


def ascent(model: nn.Module, x: Tensor, attack: PGD, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The uniform start, and where sign steps along KL(p(x) || p(.)) lead from it, example by example."""
    low, high = (x - attack.eps).clamp_min(BOUNDS[0]), (x + attack.eps).clamp_max(BOUNDS[1])
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    start = torch.minimum(torch.maximum(x - attack.eps + 2 * attack.eps * noise, low), high)
    ends = []
    for i in range(len(x)):
        p, a = softmax(model(x[i : i + 1])[0]).detach(), start[i]
        for _ in range(attack.steps):
            a = a.detach().requires_grad_()
            (g,) = torch.autograd.grad(kl(p, softmax(model(a[None])[0])), a)
            a = torch.minimum(torch.maximum(a + attack.alpha * g.sign(), low[i]), high[i])
        ends.append(a.detach())
    return start, torch.stack(ends)


@pytest.mark.parametrize("train", [False, True])
def test_trades_maximises_the_divergence_from_the_clean_predictions(train: bool) -> None:
    model, (x, _, y) = network().train(train), data()
    found = AWPS["trades"].adversarial(model, x, y, bounds=BOUNDS, generator=seeded(5))
    rest = copy.deepcopy(model).eval()
    start, expected = ascent(rest, x, INNER, seeded(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert bool((divergence(rest(x), rest(found)) > 1.5 * divergence(rest(x), rest(start))).all())


def test_trades_takes_attacks_that_stack_copies() -> None:
    model, (x, _, y) = network().eval(), data()
    attack = VMIFGSM(eps=INNER.eps, steps=3, N=3, random_start=True)
    found = TRADES(attack=attack).adversarial(model, x, y, bounds=BOUNDS, generator=seeded(5))
    start, _ = ascent(model, x, INNER, seeded(5))
    assert bool((divergence(model(x), model(found)) > 1.5 * divergence(model(x), model(start))).all())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_making_examples_leaves_the_model_as_it_was(name: str, train: bool) -> None:
    model, (x, _, y) = network().train(train), data()
    model[2].eval()
    for p in trainable(model):
        p.grad = torch.full_like(p, 0.25)
    modes, flags = [part.training for part in model.modules()], [p.requires_grad for p in model.parameters()]
    before = snapshot(model)
    assert not AWP(base=OBJECTIVES[name][0]).adversarial(model, x, y, bounds=BOUNDS).requires_grad
    assert same(model, before)
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.grad is not None and bool((p.grad == 0.25).all()) for p in model.parameters()] == flags


def is_moved(p: nn.Parameter) -> bool:
    return p.requires_grad and p.ndim > 1


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", AWPS)
def test_weights_are_moved_up_the_mean_loss_and_come_back(name: str, train: bool) -> None:
    model, (x, other, y) = network().train(train), data()
    objective, reference = AWPS[name], OBJECTIVES[name][1]
    rest, before = copy.deepcopy(model), snapshot(model)
    mean = reference(rest(x), rest(other), y).mean()
    moved = [p for p in rest.parameters() if is_moved(p)]
    for p, g in zip(moved, torch.autograd.grad(mean, moved), strict=True):
        p.data += 0.02 * p.data.norm() * g / g.norm()
    rest.load_state_dict(before | dict(rest.named_parameters()))
    there = reference(rest(x), rest(other), y).mean()
    with objective.perturbed(model, x, other, y):
        assert all(p.grad is None for p in model.parameters())
        for (key, p), own in zip(model.named_parameters(), rest.parameters(), strict=True):
            torch.testing.assert_close(p, own, rtol=1e-10, atol=1e-12)
            assert torch.equal(p, before[key]) != is_moved(p)
        assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
        assert [part.training for part in model.modules()] == [train] * len(list(model.modules()))
        loss = objective.losses(model, x, other, y).mean()
        loss.backward()
    torch.testing.assert_close(loss, there)
    assert float(loss.detach()) > float(mean.detach()) + 1e-3
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    for p, g in zip(trainable(model), torch.autograd.grad(there, trainable(rest)), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-10)


def test_weights_come_back_after_an_exception() -> None:
    model, (x, other, y) = network().float().train(), data()
    before = snapshot(model)
    context = AWPS["trades"].perturbed(model, x.float(), other.float(), y)
    with pytest.raises(RuntimeError, match="stop"), context:
        raise RuntimeError("stop")
    assert same(model, before)


@given(st.floats(0, 0.5))
def test_gamma_is_the_relative_size(gamma: float) -> None:
    model, (x, other, y) = network(), data()
    before = snapshot(model)
    with torch.no_grad(), AWP(base=Vanilla(attack=INNER), gamma=gamma).perturbed(model, x, other, y):
        for key, p in model.named_parameters():
            size = gamma * float(before[key].norm()) if is_moved(p) else 0
            assert float((p - before[key]).norm()) == pytest.approx(size, rel=1e-5, abs=1e-12)
        assert gamma > 0 or same(model, before)
    assert same(model, before)


class Tied(nn.Module):
    """Two layers of one weight, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = (nn.Linear(CLASSES, CLASSES, dtype=torch.float64) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x).tanh())
        return logits


def test_a_shared_weight_is_moved_once_and_an_unused_one_stays() -> None:
    model, x, y = Tied(), torch.eye(CLASSES, dtype=torch.float64), torch.arange(CLASSES)
    before, weight = snapshot(model), model.first.weight.detach().clone()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.first.weight)
    with AWP(base=Vanilla(attack=INNER), gamma=0.1).perturbed(model, x, x, y):
        assert model.second.weight is model.first.weight
        torch.testing.assert_close(model.first.weight.detach(), weight + 0.1 * weight.norm() * g / g.norm())
        assert torch.equal(model.unused.weight, before["unused.weight"])
    assert same(model, before)


def test_what_cannot_be_done_is_refused() -> None:
    for blind in (PGD(random_start=False), BIM()):
        with pytest.raises(ValueError, match="needs random_start=True: the divergence has no gradient at the clean"):
            TRADES(attack=blind)
    for attack in (PGD(early_stop=True), PGD(restarts=2)):
        with pytest.raises(ValueError, match="no label decides; set early_stop=False and restarts=1"):
            TRADES(attack=attack)
        assert Vanilla(attack=attack).attack is attack
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta={wrong} must be a finite number at least 0"):
            TRADES(attack=INNER, beta=wrong)
        with pytest.raises(ValueError, match=f"beta={wrong} must be a finite number at least 0"):
            MART(attack=INNER, beta=wrong)
        with pytest.raises(ValueError, match=f"gamma={wrong} must be a finite number at least 0"):
            AWP(base=Vanilla(attack=INNER), gamma=wrong)


def test_tiny_vanishing_and_missing_gradients_move_no_weight_further_than_gamma() -> None:
    x, y = torch.eye(2), torch.arange(2)
    sure, dead, biased = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    sure.weight.data = 60 * torch.eye(2)  # gradients whose squares underflow
    dead.weight.data.fill_(700.0)
    silent = nn.Sequential(dead, nn.Threshold(1e6, 0.0), nn.Linear(2, 2))
    biased.weight.requires_grad_(False)
    awp = AWP(base=Vanilla(attack=INNER), gamma=5e-3)
    for model, weight, moved in ((sure, sure.weight, 5e-3), (silent, dead.weight, 0.0), (biased, biased.weight, 0.0)):
        before = weight.detach().clone()
        with awp.perturbed(model, x, x, y):
            assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(moved, rel=1e-4)


def test_trades_refuses_images_and_losses_before_the_divergence() -> None:
    model, (x, _, y) = network(), data()
    with pytest.raises(ValueError, match="convert them"):
        TRADES(attack=INNER).adversarial(model, x.byte(), y, bounds=BOUNDS)
    with pytest.raises(RuntimeError, match="should be the same") as raised:  # the model's own word, with a note
        TRADES(attack=INNER).adversarial(model, x.half(), y, bounds=BOUNDS)
    assert "raised by the model for images" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="leave out loss"):
        TRADES(attack=PGD(random_start=True, loss=Margin()))
