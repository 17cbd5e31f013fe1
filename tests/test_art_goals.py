"""Estimators without classes, object detectors and regressors, are attacked as ART's own attacks do it."""

from __future__ import annotations

from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from art.estimators.object_detection import PyTorchObjectDetector
from art.estimators.regression.pytorch import PyTorchRegressor
from art.exceptions import EstimatorError
from torch import Tensor, nn

import firstorder.art
from cases import BOUNDED, Case, Net, classifier, images
from firstorder.attacks import APGD, Margin

Array = np.ndarray[Any, Any]
N = 7
ITERATED: dict[str, Any] = {"eps": 0.1, "eps_step": 0.03, "max_iter": 4, "batch_size": 3, "verbose": False}
WORDS: dict[str, dict[str, Any]] = {
    "FastGradientMethod": {"eps": 0.1, "batch_size": 3},
    "BasicIterativeMethod": ITERATED,
    "ProjectedGradientDescent": ITERATED,
    "MomentumIterativeMethod": {**ITERATED, "decay": 0.9},
}


class Values(nn.Module):
    """Images (N, 3, 6, 5) to one value each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.body(x)[:, :1].sin()
        return values


def regressor(**options: Any) -> Any:
    settings = {"clip_values": (0.0, 1.0), "device_type": "cpu", **options}
    return PyTorchRegressor(Values(), nn.MSELoss(), (3, 6, 5), **settings)


class Boxes(nn.Module):
    """A detector of one box: losses in training mode with targets, predictions without, as torchvision's have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(48, 4)

    def forward(self, x: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        boxes = self.head(self.norm(x).tanh().flatten(1))
        if self.training:
            assert targets is not None
            wanted = torch.stack([target["boxes"][0] for target in targets])
            return {"loss_box_reg": (boxes - wanted).square().sum(), "loss_classifier": boxes.abs().sum()}
        one = torch.ones(1)
        return [{"boxes": box[None], "labels": one.long(), "scores": one} for box in boxes]


def detector(**options: Any) -> Any:
    settings = {"clip_values": (0, 255), "device_type": "cpu", "attack_losses": ("loss_box_reg",), **options}
    return PyTorchObjectDetector(Boxes(), (3, 4, 4), **settings)


def boxes(n: int = N) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [
        {"boxes": rng.random((1, 4), dtype=np.float32), "labels": np.array([1]), "scores": np.ones(1, np.float32)}
        for _ in range(n)
    ]


def both(name: str, estimator: Any, words: dict[str, Any], x: Array, y: Any) -> tuple[Array, Array]:
    found = []
    for package in (firstorder.art, art.attacks.evasion):
        given = x.copy()
        found.append(getattr(package, name)(estimator, **words).generate(given, y))
        np.testing.assert_array_equal(given, x)
    return found[0], found[1]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("goals", ["given", "predicted", "targets"])
def test_a_regressor_as_in_art(name: str, goals: str) -> None:
    x = images(N).numpy()
    y = None if goals == "predicted" else np.random.default_rng(0).normal(size=N).astype(np.float32)
    words = {**WORDS[name], "targeted": goals == "targets"}
    if name == "MomentumIterativeMethod":
        words["batch_size"] = N  # ART's velocity is that of the whole input
    found, expected = both(name, regressor(), words, x, y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - x).max() == pytest.approx(0.1)


def test_a_regressor_under_l2_and_with_sizes_of_its_own() -> None:
    x, y = images(N).numpy(), np.linspace(-1, 1, N, dtype=np.float32)
    words = {**ITERATED, "norm": 2, "eps": 0.5, "eps_step": 0.2}
    np.testing.assert_allclose(*both("ProjectedGradientDescent", regressor(clip_values=None), words, x, y), atol=1e-6)
    eps = np.linspace(0.02, 0.1, N).reshape(-1, 1, 1, 1).astype(np.float32)
    words = {**ITERATED, "eps": eps, "eps_step": eps / 3}
    found, expected = both("ProjectedGradientDescent", regressor(), words, x, y)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.abs(found - x).max((1, 2, 3)), eps.ravel(), atol=1e-6)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("goals", ["given", "predicted", "targets"])
