"""Randomised models in expectation: the gradient, the mean prediction, the draws, and success over draws."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CASES, HOSTS, Case, Net, images, predicted
from firstorder.attacks import (
    DLR,
    FGSM,
    PGD,
    BoundedAttack,
    CrossEntropy,
    Ensemble,
    Expectation,
    Loss,
    Margin,
    RobustnessWarning,
    ScaleCopies,
    TorchModel,
    as_model,
)

CASE = Case("i-fgsm", {"steps": 3})


class Noisy(nn.Module):
    """A net behind Gaussian noise on its input; keeps what it saw."""

    def __init__(self, sigma: float = 0.3) -> None:
        super().__init__()
        self.net, self.sigma = Net().eval(), sigma
        self.noise: list[Tensor] = []
        self.points: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        noise = self.sigma * torch.randn_like(x)
        self.noise.append(noise)
        self.points.append(x.detach())
        logits: Tensor = self.net(x + noise)
        return logits


class Shifted(nn.Module):
    """Two classes by the sum of the pixels, which one draw for the whole batch moves: by -1 or by 1."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).sum(1) + 2.0 * torch.randint(2, ()) - 1
        return torch.stack([z, -z], 1)


class Misleading(nn.Module):
    """The gradient is (1, ..., 1) on average, in a single draw almost always that of noise of ten times its length."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        z = (flat * (1 + 10 * torch.randn_like(flat))).sum(1) / 100
        return torch.stack([-z, z], 1)


def slow(noisy: Noisy, x: Tensor, y: Tensor, noise: list[Tensor], loss: Loss, average: str) -> tuple[Tensor, Tensor]:
    """The gradient and the mean logits, draw by draw and example by example, for a stack of noise."""
    gradient, logits = torch.zeros_like(x), []
    for i in range(len(x)):
        point = x[i : i + 1].clone().requires_grad_(True)
        scores = [noisy.net(point + n[i : i + 1]) for n in noise]
        if average == "loss":
            total = sum((loss(s, y[i : i + 1]).sum() for s in scores), torch.zeros(())) / len(noise)
        mean = sum((s if average == "logits" else s.softmax(1) for s in scores), torch.zeros(())) / len(noise)
        mean = mean if average == "logits" else mean.log()
        if average != "loss":
            total = loss(mean, y[i : i + 1]).sum()
        (gradient[i],) = torch.autograd.grad(total, point)[0]
        logits.append(mean.detach())
    return gradient, torch.cat(logits)


# --- the gradient


@pytest.mark.parametrize("stacked", [1, 2, 5, 9])
@pytest.mark.parametrize("average", ["loss", "logits", "probabilities"])
@pytest.mark.parametrize("loss", [CrossEntropy(), Margin(), DLR()], ids=lambda loss: type(loss).__name__)
def test_the_gradient_of_the_expectation(average: Any, stacked: int, loss: Loss) -> None:
    """Against every draw by itself, with the noise that it had."""
    noisy, x = Noisy().double(), images().double()
    y = predicted(noisy.net, x)
    model = Expectation(noisy, samples=5, average=average, stacked=stacked)
    found = as_model(model).gradient(x, y, loss)
    sizes = {1: [1] * 5, 2: [2, 2, 1], 5: [5], 9: [5]}[stacked]
    assert [len(noise) // len(x) for noise in noisy.noise] == sizes
    noise = list(torch.cat(noisy.noise).split(len(x)))
    assert len({float(n[0, 0, 0, 0]) for n in noise}) == 5
    gradient, logits = slow(noisy, x, y, noise, loss, average)
    torch.testing.assert_close(found.gradient, gradient)
    torch.testing.assert_close(found.logits, logits)


def test_the_three_means_differ() -> None:
    noisy, x = Noisy().double(), images().double()
    y = predicted(noisy.net, x)
    found = [
        as_model(Expectation(noisy, samples=5, average=average)).gradient(x, y, None).gradient
        for average in ("loss", "logits", "probabilities")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[one], found[other], rtol=1e-3)


def test_a_single_draw_is_the_model() -> None:
    noisy, x = Noisy(sigma=0.0).double(), images().double()
    y = predicted(noisy.net, x)
    for average in ("loss", "logits", "probabilities"):
        model = Expectation(noisy, samples=1, average=average)
        torch.testing.assert_close(model(x).softmax(1), noisy.net(x).softmax(1))
        assert torch.allclose(PGD(steps=3)(model, x, y), PGD(steps=3)(noisy.net, x, y))


@pytest.mark.parametrize("average", ["loss", "logits", "probabilities"])
def test_draws_that_mislead_one_by_one_agree_on_average(average: Any) -> None:
    """The step along the sign of the mean gradient goes up nearly everywhere, that of one draw by chance."""
    x, y = 0.5 * torch.ones(4, 3, 6, 5), torch.zeros(4, dtype=torch.long)

    def right(samples: int) -> float:
        model = Expectation(Misleading(), samples=samples, average=average, stacked=50)
        return float((FGSM(eps=0.1)(model, x, y) > x).float().mean())

    assert right(2000) > 0.95
    assert right(1) < 0.65


def test_draws_are_made_anew_at_every_gradient_and_alike_at_every_prediction() -> None:
    noisy, x = Noisy(), images()
    model = Expectation(noisy, samples=3)
    one, two = model(x), model(x)
    assert torch.equal(one, two)
    noisy.noise.clear()
    PGD(steps=4)(model, x, predicted(noisy.net, x))
    assert len({float(noise.sum()) for noise in noisy.noise}) == 12
    own = {float(noise.sum()) for noise in noisy.noise}
    noisy.noise.clear()
    model(x)
    model.success(x, torch.zeros(6, dtype=torch.long), draws=5)
    others = {float(noise.sum()) for noise in noisy.noise}
    assert len(others) == 8
    assert not own & others


# --- draws


@pytest.mark.parametrize("average", ["loss", "probabilities"])
def test_an_attack_repeated_is_the_same_and_leaves_no_trace(average: Any) -> None:
    noisy, x = Noisy(), images()
    y = predicted(noisy.net, x)
    model = Expectation(noisy, samples=3, average=average, seed=4)
    before, python = torch.get_rng_state(), random.getstate()
    found = [PGD(steps=3).run(model, x, y) for _ in range(2)]
    assert torch.equal(found[0].adversarial, found[1].adversarial)
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()
    assert int(model.drawn) == 0
    assert not model.state_dict().keys() - {f"model.{key}" for key in noisy.state_dict()}
    other = PGD(steps=3)(Expectation(noisy, samples=3, average=average, seed=5), x, y)
    assert not torch.equal(other, found[0].adversarial)
    assert torch.equal(PGD(steps=3)(copy.deepcopy(model), x, y), found[0].adversarial)
    torch.manual_seed(12345)
    assert torch.equal(
        PGD(steps=3)(model, x, y, generator=torch.Generator().manual_seed(1)),
        PGD(steps=3)(model, x, y, generator=torch.Generator().manual_seed(1)),
    )


def test_an_exception_leaves_the_generators_as_they_were() -> None:
    def broken(x: Tensor) -> Tensor:
        torch.rand(3)
        random.random()
        raise ArithmeticError("the model broke")

    before, python = torch.get_rng_state(), random.getstate()
    with pytest.raises(ArithmeticError, match="the model broke"):
        PGD()(Expectation(broken), images(), torch.zeros(6, dtype=torch.long))
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()


def test_python_draws_are_seeded_too() -> None:
    model = Expectation(lambda x: x.flatten(1)[:, :3] * random.random(), samples=4)
    x = images()
    assert torch.equal(model(x), model(x))


def test_no_example_depends_on_another_image() -> None:
    noisy, x = Noisy(), images()
    y = predicted(noisy.net, x)
    other = x.clone()
    other[0] = x[0].flip(-1) * 0.5
    one, two = (PGD(steps=3)(Expectation(noisy, samples=3), z, y) for z in (x, other))
    assert torch.allclose(one[1:], two[1:], atol=1e-6)


def test_the_counter_stays_where_it_costs_nothing() -> None:
    model = Expectation(Noisy(), samples=2).double().to("meta")
    assert model.drawn.device.type == "cpu"
    assert model.drawn.dtype == torch.long


# --- success


def test_success_is_a_share_of_draws() -> None:
    """The sum is -0.5, 0.5, 3 or NaN; the shift of -1 or 1 decides on the first two in half of the draws."""
    x = torch.zeros(4, 2, 1)
    x[:, 0, 0] = torch.tensor([-0.5, 0.5, 3.0, torch.nan])
    y = torch.zeros(4, dtype=torch.long)
    model = Expectation(Shifted(), samples=4)
    shares = model.success(x, y, draws=1000)
    assert shares.shape == (4,)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.0, 0.0]), rtol=0, atol=0.06)
    assert shares[0] == shares[1]
    assert torch.equal(model.success(x, y, draws=1000), shares)
    torch.testing.assert_close(model.success(x[:3], y[:3], draws=1000, targeted=True), 1 - shares[:3])
    assert torch.equal(model.success(x[:3], F.one_hot(y[:3], 2), draws=1000), shares[:3])
    assert 0 < float(Expectation(Shifted(), seed=1).success(x, y, draws=1000)[0]) < 1
    assert not torch.equal(Expectation(Shifted(), seed=1).success(x, y, draws=999), model.success(x, y, draws=999))
    with pytest.raises(ValueError, match="draws=0"):
        model.success(x, y, draws=0)


@pytest.mark.parametrize("stacked", [1, 7])
def test_success_counts_every_draw(stacked: int) -> None:
    noisy, x = Noisy(), images()
    noisy.train()
    y = predicted(noisy.net, x)
    noisy.noise.clear()
    shares = Expectation(noisy, stacked=stacked).success(x, y, draws=10)
    assert noisy.training
    assert noisy.net.head[1].training
    noisy.eval()
    noise = torch.cat(noisy.noise).split(len(x))
    assert len(noise) == 10
    with torch.no_grad():
        hits = torch.stack([noisy.net(x + n).argmax(1) != y for n in noise])
    torch.testing.assert_close(shares, hits.float().mean(0))


def test_an_attack_reports_the_mean_prediction() -> None:
    """Of draws that it did not make its gradients from; the same that a forward of one's own has."""
    noisy, x = Noisy(), images()
    y = predicted(noisy.net, x)
    model = Expectation(noisy, samples=9)
    result = PGD(eps=0.05, steps=5).run(model, x, y)
    assert result.success is not None
    assert torch.equal(result.success, predicted(model, result.adversarial) != y)
    assert 0 < result.success.sum() < 6
    shares = model.success(result.adversarial, y, draws=200)
    assert (shares > model.success(x, y, draws=200)).all()
    assert shares[result.success].mean() > shares[~result.success].mean()


