"""ART's own trainers with our attacks inside: the same weights as with ART's attack, and progress with every other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art import config
from art.data_generators import NumpyDataGenerator
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerOAATPyTorch,
    AdversarialTrainerTRADESPyTorch,
    adversarial_trainer_madry_pgd,
)
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import firstorder.art

Array = np.ndarray[Any, Any]
N, BATCH = 24, 8
EPS = 0.05


class Small(nn.Module):
    """Images (N, 3, 4, 4) to three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).relu().flatten(1))
        return logits


def wrap() -> Any:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 4, 4), 3, optimizer=optimizer, clip_values=(0.0, 1.0), device_type="cpu"
    )


def data() -> tuple[Array, Array]:
    """Three classes, a colour each."""
    rng, y = np.random.default_rng(0), np.arange(N) % 3
    x = 0.35 + 0.3 * np.eye(3)[y][:, :, None, None] + 0.12 * rng.standard_normal((N, 3, 4, 4))
    return np.clip(x, 0, 1).astype(np.float32), y


def fitted(trainer: Any, labels: Array, x: Array, generator: bool, **words: Any) -> None:
    """Train, from arrays or from a generator."""
    if generator:
        trainer.fit_generator(NumpyDataGenerator(x, labels, batch_size=BATCH, shuffle=False), **words)
    else:
        trainer.fit(x, labels, **words, **({} if "batch_size" in words else {"batch_size": BATCH}))


def plain(classifier: Any, attack: Any, folder: Path) -> Any:
    return AdversarialTrainer(classifier, attack, ratio=0.5)


def several(classifier: Any, attack: Any, folder: Path) -> Any:
    """Two attacks in turn, one of them on another network, once before training."""
    return AdversarialTrainer(classifier, [attack, firstorder.art.FGSM(wrap(), eps=EPS)], ratio=1.0)


def trades(classifier: Any, attack: Any, folder: Path) -> Any:
    return AdversarialTrainerTRADESPyTorch(classifier, attack, beta=2.0)


def awp(mode: str) -> Callable[[Any, Any, Path], Any]:
    return lambda classifier, attack, folder: AdversarialTrainerAWPPyTorch(
        classifier, wrap(), attack, mode=mode, gamma=0.01, beta=2.0, warmup=1
    )


def oaat(classifier: Any, attack: Any, folder: Path) -> Any:
    """With all phases: plain, with perturbed weights, and with perceptual distances and mixed radii."""
    words = {
        "weight_decay": 0.0,
        "lr": 0.1,
        "momentum": 0.0,
        "norm": np.inf,
        "i_epsilon": EPS / 2,
        "epsilon": EPS,
        "alpha": 1.0,
        "beta": 1.5,
        "awp_gamma": 0.005,
        "awp_warmup": 1,
        "lr_schedule": "cosine",
        "beta_final": 3.0,
        "mixup_alpha": 0.2,
        "mixup_epsilon": 1.2 * EPS,
        "lpips_weight": 1.0,
        "list_swa_tau": [0.995],
        "oaat_warmup": 0,
        "alternate_iter_eps": 0.7 * EPS,
        "swa_save_epoch": 0,
        "list_swa_epoch": [0],
        "max_iter": 4,
        "models_path": str(folder),
        "load_swa_model_tau": 0.995,
        "layer_names_activation": ["conv"],
    }
    return AdversarialTrainerOAATPyTorch(classifier, wrap(), wrap(), [wrap()], attack, words)


TRAINERS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "plain": plain,
    "several": several,
    "trades": trades,
    "awp-pgd": awp("PGD"),
    "awp-trades": awp("TRADES"),
    "oaat": oaat,
}


def attack_of(package: Any, name: str, classifier: Any) -> Any:
    words: dict[str, Any] = {"eps": EPS, "batch_size": BATCH}
    if name not in ("FastGradientMethod", "FGSM"):
        words |= {"eps_step": EPS / 3, "max_iter": 4, "verbose": False}
    return getattr(package, name)(classifier, **words)


