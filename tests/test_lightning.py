"""firstorder.lightning: the gradients of a plain loop, bit for bit; accumulation, states, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from firstorder.attacks import PGD
from firstorder.lightning import ENGMModule
from firstorder.training import AENGM, ENGM, MGNC, automatic

lightning: Any = pytest.importorskip("pytorch_lightning")

ATTACK = PGD(eps=0.1, alpha=0.05, steps=2, random_start=False)
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "engm": partial(ENGM, alpha=0.05),
    "a-engm": partial(AENGM, alpha=0.05, tau=2),
    "mgnc": partial(MGNC, clip=0.01),
}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def examples() -> TensorDataset:
    source = torch.Generator().manual_seed(1)
    x = torch.rand(24, 3, 2, 2, generator=source, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (24,), generator=source))


class Classifier(ENGMModule, lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, method: Any) -> None:
        super().__init__()
        self.gradient_method = method
        self.layers = layers()
        self.gradients: list[list[Tensor]] = []
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        adversarial = ATTACK(self, x, y).requires_grad_()
        losses = F.cross_entropy(self(adversarial), y, reduction="none")
        return {"loss": self.per_example(losses, adversarial)} if index % 2 else self.per_example(losses, adversarial)

    def on_after_backward(self) -> None:
        assert self.weighting is not None
        self.gradients.append([p.grad.clone() for p in self.parameters()])
        self.weights.append(self.weighting.weights)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Manual(Classifier):
    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, 0))
        optimizer.step()


class Bare(Classifier):
    """Returns the losses alone."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(ATTACK(self, x, y)), y, reduction="none")


def trainer(folder: Path, **options: Any) -> Any:
    given = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder}
    return lightning.Trainer(**{**given, **quiet, **options})


def loop(method: Any, *, accumulate: int = 1, epochs: int = 1) -> tuple[nn.Module, list[list[Tensor]], list[Tensor]]:
    """The plain loop: what Lightning must give."""
    model = layers()
    own = method(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    gradients, weights = [], []
    for _ in range(epochs):
        for i, (x, y) in enumerate(DataLoader(examples(), batch_size=4)):
            if i % accumulate == 0:
                optimizer.zero_grad()
            adversarial = ATTACK(model, x, y).requires_grad_()
            losses = F.cross_entropy(model(adversarial), y, reduction="none")

            class Part:
                def scale(self, outputs: Tensor) -> Tensor:
                    return outputs / accumulate

            weights.append(own.backward(losses, adversarial, scaler=Part()).weights)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            if (i + 1) % accumulate == 0:
                optimizer.step()
    return model, gradients, weights


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [Classifier, Manual, Bare])
def test_gradients_are_the_plain_loops(name: str, kind: type[Classifier], tmp_path: Path) -> None:
    if kind is Bare and name == "a-engm":
        pytest.skip("needs the inputs")
    module = kind(METHODS[name])
    trainer(tmp_path).fit(module, DataLoader(examples(), batch_size=4))
    model, gradients, weights = loop(METHODS[name])
    assert len(gradients) == 6
    assert any((one < 1).any() for one in weights)
    assert all(same(a, b) for a, b in zip(module.gradients, gradients, strict=True))
    assert same(module.weights, weights)
    assert same(list(module.layers.parameters()), list(model.parameters()))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_leaves_the_weights(accumulate: int, tmp_path: Path) -> None:
    module = Classifier(METHODS["engm"])
    options = {"accumulate_grad_batches": accumulate}
    trainer(tmp_path, **options).fit(module, DataLoader(examples(), batch_size=4))
    model, gradients, weights = loop(METHODS["engm"], accumulate=accumulate)
    tight = {"rtol": 1e-13, "atol": 1e-15}
    for found, expected in zip(module.gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, **tight)
    torch.testing.assert_close(module.weights, weights, **tight)
    if accumulate == 2:  # a power of two loses nothing
        assert same(list(module.layers.parameters()), list(model.parameters()))


