"""Defences that transform the input, against which transferred adversarial examples are tried.

[Guo] Guo et al. 2018, Countering adversarial images using input transformations; [Xie] Xie et al. 2018, Mitigating
adversarial effects through randomization; [Cohen] Cohen et al. 2019, Certified adversarial robustness via
randomized smoothing; [Xu] Xu et al. 2018, Feature squeezing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from firstorder.attacks import UNDECIDED, broken, predicted, validation
from firstorder.attacks.distribution import pip_install
from firstorder.attacks.inspection import doubt
from firstorder.evaluation.names.attacks import options

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Defence(ABC):
    """A way to classify images with a given model.

    Attributes:
        name: under which `defence` finds it.
        random: whether its predictions depend on draws.
    """

    name: ClassVar[str]
    random: ClassVar[bool] = False

    @abstractmethod
    def predict(self, model: Model, x: Tensor, generator: torch.Generator) -> Tensor:
        """Predicted classes (N,) of images x (N, C, H, W) in [0, 1] under one draw, without gradients.

        `UNDECIDED` where the logits are NaN or infinite.

        Args:
            model: returns logits (N, K); given images like x, N at a time.
            generator: source of the draw; a defence that is not random leaves it alone.
        """


@dataclass(frozen=True, kw_only=True)
class Transformation(Defence):
    """A defence that hands the model transformed images."""

    @abstractmethod
    def transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The transformed x (N, C, H, W), of the same shape, dtype and device."""

    def predict(self, model: Model, x: Tensor, generator: torch.Generator) -> Tensor:
        """Predicted classes (N,) of the transformed images."""
        with torch.no_grad():
            return predicted(model(self.transform(x, generator)))


@dataclass(frozen=True, kw_only=True)
class JPEG(Transformation):
    """JPEG compression ([Guo], Sec. 4.1) of the image rounded to 8 bits, colours subsampled as is usual.

    By torchvision; ART's preprocessor truncates to 8 bits, which darkens images that are not 8-bit.

    Args:
        quality: 1 (worst) to 100; [Guo] has 75.
    """

    name: ClassVar[str] = "jpeg"
    quality: int = 75

    def __post_init__(self) -> None:
        validation.count("quality", self.quality)
        validation.number("quality", self.quality, low=1, high=100)

    def transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The images (N, C, H, W) after encoding and decoding.

        Raises:
            ValueError: C is neither 1 nor 3.
        """
        with _extra("torchvision", "report"):
            from torchvision.io import decode_jpeg, encode_jpeg
        if x.shape[1] not in (1, 3):
            raise ValueError(f"JPEG knows grey and RGB images, these have {x.shape[1]} channels; pass 1 or 3")
        pixels = (x.cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        return torch.stack([decode_jpeg(encode_jpeg(image, self.quality)) for image in pixels]).to(x) / 255


@dataclass(frozen=True, kw_only=True)
class BitDepth(Transformation):
    """Every value rounded to the nearest of 2**bits levels ([Guo], Sec. 4.1; [Xu], Sec. 3), by ART.

    Args:
        bits: 1 to 8; [Guo] has 3.
    """

    name: ClassVar[str] = "bits"
    bits: int = 3

    def __post_init__(self) -> None:
        validation.count("bits", self.bits)
        validation.number("bits", self.bits, low=1, high=8)

    def transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The rounded images."""
        with _extra("art", "art"):
            from art.defences.preprocessor import FeatureSqueezing
        rounded, _ = FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=self.bits)(x.cpu().numpy())
        return torch.from_numpy(rounded).to(x)


