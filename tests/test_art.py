"""The ART interface keeps EvasionAttack's contract, equals ART's own classes, and works through any estimator."""

from __future__ import annotations

import inspect
from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.attacks.attack import EvasionAttack
from art.defences.preprocessor import GaussianAugmentation, SpatialSmoothing
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import EnsembleClassifier, PyTorchClassifier, SklearnClassifier
from art.estimators.classification.scikitlearn import ScikitlearnLogisticRegression
from art.exceptions import EstimatorError
from art.summary_writer import SummaryWriter
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC
from torch import Tensor, nn

import firstorder.art
from cases import CASES, ROWS, Case, Net, classifier, images, predicted
from firstorder.art.models import EstimatorModel, as_model
from firstorder.attacks import Identity, Margin, Quantised, TorchModel
from samples import sampled

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
PEERS = {
    "FGSM": ("FastGradientMethod", {}),
    "BIM": ("BasicIterativeMethod", {"max_iter": 5, "eps_step": 0.02, "verbose": False}),
    "PGD": ("ProjectedGradientDescent", {"max_iter": 5, "eps_step": 0.02, "verbose": False}),
    "MIFGSM": ("MomentumIterativeMethod", {"max_iter": 5, "eps_step": 0.02, "decay": 0.9, "verbose": False}),
}


def host_class(name: str) -> Any:
    return getattr(firstorder.art, name)


def data(model: Net, n: int = 12) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x = images(n)
    return x.numpy(), np.eye(10, dtype=np.float32)[predicted(model, x).numpy()]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("preprocessing", [(0.0, 1.0), (0.4, 0.3)])
def test_equal_to_arts_own(name: str, targeted: bool, preprocessing: Any, model: Net) -> None:
    x, y = data(model)
    y = np.roll(y, 1, axis=1) if targeted else y
    estimator = classifier(model, preprocessing=preprocessing)
    peer, words = PEERS[name]
    ours = host_class(name)(estimator, eps=0.05, targeted=targeted, batch_size=5, **words)
    theirs = getattr(art.attacks.evasion, peer)(estimator, eps=0.05, targeted=targeted, batch_size=5, **words)
    np.testing.assert_allclose(ours.generate(x, y), theirs.generate(x, y), rtol=0, atol=1e-6)