def test_a_scaler_leaves_the_weights(tmp_path: Path) -> None:
    from pytorch_lightning.plugins.precision import MixedPrecision

    class Full(MixedPrecision):  # type: ignore[misc]
        def forward_context(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    module = Classifier(METHODS["engm"])
    plugin = Full("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer(tmp_path, plugins=[plugin]).fit(module, DataLoader(examples(), batch_size=4))
    model, gradients, weights = loop(METHODS["engm"])
    assert same(module.weights, weights)
    assert same([g / 1024 for g in module.gradients[0]], gradients[0])
    assert same(list(module.layers.parameters()), list(model.parameters()))


def test_the_state_goes_with_the_checkpoint(tmp_path: Path) -> None:
    data, method = DataLoader(examples(), batch_size=4), METHODS["a-engm"]
    first = Classifier(method)
    host = trainer(tmp_path)
    host.fit(first, data)
    host.save_checkpoint(tmp_path / "one.ckpt")
    second = Classifier(method)
    trainer(tmp_path, max_epochs=2).fit(second, data, ckpt_path=tmp_path / "one.ckpt")
    model, gradients, _ = loop(method, epochs=2)
    assert all(same(a, b) for a, b in zip(first.gradients + second.gradients, gradients, strict=True))
    assert same(list(second.layers.parameters()), list(model.parameters()))


class Stop(lightning.Callback):  # type: ignore[misc, name-defined]
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_epochs": 5}, 30),
        ({"max_epochs": 5, "max_steps": 7, "accumulate_grad_batches": 4}, 22),  # two steps an epoch
        ({"max_epochs": -1, "max_steps": 8, "accumulate_grad_batches": 2}, 16),
    ],
)
def test_a_training_that_ends_before_the_limit_is_refused(options: dict[str, Any], total: int, tmp_path: Path) -> None:
    data = DataLoader(examples(), batch_size=4)
    short = Classifier(partial(ENGM, alpha="auto", warmup=total))
    for _ in range(2):  # the second time too
        with pytest.raises(
            ValueError, match=f"measures the first {total} backwards, and the training has {total}: noth"
        ):
            trainer(tmp_path, **options).fit(short, data)
    module = Classifier(partial(ENGM, alpha="auto", warmup=total - 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the training has ended")
        trainer(tmp_path, **options).fit(module, data)
    assert module.weights[total - 1].min() < 1
    assert len(module.weights) == total


def test_a_training_of_unknown_length_warns_that_nothing_was_limited(tmp_path: Path) -> None:
    data = DataLoader(examples(), batch_size=4)
    auto = partial(ENGM, alpha="auto")
    for kind, options in ((Manual, {}), (Classifier, {"fast_dev_run": True})):
        with pytest.warns(UserWarning, match='while alpha="auto" was still measuring: nothing was limited'):
            trainer(tmp_path, **options).fit(kind(auto), data)
    with pytest.warns(UserWarning, match="nothing was limited"):
        trainer(tmp_path, max_epochs=20, callbacks=[Stop()]).fit(Classifier(auto), data)


def test_a_limit_that_is_known_may_go_on_for_a_short_time(tmp_path: Path) -> None:
    data, method = DataLoader(examples(), batch_size=4), partial(ENGM, alpha="auto")
    first, host = Classifier(method), trainer(tmp_path, max_epochs=18)
    host.fit(first, data)
    host.save_checkpoint(tmp_path / "known.ckpt")
    second = Classifier.load_from_checkpoint(tmp_path / "known.ckpt", method=method)
    trainer(tmp_path).fit(second, data)
    assert any((one < 1).any() for one in second.weights)


def test_the_first_epoch_says_what_the_limit_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "LEAST", 1)
    data, method = DataLoader(examples(), batch_size=4), partial(AENGM, alpha="auto", tau=2, beta=0.0)
    first, host = Classifier(method), trainer(tmp_path, max_epochs=3, callbacks=[Stop()])
    host.fit(first, data)
    host.save_checkpoint(tmp_path / "one.ckpt")
    second = Classifier(method)
    trainer(tmp_path, max_epochs=3).fit(second, data, ckpt_path=tmp_path / "one.ckpt")
    model, gradients, weights = loop(partial(method, warmup=6), epochs=3)
    assert all(same(a, b) for a, b in zip(first.gradients + second.gradients, gradients, strict=True))
    assert same(list(second.layers.parameters()), list(model.parameters()))
    assert all(torch.equal(one, torch.ones_like(one)) for one in first.weights)
    assert any((one < 1).any() for one in second.weights)
    assert same(second.weights, weights[6:])


def test_an_epoch_without_a_length_is_to_be_said(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(examples())

    for method in (partial(ENGM, alpha="auto"), partial(ENGM, alpha="auto", warmup=6)):
        module = Classifier(method)
        if "warmup" in method.keywords:
            trainer(tmp_path, max_epochs=2).fit(module, DataLoader(Endless(), batch_size=4))
            assert same(module.weights, loop(method, epochs=2)[2])
        else:
            with pytest.raises(ValueError, match="pass warmup="):
                trainer(tmp_path).fit(module, DataLoader(Endless(), batch_size=4))


def test_refused(tmp_path: Path) -> None:
    class Mean(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"training_step returned a loss of shape \(\); return one loss per example"):
        trainer(tmp_path).fit(Mean("engm"), DataLoader(examples(), batch_size=4))
    with pytest.raises(ValueError, match="AENGM needs the inputs; call backward"):
        trainer(tmp_path).fit(Bare("a-engm"), DataLoader(examples(), batch_size=4))