@dataclass(frozen=True, kw_only=True)
class Squeezing(Transformation):
    """Feature squeezing ([Xu], Sec. 3): reduced bit depth, then the median over a window, channel by channel, by ART.

    The paper compares the predictions with and without to detect attacks; here the squeezed image is classified.

    Args:
        bits: 1 to 8; [Xu] has 5 for colour images, 1 for MNIST.
        window: side of the square window, at least 2. An even one reaches one pixel further up and left, and
            its median is the upper one.
    """

    name: ClassVar[str] = "squeeze"
    bits: int = 5
    window: int = 2

    def __post_init__(self) -> None:
        BitDepth(bits=self.bits)
        validation.count("window", self.window, low=2)

    def transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The rounded and smoothed images."""
        with _extra("art", "art"):
            from art.defences.preprocessor import SpatialSmoothing
        rounded = BitDepth(bits=self.bits).transform(x, generator).cpu().numpy()
        smooth, _ = SpatialSmoothing(window_size=self.window, channels_first=True)(rounded)
        return torch.from_numpy(smooth).to(x)


@dataclass(frozen=True, kw_only=True)
class ResizePad(Transformation):
    """A random resize and padding, drawn for every example by itself ([Xie], Sec. 3).

    An image of side s is resized (nearest, as in the authors' code) to a random side in [s, int(rate * s)) and padded
    with zeros at a random place to side int(rate * s), then resized back (bilinear) to s, as models may
    insist on it. Both sides of an image that is not square are treated alike. Zero is black here; the
    authors' images span [-1, 1].

    Args:
        rate: the padded side relative to s, above 1; [Xie] has 331 / 299.
    """

    name: ClassVar[str] = "resize-pad"
    random: ClassVar[bool] = True
    rate: float = 1.1

    def __post_init__(self) -> None:
        validation.number("rate", self.rate, low=1, above=True)

    def transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The images (N, C, H, W), each resized and placed by its own draw.

        Raises:
            ValueError: images too small to grow by `rate`.
        """
        small, large = x.shape[2:], [int(self.rate * side) for side in x.shape[2:]]
        if any(high <= low for low, high in zip(small, large, strict=True)):
            raise ValueError(
                f"rate={self.rate!r} leaves images of {small[0]} x {small[1]} as they are; "
                f"raise it above {min(small) + 1}/{min(small)}"
            )
        padded = x.new_zeros(*x.shape[:2], *large)
        draws = torch.rand(len(x), 3, generator=generator, device=generator.device, dtype=torch.float64).tolist()
        for image, canvas, (size, *place) in zip(x, padded, draws, strict=True):
            sides = [low + int(size * (high - low)) for low, high in zip(small, large, strict=True)]
            top, left = (int(u * (high - side + 1)) for u, high, side in zip(place, large, sides, strict=True))
            canvas[:, top : top + sides[0], left : left + sides[1]] = F.interpolate(image[None], sides)[0]
        return F.interpolate(padded, small, mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Smoothing(Defence):
    """Randomised smoothing: the class most often predicted for noisy copies ([Cohen], Predict in Sec. 3.2).

    Without the paper's abstention; a tie goes to the lowest class. The noise is Gaussian and not clamped. One noisy
    copy of the batch is held at a time. Copies with NaN or infinite logits vote for `UNDECIDED`.

    Args:
        sigma: the noise's standard deviation, positive.
        votes: the number of copies.
    """

    name: ClassVar[str] = "smoothing"
    random: ClassVar[bool] = True
    sigma: float = 0.25
    votes: int = 50

    def __post_init__(self) -> None:
        validation.number("sigma", self.sigma, low=0, above=True)
        validation.count("votes", self.votes)

    def predict(self, model: Model, x: Tensor, generator: torch.Generator) -> Tensor:
        """Predicted classes (N,), each by the majority of `votes` predictions."""
        tally = torch.zeros((), dtype=torch.long, device=x.device)
        with torch.no_grad():
            for _ in range(self.votes):
                noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
                logits = model(x + self.sigma * noise.to(x.device))
                k = logits.shape[1]
                votes = predicted(logits)
                tally = tally + F.one_hot(torch.where(votes == UNDECIDED, k, votes), k + 1)
        winner = tally.argmax(1)
        return torch.where(winner == k, UNDECIDED, winner)


DEFENCES: Mapping[str, type[Defence]] = {cls.name: cls for cls in (JPEG, BitDepth, ResizePad, Smoothing, Squeezing)}
"""The defences by name."""


def defence(spec: str) -> Defence:
    """The defence that `spec` names, with parameters where they differ from the defaults.

    Args:
        spec: as in "jpeg", "jpeg:quality=50" or "smoothing:sigma=0.5,votes=100".

    Raises:
        ValueError: no such defence or parameter, or a value that it cannot have.
    """
    name, _, words = spec.partition(":")
    if name not in DEFENCES:
        raise ValueError(f"unknown defence {name!r}; there are {', '.join(DEFENCES)}")
    return DEFENCES[name](**options(spec, words, {field.name for field in fields(DEFENCES[name])}))


def error_rate(
    defence: Defence, model: Model, x: Tensor, y: Tensor, *, draws: int = 5, seed: int = 0, batch_size: int = 50
) -> Tensor:
    """The share of draws in which each example is misclassified, shape (N,); 0 or 1 where nothing is random.

    NaN or infinite logits are no misclassification; a `RobustnessWarning` says so.

    Args:
        model: returns logits (N, K); in evaluation mode.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        draws: predictions per example of a random defence; the others make one.
        seed: of all draws; no global random state is touched.
        batch_size: the most images in a forward; the draws do not depend on it.

    Raises:
        ValueError: images or labels of another kind, no draws, or no batch.
    """
    validation.count("draws", draws)
    validation.count("batch_size", batch_size)
    if x.ndim != 4 or not len(x):
        raise ValueError(f"the images have shape {tuple(x.shape)}; pass at least one, as (N, C, H, W)")
    x = x.detach()
    validation.images(x, x.new_zeros(()), x.new_ones(()), remedy=validation.RESCALE)
    y = validation.indices(y, len(x), x.device)
    classes = drawn(defence, model, x, draws=draws, seed=seed, batch_size=batch_size)
    doubtful = int((classes == UNDECIDED).any(0).sum())
    if doubtful:
        doubt(
            f"{doubtful} of {len(x)} examples met NaN or infinite logits behind {defence.name}; that does not count as "
            "misclassified"
        )
    return broken(classes, y).float().mean(0)


def drawn(defence: Defence, model: Model, x: Tensor, *, draws: int, seed: int, batch_size: int) -> Tensor:
    """The predicted classes (draws, N) behind a defence, or (1, N) of one that is not random.

    Args:
        model: returns logits (N, K); in evaluation mode.
        x: images (N, C, H, W) in [0, 1].
        draws: predictions per image of a random defence.
        seed: of all draws.
        batch_size: the most images in a forward; the draws do not depend on it.
    """
    generator = torch.Generator(x.device).manual_seed(seed)

    def parts(images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(batch_size)])

    return torch.stack([defence.predict(parts, x, generator) for _ in range(draws if defence.random else 1)])


@contextmanager
def _extra(package: str, extra: str) -> Iterator[None]:
    """Name the extra that brings `package` where its import fails for want of it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"this defence needs {package}: {pip_install(extra)}", name=package) from error
