"""DDN and ANU against a slow transcription, foolbox, closed forms and their promises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import foolbox
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import firstorder.art
import firstorder.torchattacks
from cases import Net, classifier, images, predicted
from firstorder.attacks import ANU, DDN, DLR, AdaptiveRate, FixedRate, Margin, MinimumNormAttack, MinimumNormResult
from references import Problem, Vector, add, l2, limits, onto_bounds

MODES = pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])


# The papers, one example and one number at a time. Nothing is shared with the package.


def cosine(start: float, end: float, k: int, steps: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * (k - 1) / steps)) / 2


def decoupled(
    p: Problem,
    *,
    steps: int,
    gamma: float,
    alpha_gamma: float = 0.0,
    annealed: bool = True,
    eps: float = 1.0,
    ceiling: float = 0.9,
) -> tuple[Vector, float, int]:
    """The closest adversarial example of one input, its norm, and the iteration that found it."""
    width = max(p.high[j] - p.low[j] for j in range(len(p.x)))
    eps *= width
    worst = l2([max(p.x[j] - p.low[j], p.high[j] - p.x[j]) for j in range(len(p.x))])

    def adversarial(a: Vector) -> bool:
        with torch.no_grad():
            z = p.model(torch.tensor(a, dtype=torch.float64).reshape(1, *p.shape))[0].tolist()
        return (z.index(max(z)) == p.y) == p.targeted

    best = (p.x, math.inf, -1)
    a, delta, was = p.x, [0.0] * len(p.x), False
    for k in range(1, steps + 1):
        g = p.gradient(a)
        size = l2(g)
        if size > 0:
            delta = add(delta, width * cosine(1.0, 0.01, k, steps) / size, g)
        now = adversarial(a)
        distance = l2(add(a, -1.0, p.x))
        if now and distance < best[1]:
            best = (a, distance, k - 1)
        rate = cosine(alpha_gamma, 0.0, k, steps) if annealed else alpha_gamma
        gamma = min(gamma * (1 + rate if now == was else 1 - rate), max(ceiling, gamma if alpha_gamma == 0 else 0))
        was = now
        eps = min(eps * (1 - gamma if now else 1 + gamma), worst)
        length = l2(delta)
        a = onto_bounds(p, add(p.x, eps / length, delta)) if length > 0 else p.x
        delta = add(a, -1.0, p.x)
    distance = l2(add(a, -1.0, p.x))
    return (a, distance, steps) if adversarial(a) and distance < best[1] else best


def transcribed(
    model: nn.Module, x: Tensor, y: Tensor, *, targeted: bool, bounds: Any = (0.0, 1.0), **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(x.shape[1:])
    low, high = (limits(bound, shape) for bound in bounds)
    found = [
        decoupled(Problem(model, shape, a.flatten().tolist(), int(label), low, high, 0.0, "L2", targeted), **settings)
        for a, label in zip(x, y, strict=True)
    ]
    a, norm, k = zip(*found, strict=True)
    return torch.tensor(a, dtype=x.dtype).reshape(x.shape), torch.tensor(norm, dtype=x.dtype), torch.tensor(k)


SETTINGS: dict[str, tuple[MinimumNormAttack, dict[str, Any]]] = {
    "DDN": (DDN(steps=40), {"steps": 40, "gamma": 0.05}),
    "DDN, one step": (DDN(steps=1), {"steps": 1, "gamma": 0.05}),
    "DDN, gamma, eps_0": (
        DDN(steps=25, gamma=0.3, init_norm=0.2),
        {"steps": 25, "gamma": 0.3, "eps": 0.2},
    ),
    "DDN, eps_0 beyond the bounds": (DDN(steps=40, init_norm=90.0), {"steps": 40, "gamma": 0.05, "eps": 90.0}),
    "ANU": (ANU(steps=30, gamma=0.2, alpha_gamma=0.1), {"steps": 30, "gamma": 0.2, "alpha_gamma": 0.1}),
    "ANU, not annealed": (
        ANU(steps=30, gamma=0.2, alpha_gamma=0.1, annealed=False),
        {"steps": 30, "gamma": 0.2, "alpha_gamma": 0.1, "annealed": False},
    ),
    "ANU, at the ceiling": (ANU(steps=40, gamma=0.8, alpha_gamma=0.5), {"steps": 40, "gamma": 0.8, "alpha_gamma": 0.5}),
}
BOUNDS = {"[0, 1]": (0.0, 1.0), "channels": ((-0.3, 0.0, 0.0), (1.0, 1.5, 1.2))}


@MODES
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_transcription(name: str, bounds: str, targeted: bool, model: Net) -> None:
    attack, settings = SETTINGS[name]
    model, x = model.double(), images().double()
    y = predicted(model, x)
    y = (y + 3) % 10 if targeted else y
    y[0] = (y[0] + 1) % 10
    result = attack.run(model, x, y, targeted=targeted, bounds=BOUNDS[bounds])
    a, norm, k = transcribed(model, x, y, targeted=targeted, bounds=BOUNDS[bounds], **settings)
    torch.testing.assert_close(result.adversarial, a, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.norm, norm, rtol=0, atol=1e-9)
    assert result.iterations.tolist() == k.tolist()
    assert result.success is not None
    assert result.success.tolist() == [value >= 0 for value in k.tolist()]
    if attack.steps > 1:
        assert (result.iterations > 1).sum() >= 4


def test_presets_are_the_papers() -> None:
    published = {
        ("mnist", False): (0.4, 0.15),
        ("mnist", True): (0.05, 0.05),
        ("cifar10", False): (0.2, 0.1),
        ("cifar10", True): (0.15, 0.06),
        ("imagenet", False): (0.1, 0.08),
        ("imagenet", True): (0.05, 0.05),
    }
    for (preset, targeted), (gamma, alpha_gamma) in published.items():
        assert ANU(preset=preset).update(targeted=targeted) == AdaptiveRate(gamma=gamma, alpha_gamma=alpha_gamma)
    assert ANU(gamma=0.3).update(targeted=True) == AdaptiveRate(gamma=0.3, alpha_gamma=0.06)


class Recorder(nn.Module):
    """Keeps every batch of points that the model is asked about with gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points, self.forwards = model, [], 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if torch.is_grad_enabled():
            self.points.append(x.detach().clone())
        return self.model(x)


