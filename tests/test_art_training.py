"""ENGM in ART: every update is the hand-written one, ART's rules of labels, preprocessing, seeds and modes hold."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.attacks.evasion import ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor import GaussianAugmentation, SpatialSmoothing
from art.defences.trainer import AdversarialTrainer, Trainer
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.scikitlearn import ScikitlearnLogisticRegression
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import firstorder.art
from firstorder.art import AdversarialTrainerENGM, ENGMCriterion
from firstorder.attacks import PGD, Attack
from firstorder.evaluation.names.packaged import mnist
from firstorder.training import (
    AENGM,
    AWP,
    ENGM,
    MART,
    METHODS,
    NENGM,
    TRADES,
    GradientMethod,
    Objective,
    Vanilla,
    automatic,
)

RATE, ALPHA = 0.1, 0.7
QUIET = {"verbose": False}
Array = np.ndarray[Any, Any]


class Small(nn.Module):
    """Images (N, 3, 6, 5), or (N, 6, 5, 3) if `last`, to four classes."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(120, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.softplus(self.conv(x.movedim(-1, 1) if self.last else x)).flatten(1))
        return logits


def network(seed: int = 0, *, last: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small(last=last)


def stacked() -> nn.Module:
    """A Sequential, whose members ART calls one by one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(90, 12), nn.Softplus(), nn.Linear(12, 4))


def wrap(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> PyTorchClassifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    settings: dict[str, Any] = {"optimizer": optimizer, "clip_values": (0.0, 1.0), "device_type": "cpu", **options}
    shape = settings.pop("input_shape", (3, 6, 5))
    return PyTorchClassifier(model, loss or nn.CrossEntropyLoss(), shape, 4, **settings)


def data(n: int = 6) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.random((n, 3, 6, 5), dtype=np.float32), rng.integers(0, 4, n)


def attack(classifier: PyTorchClassifier) -> Any:
    return firstorder.art.PGD(classifier, eps=0.1, eps_step=0.05, max_iter=3, num_random_init=0, **QUIET)


def arts_own(classifier: PyTorchClassifier) -> Any:
    return ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.05, max_iter=3, **QUIET)


def objective_of(name: str, **beta: float) -> Objective:
    """The objective's losses; its attack is not used."""
    inner: Attack = PGD()
    kinds: dict[str, Any] = {"vanilla": Vanilla, "trades": TRADES, "mart": MART}
    found: Objective = kinds[name](attack=inner, **beta)
    return found


def norms(model: nn.Module, losses: Tensor, wanted: list[Tensor] | None = None) -> list[float]:
    """The norm of the gradient of every single loss, by the parameters or by what is `wanted`."""
    wanted = list(model.parameters()) if wanted is None else wanted
    found = [torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses]
    return [float(torch.cat([g.flatten() for g in one]).norm()) for one in found]


def stepped(model: nn.Module, losses: Tensor, weights: list[float]) -> list[Tensor]:
    """The parameters after a step of SGD along the weighted mean gradient."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((torch.tensor(weights) * losses).mean(), parameters)
    return [p.detach() - RATE * g for p, g in zip(parameters, gradients, strict=True)]


def capped(values: list[float], alpha: float = ALPHA) -> list[float]:
    weights = [min(alpha / v, 1.0) for v in values]
    assert alpha == float("inf") or min(weights) < 0.9, "the cap must be felt"
    return weights


def by_hand(model: nn.Module, make: Any, name: str, *, alpha: float = ALPHA, **beta: float) -> list[Tensor]:
    """One step of ENGM on x' of `make(classifier)`, for a copy of the model."""
    x, y = data()
    twin = copy.deepcopy(model)
    adversarial = torch.from_numpy(make(wrap(twin)).generate(x, np.eye(4, dtype=np.float32)[y]))
    twin.zero_grad()
    losses = objective_of(name, **beta).losses(twin, torch.from_numpy(x), adversarial, torch.from_numpy(y))
    return stepped(twin, losses, capped(norms(twin, losses), alpha))


def assert_at(model: nn.Module, expected: list[Tensor], atol: float = 1e-6) -> None:
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=atol)


