"""Several models attacked as one: the logits, what each member is shown, and what an attack leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import HOSTS, Case, Net, images, predicted
from firstorder.attacks import MIFGSM, Ensemble

CASE = Case("mi-fgsm", {"steps": 4})


def members() -> list[Net]:
    return [Net(seed=seed).eval() for seed in (0, 1, 2)]


def average(parts: list[Net], weights: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """The weighted logits, written out."""
    return lambda x: sum((w * model(x) for w, model in zip(weights, parts, strict=True)), torch.zeros(()))


class Watch(nn.Module):
    """Logits from the mean of every channel; keeps the last images it saw."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.mean((2, 3))


# --- the logits


@pytest.mark.parametrize(
    ("weights", "shares"),
    [(None, (1 / 3, 1 / 3, 1 / 3)), ([1, 3, 4], (0.125, 0.375, 0.5)), ([0.0, 0.2, 0.0], (0.0, 1.0, 0.0))],
)
def test_the_weighted_mean_of_logits(weights: list[float] | None, shares: tuple[float, ...]) -> None:
    parts, x = members(), images()
    torch.testing.assert_close(Ensemble(parts, weights=weights)(x), average(parts, shares)(x))


def test_members_need_not_be_modules() -> None:
    net, x = Net().eval(), images()
    ensemble = Ensemble([net, lambda x: 3 * net(x)])
    torch.testing.assert_close(ensemble(x), 2 * net(x))
    assert list(ensemble.models) == [net]


def test_every_member_sees_its_own_size() -> None:
    watches, x = [Watch(), Watch(), Watch(), Watch()], images()
    logits = Ensemble(watches, sizes=[None, 4, (7, 9), (6, 5)])(x)
    expected = [x, *(F.interpolate(x, size, mode="bilinear", align_corners=False) for size in [(4, 4), (7, 9)]), x]
    for watch, shown in zip(watches, expected, strict=True):
        assert torch.equal(watch.seen, shown)
    torch.testing.assert_close(logits, sum(shown.mean((2, 3)) for shown in expected) / 4)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "at least one model; models is empty"),
        ([Watch()], {"weights": [1, 2]}, "1 models but 2 weights"),
        ([Watch(), Watch()], {"sizes": [8]}, "2 models but 1 sizes"),
        ([Watch(), Watch()], {"weights": [2, -1]}, "weights=-1 must be a finite number at least 0"),
        ([Watch()], {"weights": [float("nan")]}, "weights=nan must be a finite number"),
        ([Watch(), Watch()], {"weights": [0, 0.0]}, "are all 0; at least one must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(models: list[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble(models, **options)


def test_logits_over_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \(6, 10\) and \(6, 3\)"):
        Ensemble([Net().eval(), Watch()])(images())


# --- as a module


def test_it_is_a_module_like_any_other() -> None:
    parts, x = members(), images().double()
    ensemble = Ensemble(parts, weights=[1, 2, 3])
    assert ensemble.train().models[2].head[1].training
    assert not ensemble.eval().models[2].head[1].training
    other = copy.deepcopy(ensemble).double()
    torch.testing.assert_close(other(x).float(), ensemble(x.float()))
    assert parts[0].head[2].weight.dtype == torch.float32
    for weight in other.parameters():
        weight.data.zero_()
    assert not other(x).any()


# --- attacked


def test_members_are_left_as_they_were() -> None:
    """Modes differ from member to member, BatchNorm would move in training mode, and dropout would blur."""
    parts, x = members(), images()
    y = predicted(parts[0], x)
    expected = MIFGSM(eps=0.06, steps=4)(average(parts, (1 / 3,) * 3), x, y)
    parts[0].train()
    parts[1].features.train()
    modes = [[part.training for part in model.modules()] for model in parts]
    buffers = [{name: value.clone() for name, value in model.named_buffers()} for model in parts]
    ensemble = Ensemble(parts)
    assert torch.equal(MIFGSM(eps=0.06, steps=4)(ensemble, x, y), expected)
    assert [[part.training for part in model.modules()] for model in parts] == modes
    assert any(modes[0])
    assert not any(modes[2])
    for model, before in zip(parts, buffers, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_examples_in_every_host(host: str) -> None:
    parts, x = members(), images()
    weights = (0.5, 0.25, 0.25)
    y = predicted(Ensemble(parts, weights=weights), x)
    expected = CASE.build()(average(parts, weights), x, y)
    ensemble = Ensemble(parts, weights=weights).eval()
    found = HOSTS[host](CASE, ensemble, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not any(part.training for part in ensemble.modules())
    alone = CASE.build()(parts[0], x, y)
    assert (found - alone).abs().amax() > 0.01
    assert (ensemble(found).argmax(1) != y).float().mean() > (ensemble(x).argmax(1) != y).float().mean()


def test_members_of_other_sizes_are_attacked_through_the_resize() -> None:
    x, y = images(), torch.arange(6) % 3
    small = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 3)).eval()
    with torch.no_grad():
        small[1].weight.copy_(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)))
    found = MIFGSM(eps=0.05, steps=3)(Ensemble([Watch(), small], sizes=[None, 4]), x, y)
    expected = MIFGSM(eps=0.05, steps=3)(
        lambda x: (x.mean((2, 3)) + small(F.interpolate(x, (4, 4), mode="bilinear"))) / 2, x, y
    )
    torch.testing.assert_close(found, expected)
    assert (found - x).abs().amax() > 0.04