def test_a_detector_as_in_art(name: str, last: bool, goals: str) -> None:
    x = 255 * images(N, shape=(3, 4, 4)).numpy()
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
    words = {key: 255 * value if key in ("eps", "eps_step") else value for key, value in WORDS[name].items()}
    words |= {"targeted": goals == "targets", "batch_size": N}
    estimator = detector(channels_first=not last)
    found, expected = both(name, estimator, words, x, None if goals == "predicted" else boxes())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    if goals != "predicted":  # at its own predictions the loss is flat
        assert np.abs(found - x).max() == pytest.approx(25.5)


def test_a_detector_is_left_as_it_was() -> None:
    estimator, x = detector(), 255 * images(N, shape=(3, 4, 4)).numpy()
    model = estimator.model
    model.head.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = {"eps": 8.0, "eps_step": 2.0, "max_iter": 3, "num_random_init": 2, "verbose": False}
    firstorder.art.PGD(estimator, **words).generate(x, boxes())
    assert [model.training, model.norm.training, model.head.training] == [False, False, True]
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", [c for c in BOUNDED if not c.early], ids=lambda case: case.name)
def test_every_bounded_attack_takes_a_regressor(case: Case) -> None:
    x, y = images(N).numpy(), np.linspace(-1, 1, N, dtype=np.float32)
    words = {{"steps": "max_iter", "alpha": "eps_step"}.get(key, key): value for key, value in case.parameters.items()}
    attack = getattr(firstorder.art, case.cls.__name__)(regressor(), eps=0.05, seed=0, verbose=False, **words)
    if case.cls is APGD:  # it follows the loss of every example, and a regressor gives their mean
        with pytest.raises(ValueError, match="has no classes, which this attack needs"):
            attack.generate(x, y)
        return
    found = attack.generate(x, y)
    assert np.abs(found - x).max() <= 0.05 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    before, after = (regressor().compute_loss(a, y[:, None]).mean() for a in (x, found))
    assert after > before


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["regressor", "detector"])
def test_of_several_runs_the_worst_loss_counts(kind: str, targeted: bool) -> None:
    if kind == "regressor":
        estimator, x, y = regressor(), images(N).numpy(), np.linspace(-1, 1, N, dtype=np.float32)
    else:
        estimator, x, y = detector(clip_values=(0, 1)), images(N, shape=(3, 4, 4)).numpy(), boxes()
    words = {"eps": 0.2, "eps_step": 0.02, "max_iter": 2, "seed": 0, "targeted": targeted, "verbose": False}
    merged = firstorder.art.PGD(estimator, num_random_init=4, **words).generate(x, y)
    single = firstorder.art.PGD(estimator, num_random_init=1, **words)
    runs = [single.generate(x, y) for _ in range(4)]

    def losses(found: Array) -> Array:
        return np.array([estimator.compute_loss(found[i : i + 1], y[i : i + 1]) for i in range(N)]).ravel()

    table = np.stack([losses(run) for run in runs])
    np.testing.assert_allclose(losses(merged), table.min(0) if targeted else table.max(0), rtol=1e-5)
    assert len(set(table.argmin(0) if targeted else table.argmax(0))) > 1


def test_a_random_start_of_one_step() -> None:
    """ART's fast gradient method starts at random on a detector, once; its PGD refuses."""
    estimator, x = detector(clip_values=(0, 1)), images(N, shape=(3, 4, 4)).numpy()
    for package in (art.attacks.evasion, firstorder.art):
        found = package.FastGradientMethod(estimator, eps=0.1, num_random_init=3).generate(x, boxes())
        assert 0.05 < np.abs(found - x).max() <= 0.1 + 1e-6


