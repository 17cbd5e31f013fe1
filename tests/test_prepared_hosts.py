"""Prepared models where hosts and training have their calls: what decides is always the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from torch import Tensor, nn

import firstorder.art
import firstorder.attacks.prepared as preparation
import firstorder.torchattacks
from cases import Net, classifier, images, predicted
from fabric_runs import ATTACK, FIXED, fit, recipe
from firstorder.art.models import ChannelsLast, as_model
from firstorder.attacks import PGD, Prepared, TorchModel, prepare
from firstorder.training import AWP, MART, TRADES, Objective, Vanilla
from test_prepared import SMOOTH, Approximated, Noted, deep

WORDS = {"eps": 0.05, "eps_step": 0.02, "max_iter": 4, "verbose": False}


class Counting:
    """Counts the gradients that prepared copies give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        gradient = preparation.Private.gradient

        def counted(model: Any, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            return gradient(model, *arguments, **options)

        monkeypatch.setattr(preparation.Private, "gradient", counted)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


# --- torchattacks


def test_torchattacks(copies: Counting) -> None:
    net, x = deep(), images(8, seed=7)
    y = predicted(net, x)
    model = prepare(net, x[:4])
    before = copies.count
    attacks = [firstorder.torchattacks.PGD(one, eps=0.02, alpha=0.01, steps=4, seed=3) for one in (model, net)]
    fast, slow = (attack(x, y) for attack in attacks)
    assert copies.count == before + 4
    assert torch.allclose(fast, slow, atol=1e-3)
    assert attacks[0].model is net
    assert net.training, "the mode it came in"
    attacks[0].set_mode_targeted_by_label(quiet=True)
    attacks[1].set_mode_targeted_by_label(quiet=True)
    aims = (y + 1) % 10
    assert torch.allclose(attacks[0](x, aims), attacks[1](x, aims), atol=1e-3)


def test_torchattacks_refuses_what_the_copy_does_not_know() -> None:
    net, x = deep(), images(4, seed=7)
    y = predicted(net, x)
    model = prepare(net, x)
    attack = firstorder.torchattacks.PGD(model)
    attack.set_normalization_used([0.5] * 3, [0.2] * 3)
    with pytest.raises(ValueError, match="prepare a module that normalises them itself"):
        attack((x - 0.5) / 0.2, y)
    attack = firstorder.torchattacks.PGD(model)
    attack.set_model_training_mode(model_training=True)
    with pytest.raises(ValueError, match="a prepared model is in evaluation mode"):
        attack(x, y)
    attack = firstorder.torchattacks.PGD(model)
    attack.model = Net()
    with pytest.raises(ValueError, match="the attack's model was replaced"):
        attack(x, y)


# --- ART


@pytest.mark.parametrize("preprocessing", [None, (0.2, 0.5)], ids=["plain", "preprocessing"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_art(preprocessing: Any, reduction: str, copies: Counting) -> None:
    net, x = deep(), images(8, seed=7).numpy()
    estimator = PyTorchClassifier(
        net, nn.CrossEntropyLoss(reduction=reduction), (3, 6, 5), 10, clip_values=(0, 1), preprocessing=preprocessing,
        device_type="cpu",
    )  # fmt: skip
    y = estimator.predict(x).argmax(1)
    view = firstorder.art.prepare(estimator, x[:4])
    assert isinstance(view, PyTorchClassifier)
    assert view.model is estimator.model is net
    assert np.array_equal(view.predict(x), estimator.predict(x))
    before = copies.count
    fast, slow = (firstorder.art.PGD(e, **WORDS, seed=1).generate(x, y) for e in (view, estimator))
    assert copies.count == before + 4
    assert np.abs(fast - slow).max() < 1e-3
    assert np.abs(fast - x).max() > 0.01
    early = [firstorder.art.PGD(e, **WORDS, early_stop=True).generate(x, y) for e in (view, estimator)]
    broken = [estimator.predict(a).argmax(1) != y for a in early]
    assert np.array_equal(*broken)
    assert broken[0].any()


def test_the_estimators_own_loss_drives_the_copy() -> None:
    net, x = deep(), images(5, seed=7)
    y = predicted(net, x)
    estimator = PyTorchClassifier(net, nn.MultiMarginLoss(), (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    view = firstorder.art.prepare(estimator, x.numpy())
    fast, slow = (as_model(e) for e in (view, estimator))
    with slow.preserved():
        found, expected = (one.gradient(x, y, None).gradient for one in (fast, slow))
        other = TorchModel(net).gradient(x, y, None).gradient
    assert isinstance(fast, Prepared)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, other, atol=1e-2)


def test_what_art_cannot_prepare() -> None:
    box = BlackBoxClassifier(lambda x: np.eye(10)[: len(x)], (3, 6, 5), 10)
    with pytest.raises(ValueError, match="BlackBoxClassifier cannot be prepared"):
        firstorder.art.prepare(box, images(2).numpy())
    with pytest.raises(RuntimeError, match="expected input"):
        firstorder.art.prepare(classifier(Net()), images(2, shape=(1, 6, 5)).numpy())
    assert "prepare" in dir(firstorder.art)


def test_images_with_the_channels_last_are_decided_by_the_exact_model() -> None:
    exact = Noted(SMOOTH)
    model = ChannelsLast(Approximated(Noted(SMOOTH), exact))
    assert isinstance(model.exact, ChannelsLast)
    assert model.exact.exact is not model
    plain = ChannelsLast(exact)
    assert plain.exact is plain


# --- training


OBJECTIVES: dict[str, Objective] = {
    "vanilla": Vanilla(attack=ATTACK),
    "mart": MART(attack=ATTACK),
    "trades": TRADES(attack=ATTACK),
    "awp": AWP(base=Vanilla(attack=FIXED), gamma=0.05),
}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_on_a_copy_of_this_steps_weights(name: str, tmp_path: Path, copies: Counting) -> None:
    plain = weights(fit(tmp_path / "plain", recipe(objective=OBJECTIVES[name])))
    assert copies.count == 0
    prepared = weights(fit(tmp_path / "prepared", recipe(objective=OBJECTIVES[name], prepare=True)))
    assert copies.count >= 15 * 2
    assert torch.allclose(prepared, plain, atol=1e-3)


def test_without_the_weights_of_the_step_training_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(objective=Vanilla(attack=FIXED), prepare=True)
    fresh = weights(fit(tmp_path / "fresh", chosen))
    monkeypatch.setattr(Prepared, "refresh", lambda self: None)
    stale = weights(fit(tmp_path / "stale", chosen))
    assert not torch.allclose(fresh, stale, atol=1e-3)


def test_a_run_is_another_one_with_a_prepared_model(tmp_path: Path) -> None:
    fit(tmp_path / "run", recipe(epochs=1))
    with pytest.raises(ValueError, match="prepared"):
        fit(tmp_path / "run", recipe(epochs=1, prepare=True), resume=True)


def test_the_inner_attack_does_not_change_the_copys_module() -> None:
    net, x = deep(), images(6, seed=7)
    y = predicted(net, x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = prepare(net, x)
    for objective in (Vanilla(attack=PGD(steps=2)), TRADES(attack=PGD(steps=2))):
        model.refresh()
        assert objective.adversarial(model, x, y).shape == x.shape
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
