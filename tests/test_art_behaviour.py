"""What ART's users rely on in its fast gradient, iterative, projected and momentum attacks, asked of ours."""

from __future__ import annotations

from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.defences.preprocessor import SpatialSmoothing
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier, SklearnClassifier
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from art.exceptions import EstimatorError
from art.utils import random_targets
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC
from torch import nn

import firstorder.art
from cases import Net, classifier, images

Array = np.ndarray[Any, Any]
NAMES = ("FastGradientMethod", "BasicIterativeMethod", "ProjectedGradientDescent", "MomentumIterativeMethod")
every_attack = pytest.mark.parametrize("name", NAMES)


def settings(name: str, **more: Any) -> dict[str, Any]:
    """Parameters that the attack has in ART."""
    steps = {} if name == "FastGradientMethod" else {"max_iter": 5, "verbose": False}
    return {"eps": 0.1, "eps_step": 0.03, "batch_size": 5, **steps, **more}


def both(name: str, estimator: Any, x: Array, y: Any = None, **words: Any) -> tuple[Array, Array]:
    """What our attack and ART's find, both with the input as it was."""
    found = []
    for package in (firstorder.art, art.attacks.evasion):
        given = x.copy()
        attack = getattr(package, name)(estimator, **settings(name, **words))
        found.append(attack.generate(given, y))
        np.testing.assert_array_equal(given, x)
    return found[0], found[1]


# Estimators


@every_attack
def test_an_estimator_that_gives_no_gradients_is_refused(name: str) -> None:
    attack = getattr(firstorder.art, name)
    assert attack._estimator_requirements == getattr(art.attacks.evasion, name)._estimator_requirements
    for bad in (BlackBoxClassifier(lambda x: x, (3, 6, 5), 10), object(), Net()):
        with pytest.raises(EstimatorError) as refused:
            attack(bad)
        assert set(refused.value.class_expected_list) == {BaseEstimator, LossGradientsMixin}


@every_attack
def test_defended_classifiers(name: str, model: Net) -> None:
    defence = SpatialSmoothing(window_size=3, channels_first=True)
    estimator = classifier(model, preprocessing_defences=defence)
    x = images(12).numpy()
    y = estimator.predict(x).argmax(1)
    for given in (None, y):
        found, expected = both(name, estimator, x, given)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - x).max() == pytest.approx(0.1)
    assert (estimator.predict(found).argmax(1) != y).any()