@MODES
def test_ddn_walks_like_foolboxs(targeted: bool, model: Net) -> None:
    """Every iterate is foolbox's; the result too where the last iterate, which foolbox leaves out, is no better."""
    ours, theirs = Recorder(model.double()).eval(), Recorder(model.double()).eval()
    x = images(8).double()
    y = predicted(model, x)
    y = (y + 3) % 10 if targeted else y
    result = DDN(steps=60, gamma=0.1).run(ours, x, y, targeted=targeted)
    criterion = (foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification)(y)
    peer = foolbox.attacks.DDNAttack(steps=60, gamma=0.1)
    expected = peer.run(foolbox.PyTorchModel(theirs, bounds=(0, 1), device="cpu"), x, criterion)
    assert len(ours.points) == len(theirs.points) == 60
    torch.testing.assert_close(torch.stack(ours.points), torch.stack(theirs.points), rtol=0, atol=1e-6)
    same = result.iterations < 60
    assert same.sum() >= 6
    torch.testing.assert_close(result.adversarial[same], expected[same], rtol=0, atol=1e-6)


# Reductions and parts


@MODES
def test_anu_without_adaptation_is_ddn_to_the_last_bit(targeted: bool, model: Net) -> None:
    x = images()
    y = (predicted(model, x) + 3 * targeted) % 10
    for gamma in (0.05, 0.37):
        one = ANU(steps=30, gamma=gamma, alpha_gamma=0.0).run(model, x, y, targeted=targeted)
        two = DDN(steps=30, gamma=gamma).run(model, x, y, targeted=targeted)
        assert torch.equal(one.adversarial, two.adversarial)
        assert torch.equal(one.norm, two.norm)
        other = ANU(steps=30, gamma=gamma, alpha_gamma=0.1).run(model, x, y, targeted=targeted)
        assert not torch.equal(one.adversarial, other.adversarial)