# --- as a module, in attacks and hosts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_with_every_attack(case: Case) -> None:
    """Every gradient is the mean over as many draws."""
    noisy, x = Noisy(sigma=0.05), images()
    y = predicted(noisy.net, x)
    noisy.points.clear()
    model = Expectation(noisy, samples=3)
    attack = case.build(**({"early_stop": False} if case.bounded and not case.early else {}))
    result = attack.run(model, x, y)
    assert result.success is not None
    assert torch.equal(result.success, predicted(model, result.adversarial) != y)
    assert (
        len([points for points in noisy.points if len(points) >= len(x)]) % 3 == 0
    )  # fewer: what one keeps is measured
    assert (model.success(result.adversarial, y) >= model.success(x, y) - 0.02).all()


@pytest.mark.parametrize("host", HOSTS)
def test_through_every_host(host: str) -> None:
    """The loss is what is averaged there too: a draw of the module at a time, three for each of three gradients."""
    noisy, x = Noisy(), images()
    y = predicted(noisy.net, x)
    found = {}
    for average in ("loss", "probabilities"):
        model = Expectation(noisy, samples=3, average=average).eval()
        found[average] = HOSTS[host](CASE, model, x, y)
        torch.testing.assert_close(found[average], HOSTS["core"](CASE, model, x, y))
    assert not torch.equal(found["loss"], found["probabilities"])