class Through(PyTorchClassifier):  # type: ignore[misc]
    """A classifier whose gradients can be had by `loss_gradient` alone."""

    def loss_gradient(self, x: Any, y: Any, **kwargs: Any) -> Any:
        return super().loss_gradient(x, y, **kwargs)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"norm": 2, "eps": 0.5},
        {"targeted": True},
        {"num_random_init": 2},
        {"random_eps": True, "eps_step": 0.02},
        {"num_random_init": 1, "random_eps": True, "mask": True},
        {"decay": 0.8},
    ],
    ids=str,
)
def test_through_numpy_as_in_pytorch(words: dict[str, Any], model: Net) -> None:
    """The same draws, the same result, whichever way the gradient comes."""
    x = images(12).numpy()
    y = (classifier(model).predict(x).argmax(1) + 1) % 10
    words = dict(words)
    mask = {"mask": (np.random.default_rng(0).random(x.shape[1:]) < 0.5)} if words.pop("mask", False) else {}
    numpy = Through(model, nn.CrossEntropyLoss(), (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    one, other = (
        firstorder.art.ProjectedGradientDescent(
            estimator, seed=1, **settings("ProjectedGradientDescent", batch_size=3, **words)
        ).generate(x, y, **mask)
        for estimator in (classifier(model), numpy)
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert not np.allclose(one, x, atol=1e-3)


# Limits, radii, masks


@every_attack
@pytest.mark.parametrize("shape", [(3, 6, 5), (6, 5), (5,), (1,), ()], ids=str)
def test_clip_values_as_arrays(name: str, shape: tuple[int, ...], model: Net) -> None:
    low, high = np.zeros(shape, np.float32), np.linspace(0.6, 0.9, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    x = np.minimum(images(12).numpy(), high)
    estimator = classifier(model)
    estimator.set_params(clip_values=(low, high))
    found, expected = both(name, estimator, x, np.arange(12) % 10)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (found <= high).all()
    assert np.isclose(found, high, atol=1e-6).any()


@every_attack
def test_without_clip_values(name: str, model: Net) -> None:
    x = images(12).numpy()
    found, expected = both(name, classifier(model, clip_values=None), x, np.arange(12) % 10)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert found.min() < 0
    assert found.max() > 1


@pytest.mark.parametrize("name", NAMES[:3])
def test_parameters_may_be_set_later(name: str, model: Net) -> None:
    x, y = images(12).numpy(), np.arange(12) % 10
    attack = getattr(firstorder.art, name)(classifier(model), **settings(name))
    number = attack.generate(x, y)
    for shape in (x.shape, x.shape[1:], x.shape[2:], x.shape[3:]):
        attack.set_params(eps=np.full(shape, 0.1), eps_step=np.full(shape, 0.03))
        np.testing.assert_allclose(attack.generate(x, y), number, rtol=0, atol=1e-6)
        assert attack.eps.shape == shape
    attack.set_params(eps=0.02, eps_step=0.01)
    assert np.abs(attack.generate(x, y) - x).max() == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(), (12, 3, 6, 5), (3, 6, 5), (6, 5), (5,)], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
def test_the_smallest_radius(shape: tuple[int, ...], targeted: bool, model: Net) -> None:
    x, estimator = images(12).numpy(), classifier(model)
    scores = estimator.predict(x).argsort(1)
    goal = scores[:, -2] if targeted else scores[:, -1]
    words = {"minimal": True, "targeted": targeted, "eps": 0.5, "eps_step": 0.02}
    if shape:
        words |= {"eps": np.full(shape, 0.5), "eps_step": np.full(shape, 0.02)}
    found, expected = both("FastGradientMethod", estimator, x, goal, **words)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    hit = estimator.predict(found).argmax(1) == goal
    assert (hit if targeted else ~hit).mean() >= 0.5
    radii = np.abs(found - x).max((1, 2, 3)) / 0.02
    np.testing.assert_allclose(radii, radii.round(), atol=1e-3)
    assert len(set(radii.round())) > 1


@pytest.mark.parametrize("name", ["FastGradientMethod", "ProjectedGradientDescent"])
@pytest.mark.parametrize("norm", [np.inf, "inf", 2])
@pytest.mark.parametrize("kind", [bool, np.float32, np.float64])
def test_masks_with_random_starts(name: str, norm: Any, kind: Any, model: Net) -> None:
    x = images(12).numpy()
    for shape in (x.shape, x.shape[1:], x.shape[2:]):
        mask = np.random.default_rng(0).binomial(1, 0.5, shape).astype(kind)
        attack = getattr(firstorder.art, name)(classifier(model), norm=norm, **settings(name, num_random_init=1))
        found = attack.generate(x, np.arange(12) % 10, mask=mask)
        changed = np.broadcast_to(mask, x.shape) != 0
        np.testing.assert_array_equal(found[~changed], x[~changed])
        assert (found[changed] != x[changed]).mean() > 0.8


@pytest.mark.parametrize("name", ["FastGradientMethod", "ProjectedGradientDescent"])
@pytest.mark.parametrize("norm", [np.inf, 2])
def test_random_starts_do_no_worse_than_arts(name: str, norm: Any, model: Net) -> None:
    x, estimator = images(200).numpy(), classifier(model)
    y = estimator.predict(x).argmax(1)
    eps = 0.02 if norm == np.inf else 0.12
    np.random.seed(0)
    found, expected = both(
        name, estimator, x, y, norm=norm, eps=eps, eps_step=eps / 4, num_random_init=3, batch_size=100
    )
    size = np.linalg.norm((found - x).reshape(200, -1), ord=norm, axis=1)
    assert size.max() <= eps + 1e-6
    ours, theirs = ((estimator.predict(a).argmax(1) == y).mean() for a in (found, expected))
    assert 0.1 < ours < 0.9
    assert ours <= theirs + 1.96 * (2 * theirs * (1 - theirs) / 200) ** 0.5


# Targets


@every_attack
def test_targets_are_reached(name: str, model: Net) -> None:
    """The second class of every example; a keyword of other attacks does no harm."""
    x, estimator = images(12).numpy(), classifier(model)
    goal = estimator.predict(x).argsort(1)[:, -2]
    words = settings(name, eps=1.0, eps_step=0.02, targeted=True, batch_size=128)
    words |= {"minimal": True} if name == "FastGradientMethod" else {"max_iter": 60}
    with pytest.warns(UserWarning, match="ignores x_init"):
        found = getattr(firstorder.art, name)(estimator, **words).generate(x, np.eye(10)[goal], x_init=x[:3])
    reached = (estimator.predict(found).argmax(1) == goal).mean()
    assert reached >= (0.5 if name == "FastGradientMethod" else 1.0)


@every_attack
def test_labels_in_any_form(name: str, model: Net) -> None:
    x, estimator = images(12).numpy(), classifier(model)
    y = estimator.predict(x).argmax(1)
    forms = (None, y, y[:, None], y.astype(np.int32), np.eye(10)[y], np.eye(10, dtype=np.float32)[y])
    for form in forms:
        found, expected = both(name, estimator, x, form)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@every_attack
@pytest.mark.parametrize("size", [1, 5, 12, 128])
def test_the_size_of_a_batch_changes_nothing(name: str, size: int, model: Net) -> None:
    x, y = images(12).numpy(), np.arange(12) % 10
    attack = getattr(firstorder.art, name)(classifier(model), **settings(name, batch_size=size))
    whole = getattr(firstorder.art, name)(classifier(model), **settings(name, batch_size=12))
    found = attack.generate(x, y)
    np.testing.assert_allclose(found, whole.generate(x, y), rtol=0, atol=1e-6)
    assert np.abs(found - x).max((1, 2, 3)) == pytest.approx(0.1)


# Tables, scikit-learn


def iris() -> tuple[Array, Array]:
    data = load_iris()
    x = data.data.astype(np.float32)
    return (x - x.min(0)) / (x.max(0) - x.min(0)), data.target


def network(clip: Any) -> Any:
    x, y = iris()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    return PyTorchClassifier(model.eval(), nn.CrossEntropyLoss(), (4,), 3, clip_values=clip, device_type="cpu")


MODELS: dict[str, Any] = {
    "network": network,
    "LogisticRegression": lambda clip: SklearnClassifier(LogisticRegression().fit(*iris()), clip_values=clip),
    "SVC": lambda clip: SklearnClassifier(SVC(gamma="auto", probability=False).fit(*iris()), clip_values=clip),
    "linear SVC": lambda clip: SklearnClassifier(
        SVC(kernel="linear", probability=False).fit(*iris()), clip_values=clip
    ),
    "LinearSVC": lambda clip: SklearnClassifier(LinearSVC().fit(*iris()), clip_values=clip),
}


@every_attack
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=str)
def test_iris(name: str, kind: str, targeted: bool, clip: Any) -> None:
    x, y = (v[::4] for v in iris())
    np.random.seed(0)
    estimator, goal = MODELS[kind](clip), random_targets(y, 3) if targeted else None
    words = {"eps": 0.3, "eps_step": 0.1, "targeted": targeted, "batch_size": 150}
    found, expected = both(name, estimator, x, goal, **words)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - x).max() == pytest.approx(0.3, abs=1e-6)
    assert (found.min() >= 0 and found.max() <= 1) == (clip is not None)
    predicted = estimator.predict(found).argmax(1)
    if targeted:
        hit = (predicted == goal.argmax(1)).mean()
        assert hit > (estimator.predict(x).argmax(1) == goal.argmax(1)).mean()
    else:
        assert (predicted == y).mean() < (estimator.predict(x).argmax(1) == y).mean()


@pytest.mark.parametrize("name", NAMES[1:])
def test_momentum_and_steps_reach_the_edge_of_the_ball(name: str, model: Net) -> None:
    x = images(12).numpy()
    words = settings(name, eps=0.3, eps_step=0.1, max_iter=10)
    words |= {"decay": 1.0} if name == "MomentumIterativeMethod" else {}
    found = getattr(firstorder.art, name)(classifier(model), **words).generate(x)
    assert np.abs(found - x).max() == pytest.approx(0.3)
    assert np.abs(found - x).mean() > 0.1


# Parameters


BAD: list[tuple[str, dict[str, Any]]] = [
    ("norm", {"norm": 0}),
    ("norm", {"norm": -1}),
    ("norm", {"norm": "two"}),
    ("eps", {"eps": -1, "eps_step": 1}),
    ("eps", {"eps": "1", "eps_step": 0.1}),
    ("eps", {"eps": np.array([-1, -1, -1]), "eps_step": np.array([1, 1, 1])}),
    ("eps", {"eps": np.nan}),
    ("eps_step", {"eps_step": -1}),
    ("eps_step", {"eps_step": 0}),
    ("eps_step", {"eps": np.array([1, 1, 1]), "eps_step": np.array([-1, -1, -1])}),
    ("targeted", {"targeted": "true"}),
    ("num_random_init", {"num_random_init": 1.0}),
    ("num_random_init", {"num_random_init": "1"}),
    ("num_random_init", {"num_random_init": -1}),
    ("batch_size", {"batch_size": 0}),
    ("batch_size", {"batch_size": -1}),
    ("batch_size", {"batch_size": 2.5}),
    ("max_iter", {"max_iter": -1}),
    ("max_iter", {"max_iter": 1.5}),
    ("decay", {"decay": -1}),
    ("minimal", {"minimal": "true"}),
    ("random_eps", {"random_eps": "true"}),
    ("verbose", {"verbose": "true"}),
]


@every_attack
@pytest.mark.parametrize(("parameter", "words"), BAD, ids=str)
def test_bad_parameters_are_named(name: str, parameter: str, words: dict[str, Any], model: Net) -> None:
    attack = getattr(firstorder.art, name)
    if parameter not in attack.attack_params:
        with pytest.raises(TypeError, match=parameter):
            attack(classifier(model), **words)
        return
    with pytest.raises(ValueError, match=parameter):
        attack(classifier(model), **words)
    good = attack(classifier(model))
    with pytest.raises(ValueError, match=parameter):
        good.set_params(**words)