@pytest.mark.parametrize("update", [FixedRate(gamma=0.2), AdaptiveRate(gamma=0.2, alpha_gamma=0.5, annealed=True)])
def test_norm_updates(update: FixedRate) -> None:
    eps = torch.ones(2, dtype=torch.float64)
    rate = update.init(eps)
    adversarial = torch.tensor([True, False])
    eps, rate = update(eps, adversarial, rate, 1, 10)
    if isinstance(update, AdaptiveRate):
        assert eps.tolist() == pytest.approx([1 - 0.2 * 0.5, 1 + 0.2 * 1.5])
        half = 0.5 * (1 + math.cos(math.pi / 10)) / 2
        eps, rate = update(torch.ones_like(eps), torch.tensor([True, True]), rate, 2, 10)
        assert eps.tolist() == pytest.approx([1 - 0.1 * (1 + half), 1 - 0.3 * (1 - half)])
    else:
        assert eps.tolist() == pytest.approx([0.8, 1.2])


def test_the_rate_stays_below_one() -> None:
    update = AdaptiveRate(gamma=0.4, alpha_gamma=0.15)
    eps = torch.ones(1)
    rate = update.init(eps)
    for k in range(1, 1001):
        eps, rate = update(eps, torch.tensor([True]), rate, k, 1000)
        assert 0 < rate.gamma.item() <= 0.9


# Closed form: the distance to the boundary of a linear model


@pytest.mark.parametrize("attack", [DDN(steps=200), ANU(steps=100)], ids=["ddn", "anu"])
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 4)])
@MODES
def test_a_linear_models_boundary(attack: MinimumNormAttack, n: int, shape: tuple[int, ...], targeted: bool) -> None:
    torch.manual_seed(len(shape))
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).double()
    x = images(n, shape=shape).double()
    logits, w = model(x).detach(), model[1].weight.detach()
    y = logits.argmin(1) if targeted else logits.argmax(1)
    distance = (logits[:, 0] - logits[:, 1]).abs() / (w[0] - w[1]).norm()
    result = attack.run(model, x, y, targeted=targeted, bounds=None)
    assert (result.norm >= distance * (1 - 1e-9)).all()
    assert (result.norm <= distance * 1.01).all()


# What is returned


def test_misclassified_and_unbroken_inputs(model: Net) -> None:
    x = images()
    y = predicted(model, x)
    y[:3] = (y[:3] + 1) % 10
    stubborn = lambda z: model(z) + 1e6 * nn.functional.one_hot(y, 10) * (torch.arange(6) > 4)[:, None]  # noqa: E731
    for attack in (DDN(steps=200), ANU(steps=200)):
        result = attack.run(_for_batches(stubborn), x, y)
        assert result.success is not None
        assert result.success.tolist() == [True] * 5 + [False]
        assert torch.equal(result.adversarial[[0, 1, 2, 5]], x[[0, 1, 2, 5]])
        assert result.norm[[0, 1, 2, 5]].tolist() == [0, 0, 0, torch.inf]
        assert result.iterations[[0, 1, 2, 5]].tolist() == [0, 0, 0, -1]
        assert (result.norm[3:5] > 0).all()
        assert result.broken(0.0).tolist() == [True] * 3 + [False] * 3
        assert result.broken(math.inf).sum() == 6
        assert result.broken(1e9).tolist() == [True] * 5 + [False]
        assert result.gradients.tolist() == [200] * 6