def test_equal_to_arts_own_in_l2_without_active_bounds(model: Net) -> None:
    x, y = data(model)
    estimator = classifier(model, clip_values=(-9.0, 9.0))
    words = {"norm": 2, "eps": 0.5, "eps_step": 0.2, "max_iter": 5, "verbose": False}
    theirs = art.attacks.evasion.ProjectedGradientDescent(estimator, **words)
    np.testing.assert_allclose(
        host_class("PGD")(estimator, **words).generate(x, y), theirs.generate(x, y), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", PEERS)
def test_defaults_are_arts(name: str) -> None:
    peer, own = (
        inspect.signature(c).parameters for c in (getattr(art.attacks.evasion, PEERS[name][0]), host_class(name))
    )
    assert list(own)[: len(peer)] == list(peer)
    for parameter in peer:
        assert own[parameter].default == peer[parameter].default


@every_attack
def test_is_an_evasion_attack(case: Case, model: Net) -> None:
    attack = host_class(case.cls.__name__)(estimator=classifier(model), **case.small, verbose=False)
    assert isinstance(attack, EvasionAttack)
    assert {"targeted", "batch_size", "summary_writer", "verbose"} <= set(attack.attack_params)
    ball = {"eps", "norm", "num_random_init"}
    assert ball & set(attack.attack_params) == (ball if case.bounded else set())
    assert ("max_iter" in attack.attack_params) == ("steps" in case.fields)
    assert ("eps_step" in attack.attack_params) == ("alpha" in case.fields or case.name == "fgsm")
    name = "eps" if case.bounded else "gamma"
    attack.set_params(**{name: 0.02}, targeted=True)
    assert (getattr(attack, name), attack.targeted) == (0.02, True)
    assert f"{name}=0.02" in repr(attack)
    with pytest.raises(ValueError, match="steps"):
        attack.set_params(steps=3)
    for name, bad in (
        ("eps", -1.0),
        ("batch_size", 0),
        ("targeted", 1),
        ("num_random_init", -1),
        ("verbose", 2),
        ("norm", 1),
        ("init_norm", -1.0),
    ):
        if name not in attack.attack_params:
            continue
        with pytest.raises(ValueError, match=f"{name}={bad!r}"):
            host_class(case.cls.__name__)(classifier(model), **{name: bad})


def test_the_estimator_must_have_loss_gradients() -> None:
    with pytest.raises(EstimatorError):
        host_class("PGD")(art.estimators.classification.BlackBoxClassifier(lambda x: x, (3, 6, 5), 10))


@every_attack
def test_no_labels_means_the_models_own(case: Case, model: Net) -> None:
    x, y = data(model)
    attack = host_class(case.cls.__name__)(classifier(model), **case.small, verbose=False, seed=1)
    again = host_class(case.cls.__name__)(classifier(model), **case.small, verbose=False, seed=1)
    np.testing.assert_array_equal(attack.generate(x), again.generate(x, y))
    with pytest.raises(ValueError, match="targeted"):
        host_class(case.cls.__name__)(classifier(model), targeted=True, verbose=False).generate(x)


def test_label_formats(model: Net) -> None:
    x, y = data(model)
    attack = host_class("BIM")(classifier(model), eps=0.05, eps_step=0.01, max_iter=3, verbose=False)
    expected = attack.generate(x, y)
    for labels in (y.argmax(1), y.argmax(1)[:, None], y.astype(np.float64)):
        np.testing.assert_array_equal(attack.generate(x, labels), expected)
    for bad, message in ((y[:3], "one-hot"), (y.argmax(1) + 0.5, "whole"), (y.argmax(1) + 5, "classes 0..9")):
        with pytest.raises(ValueError, match=message):
            attack.generate(x, bad)


def test_bad_calls(model: Net) -> None:
    x, y = data(model)
    attack = host_class("PGD")(classifier(model), verbose=False)
    with pytest.raises(ValueError, match="uint8"):
        attack.generate((x * 255).astype(np.uint8), y)
    with pytest.raises(ValueError, match=r"eps.*does not broadcast"):
        host_class("PGD")(classifier(model), eps=np.full(12, 0.1), verbose=False).generate(x, y)
    with pytest.raises(ValueError, match=r"eps.*at least 0"):
        host_class("PGD")(classifier(model), eps=np.full((12, 1, 1, 1), -0.1))
    with pytest.raises(ValueError, match="outside the bounds"):
        attack.generate(x * 3, y)


def test_float64_input_comes_back_as_float64(model: Net) -> None:
    x, y = data(model)
    attack = host_class("BIM")(classifier(model), eps=0.05, verbose=False)
    result = attack.generate(x.astype(np.float64), y)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, attack.generate(x, y), atol=1e-6)


def test_clip_values_per_channel_and_absent(model: Net) -> None:
    x, y = data(model)
    low, high = np.full((3, 1, 1), 0.0, np.float32), np.array([0.9, 1.0, 0.95], np.float32)[:, None, None]
    attack = host_class("PGD")(classifier(model, clip_values=(low, high)), eps=0.3, verbose=False)
    result = attack.generate(np.minimum(x, high), y)
    np.testing.assert_allclose(result.max(axis=(0, 2, 3)), high[:, 0, 0], atol=1e-6)
    free = host_class("PGD")(classifier(model, clip_values=None), eps=0.3, verbose=False).generate(x, y)
    assert free.min() < 0
    assert free.max() > 1


@pytest.mark.parametrize("per_example", [False, True])
def test_masks_equal_arts(per_example: bool, model: Net) -> None:
    x, y = data(model)
    mask = np.random.default_rng(0).random(x.shape if per_example else x.shape[1:]) < 0.5
    words = {"eps": 0.05, "eps_step": 0.02, "max_iter": 4, "verbose": False, "batch_size": 5}
    theirs = art.attacks.evasion.ProjectedGradientDescent(classifier(model), **words)
    ours = host_class("PGD")(classifier(model), **words).generate(x, y, mask=mask)
    np.testing.assert_allclose(ours, theirs.generate(x, y, mask=mask.astype(np.float32)), atol=1e-6)
    assert (ours == x)[~np.broadcast_to(mask, x.shape)].all()


