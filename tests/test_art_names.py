"""ART's names for attacks of ours, with all of ART's parameters, in place of ART's classes."""

from __future__ import annotations

from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
from art.attacks.evasion import FrameSaliencyAttack

import firstorder.art
from cases import Net, classifier, images

NAMES = {
    "FastGradientMethod": "FGSM",
    "BasicIterativeMethod": "BIM",
    "ProjectedGradientDescent": "PGD",
    "ProjectedGradientDescentPyTorch": "PGD",
    "ProjectedGradientDescentNumpy": "PGD",
    "MomentumIterativeMethod": "MIFGSM",
}
Y = np.arange(12) % 10
WORDS: dict[str, Any] = {"eps": 0.1, "eps_step": 0.03, "max_iter": 4, "verbose": False}


@pytest.mark.parametrize("name", NAMES)
def test_arts_names_are_ours(name: str) -> None:
    ours = getattr(firstorder.art, name)
    assert ours is getattr(firstorder.art, NAMES[name])
    assert name in firstorder.art.__all__


CALLS: dict[str, tuple[Any, ...]] = {
    "FastGradientMethod": (np.inf, 0.1, 0.03, False, 0, 5, True, False),
    "BasicIterativeMethod": (0.1, 0.03, 4, False, 5, False),
    "ProjectedGradientDescent": (np.inf, 0.1, 0.03, 0.7, 4, False, 0, 5, False, False, False),
    "MomentumIterativeMethod": (np.inf, 0.1, 0.03, 0.7, 4, False, 5, False),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_call_by_position_keeps_its_result(name: str, targeted: bool, model: Net) -> None:
    x, estimator = images(12).numpy(), classifier(model)
    y = (estimator.predict(x).argmax(1) + targeted) % 10
    found, expected = (
        getattr(package, name)(estimator, *CALLS[name]) for package in (firstorder.art, art.attacks.evasion)
    )
    for one in (found, expected):
        one.set_params(targeted=targeted)
    np.testing.assert_allclose(found.generate(x, y), expected.generate(x, y), rtol=0, atol=1e-6)


def test_minimal_stops_at_the_first_radius(model: Net) -> None:
    x, estimator = images(12).numpy(), classifier(model)
    y = estimator.predict(x).argmax(1)
    step = np.linspace(0.01, 0.02, 12).reshape(-1, 1, 1, 1).astype(np.float32)
    words = {"eps": 10.5 * step, "eps_step": step, "minimal": True, "batch_size": 5}
    found, expected = (p.FastGradientMethod(estimator, **words) for p in (firstorder.art, art.attacks.evasion))
    adversarial = found.generate(x, y)
    np.testing.assert_allclose(adversarial, expected.generate(x, y), rtol=0, atol=1e-6)
    radii = np.abs(adversarial - x).max((1, 2, 3)) / step.ravel()
    assert len(np.unique(radii.round(3))) > 2
    with pytest.raises(ValueError, match="eps_step"):
        firstorder.art.FGSM(estimator, eps_step=0.0, minimal=True)


def test_a_random_radius(model: Net) -> None:
    """Half of a normal variable's size, below twice its deviation: its median is about a third of eps."""
    x = images(2).numpy()
    words = {"eps": 0.1, "eps_step": 0.1, "max_iter": 1, "random_eps": True, "verbose": False, "seed": 0}
    attack = firstorder.art.ProjectedGradientDescent(classifier(model, clip_values=None), **words)
    radii = np.array([np.abs(attack.generate(x, Y[:2]) - x).max() for _ in range(100)])
    assert radii.max() <= 0.1 + 1e-6
    assert 0.024 < np.median(radii) < 0.042
    assert (radii > 0.06).mean() == pytest.approx(0.19, abs=0.12)
    assert attack.eps == 0.1


def test_bad_values_of_arts_parameters(model: Net) -> None:
    for name, bad in (("random_eps", 1), ("decay", -1.0)):
        with pytest.raises(ValueError, match=f"{name}={bad!r}"):
            firstorder.art.PGD(classifier(model), **{name: bad})
    with pytest.raises(ValueError, match="minimal=1"):
        firstorder.art.FGSM(classifier(model), minimal=1)


@pytest.mark.parametrize("name", ["FGSM", "BIM", "PGD", "MIFGSM", "PQGD", "ClippedNGM"])
def test_composite_attacks_take_ours(name: str, model: Net) -> None:
    estimator, x = classifier(model), images(12).numpy()
    words = {key: value for key, value in WORDS.items() if name != "FGSM" or key != "max_iter"}
    attack = getattr(firstorder.art, name)(estimator, **words)
    found = FrameSaliencyAttack(estimator, attack, "iterative_saliency", frame_index=2, verbose=False).generate(x, Y)
    assert 0 < np.abs(found - x).max() <= 0.1 + 1e-6
    assert isinstance(attack, art.attacks.evasion.ProjectedGradientDescent) == (name != "FGSM")