def test_behind_other_modules() -> None:
    """The loss is averaged wherever in the model the draws are made."""
    noisy, x = Noisy().double(), images().double()
    y = predicted(noisy.net, x)
    alone = as_model(Expectation(noisy, samples=4)).gradient(x, y, None).gradient
    inside = nn.Sequential(nn.Identity(), Expectation(noisy, samples=4))
    torch.testing.assert_close(as_model(inside).gradient(x, y, None).gradient, alone)
    both = Ensemble([Expectation(noisy, samples=4), Expectation(noisy, samples=2)], weights=[1, 0])
    torch.testing.assert_close(as_model(both).gradient(x, y, None).gradient, alone)
    inside = nn.Sequential(Expectation(noisy, samples=4))
    hidden = TorchModel(lambda z: inside(z), module=inside)
    torch.testing.assert_close(hidden.gradient(x, y, None).gradient, alone)


def test_what_a_forward_keeps_is_known() -> None:
    noisy, x = Noisy(), images()
    one = as_model(noisy).footprint(x)
    assert as_model(Expectation(noisy, samples=6)).footprint(x) == one
    assert as_model(Expectation(noisy, samples=6, stacked=4)).footprint(x) == 4 * one
    assert as_model(Expectation(noisy, samples=6, average="logits")).footprint(x) >= 6 * one
    model = Expectation(noisy, samples=2)
    as_model(model).footprint(x)
    assert int(model.drawn) == 0

    class Scaled(BoundedAttack):
        def oracle(self) -> Any:
            return ScaleCopies(m=3)

    for budget, sizes in ((one, [6] * 6), (12 * one, [12, 12, 6, 6]), (None, [18, 18])):
        noisy.points.clear()
        Scaled(eps=0.05, memory_budget=budget)(Expectation(noisy, samples=2), x, predicted(noisy.net, x))
        assert [len(points) for points in noisy.points if len(points) >= len(x)] == sizes


@pytest.mark.parametrize("stacked", [1, 4])
def test_draws_that_are_all_the_same_are_said(stacked: int) -> None:
    net, x = Net(), images()
    model = Expectation(net, samples=4, stacked=stacked)
    with pytest.warns(RobustnessWarning, match="4 draws are all the same") as caught:
        PGD(steps=2)(model, x, predicted(net, x))
    assert len([w for w in caught if "draws" in str(w.message)]) == 1
    assert ("stacked=1" in str(caught[0].message)) == (stacked > 1)
    with pytest.warns(RobustnessWarning, match="needs stacked=1"):
        Expectation(Shifted(), samples=8, stacked=4)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be an integer of at least 1"),
        ({"stacked": 0}, "stacked=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"average": "mean"}, "average='mean' is not supported here; choose 'loss' or 'logits' or 'probabilities'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expectation(Shifted(), **options)


def test_logits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="one output, one class only"):
        Expectation(lambda x: x.flatten(1).sum(1))(images())
    assert math.isnan(float(Expectation(lambda x: x.flatten(1) * torch.nan, samples=2)(images())[0, 0]))