def test_restarts_are_num_random_init(model: Net) -> None:
    x, y = data(model, 40)
    rates = []
    for restarts in (1, 10):
        words = {"eps": 0.02, "eps_step": 0.01, "max_iter": 2, "num_random_init": restarts, "seed": 0}
        adversarial = host_class("PGD")(classifier(model), verbose=False, batch_size=40, **words).generate(x, y)
        rates.append((classifier(model).predict(adversarial).argmax(1) != y.argmax(1)).mean())
    assert rates[1] > rates[0]


@every_attack
def test_the_own_loss_of_the_estimator_is_used(case: Case, model: Net) -> None:
    x, y = data(model)
    criterion = nn.MultiMarginLoss()
    estimator = PyTorchClassifier(model, criterion, (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    words = {**case.small, "verbose": False, "seed": 0, "loss": None}
    own = host_class(case.cls.__name__)(estimator, **words).generate(x, y)
    cross_entropy = host_class(case.cls.__name__)(classifier(model), **words).generate(x, y)
    assert not np.array_equal(own, cross_entropy)
    margin = host_class(case.cls.__name__)(estimator, **{**words, "loss": Margin()}).generate(x, y)
    assert not np.array_equal(own, margin)
    assert criterion.reduction == "mean"


def test_pytorch_estimators_stay_in_pytorch(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(model)
    estimator = classifier(model)
    monkeypatch.setattr(estimator, "loss_gradient", None)
    assert isinstance(as_model(estimator), TorchModel)
    host_class("ClippedNGM")(estimator, verbose=False).generate(x, y)


def test_preprocessing_defences_are_honoured(model: Net) -> None:
    """A NumPy defence goes through ART's own gradient; the result equals ART's attack on the same estimator."""
    x, y = data(model)
    estimator = classifier(model, preprocessing_defences=SpatialSmoothing(window_size=3, channels_first=True))
    assert isinstance(as_model(estimator), EstimatorModel)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    words = {"eps": 0.1, "eps_step": 0.02, "max_iter": 5, "verbose": False}
    ours = host_class("PGD")(estimator, **words).generate(x, y)
    assert all(module.training for module in model.modules())
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    theirs = art.attacks.evasion.ProjectedGradientDescent(estimator, **words).generate(x, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    bare = host_class("PGD")(classifier(model), **words).generate(x, y)
    assert not np.allclose(ours, bare, atol=1e-6), "the defence must change the gradient for the test to say anything"
    with pytest.raises(ValueError, match="its own loss only"):
        host_class("PGD")(estimator, loss=Margin(), **words).generate(x, y)
    noise = classifier(model, preprocessing_defences=GaussianAugmentation(augmentation=False, apply_predict=False))
    assert host_class("PGD")(noise, **words).generate(x, y).shape == x.shape


def blobs(classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    centers = rng.random((classes, 8)) * 0.6 + 0.2
    y = np.arange(60) % classes
    return np.clip(centers[y] + 0.08 * rng.standard_normal((60, 8)), 0, 1).astype(np.float32), y


ESTIMATORS = {
    "logistic regression": lambda: LogisticRegression(max_iter=500),
    "linear SVM": lambda: LinearSVC(),
    "SVM": lambda: SVC(kernel="rbf", gamma=3.0, probability=False),
}


VECTOR_ROWS = [row for row in ROWS if not row[0].of_images]


SCIKIT_ROWS = [(estimator, *row) for row in VECTOR_ROWS for estimator in ESTIMATORS]


@pytest.mark.parametrize(
    ("estimator", "case", "norm"),
    sampled(SCIKIT_ROWS, 2, lambda row: row[1].name),
    ids=[f"{estimator}-{case.name}-{norm}" for estimator, case, norm in SCIKIT_ROWS],
)
def test_scikit_learn(estimator: str, case: Case, norm: str) -> None:
    x, y = blobs(3)
    model = SklearnClassifier(ESTIMATORS[estimator]().fit(x, y), clip_values=(0, 1))
    steps: dict[str, Any] = {"max_iter": 5} if "steps" in case.fields else {}
    steps |= {"loss": None} if case.early else {}
    eps = 0.25 if norm == "Linf" else 0.7
    if case.bounded:
        steps |= {"norm": 2 if norm == "L2" else np.inf, "eps": eps}
    else:
        steps |= {"max_iter": 20, "max_norm": eps}
    attack = host_class(case.cls.__name__)(model, verbose=False, seed=0, **steps)
    adversarial = attack.generate(x, np.eye(3, dtype=np.float32)[y])
    size = np.linalg.norm(adversarial - x, ord=np.inf if norm == "Linf" else 2, axis=1)
    assert (size <= eps + 1e-6).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    before, after = ((model.predict(a).argmax(1) == y).mean() for a in (x, adversarial))
    assert before > 0.9
    assert after < 0.75 * before


class Last(nn.Module):
    """A network for images (N, H, W, C)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.movedim(-1, 1))
        return logits


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("pgd", "si-ni-ti-dim", "vmi-fgsm", "anu")], ids=str)
@pytest.mark.parametrize("clip", ["scalars", "channels", "pixels"])
def test_channels_may_come_last(case: Case, clip: str, model: Net) -> None:
    x = images().numpy()
    y = np.arange(6)
    low, high = np.array([0.0, 0.0, -0.1], np.float32), np.array([1.0, 1.2, 1.0], np.float32)
    limits = {
        "scalars": ((0.0, 1.0), (0.0, 1.0)),
        "channels": ((low, high), (low, high)),
        "pixels": tuple(
            tuple(np.broadcast_to(v.reshape(s), shape).copy() for v in (low, high))
            for s, shape in (((3, 1, 1), (3, 6, 5)), ((1, 1, 3), (6, 5, 3)))
        ),
    }[clip]
    mask = np.random.default_rng(0).random(x.shape) < 0.7
    words = {**case.parameters, **case.small}
    words = {{"steps": "max_iter", "alpha": "eps_step"}.get(name, name): value for name, value in words.items()}
    first = classifier(model, clip_values=limits[0])
    loss = nn.CrossEntropyLoss()
    last = PyTorchClassifier(
        Last(model), loss, (6, 5, 3), 10, channels_first=False, clip_values=limits[1], device_type="cpu"
    )
    one, other = (host_class(case.cls.__name__)(e, seed=0, verbose=False, **words) for e in (first, last))
    expected = one.generate(x, y, mask=mask)
    found = other.generate(np.moveaxis(x, 1, -1), y, mask=np.moveaxis(mask, 1, -1))
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected, atol=1e-6)
    assert not np.allclose(expected, x, atol=1e-3)


def test_logistic_regression_matches_arts_own_attack() -> None:
    x, y = blobs(3)
    model = ScikitlearnLogisticRegression(LogisticRegression(max_iter=500).fit(x, y), clip_values=(0, 1))
    words = {"eps": 0.2, "eps_step": 0.05, "max_iter": 6, "verbose": False}
    one_hot = np.eye(3, dtype=np.float32)[y]
    ours, theirs = (
        cls(model, **words).generate(x, one_hot)
        for cls in (host_class("PGD"), art.attacks.evasion.ProjectedGradientDescent)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def trainable() -> PyTorchClassifier:
    """An untrained classifier of blobs, with an optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (8,), 3, optimizer=optimizer, clip_values=(0, 1), device_type="cpu"
    )


@pytest.mark.parametrize("name", ["PGD", "PQGD", "ClippedNGM", "SINIFGSM"])
def test_adversarial_training(name: str) -> None:
    x, y = blobs(3)
    estimator = trainable()
    attack = host_class(name)(estimator, eps=0.05, max_iter=3, verbose=False)
    one_hot = np.eye(3, dtype=np.float32)[y]
    AdversarialTrainer(estimator, attack, ratio=1.0).fit(x, one_hot, nb_epochs=20, batch_size=20)
    adversarial = attack.generate(x, one_hot)
    assert np.abs(adversarial - x).max() == pytest.approx(0.05, abs=1e-6)
    assert (estimator.predict(adversarial).argmax(1) == y).mean() > 0.85


def test_adversarial_training_on_minimum_norm_examples() -> None:
    x, y = blobs(3)
    estimator = trainable()
    attack = host_class("ANU")(estimator, max_iter=10, max_norm=0.15, verbose=False)
    one_hot = np.eye(3, dtype=np.float32)[y]
    AdversarialTrainer(estimator, attack, ratio=1.0).fit(x, one_hot, nb_epochs=20, batch_size=20)
    adversarial = attack.generate(x, one_hot)
    assert np.linalg.norm(adversarial - x, axis=1).max() == pytest.approx(0.15, abs=1e-6)
    assert (estimator.predict(adversarial).argmax(1) == y).mean() > 0.85


def test_the_summary_writer_sees_every_step(model: Net) -> None:
    seen: list[tuple[int, int]] = []

    class Writer(SummaryWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def reset(self) -> None:
            pass

        def update(self, batch_id: int, global_step: int, **values: Any) -> None:
            assert values["grad"].shape == values["x"].shape
            assert values["y"].shape[1] == 10
            seen.append((batch_id, global_step))

    x, y = data(model)
    writer = Writer()
    host_class("BIM")(classifier(model), max_iter=3, batch_size=6, summary_writer=writer, verbose=False).generate(x, y)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="summary_writer"):
        host_class("PGD")(classifier(model), num_random_init=2, summary_writer=writer)


def test_progress_is_shown_and_silenced(model: Net, capfd: pytest.CaptureFixture[str]) -> None:
    x, y = data(model)
    host_class("PQGD")(classifier(model), eps=0.05).generate(x, y)
    shown = capfd.readouterr()
    assert "PQGD" in shown.err
    assert shown.out == ""


def test_any_direction_from_art(model: Net) -> None:
    x, y = data(model)
    words = {"eps": 0.05, "eps_step": 0.01, "max_iter": 3, "verbose": False}
    quantised = host_class("PGD")(classifier(model), direction=Quantised(levels=100), **words).generate(x, y)
    pqgd = host_class("PQGD")(classifier(model), b=100, num_random_init=0, **words).generate(x, y)
    np.testing.assert_array_equal(quantised, pqgd)


def test_a_batch_equals_its_examples_behind_a_defence(model: Net) -> None:
    """ART averages a PyTorch loss over the batch; a rule that feels the size of the gradient must not."""
    x, y = data(model)
    defended = classifier(model, preprocessing_defences=SpatialSmoothing(window_size=3, channels_first=True))
    attack = host_class("FGSM")(defended, eps=0.1, direction=Identity())
    single = np.concatenate([attack.generate(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(attack.generate(x, y), single, atol=1e-5)


def test_an_ensemble_is_left_as_it_was(model: Net) -> None:
    members = [Net(seed=s).train() for s in (1, 2)]
    for member in members:
        for parameter in member.parameters():
            parameter.grad = torch.ones_like(parameter)
    x, y = data(model)
    ensemble = EnsembleClassifier([classifier(m) for m in members], channels_first=True, clip_values=(0, 1))
    adversarial = host_class("PGD")(ensemble, eps=0.05, max_iter=2, verbose=False).generate(x, y)
    assert not np.array_equal(adversarial, x)
    assert all(module.training for member in members for module in member.modules())
    assert all(bool((p.grad == 1).all()) for member in members for p in member.parameters() if p.grad is not None)


def test_an_overridden_gradient_is_used(model: Net) -> None:
    calls: list[int] = []

    class Own(PyTorchClassifier):  # type: ignore[misc]
        def loss_gradient(self, x: Any, y: Any, **kwargs: Any) -> Any:
            calls.append(len(x))
            return super().loss_gradient(x, y, **kwargs)

    x, y = data(model)
    estimator = Own(model, nn.CrossEntropyLoss(), (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    host_class("BIM")(estimator, max_iter=3, verbose=False).generate(x, y)
    assert len(calls) == 3