def trained(trainer: str, package: Any, name: str, folder: Path, *, one_hot: bool, generator: bool) -> Any:
    """The classifier after a few epochs of `trainer` with the attack `name` of `package`."""
    classifier = wrap()
    x, y = data()
    labels = np.eye(3, dtype=np.float32)[y] if one_hot else y
    built = TRAINERS[trainer](classifier, attack_of(package, name, classifier), folder)
    words: dict[str, Any] = {"nb_epochs": 6 if trainer == "oaat" else 4}
    if trainer not in ("plain", "several"):
        words["validation_data"] = (x, labels)
    np.random.seed(0)
    torch.manual_seed(0)
    fitted(built, labels, x, generator, **words)
    return classifier


@pytest.fixture(autouse=True)
def _files_in_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some trainers save networks there."""
    monkeypatch.setattr(config, "ART_DATA_PATH", str(tmp_path))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("form", ["rows", "indices", "generator"])
def test_the_weights_are_those_with_arts_own_attack(trainer: str, form: str, tmp_path: Path) -> None:
    name = "ProjectedGradientDescent"
    how = {"one_hot": form != "indices", "generator": form == "generator"}
    ours, theirs = (
        trained(trainer, package, name, tmp_path, **how) for package in (firstorder.art, art.attacks.evasion)
    )
    start = wrap()
    for parameter, expected, before in zip(
        ours.model.parameters(), theirs.model.parameters(), start.model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-4)
        assert float((parameter - before).detach().norm()) > 1e-2


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (trainer, name)
        for trainer in TRAINERS
        for name in ("PQGD", "ClippedNGM", "VMIFGSM", "ANU")
        if (trainer, name) != ("oaat", "ANU")  # it sets eps, which an attack for the smallest norm has not
    ],
)
def test_other_attacks_train(trainer: str, name: str, tmp_path: Path) -> None:
    x, y = data()
    classifier = wrap()
    words = {"max_iter": 4, "verbose": False} | ({"max_norm": 2 * EPS} if name == "ANU" else {"eps": EPS})
    attack = getattr(firstorder.art, name)(classifier, **words)
    first = attack.generate(x, y)
    assert np.abs(first - x).max() > EPS / 2
    before = (classifier.predict(first).argmax(1) == y).mean()
    np.random.seed(0)
    torch.manual_seed(0)
    fitted(TRAINERS[trainer](classifier, attack, tmp_path), np.eye(3, dtype=np.float32)[y], x, False, nb_epochs=8)
    attack.set_params(**words)
    after = (classifier.predict(attack.generate(x, y)).argmax(1) == y).mean()
    assert after > max(before, 0.6)


@pytest.mark.parametrize("random", [0, 1])
def test_madrys_trainer(random: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    found = []
    for package in (firstorder.art, art.attacks.evasion):
        monkeypatch.setattr(adversarial_trainer_madry_pgd, "ProjectedGradientDescent", package.ProjectedGradientDescent)
        classifier = wrap()
        words = {"eps": EPS, "eps_step": EPS / 3, "max_iter": 4, "num_random_init": random}
        trainer = AdversarialTrainerMadryPGD(classifier, nb_epochs=20, batch_size=BATCH, **words)
        np.random.seed(0)
        trainer.fit(x, np.eye(3, dtype=np.float32)[y])
        assert type(trainer.attack).__module__.startswith(package.__name__)
        found.append(classifier)
    ours, theirs = ([p.detach() for p in one.model.parameters()] for one in found)
    for parameter, expected in zip(ours, theirs, strict=True):
        if random == 0:
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-4)
    attack = attack_of(art.attacks.evasion, "ProjectedGradientDescent", found[0])
    assert (found[0].predict(attack.generate(x, y)).argmax(1) == y).mean() > 0.6
