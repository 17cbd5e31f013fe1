"""ART's names for attacks of ours, with all of ART's parameters, in place of ART's classes."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.attacks.attack import EvasionAttack
from art.attacks.evasion import FrameSaliencyAttack
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import LossGradientsMixin
from torch import nn

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


CALLED: dict[str, dict[str, Any]] = {
    "L-infinity": {"eps": 0.03, "eps_step": 0.01},
    "L2, no clip values": {"norm": 2, "eps": 0.3, "eps_step": 0.1},
    "L2": {"norm": 2, "eps": 0.3, "eps_step": 0.1},
    "targeted": {"eps": 0.2, "eps_step": 0.05, "targeted": True},
    "random start": {"eps": 0.03, "eps_step": 0.01, "num_random_init": 1},
}
"""How every attack is called, the columns of the table."""


def differentiates(attack: Any) -> bool:
    """Whether an attack of ART asks its estimator for gradients."""
    needed = {part for one in attack._estimator_requirements or () for part in (one if type(one) is tuple else (one,))}
    return bool(needed & {LossGradientsMixin, ClassGradientsMixin})


def compared(name: str, words: dict[str, Any], estimator: Any, x: Any, y: Any) -> str:
    """A cell of the table: what ours and ART's, called alike, have in common."""
    accepted = inspect.signature(getattr(art.attacks.evasion, name)).parameters
    if not words.keys() <= accepted.keys():
        return "no such parameter"
    words = words | {key: value for key, value in {"max_iter": 10, "verbose": False}.items() if key in accepted}
    goal = (y + 1) % 10 if words.get("targeted") else y
    np.random.seed(0)
    ours, theirs = (
        getattr(p, name)(estimator, **words).generate(x, goal) for p in (firstorder.art, art.attacks.evasion)
    )
    kept = [(estimator.predict(found).argmax(1) == goal).mean() for found in (ours, theirs)]
    mean = sum(kept) / 2
    assert 0.03 < mean < 0.97, f"{name}, {words}: {kept} tell nothing"
    if np.allclose(ours, theirs, rtol=0, atol=1e-6):
        return "equal to 1e-6"
    assert abs(kept[0] - kept[1]) <= 1.96 * (2 * mean * (1 - mean) / len(x)) ** 0.5, f"{name}, {words}: {kept}"
    return "same accuracy"


def table() -> str:
    """What firstorder.art has under the names of ART's attacks that ask for gradients, and which it has not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 30), nn.Tanh(), nn.Linear(30, 10))
    estimators = {
        clip: PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 6, 6), 10, clip_values=clip, device_type="cpu")
        for clip in (None, (0.0, 1.0))
    }
    x = images(200, shape=(3, 6, 6)).numpy()
    y = estimators[None].predict(x).argmax(1)
    attacks = {
        name: attack
        for name, attack in sorted(vars(art.attacks.evasion).items())
        if inspect.isclass(attack) and issubclass(attack, EvasionAttack) and differentiates(attack)
    }
    lines = [f"| name | here | {' | '.join(CALLED)} |", "|---|---|" + len(CALLED) * "---|"]
    for name in [name for name in attacks if name in NAMES]:
        cells = [
            compared(name, words, estimators[None if "no clip" in column else (0.0, 1.0)], x, y)
            for column, words in CALLED.items()
        ]
        lines.append(f"| {name} | {NAMES[name]} | {' | '.join(cells)} |")
    others = [name for name in attacks if name not in firstorder.art.__all__]
    assert len(others) == len(attacks) - len(NAMES)
    return "\n".join([*lines, "", *textwrap.wrap(f"ART alone has {', '.join(others)}.", 120)])


def test_the_table_of_names_is_that_of_the_documentation() -> None:
    page = Path(__file__).parent.parent / "docs" / "numbers" / "art.md"
    text = page.read_text(encoding="utf-8")
    for part in table().split("\n\n"):
        assert part in text


def test_frame_saliency_refuses_what_searches_for_the_smallest_norm_as_it_does_arts_own(model: Net) -> None:
    estimator = classifier(model)
    for attack in (
        art.attacks.evasion.CarliniL2Method(estimator, verbose=False),
        art.attacks.evasion.DeepFool(estimator, verbose=False),
        firstorder.art.DDN(estimator, verbose=False),
        firstorder.art.ANU(estimator, verbose=False),
    ):
        with pytest.raises(ValueError, match="attacker must be either of class 'ProjectedGradientDescent'"):
            FrameSaliencyAttack(estimator, attack)


@pytest.mark.parametrize("method", ["iterative_saliency", "iterative_saliency_refresh", "one_shot"])
@pytest.mark.parametrize("name", ["FastGradientMethod", "BasicIterativeMethod", "ProjectedGradientDescent"])
def test_frame_saliency_finds_what_it_finds_with_arts_own(name: str, method: str, model: Net) -> None:
    estimator, x = classifier(model), images(6).numpy()
    y = estimator.predict(x).argmax(1)
    words = {key: value for key, value in WORDS.items() if name != "FastGradientMethod" or key in ("eps", "eps_step")}
    found, expected = (
        FrameSaliencyAttack(
            estimator, getattr(package, name)(estimator, **words), method, frame_index=2, verbose=False
        ).generate(x, y)
        for package in (firstorder.art, art.attacks.evasion)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    frames = np.abs(found - x).max((1, 3)) > 0
    assert frames.any()
    assert method == "one_shot" or not frames.all()