class Lengths(LossGradientsMixin, BaseEstimator):  # type: ignore[misc]
    """Sequences of any length; the loss of one is the distance of its sine's mean from its goal."""

    def predict(self, x: Any, **kwargs: Any) -> Array:
        return np.array([np.sin(3 * one).mean() for one in x])

    def loss_gradient(self, x: Any, y: Any, **kwargs: Any) -> Any:
        signs = np.sign(self.predict(x) - y)
        found = [sign * 3 * np.cos(3 * one) / one.size for sign, one in zip(signs, x, strict=True)]
        if x.dtype != object:
            return np.array(found, dtype=x.dtype)
        gradients = np.empty(len(x), dtype=object)
        gradients[:] = found
        return gradients

    def fit(self, x: Any, y: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (-1,)


def test_examples_of_different_shapes() -> None:
    rng = np.random.default_rng(0)
    x = np.empty(4, dtype=object)
    x[:] = [rng.random(length, dtype=np.float32) for length in (3, 5, 8, 5)]
    y = np.array([-1.0, 1.0, 0.2, 0.3])
    estimator = Lengths(model=None, clip_values=(0.0, 1.0))
    words = {"eps": 0.1, "eps_step": 0.03, "max_iter": 4, "batch_size": 4, "verbose": False}
    for name in ("ProjectedGradientDescent", "BasicIterativeMethod", "FastGradientMethod"):
        used = words if name != "FastGradientMethod" else {"eps": 0.1}
        for goals in (y, None):
            found, expected = (getattr(p, name)(estimator, **used) for p in (firstorder.art, art.attacks.evasion))
            for one, other, start in zip(found.generate(x, goals), expected.generate(x.copy(), goals), x, strict=True):
                assert one.dtype == np.float32
                np.testing.assert_allclose(one, np.asarray(other, np.float32), atol=1e-6)
                assert goals is None or np.abs(one - start).max() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="a mask cannot broadcast"):
        firstorder.art.PGD(estimator, verbose=False).generate(x, y, mask=np.ones(3))
    with pytest.raises(ValueError, match="eps cannot broadcast"):
        firstorder.art.PGD(estimator, eps=np.full(4, 0.1), verbose=False).generate(x, y)
    with pytest.raises(ValueError, match="num_random_init=2: Lengths has no compute_loss"):
        firstorder.art.PGD(estimator, num_random_init=2)
    whole = np.empty(2, dtype=object)
    whole[:] = [np.arange(3), np.arange(4)]
    with pytest.raises(ValueError, match="x is int64"):
        firstorder.art.PGD(estimator, verbose=False).generate(whole, y[:2])


def test_what_needs_classes_is_refused() -> None:
    estimator, x = regressor(), images(N).numpy()
    for name in ("FastGradientMethod", "ProjectedGradientDescent"):
        with pytest.raises(ValueError, match="early_stop=True needs classes, PyTorchRegressor has none"):
            getattr(firstorder.art, name)(estimator, early_stop=True)
    with pytest.raises(ValueError, match="minimal=True needs classes"):
        firstorder.art.FGSM(estimator, minimal=True)
    with pytest.raises(ValueError, match=r"[Mm]inimal"):
        art.attacks.evasion.FastGradientMethod(estimator, minimal=True).generate(x)
    with pytest.raises(ValueError, match=r"loss=Margin.* needs classes"):
        firstorder.art.PGD(estimator, loss=Margin())
    for attack in (firstorder.art.DDN, firstorder.art.ANU, art.attacks.evasion.DeepFool):
        with pytest.raises(EstimatorError):
            attack(estimator)
    quiet = {"verbose": False, "max_iter": 1}
    with pytest.raises(ValueError, match="what to move towards"):
        firstorder.art.PGD(estimator, targeted=True, **quiet).generate(x)
    with pytest.raises(ValueError, match="y has 2 entries; pass one for each of the 7 examples"):
        firstorder.art.PGD(estimator, **quiet).generate(x, np.ones(2, np.float32))
    ragged = np.empty(2, dtype=object)
    ragged[:] = [x[0], x[1, :, :3]]
    with pytest.raises(ValueError, match="x is object"):
        firstorder.art.PGD(classifier(Net()), **quiet).generate(ragged, np.arange(2))
