"""The architectures of the packaged models, and of networks to be trained."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two 5 x 5 convolutions of stride 2 and two linear layers, 215 370 parameters: (N, 1, 28, 28) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class SmallResNet(nn.Module):
    """A 3 x 3 convolution and three residual blocks of stride 2, 304 154 parameters: (N, 3, 32, 32) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = itertools.pairwise((16, 32, 64, 128))
        self.blocks = nn.Sequential(*(_Block(given, width, stride=2) for given, width in widths))
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class ResNet18(nn.Module):
    """ResNet-18 as in the CIFAR-10 literature, 11 173 962 parameters: (N, 3, 32, 32) to (N, 10).

    He et al. 2016 with a 3 x 3 convolution of stride 1 in front and no max-pooling; parameters are named as in most
    checkpoints of it (`conv1`, `layer1.0.conv1`, `layer2.0.shortcut.0`, `linear`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (given, width) in enumerate(itertools.pairwise((64, 64, 128, 256, 512)), 1):
            blocks = (_Block(given, width, stride=1 + (i > 1)), _Block(width, width, stride=1))
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class KerasCNN(nn.Module):
    """The CNN of the package cifar-10-model, 968 394 parameters: (N, 3, 32, 32) to (N, 10).

    Six 3 x 3 convolutions without padding, ReLU before BatchNorm, three linear layers. It takes images in [0, 1] and
    multiplies them by 255, as the package trained it on bytes that it does not normalise. Its last layer has a ReLU
    too: logits are at least 0, and where one is 0 it has no gradient.
    """

    WIDTHS = (64, 64, 128, 128, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (given, width) in enumerate(itertools.pairwise((3, *self.WIDTHS))):
            layers += [nn.Conv2d(given, width, 3), nn.ReLU(), nn.BatchNorm2d(width, eps=1e-3)]
            layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
        layers.append(nn.Flatten())
        for given, width in itertools.pairwise((64, 1024, 512, 10)):
            layers += [nn.Linear(given, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(255 * x)
        return logits


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, given: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or given != width:
            convolution = nn.Conv2d(given, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))