@pytest.mark.parametrize("make", [attack, arts_own])
@pytest.mark.parametrize("name", ["vanilla", "trades", "mart"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_a_step_is_the_one_by_hand(make: Any, name: Any, one_hot: bool) -> None:
    x, y = data()
    model = network()
    expected = by_hand(model, make, name)
    classifier = wrap(model)
    trainer = AdversarialTrainerENGM(classifier, make(classifier), ALPHA, name)
    assert isinstance(trainer, Trainer)
    labels = np.eye(4, dtype=np.float32)[y] if one_hot else y
    trainer.fit(x, labels, batch_size=6, nb_epochs=1, **QUIET)
    assert_at(model, expected)
    np.testing.assert_array_equal(trainer.predict(x), trainer.get_classifier().predict(x))


@pytest.mark.parametrize("name", ["vanilla", "trades"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_a_step_of_a_generator_is_the_one_by_hand(name: Any, one_hot: bool) -> None:
    x, y = data()
    model = network()
    expected = by_hand(model, attack, name)
    classifier = wrap(model)
    labels = np.eye(4, dtype=np.float32)[y] if one_hot else y
    generator = PyTorchDataGenerator(
        DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(labels)), batch_size=6), size=6, batch_size=6
    )
    AdversarialTrainerENGM(classifier, attack(classifier), ALPHA, name).fit_generator(generator, nb_epochs=1, **QUIET)
    assert_at(model, expected)


def test_beta_reaches_the_objective() -> None:
    x, y = data()
    model = network()
    expected = by_hand(model, arts_own, "trades", beta=40.0)
    classifier = wrap(model)
    trainer = AdversarialTrainerENGM(classifier, arts_own(classifier), ALPHA, "trades", beta=40.0)
    trainer.fit(x, y, batch_size=6, nb_epochs=1, **QUIET)
    assert_at(model, expected)


@pytest.mark.parametrize("name", ["vanilla", "trades"])
def test_an_infinite_limit_is_plain_training(name: Any) -> None:
    x, y = data()
    model = network()
    expected = by_hand(model, attack, name, alpha=float("inf"))
    weighted = by_hand(model, attack, name)
    assert any(float((a - b).abs().max()) > 1e-3 for a, b in zip(expected, weighted, strict=True))
    classifier = wrap(model)
    AdversarialTrainerENGM(classifier, attack(classifier), float("inf"), name).fit(x, y, nb_epochs=1, **QUIET)
    assert_at(model, expected)


@pytest.mark.parametrize("generator", [False, True])
def test_the_first_epoch_says_what_the_limit_is(generator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "LEAST", 1)
    x, y = data()
    classifier = wrap(network())
    trainer = AdversarialTrainerENGM(classifier, attack(classifier), alpha="auto", objective="vanilla")
    size = 4  # two batches, the last one smaller
    if generator:
        batches = PyTorchDataGenerator(DataLoader(TensorDataset(*map(torch.tensor, (x, y))), size), len(x), size)
        trainer.fit_generator(batches, nb_epochs=2, **QUIET)
    else:
        trainer.fit(x, y, batch_size=size, nb_epochs=2, **QUIET)
    assert isinstance(trainer.method, ENGM)
    assert 0 < trainer.method.alpha < float("inf")
    assert trainer.method.state_dict()["measured"] == 2


@pytest.mark.parametrize("generator", [False, True])
def test_a_fit_in_which_nothing_was_limited_warns_and_the_next_goes_on(generator: bool) -> None:
    x, y = data()
    classifier = wrap(network())
    method = ENGM(classifier.model, alpha="auto", warmup=3)
    trainer = AdversarialTrainerENGM(classifier, attack(classifier), objective="vanilla", method=method)

    def fit() -> None:
        if generator:
            trainer.fit_generator(NumpyGenerator(x, y), nb_epochs=2, **QUIET)
        else:
            trainer.fit(x, y, batch_size=6, nb_epochs=2, **QUIET)

    with pytest.warns(UserWarning, match='while alpha="auto" was still measuring: nothing was limited'):
        fit()
    assert method.alpha == float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit()
    assert 0 < method.alpha < float("inf")


def test_every_method_weighs_in_its_own_way() -> None:
    x, y = data()
    found = {}
    for name in METHODS:
        classifier = wrap(network())
        limit = {"alpha": 0.05 if name == "n-engm" else ALPHA}
        trainer = AdversarialTrainerENGM(classifier, attack(classifier), **limit, objective="vanilla", method=name)
        trainer.fit(x, y, nb_epochs=1, **QUIET)
        assert getattr(trainer.method, "alpha", limit["alpha"]) == limit["alpha"]
        found[name] = torch.cat([p.detach().flatten() for p in classifier.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    for name, value in found.items():
        assert float((value - start).norm()) > 1e-3, name
        same = [other for other, v in found.items() if torch.equal(v, value)]
        # MGNC's limit of 25 is far.
        assert set(same) <= ({name, "msgd", "mgnc"} if name in ("msgd", "mgnc") else {name})
    direction = found["sngm"] - start
    assert float(direction.norm()) == pytest.approx(RATE, rel=1e-4)


def test_defaults_of_alpha_are_the_methods() -> None:
    classifier = wrap(network())
    for name, own in (("engm", 5.0), ("n-engm", 0.5)):
        method: Any = AdversarialTrainerENGM(classifier, attack(classifier), method=name).method
        assert method.alpha == own
    given = AENGM(classifier.model, alpha=2.0, tau=3)
    assert AdversarialTrainerENGM(classifier, attack(classifier), method=given).method is given


def test_n_engm_differentiates_by_the_adversarial_examples() -> None:
    x, y = data()
    model = network()
    classifier, twin = wrap(model), copy.deepcopy(model)
    adversarial = torch.from_numpy(attack(wrap(twin)).generate(x, y)).requires_grad_()
    losses = F.cross_entropy(twin(adversarial), torch.from_numpy(y), reduction="none")
    expected = stepped(twin, losses, capped(norms(twin, losses, [adversarial]), 0.05))
    trainer = AdversarialTrainerENGM(classifier, attack(classifier), 0.05, "vanilla", method="n-engm")
    trainer.fit(x, y, nb_epochs=1, **QUIET)
    assert_at(model, expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("base", [Vanilla, TRADES])
def test_an_objective_attacks_by_itself(base: Any, last: bool) -> None:
    """Through the preprocessing, within the clip values, with the channels where they are."""
    x, y = data()
    inner = PGD(eps=0.1, alpha=0.05, steps=3, random_start=True)
    objective = AWP(base=base(attack=inner), gamma=0.05)
    model, plain = network(last=last), network()
    labels, clean = torch.from_numpy(y), torch.from_numpy(x)
    source = torch.Generator().manual_seed(torch.initial_seed())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner((x - 0.4) / 0.5)
            return logits

    adversarial = objective.adversarial(Whole(), clean, labels, generator=source)
    before = [p.detach().clone() for p in plain.parameters()]
    inputs = (plain, (clean - 0.4) / 0.5, (adversarial - 0.4) / 0.5, labels)
    with objective.perturbed(*inputs):
        losses = objective.losses(*inputs)
        weights = torch.tensor(capped(norms(plain, losses)))
        gradients = torch.autograd.grad((weights * losses).mean(), list(plain.parameters()))
    expected = [p - RATE * g for p, g in zip(before, gradients, strict=True)]
    shape = {"input_shape": (6, 5, 3), "channels_first": False} if last else {}
    np.random.seed(0)
    trainer = AdversarialTrainerENGM(wrap(model, preprocessing=(0.4, 0.5), **shape), None, ALPHA, objective)
    generator = NumpyGenerator(np.moveaxis(x, 1, -1).copy() if last else x, y)
    trainer.fit_generator(generator, nb_epochs=1, **QUIET)
    assert_at(model, expected)
    moved = [p.detach().clone() for p in model.parameters()]
    trainer.fit_generator(generator, nb_epochs=1, **QUIET)
    assert any(not torch.equal(p.detach(), q) for p, q in zip(model.parameters(), moved, strict=True))


class NumpyGenerator(NumpyDataGenerator):  # type: ignore[misc]
    """The whole of the data, in order."""

    def __init__(self, x: Array, y: Array) -> None:
        super().__init__(x, y, batch_size=len(x), shuffle=False)


def test_random_starts_advance_from_batch_to_batch() -> None:
    seen: list[Tensor] = []

    class Spy(Vanilla):
        def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
            seen.append((adversarial - x).detach())
            return super().losses(model, x, adversarial, y)

    x, y = data(3)
    inner = PGD(eps=0.1, alpha=0.001, steps=1, random_start=True)
    trainer = AdversarialTrainerENGM(wrap(network()), None, objective=Spy(attack=inner))
    trainer.fit_generator(NumpyGenerator(x, y), nb_epochs=2, **QUIET)
    assert float((seen[0] - seen[1]).abs().max()) > 0.02


def test_the_last_short_batch_counts_and_numpys_seed_rules_the_order() -> None:
    x, y = data(7)
    x[:, 0, 0, 0] = np.arange(7) / 7
    batches: list[Array] = []

    class Watched(PyTorchClassifier):  # type: ignore[misc]
        def _apply_preprocessing(self, x: Any, y: Any, fit: bool = False, no_grad: bool = True) -> Any:
            if fit:
                batches.append(np.round(np.asarray(x)[:, 0, 0, 0] * 7).astype(int))
            return super()._apply_preprocessing(x, y, fit, no_grad)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    classifier = Watched(model, nn.CrossEntropyLoss(), (3, 6, 5), 4, optimizer=optimizer, device_type="cpu")
    np.random.seed(3)
    AdversarialTrainerENGM(classifier, attack(classifier)).fit(x, y, batch_size=3, nb_epochs=2, **QUIET)
    order, expected = np.arange(7), []
    np.random.seed(3)
    for _ in range(2):
        np.random.shuffle(order)
        expected += [order[:3].copy(), order[3:6].copy(), order[6:].copy()]
    for found, one in zip(batches[::2], expected, strict=True):
        np.testing.assert_array_equal(found, one)


def test_modes_preprocessing_and_the_callers_data() -> None:
    x, y = data()
    modes: list[bool] = []
    model = network()
    model.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    classifier = wrap(
        model, preprocessing_defences=[SpatialSmoothing(window_size=3, channels_first=True, apply_fit=True)]
    )
    smooth = classifier._apply_preprocessing(x, None, fit=True)[0]
    given: list[Array] = []
    model.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().numpy().copy()))

    class Spy(firstorder.art.PGD):  # type: ignore[misc, name-defined]
        def generate(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
            assert not model.training
            found = super().generate(x, y, **kwargs)
            modes.clear()
            given.clear()
            x += 1  # what an attack does to its input is its own business
            return found

    keep = x.copy()
    AdversarialTrainerENGM(classifier, Spy(classifier, eps=0.0001, max_iter=1, **QUIET)).fit(x, y, nb_epochs=1, **QUIET)
    assert modes == [True, True]
    np.testing.assert_array_equal(x, keep)
    np.testing.assert_allclose(np.sort(given[0], axis=0), np.sort(smooth, axis=0), atol=1e-6)
    assert np.abs(smooth - x).max() > 0.1
    assert not model.training


def test_defences_of_training_only_apply() -> None:
    x, y = data()
    found = []
    for sigma in (1e-6, 1.0):
        np.random.seed(0)
        model = network()
        noise = GaussianAugmentation(sigma=sigma, augmentation=False, apply_fit=True, apply_predict=False)
        classifier = wrap(model, preprocessing_defences=[noise])
        AdversarialTrainerENGM(classifier, attack(classifier)).fit(x, y, nb_epochs=1, **QUIET)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_robust_accuracy_rises() -> None:
    images = mnist()
    x, y = images.x[:200].numpy(), images.y[:200].numpy()
    torch.manual_seed(0)
    np.random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 28, 28), 10, optimizer=optimizer, clip_values=(0, 1), device_type="cpu"
    )
    pgd = ProjectedGradientDescent(classifier, eps=0.03, eps_step=0.012, max_iter=4, verbose=False)

    def robust() -> float:
        return float(np.mean(classifier.predict(pgd.generate(x, y)).argmax(1) == y))

    before = robust()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    AdversarialTrainerENGM(classifier, pgd, 5.0, "vanilla").fit(
        x, y, batch_size=4, nb_epochs=2, scheduler=scheduler, **QUIET
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.015)
    assert before < 0.2
    assert robust() > 0.5


def test_epochs_are_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = data()
    classifier = wrap(network(), preprocessing=(0.4, 0.5))
    trainer = AdversarialTrainerENGM(classifier, attack(classifier))
    with caplog.at_level(logging.INFO, logger="firstorder.art.training"):
        trainer.fit(x, y, validation_data=(x, y), nb_epochs=2, batch_size=4)
    lines = [r.getMessage() for r in caplog.records if r.name == "firstorder.art.training"]
    assert len(lines) == 2
    assert f"acc(val): {np.mean(classifier.predict(x).argmax(1) == y):.4f}" in lines[-1]
    shown = capsys.readouterr()
    assert "Adversarial Training ENGM - Epochs" in shown.err
    assert shown.out == ""


class Both(Vanilla):
    """Half of the loss at x, half at x', the clean forward `last` or not."""

    last = False

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        order = (adversarial, x) if self.last else (x, adversarial)
        losses = [F.cross_entropy(model(v), y, reduction="none") for v in order]
        return (losses[0] + losses[1]) / 2


class CleanLast(Both):
    last = True


class Joint(Vanilla):
    """The same from one forward."""

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        clean, attacked = model(torch.cat([x, adversarial])).chunk(2)
        return (F.cross_entropy(clean, y, reduction="none") + F.cross_entropy(attacked, y, reduction="none")) / 2


def logged(objective: Objective, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The accuracy of every epoch, as logged."""
    x, y = data(40)
    np.random.seed(0)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="firstorder.art.training"):
        trainer = AdversarialTrainerENGM(wrap(network()), None, objective=objective)
        trainer.fit(x, y, nb_epochs=4, batch_size=8, **QUIET)
    lines = [r.getMessage() for r in caplog.records if r.name == "firstorder.art.training"]
    return [line.partition(" acc: ")[2] for line in lines]


def test_the_logged_accuracy_is_that_of_the_adversarial_examples(caplog: pytest.LogCaptureFixture) -> None:
    inner = PGD(eps=0.2, alpha=0.1, steps=2)
    right = logged(Both(attack=inner), caplog)
    assert len({*right}) > 1
    assert logged(CleanLast(attack=inner), caplog) == right
    assert logged(Joint(attack=inner), caplog) == right


INTEGERS = (np.uint8, np.int8, np.int16, np.int32, np.int64)


@pytest.mark.parametrize("name", ["vanilla", "trades", "mart"])
def test_labels_of_every_integer_type_train_alike(name: Any) -> None:
    x, y = data()
    expected = by_hand(network(), attack, name)
    for labels in (*(y.astype(kind) for kind in INTEGERS), np.eye(4, dtype=np.uint8)[y], np.eye(4)[y]):
        model = network()
        classifier = wrap(model)
        AdversarialTrainerENGM(classifier, attack(classifier), ALPHA, name).fit(
            x, labels, batch_size=6, nb_epochs=1, **QUIET
        )
        assert_at(model, expected)


@pytest.mark.parametrize("base", ["vanilla", "trades"])
def test_probabilities_are_trained_on(base: Any) -> None:
    x, y = data()
    rows = (0.7 * np.eye(4) + 0.3 * np.eye(4)[[1, 2, 3, 0]])[y].astype(np.float32)
    model, twin = network(), network()
    adversarial = torch.from_numpy(arts_own(wrap(twin)).generate(x, np.eye(4, dtype=np.float32)[y]))
    twin.zero_grad()
    clean, attacked = twin(torch.from_numpy(x)), twin(adversarial)
    losses = -(torch.from_numpy(rows) * (attacked if base == "vanilla" else clean).log_softmax(1)).sum(1)
    if base == "trades":
        p, q = clean.softmax(1), attacked.softmax(1)
        losses = losses + 6 * (p * (p / q).log()).sum(1)
    expected = stepped(twin, losses, capped(norms(twin, losses)))
    classifier = wrap(model)

    class Given(ProjectedGradientDescent):  # type: ignore[misc]
        def generate(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
            assert {*map(tuple, y)} == {*map(tuple, rows)}  # as they are, not one-hot
            return super().generate(x, np.eye(4, dtype=np.float32)[y.argmax(1)], **kwargs)

    given = Given(classifier, eps=0.1, eps_step=0.05, max_iter=3, **QUIET)
    AdversarialTrainerENGM(classifier, given, ALPHA, base).fit(x, rows, batch_size=6, nb_epochs=1, **QUIET)
    assert_at(model, expected)


def test_labels_that_mean_nothing_are_refused_before_work() -> None:
    x, y = data()
    hot = np.eye(4, dtype=np.float32)[y]
    several, soft = hot.copy(), 0.8 * hot + 0.05
    several[1, :2] = 1
    inner = PGD(eps=0.1, steps=1)
    made: list[tuple[Any, Array, str]] = [
        ("vanilla", several, "one-hot"),
        ("trades", several, "one-hot"),
        ("mart", several, "one-hot"),
        ("mart", soft, "MARTLoss is defined for single classes"),
        (Vanilla(attack=inner), several, "one-hot"),
        (MART(attack=inner), soft, "MARTLoss is defined for single classes"),
    ]
    for objective, rows, message in made:
        model = network()
        before = copy.deepcopy(model.state_dict())
        classifier = wrap(model)
        own = isinstance(objective, Objective)

        class Never(firstorder.art.PGD):  # type: ignore[misc, name-defined]
            def generate(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
                raise AssertionError("the attack ran")

        never = None if own else Never(classifier, **QUIET)
        trainer = AdversarialTrainerENGM(classifier, never, objective=objective)
        with pytest.raises(ValueError, match=message):
            trainer.fit(x, rows, nb_epochs=1, **QUIET)
        with pytest.raises(ValueError, match=message):
            trainer.fit_generator(NumpyGenerator(x, rows), nb_epochs=1, **QUIET)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer = AdversarialTrainerENGM(wrap(network()), None, objective=Vanilla(attack=inner))
    with pytest.raises(ValueError, match="one-hot"):
        trainer.fit(x, hot, validation_data=(x, several), nb_epochs=1, **QUIET)


WRONG: list[tuple[Any, str]] = [
    (lambda y: y - 5, r"labels span -5..-\d, but the model has classes 0..3"),
    (lambda y: y + 4, r"labels span \d..7, but the model has classes 0..3"),
    (lambda y: (y - 5)[:, None], "labels span -5"),
    (lambda y: y + 0.4, "fractions; class indices must be whole numbers"),
    (lambda y: np.concatenate([y, y]), r"y has shape \(12,\); pass one-hot rows \(6, K\) or indices \(6,\)"),
    (lambda y: y[:4], r"y has shape \(4,\)"),
    (lambda y: np.eye(4)[y][:5], r"y has shape \(5, 4\)"),
    (lambda y: np.eye(7)[y], r"y has shape \(6, 7\), but the classifier has 4 classes"),
    (lambda y: y[:, None, None], r"y has shape \(6, 1, 1\)"),
    (lambda y: np.full((6, 4), np.nan), "NaN"),
    (lambda y: None, r"y has shape \(\)"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_labels_that_are_none_are_refused_as_an_attack_refuses_them(case: int) -> None:
    x, y = data()
    y[0], y[1] = 0, 3
    change, message = WRONG[case]
    model = network()
    before = copy.deepcopy(model.state_dict())
    classifier = wrap(model)
    trainer = AdversarialTrainerENGM(classifier, attack(classifier), objective="vanilla")
    with pytest.raises(ValueError, match=message):
        trainer.fit(x, change(y), batch_size=3, nb_epochs=1, **QUIET)
    with pytest.raises(ValueError, match=message):
        trainer.fit(x, y, validation_data=(x, change(y)), nb_epochs=1, **QUIET)

    class Given(NumpyGenerator):
        def get_batch(self) -> tuple[Array, Array]:
            return x, change(y)

    with pytest.raises(ValueError, match=message):
        trainer.fit_generator(Given(x, y), nb_epochs=1, **QUIET)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sizes_that_train_nothing_are_refused() -> None:
    x, y = data()
    classifier = wrap(network())
    trainer = AdversarialTrainerENGM(classifier, attack(classifier), objective="vanilla")
    for wrong in (0, -1, 2.5, True):
        for name in ("batch_size", "nb_epochs"):
            with pytest.raises(ValueError, match=f"{name}={wrong!r} must be an integer of at least 1"):
                trainer.fit(x, y, **{name: wrong}, **QUIET)
        with pytest.raises(ValueError, match=f"nb_epochs={wrong!r} must be an integer"):
            trainer.fit_generator(NumpyGenerator(x, y), nb_epochs=wrong, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has shape \(0, 3, 6, 5\); pass at least one example"):
        trainer.fit(x[:0], y[:0], **QUIET)


def test_errors_name_the_remedy() -> None:
    x, y = data()
    classifier = wrap(network())
    pgd = attack(classifier)
    other = ScikitlearnLogisticRegression(LogisticRegression().fit(x.reshape(6, -1), y))
    inner = TRADES(attack=PGD())
    targeted = firstorder.art.PGD(classifier, targeted=True)
    for build, match in [
        (lambda: AdversarialTrainerENGM(other, pgd), "PyTorchClassifier"),
        (lambda: AdversarialTrainerENGM(classifier, None), "EvasionAttack"),
        (lambda: AdversarialTrainerENGM(classifier, PGD()), "EvasionAttack"),  # type: ignore[arg-type]
        (lambda: AdversarialTrainerENGM(classifier, targeted), "targeted=False"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, objective="cure"), "'trades'"),  # type: ignore[arg-type]
        (lambda: AdversarialTrainerENGM(classifier, pgd, objective="vanilla", beta=1.0), "no beta"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, beta=-1.0), "beta"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, objective=inner), "leave attack"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, method="sgd"), "did you mean msgd"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, method=ENGM(network())), "classifier.model"),
        (lambda: AdversarialTrainerENGM(classifier, pgd, -1.0), "alpha"),
        (lambda: AdversarialTrainerENGM(wrap(network(), optimizer=None), pgd).fit(x, y, **QUIET), "optimizer"),
        (lambda: AdversarialTrainerENGM(classifier, pgd).fit(x, y, scheduler=1), "lr_scheduler"),  # type: ignore[arg-type]
        (lambda: ENGMCriterion(nn.Linear(1, 1)), "firstorder.training"),  # type: ignore[arg-type]
        (lambda: ENGMCriterion(ENGM(network()), nn.Softmax(1)), "reduction"),
    ]:
        with pytest.raises(ValueError, match=match):
            build()
    smooth = wrap(network(), preprocessing_defences=[SpatialSmoothing(window_size=3, channels_first=True)])
    with pytest.raises(ValueError, match="PyTorch version"):
        AdversarialTrainerENGM(smooth, None, objective=inner)
    generator = NumpyGenerator(x, y)
    generator._size = None
    with pytest.raises(ValueError, match="size"):
        AdversarialTrainerENGM(classifier, pgd).fit_generator(generator)


METHOD_OF: dict[str, Any] = {
    "engm": lambda model: ENGM(model, alpha=ALPHA),
    "n-engm": lambda model: NENGM(model, alpha=0.05),
}


def expected_step(model: nn.Module, name: str, x: Array, y: Array) -> list[Tensor]:
    twin = copy.deepcopy(model)
    inputs = torch.from_numpy(x).requires_grad_()
    losses = F.cross_entropy(twin(inputs), torch.from_numpy(y), reduction="none")
    values = norms(twin, losses, [inputs] if name == "n-engm" else None)
    return stepped(twin, losses, capped(values, 0.05 if name == "n-engm" else ALPHA))


@pytest.mark.parametrize("build", [network, stacked])
@pytest.mark.parametrize("name", METHOD_OF)
@pytest.mark.parametrize("one_hot", [False, True])
def test_fit_with_the_criterion_is_the_step_by_hand(build: Any, name: str, one_hot: bool) -> None:
    x, y = data()
    model = build()
    expected = expected_step(model, name, x, y)
    classifier = wrap(model, ENGMCriterion(METHOD_OF[name](model)))
    classifier.fit(x, np.eye(4, dtype=np.float32)[y] if one_hot else y, batch_size=6, nb_epochs=1)
    assert_at(model, expected)


@pytest.mark.parametrize("name", METHOD_OF)
def test_arts_own_trainer_with_the_criterion(name: str) -> None:
    x, y = data()
    model = network()
    adversarial = arts_own(wrap(copy.deepcopy(model))).generate(x, y)
    expected = expected_step(model, name, adversarial, y)
    classifier = wrap(model, ENGMCriterion(METHOD_OF[name](model)))
    one_hot = np.eye(4, dtype=np.float32)[y]
    AdversarialTrainer(classifier, arts_own(classifier), ratio=1.0).fit(x, one_hot, batch_size=6, nb_epochs=1)
    assert_at(model, expected)


def test_arts_generator_with_the_criterion() -> None:
    x, y = data()
    model = network()
    expected = expected_step(model, "n-engm", x, y)
    classifier = wrap(model, ENGMCriterion(NENGM(model, alpha=0.05)), preprocessing=None)
    tensors = TensorDataset(torch.from_numpy(x), F.one_hot(torch.from_numpy(y), 4))
    classifier.fit_generator(PyTorchDataGenerator(DataLoader(tensors, batch_size=6), size=6, batch_size=6), nb_epochs=1)
    assert_at(model, expected)


@pytest.mark.parametrize("name", METHOD_OF)
@pytest.mark.parametrize("training", [False, True])
def test_attacks_and_losses_are_not_weighted(name: str, training: bool) -> None:
    x, y = data()
    one_hot = np.eye(4, dtype=np.float32)[y]
    model = network()
    ours, plain = wrap(model, ENGMCriterion(METHOD_OF[name](model))), wrap(copy.deepcopy(model))
    model.train(training)
    np.testing.assert_allclose(ours.loss_gradient(x, one_hot), plain.loss_gradient(x, one_hot), atol=1e-7)
    for reduction in ("none", "mean", "sum"):
        np.testing.assert_allclose(
            ours.compute_loss(x, one_hot, reduction), plain.compute_loss(x, one_hot, reduction), rtol=1e-6
        )
    np.testing.assert_allclose(attack(ours).generate(x, y), attack(plain).generate(x, y), atol=1e-6)
    assert ours.predict(x, training_mode=True).shape == (6, 4)


@pytest.mark.parametrize("name", METHOD_OF)
@pytest.mark.parametrize("preprocessing", [None, (0.0, 1.0)])
def test_the_gradient_in_training_mode_goes_through_the_hook(name: str, preprocessing: Any) -> None:
    x, y = data()
    model = network()
    classifier = wrap(model, ENGMCriterion(METHOD_OF[name](model)), preprocessing=preprocessing)
    found = classifier.loss_gradient(x, np.eye(4, dtype=np.float32)[y], training_mode=True)
    inputs = torch.from_numpy(x).requires_grad_()
    losses = F.cross_entropy(model(inputs), torch.from_numpy(y), reduction="none")
    gradient = torch.autograd.grad(losses.mean(), inputs, retain_graph=True)[0]
    values = norms(model, losses, [inputs] if name == "n-engm" else None)
    weights = torch.tensor(capped(values, 0.05 if name == "n-engm" else ALPHA))
    np.testing.assert_allclose(found, (weights[:, None, None, None] * gradient).numpy(), rtol=0, atol=1e-6)


def test_reductions_and_labels_of_the_criterion() -> None:
    x, y = (torch.from_numpy(v) for v in data())
    model = network().train()
    criterion = ENGMCriterion(ENGM(model, alpha=ALPHA))
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    expected = torch.tensor(capped(norms(model, losses))) * losses
    assert criterion.reduction == "mean"
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        criterion.reduction = reduction
        for labels in (y, F.one_hot(y, 4), F.one_hot(y, 4).float()):
            torch.testing.assert_close(criterion(logits, labels), value, rtol=1e-5, atol=1e-6)
    criterion.reduction = "median"
    with pytest.raises(ValueError, match="'mean'"):
        criterion(logits, y)
    criterion.reduction = "none"
    with torch.no_grad():
        torch.testing.assert_close(criterion(logits, y), losses)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        with torch.no_grad():
            torch.testing.assert_close(criterion(logits, y.to(kind)), losses)
    several = F.one_hot(y, 4)
    several[0] = 1
    for wrong in (several, several.float(), y[:, None], y.float()):
        with pytest.raises(ValueError, match=r"one-hot|indices must be integers"):
            criterion(logits, wrong)
    soft = torch.full((6, 4), 0.25)
    model.eval()
    torch.testing.assert_close(criterion(logits, soft), F.cross_entropy(logits, soft, reduction="none"))
    smoothed = ENGMCriterion(ENGM(model), nn.CrossEntropyLoss(label_smoothing=0.1))
    torch.testing.assert_close(smoothed(logits, y), F.cross_entropy(logits, y, label_smoothing=0.1))


def test_the_criterions_hook_and_its_end() -> None:
    x, y = (torch.from_numpy(v) for v in data())
    model = network().train()
    method: GradientMethod = NENGM(model, alpha=0.05)
    criterion = ENGMCriterion(method)
    logits = model(x)
    criterion(logits, y).backward()
    assert not x.requires_grad
    with pytest.raises(ValueError, match="one forward"):
        criterion(logits, y)
    criterion.close()
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="close"):
        criterion(model(x), y)
    engm = ENGMCriterion(ENGM(model))
    assert not model._forward_pre_hooks
    engm.close()


def test_a_first_layer_that_is_used_again_keeps_the_graph() -> None:
    x, y = data()
    first = nn.Tanh()
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(90, 8), first, nn.Linear(8, 4))
    expected = expected_step(model, "n-engm", x, y)
    wrap(model, ENGMCriterion(NENGM(model, alpha=0.05))).fit(x, y, batch_size=6, nb_epochs=1)
    assert_at(model, expected)


@pytest.mark.parametrize("name", METHOD_OF)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [network, stacked])
def test_a_clone_for_refitting_asks_for_a_criterion_of_its_own(build: Any, name: str, training: bool) -> None:
    x, y = data()
    model = build()
    classifier = wrap(model, ENGMCriterion(METHOD_OF[name](model)))
    clone = classifier.clone_for_refitting()
    model.train(training)
    start = [p.detach().clone() for p in clone.model.parameters()]
    for call in (lambda: clone.fit(x, y, batch_size=6, nb_epochs=1), lambda: clone.loss_gradient(x, np.eye(4)[y])):
        with pytest.raises(
            ValueError, match=r"another model .* set_params\(loss=ENGMCriterion\(N?ENGM\(classifier.model"
        ):
            call()
    assert all(torch.equal(p, before) for p, before in zip(clone.model.parameters(), start, strict=True))
    assert clone.predict(x).shape == (6, 4)
    expected = expected_step(clone.model, name, x, y)
    clone.set_params(loss=ENGMCriterion(METHOD_OF[name](clone.model)))
    clone.fit(x, y, batch_size=6, nb_epochs=1)
    assert_at(clone.model, expected)


def test_a_model_that_is_frozen_in_part_is_its_own() -> None:
    """Its parameters are looked for behind the logits: those of other modules there do not matter."""
    x, y = (torch.from_numpy(v) for v in data())
    model, head = network().train(), nn.Linear(4, 4)
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    criterion = ENGMCriterion(ENGM(model, alpha=ALPHA))
    assert criterion(head(model(x)), y).requires_grad
    model.requires_grad_(False).eval()
    assert criterion(model(x.requires_grad_()), y).requires_grad
    with pytest.raises(ValueError, match="another model"):
        criterion(network()(x), y)


def test_they_are_listed_and_loaded_on_demand() -> None:
    assert {"AdversarialTrainerENGM", "ENGMCriterion", "PGD"} <= set(dir(firstorder.art))
    with pytest.raises(AttributeError, match="AdversarialTrainerFENGM"):
        firstorder.art.AdversarialTrainerFENGM  # noqa: B018
