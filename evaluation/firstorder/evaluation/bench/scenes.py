"""On which models and images speed is compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.evaluation.names import models, packaged


class Case(NamedTuple):
    """What a contender is given: a module, images x (N, C, H, W) in [0, 1], labels y (N,), and the attack's words."""

    module: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    alpha: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An attack and how many images it gets.

    Attributes:
        eps: the radius (L-infinity), in 255ths.
        alpha: the step size, in 255ths.
        steps: gradients per image.
        images: how many.
        rivals: the contenders of other packages that are run in a comparison of ordinary length.
    """

    eps: float
    alpha: float
    steps: int
    images: int
    rivals: tuple[str, ...] = ()

    def label(self) -> str:
        """As it is written in tables."""
        return f"ε = {self.eps:g}/255, PGD-{self.steps}, {self.images} images"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model in the comparison.

    Attributes:
        name: of the model.
        step: the run whose time per step is taken.
        verdicts: the runs until robust accuracy is known.
    """

    name: str
    step: Setting
    verdicts: tuple[Setting, ...] = field(default=())

    def case(self, setting: Setting) -> Case:
        """The model, as it comes from training, and its images."""
        module = models.load(self.name).requires_grad_(True)  # a package may compute gradients that nobody asked for
        if self.name in packaged.MODELS:
            images = packaged.MODELS[self.name].images()
            x, y = images.x[: setting.images], images.y[: setting.images]
        else:  # photographs, enlarged to what the ImageNet classifiers take, and what these see in them
            side = models.LITE[self.name]
            x = F.interpolate(packaged.cifar10().x[: setting.images], size=(side, side), mode="bilinear")
            with torch.no_grad():
                y = module(x).argmax(1)
        return Case(module, x, y, setting.eps / 255, setting.alpha / 255, setting.steps)


TORCHATTACKS, ART, FOOLBOX, ADV_LIB = (
    "torchattacks PGD",
    "ART ProjectedGradientDescent",
    "foolbox LinfPGD",
    "adversarial-library pgd_linf",
)

SCENES = (
    Scene(
        name="mnist-cnn",
        step=Setting(eps=76.5, alpha=2.55, steps=20, images=128),
        verdicts=(Setting(eps=76.5, alpha=2.55, steps=100, images=200, rivals=(TORCHATTACKS, ART, FOOLBOX, ADV_LIB)),),
    ),
    Scene(
        name="cifar10-resnet18",
        step=Setting(eps=8, alpha=2, steps=3, images=32),
        verdicts=(
            Setting(eps=1, alpha=2, steps=100, images=100, rivals=(TORCHATTACKS, ART)),
            Setting(eps=8, alpha=2, steps=100, images=100, rivals=(TORCHATTACKS,)),
        ),
    ),
    Scene(
        name="efficientnet-lite0",
        step=Setting(eps=4, alpha=1, steps=3, images=8),
        verdicts=(Setting(eps=0.25, alpha=0.1, steps=20, images=8, rivals=(TORCHATTACKS, ART)),),
    ),
)
"""The comparison of `firstorder bench`."""


def quick(scene: Scene) -> Scene:
    """The scene with a tenth of the images and of the steps, at least two, to try the comparison."""

    def less(setting: Setting) -> Setting:
        return replace(setting, images=max(setting.images // 10, 2), steps=max(setting.steps // 10, 2))

    return replace(scene, step=less(scene.step), verdicts=tuple(less(setting) for setting in scene.verdicts))