def _for_batches(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Pads the probe of two examples, which comes before the attack, to the batch of six."""

    def forward(z: Tensor) -> Tensor:
        return function(torch.cat([z] * (6 // len(z))))[: len(z)]

    return forward


@MODES
def test_the_norm_is_that_of_a_verified_example(targeted: bool, model: Net) -> None:
    x = images()
    y = (predicted(model, x) + 3 * targeted) % 10
    result = ANU(steps=30).run(model, x, y, targeted=targeted)
    assert isinstance(result, MinimumNormResult)
    assert ((predicted(model, result.adversarial) == y) == targeted).all()
    torch.testing.assert_close(result.norm, (result.adversarial - x).flatten(1).norm(dim=1), rtol=0, atol=1e-6)
    more = ANU(steps=120).run(model, x, y, targeted=targeted)
    assert more.norm.mean() < result.norm.mean()


def test_a_maximal_norm(model: Net) -> None:
    x = images()
    y = predicted(model, x)
    free = ANU(steps=30).run(model, x, y)
    limit = 1.0001 * float(free.norm.median())
    bounded = ANU(steps=30, max_norm=limit).run(model, x, y)
    size = (bounded.adversarial - x).flatten(1).norm(dim=1)
    assert (size <= limit + 1e-6).all()
    near = free.norm <= limit
    assert torch.equal(bounded.adversarial[near], free.adversarial[near])
    torch.testing.assert_close(size[~near], torch.full_like(size[~near], limit))
    assert torch.equal(bounded.iterations >= 0, bounded.norm.isfinite())
    direction = nn.functional.cosine_similarity((bounded.adversarial - x).flatten(1), (free.adversarial - x).flatten(1))
    torch.testing.assert_close(direction, torch.ones(6))
    assert bounded.success is not None
    assert torch.equal(bounded.success, predicted(model, bounded.adversarial) != y)
    assert torch.equal(bounded.norm.isfinite(), bounded.success)
    assert torch.equal(ANU(steps=30, max_norm=limit)(model, x, y), bounded.adversarial)


@pytest.mark.parametrize("masked", [False, True])
def test_rounding_to_8_bits(masked: bool, model: Net) -> None:
    x = (images() * 255).round() / 255
    y = predicted(model, x)
    mask = torch.ones(3, 6, 5)
    mask[:, 0] = 1 - masked
    result = ANU(steps=60, levels=256).run(model, x, y, mask=mask)
    stored = (result.adversarial * 255).round().to(torch.uint8)
    assert torch.equal(stored.float() / 255, result.adversarial)
    assert (predicted(model, stored.float() / 255) != y).all()
    assert torch.equal(ANU(steps=60).run(model, x, y).success, torch.ones(6, dtype=torch.bool))
    if masked:
        assert torch.equal(result.adversarial[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("attack", [DDN(steps=30), ANU(steps=30)], ids=["ddn", "anu"])
def test_other_units(attack: MinimumNormAttack, model: Net) -> None:
    """Images in [0, 255] or [-1, 1] give the same examples in their own units."""
    model, x = model.double(), images().double()
    y = predicted(model, x)
    unit = attack.run(model, x, y)
    assert ((unit.norm > 0) & unit.norm.isfinite()).all()
    bytes_ = attack.run(lambda z: model(z / 255), 255 * x, y, bounds=(0, 255))
    torch.testing.assert_close(bytes_.adversarial / 255, unit.adversarial, rtol=0, atol=1e-9)
    torch.testing.assert_close(bytes_.norm / 255, unit.norm, rtol=0, atol=1e-9)
    centred = attack.run(lambda z: model((z + 1) / 2), 2 * x - 1, y, bounds=(-1, 1))
    torch.testing.assert_close((centred.adversarial + 1) / 2, unit.adversarial, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1.0, 255.0])
def test_half_precision(dtype: torch.dtype, width: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3 * 32 * 32, 2)
    model = nn.Sequential(nn.Flatten(), linear)
    x = width * images(4, shape=(3, 32, 32))
    with torch.no_grad():
        linear.weight.mul_(20 / width)
        logits = model(x)
    y = logits.argmax(1)
    expected = (logits[:, 0] - logits[:, 1]).abs() / (linear.weight[0] - linear.weight[1]).norm()
    for attack in (DDN(steps=200, loss=Margin()), ANU(steps=100, loss=Margin())):
        result = attack.run(model.to(dtype), x.to(dtype), y, bounds=(0, width))
        assert result.adversarial.dtype == dtype
        assert result.success is not None
        assert result.success.all()
        assert (result.norm < 2 * expected + 0.02 * width).all()
        model.float()


def test_the_success_is_that_of_a_forward_of_its_own() -> None:
    class Fickle(nn.Module):
        """Misclassifies only while a gradient is asked for."""

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1)[:, :2] * torch.tensor([1.0, -1.0]) + torch.tensor([2.0, 0.0])
            return z.flip(1) if torch.is_grad_enabled() else z

    result = DDN(steps=5).run(Fickle(), images(), torch.zeros(6, dtype=torch.long))
    assert result.success is not None
    assert not result.success.any()
    assert result.norm.isinf().all()
    assert result.iterations.tolist() == [-1] * 6


def test_tiny_gradients_still_point_somewhere() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(90, 10)
    x = images()
    y = linear(x.flatten(1)).argmax(1)
    loss = lambda z, labels: 1e-30 * nn.functional.cross_entropy(z, labels, reduction="none")  # noqa: E731
    model = nn.Sequential(nn.Flatten(), linear)
    tiny, full = (DDN(steps=60, loss=chosen).run(model, x, y) for chosen in (loss, None))
    assert ((full.norm > 0) & full.norm.isfinite()).all()
    torch.testing.assert_close(tiny.norm, full.norm, rtol=1e-4, atol=0)


# The price


def test_one_forward_per_iteration_and_one_for_the_last(model: Net) -> None:
    recorder = Recorder(model).eval()
    x = images()
    DDN(steps=7).run(recorder, x, predicted(model, x))
    assert recorder.forwards == 7 + 1 + 1, "the iterates, and one to verify the result"
    assert len(recorder.points) == 7
    recorder.forwards = 0
    DDN(steps=7)(recorder, x, predicted(model, x))
    assert recorder.forwards == 7 + 1


class Synchronisations(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attack", [DDN(), ANU(), ANU(max_norm=0.1), DDN(levels=256)])
def test_no_synchronisation_in_the_loop(attack: MinimumNormAttack, model: Net) -> None:
    x = images()
    counts = []
    for steps in (3, 12):
        with Synchronisations() as mode:
            dataclasses.replace(attack, steps=steps)(model, x, torch.arange(6))
        counts.append(mode.count)
    assert counts[0] == counts[1]


# Hosts


@MODES
def test_hosts_give_the_minimum_norm_examples(targeted: bool, model: Net) -> None:
    x = images()
    y = (predicted(model, x) + 3 * targeted) % 10
    for cls, words in ((DDN, {"gamma": 0.1}), (ANU, {"preset": "mnist"})):
        expected = cls(steps=25, **words)(model, x, y, targeted=targeted)
        assert (expected - x).abs().flatten(1).amax(1).count_nonzero() >= 5
        host = getattr(firstorder.torchattacks, cls.__name__)(model, steps=25, **words)
        if targeted:
            host.set_mode_targeted_by_label(quiet=True)
        assert torch.equal(host(x, y), expected)
        host = getattr(firstorder.art, cls.__name__)(
            classifier(model), max_iter=25, targeted=targeted, batch_size=4, verbose=False, **words
        )
        np.testing.assert_allclose(host.generate(x.numpy(), y.numpy()), expected.numpy(), atol=1e-6)


def untouched(x: Tensor) -> Tensor:
    raise AssertionError("the model was called before the input was checked")


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "steps": (lambda: DDN(steps=0), "steps=0"),
    "gamma": (lambda: DDN(gamma=1.0), "gamma=1"),
    "gamma_0": (lambda: ANU(gamma=0.95), "gamma=0.95"),
    "alpha_gamma": (lambda: ANU(alpha_gamma=1.0), "alpha_gamma=1"),
    "preset": (lambda: ANU(preset="svhn"), "preset='svhn'"),
    "eps_0": (lambda: DDN(init_norm=0), "init_norm=0"),
    "max_norm": (lambda: DDN(max_norm=-1), "max_norm=-1"),
    "levels": (lambda: DDN(levels=1), "levels=1"),
    "both": (lambda: DDN(levels=256, max_norm=1.0), "levels=256.*max_norm=1.0"),
    "levels without bounds": (
        lambda: DDN(levels=256)(untouched, images(), torch.arange(6), bounds=None),
        "finite bounds.*clip_values",
    ),
    "annealed": (lambda: ANU(annealed="no"), "annealed='no'"),  # type: ignore[arg-type]
    "two classes": (lambda: DDN(loss=DLR())(lambda z: z.flatten(1)[:, :2], images(), torch.arange(6) % 2), "3 classes"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_parameters(bad: str) -> None:
    build, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        build()
