"""Prepared copies in float16: gradients that would vanish or overflow are scaled, and verdicts are the module's."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import images, predicted
from firstorder.attacks import (
    APGD,
    DDN,
    DLR,
    FGSM,
    PGD,
    Attack,
    CrossEntropy,
    Ensemble,
    Evaluation,
    Loss,
    Margin,
    Prepared,
    RobustnessWarning,
    ScaleCopies,
    TorchModel,
    graphs,
    prepare,
    scaling,
)
from firstorder.attacks.graphs import AFTER, Graphed
from firstorder.attacks.prepared import _Preparation
from firstorder.attacks.scaling import HIGHEST, LOWEST, STEP, scaled
from test_graphs import Recorder
from test_prepared import Witness, deep, probe, watched

FACTORS = [1e-4, 1.0, 1e4]
"""Of logits, by the last layer's weights."""


def loud(factor: float) -> nn.Module:
    net = deep()
    with torch.no_grad():
        for parameter in net.head[2].parameters():
            parameter.mul_(factor)
    return net


def both(model: Prepared, x: Tensor, y: Tensor, loss: Loss | None) -> tuple[Tensor, Tensor]:
    """The copy's gradients and the module's, (N, d)."""
    with model.preserved():
        found = [m.gradient(x, y, loss).gradient.flatten(1).double() for m in (model, model.exact)]
    return found[0], found[1]


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of rows of any size, (N,)."""
    one, other = (part / part.abs().amax(1, keepdim=True).clamp_min(1e-300) for part in (ours, theirs))
    return torch.cosine_similarity(one, other)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("loss", [CrossEntropy(), Margin(), DLR()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("aimed", [False, True], ids=["own class", "other class"])
def test_gradients_are_those_of_float32(factor: float, loss: Any, aimed: bool) -> None:
    """Direction, length and signs, of every example whose gradient float32 itself finds.

    Some lengths are another matter, as rounded logits decide on them: that of a confident example under cross-entropy
    goes with their exponential, that of DLR with a quotient of their differences.
    """
    net, x = loud(factor), images(64, seed=5)
    model = prepare(net, images(8), precision="float16")
    assert model.parts[-1] == "float16"
    y = (predicted(net, x) + aimed) % 10
    ours, theirs = both(model, x, y, loss)
    assert (ours.sign() == theirs.sign()).double().mean() > 0.98
    live = theirs.any(1)
    assert live.sum() > (1 if isinstance(loss, CrossEntropy) else 50)
    assert (cosine(ours[live], theirs[live]) > 0.999).double().mean() > 0.95, "the second class may be another"
    if isinstance(loss, Margin) or (isinstance(loss, CrossEntropy) and factor < 1e4):
        error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
        assert (error < 0.005).double().mean() > 0.95


def test_tiny_gradients_do_not_vanish_and_zero_is_zero() -> None:
    """A confident example beside one that is not: its gradient is 1e-30, its signs are right."""
    net = deep().eval()
    x = images(8)
    y = predicted(net, x)
    model = prepare(net, x, precision="float16")

    def uneven(logits: Tensor, labels: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 1e-30, 0.0, 1e-12, 1e6, 1.0, 1e-6, 1.0])
        return (Margin()(logits, labels)) * weights

    ours, theirs = both(model, x, y, uneven)
    assert float(theirs[1].abs().amax()) < 1e-28
    live = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    assert (cosine(ours[live], theirs[live]) > 0.9999).all()
    torch.testing.assert_close(ours[live].norm(dim=1), theirs[live].norm(dim=1), rtol=2e-3, atol=0)
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("lost", ["scaling", "division"])
def test_without_scaling_they_are_not(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = scaling.scaled, itertools.count(lost == "division")

    def missing(values: Tensor, exponents: Tensor) -> Tensor:
        return right(values, exponents) if next(calls) % 2 else values

    test_tiny_gradients_do_not_vanish_and_zero_is_zero()
    monkeypatch.setattr(scaling, "scaled", missing)
    with pytest.raises(AssertionError):
        test_tiny_gradients_do_not_vanish_and_zero_is_zero()


def test_examples_do_not_depend_on_each_other() -> None:
    net, x = deep(), images(6, seed=3)
    model, y = prepare(net, x, precision="float16"), torch.arange(6)
    whole = probe(model, x, y).gradient
    for i in range(6):
        one = slice(i, i + 1)
        torch.testing.assert_close(probe(model, x[one], y[one]).gradient, whole[one], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("exponent", [-252, -149, -126, -1, 0, 1, 127, 163, 254])
def test_powers_of_two(exponent: int) -> None:
    """As exact as float64 rounded once: nothing is lost on the way."""
    start = 2.0 ** max(min(-exponent, 126), -126)
    values = torch.tensor([[1.0, -1.5, 0.0], [1.25, 3.0, 0.5]]) * start
    found = scaled(values, torch.tensor([exponent, 0], dtype=torch.int32))
    assert torch.equal(found[0], (values[0].double() * 2.0**exponent).float())
    assert torch.equal(found[1], values[1])


# --- overflow


class Steep(nn.Module):
    """Gradients of its features grow 2^`power` times where the first pixel is above a half, 1 elsewhere."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.layer, self.power = nn.Linear(90, 10), power
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.layer.weight.copy_(torch.randn(10, 90, generator=generator) / 10)
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        steep = (x.detach()[:, 0, 0, 0] > 0.5)[:, None]
        z = self.layer(x.flatten(1))
        strong = z - z.detach()
        for _ in range(2):
            strong = strong * 2.0 ** (self.power // 2)
        return torch.where(steep, strong + z.detach(), z)


def flat_and_steep(power: int) -> tuple[nn.Module, Tensor, Tensor]:
    net, x = Steep(power).eval(), images(8)
    x[:, 0, 0, 0] = 0.0
    y = predicted(net, x)
    return net, x, y


def reported(model: Prepared, x: Tensor, y: Tensor, how: str) -> list[Tensor]:
    """Two gradients after each other, of which so many are said to have overflowed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with model.preserved():
            found = [model.gradient(x, y, None).gradient for _ in range(2)]
    assert [one.category for one in said] == [RobustnessWarning]
    assert re.match(f"{how} gradients overflowed in float16", str(said[0].message))
    return found


def test_gradients_that_overflow_later_are_said_and_met() -> None:
    """Prepared on gentle examples; the first gradient of an attack finds a lower scale by itself."""
    net, x, y = flat_and_steep(8)
    model = prepare(net, x, precision="float16")
    assert model.parts == ("float16",)
    before = int(model._scaling.exponent)  # type: ignore[union-attr]
    x[3, 0, 0, 0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FGSM(eps=0.1).run(model, x, y)
    assert int(model._scaling.exponent) < before  # type: ignore[union-attr]
    expected = FGSM(eps=0.1).run(net, x, y)
    assert (found.adversarial - expected.adversarial).abs().gt(1e-6).double().mean() < 0.02
    moved = (found.adversarial - x).flatten(1).abs().amax(1)
    assert (moved > 0.05).all()


def test_an_overflow_within_an_attack_is_reported() -> None:
    """Where the host does not wait: the example keeps still for that step, and the scale is lower after it."""
    net, x, y = flat_and_steep(8)
    model = prepare(net, x, precision="float16")
    steep = x.clone()
    steep[3, 0, 0, 0] = 1.0
    first, second = reported(model, steep, y, "1 of 16")
    assert (first[3] == 0).all()
    assert (first[:3] != 0).any()
    expected = model.exact.gradient(steep, y, None).gradient
    assert torch.cosine_similarity(second.flatten(1), expected.flatten(1)).min() > 0.999
    with warnings.catch_warnings(), model.preserved():
        warnings.simplefilter("error")
        assert model.gradient(steep, y, None).gradient[3].any()


def test_an_overflow_without_end_is_reported() -> None:
    """2^40 has no place in float16 at any scale; other examples keep theirs."""
    net, x, y = flat_and_steep(40)
    model = prepare(net, x, precision="float16")
    steep = x.clone()
    steep[3, 0, 0, 0] = 1.0
    with pytest.warns(RobustnessWarning, match="overflowed in float16"):
        found = PGD(eps=0.1, steps=3, random_start=False).run(model, steep, y)
    assert int(model._scaling.exponent) == LOWEST  # type: ignore[union-attr]
    assert found.adversarial.isfinite().all()
    assert torch.equal(found.success, predicted(net, found.adversarial) != y)
    moved = (found.adversarial - steep).flatten(1).abs().amax(1)
    assert (moved[[0, 1, 2, 4, 5, 6, 7]] > 0.05).all()


def test_logits_that_overflow() -> None:
    """Of the example: the copy is left out. Later: an error where they are seen first, else a gradient that is lost."""
    assert "float16" not in prepare(loud(1e6), images(4), precision="float16").parts
    net = Steep(0).eval()
    with torch.no_grad():
        net.layer.weight.mul_(1e5)
    x, y = images(8), torch.arange(8)
    model = prepare(net, x / 1000, precision="float16")
    assert model.parts == ("float16",)
    with pytest.raises(ValueError, match="the model's logits are NaN or infinite"):
        FGSM(eps=0.1).run(model, x, y)
    exponent = int(model._scaling.exponent)  # type: ignore[union-attr]
    model = prepare(net, x / 1000, precision="float16")
    first, second = reported(model, torch.cat([x[:1], x[1:] / 1000]), y, "2 of 16")
    assert (first[0] == 0).all()
    assert second[1:].flatten(1).any(1).all()
    assert int(model._scaling.exponent) == exponent, "no lower scale would help"  # type: ignore[union-attr]


def test_the_scale_is_found_on_the_example() -> None:
    for power, expected in ((0, HIGHEST - STEP), (8, HIGHEST - 3 * STEP)):
        net, x, _ = flat_and_steep(power)
        x[:, 0, 0, 0] = 1.0
        model = prepare(net, x, precision="float16")
        assert model._scaling is not None
        assert int(model._scaling.exponent) == expected
    assert not prepare(net, x, precision="bfloat16")._scaling


def test_copies_are_run_as_said() -> None:
    module = watched()
    model, x = prepare(module, images(4), precision="float16"), images(5, seed=1)
    assert model.parts == ("channels_last", "float16")
    y = predicted(module, x)
    Witness.seen.clear()
    found = probe(model, x, y)
    assert Witness.seen == [(torch.float32, True), (torch.float16, True)]
    assert found.gradient.is_contiguous()
    assert found.gradient.dtype == torch.float32
    assert torch.equal(model.logits(x), module(x))


# --- attacks


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.015, steps=6, loss=Margin()),
        PGD(eps=0.015, steps=6, early_stop=True, loss=Margin()),
        PGD(eps=0.1, norm="L2", steps=6, early_stop=True, loss=Margin()),
        APGD(eps=0.015, steps=12, loss=Margin()),
        DDN(steps=15, max_norm=0.1, loss=Margin()),
    ],
    ids=["pgd", "early_stop", "l2", "apgd", "ddn"],
)
def test_verdicts_are_the_modules(attack: Attack[Any], factor: float) -> None:
    net, x = loud(factor), images(16, seed=7)
    y = predicted(net, x)
    model = prepare(net, x[:4], precision="float16")
    assert "float16" in model.parts
    result, expected = attack.run(model, x, y), attack.run(net, x, y)
    assert torch.equal(result.success, predicted(net, result.adversarial) != y)
    assert abs(int(result.success.sum()) - int(expected.success.sum())) <= 1
    assert result.success.any()


def test_stacked_copies_and_ensembles() -> None:
    net = Ensemble([deep(), loud(0.5)]).eval()
    x = images(6, seed=2)
    y = predicted(net, x)
    model = prepare(net, x, precision="float16")
    assert model.members == 2
    for member in (None, 0, 1):
        for points in (x, torch.cat([x, x / 2])):
            labels = y.repeat(len(points) // 6)
            if member is None:
                ours, theirs = both(model, points, labels, None)
            else:
                with model.only(member), model.exact.only(member):
                    ours, theirs = both(model, points, labels, None)
            assert (torch.cosine_similarity(ours, theirs) > 0.999).all()
    assert ScaleCopies(m=2).m == 2


@pytest.mark.parametrize("refresh", [False, True])
def test_graphs_read_the_scale_where_it_is(refresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "capture", recorder)
    monkeypatch.setattr(_Preparation, "_seconds", lambda self, interface: 2.0 - isinstance(interface, Graphed))
    net, x, y = flat_and_steep(8)
    model = prepare(net, x, precision="float16", graph=True)
    assert model.parts == ("float16", "CUDA graph")
    if refresh:
        model.refresh()
    for _ in range(AFTER + 1):
        model.gradient(x, y, None)
    replayed = recorder.replayed
    steep = x.clone()
    steep[3, 0, 0, 0] = 1.0
    with model.preserved():
        pass  # what was asked for so far is done with
    first, second = reported(model, steep, y, "1 of 16")
    assert (first[3] == 0).all()
    assert (second[3] != 0).any()
    assert recorder.replayed == replayed + 2


# --- models that are in half precision themselves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_losses_of_models_in_half_precision_are_float32(dtype: torch.dtype) -> None:
    """Tiny logits: the losses of all iterates would be one number, and a control that follows them would halve."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(90, 10)).to(dtype)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(10, 90, generator=torch.Generator().manual_seed(0)) * 1e-4)
        net[1].bias.zero_()
    x = images(6).to(dtype)
    y = predicted(net, x)
    found: list[Evaluation] = [TorchModel(net).gradient(points, y, None) for points in (x, x + x.new_tensor(0.1))]
    assert found[0].losses is not None
    assert found[1].losses is not None
    assert found[0].losses.dtype == torch.float32
    assert found[0].gradient.dtype == dtype
    assert (found[0].losses != found[1].losses).all()
    assert found[0].losses.unique().numel() == 6
