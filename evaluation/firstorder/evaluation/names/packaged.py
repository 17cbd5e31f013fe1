"""The data and models that need no download.

Excerpts of the MNIST (500 images) and CIFAR-10 (200 images) test sets, adversarially trained networks for MNIST,
Fashion-MNIST and CIFAR-10 and a naturally trained one for MNIST come with firstorder; a CIFAR-10 ResNet-18, trained
without adversary, comes with pyautoattack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from firstorder.attacks.distribution import pip_install
from firstorder.evaluation.names.networks import SmallCNN, SmallResNet

ASSETS = Path(__file__).parent.parent / "assets"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """Test images x (N, C, H, W) in [0, 1], labels y (N,) and the names of the classes."""

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]


def mnist() -> Images:
    """The first 500 MNIST test images, (500, 1, 28, 28)."""
    return _images("MNIST", "mnist_test_500.npz", tuple("0123456789"))


def cifar10() -> Images:
    """The first 200 CIFAR-10 test images, (200, 3, 32, 32)."""
    return _images("CIFAR-10", "cifar10_test_200.npz", CIFAR10_CLASSES)


def mnist_cnn() -> nn.Module:
    """The packaged MNIST network, adversarially trained at eps = 0.3 (L-infinity), in evaluation mode."""
    return _trained(SmallCNN(), "mnist_cnn")


def mnist_cnn_natural() -> nn.Module:
    """The same network trained on MNIST without an adversary, in evaluation mode."""
    return _trained(SmallCNN(), "mnist_cnn_natural")


def fashion_cnn() -> nn.Module:
    """The packaged Fashion-MNIST network, adversarially trained at eps = 0.2 (L-infinity), in evaluation mode."""
    return _trained(SmallCNN(), "fashion_cnn")


def cifar10_small_resnet() -> nn.Module:
    """The packaged CIFAR-10 network, adversarially trained at eps = 8/255 (L-infinity), in evaluation mode."""
    return _trained(SmallResNet(), "cifar10_small_resnet")


def cifar10_resnet18() -> nn.Module:
    """The CIFAR-10 ResNet-18 that pyautoattack ships, trained without adversary, in evaluation mode."""
    spec = find_spec("pyautoattack")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the CIFAR-10 ResNet-18 comes with pyautoattack: {pip_install('robustbench')}", name="pyautoattack"
        )
    from pyautoattack.examples.resnet import ResNet18

    model: nn.Module = ResNet18()
    weights = Path(spec.origin).parent / "examples" / "model_test.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


DATA: dict[str, Callable[[], Images]] = {"mnist": mnist, "cifar10": cifar10}
"""The packaged excerpts by name."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model, and the test images that go with it.

    Attributes:
        model: loads it.
        data: the images' name in `DATA`; empty for a model that brings none.
    """

    model: Callable[[], nn.Module]
    data: str = ""

    def images(self) -> Images:
        """The images.

        Raises:
            ValueError: there are none.
        """
        if not self.data:
            raise ValueError("this packaged model brings no images; name some with --data")
        return DATA[self.data]()


MODELS = {
    "mnist-cnn": Packaged(model=mnist_cnn, data="mnist"),
    "cifar10-small-resnet": Packaged(model=cifar10_small_resnet, data="cifar10"),
    "cifar10-resnet18": Packaged(model=cifar10_resnet18, data="cifar10"),
    "mnist-cnn-natural": Packaged(model=mnist_cnn_natural, data="mnist"),
    "fashion-cnn": Packaged(model=fashion_cnn),
}
"""The packaged models by name: the only table of them."""


def get(name: str) -> Packaged:
    """The packaged model called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in MODELS:
        raise ValueError(f"there is no packaged model {name!r}; choose {' or '.join(MODELS)}")
    return MODELS[name]


def data_of(model: str, given: str | None = None, default: str | None = None) -> str:
    """The name of the images that a model is attacked on.

    Args:
        model: its name.
        given: the images that the user named.
        default: of a model that brings none.

    Raises:
        ValueError: there are none.
    """
    found = given or (MODELS[model].data if model in MODELS else "") or default
    if not found:
        raise ValueError(f"{model} brings no images; name some with --data")
    return found


def _trained(network: nn.Module, file: str) -> nn.Module:
    network.load_state_dict(load_file(ASSETS / f"{file}.safetensors"))
    return network.eval()


def _images(name: str, file: str, classes: tuple[str, ...]) -> Images:
    with np.load(ASSETS / file, allow_pickle=False) as data:
        x = torch.from_numpy(data["x"]).float() / 255
        return Images(name, x, torch.from_numpy(data["y"]).long(), classes)
