"""Oracles that average over randomly transformed copies of images, what they share and the two without blocks.

[SSA] Long et al. 2022, Frequency domain model augmentation for adversarial attack; [Admix] Wang et al. 2021, Admix:
enhancing the transferability of adversarial attacks. Constants were read in the authors' code, yuyang-long/SSA and
JHL-HUST/Admix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Query, Step
from firstorder.attacks.transformations import OfImages, through


@dataclass(frozen=True)
class Known:
    """What transforms need on one run's images, made once: not per example, so the loop carries it as it is."""

    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Copies(OfImages, ABC):
    """The mean gradient over m copies of images, each transformed at random, every example by itself.

    No logits are returned, as none are those of the image itself.

    Args:
        m: number of copies, at least 1; a step takes as many gradients.
    """

    m: int = 20

    def __post_init__(self) -> None:
        validation.count("m", self.m)

    @property
    def at_iterate(self) -> bool:
        return False

    @abstractmethod
    def draws(self, x: Tensor) -> int:
        """How many draws a copy of one of the images x (M, C, H, W) takes."""

    def constants(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `transform` needs on images like x (M, C, H, W), of at least float32."""
        return ()

    @abstractmethod
    def transform(self, x: Tensor, draws: Tensor, *constants: Tensor) -> Tensor:
        """The transformed x (M, C, H, W), of at least float32, for draws (M, `draws`) from [0, 1)."""

    def init(self, x: Tensor) -> Known:
        return Known(self.constants(x[:1].to(torch.promote_types(x.dtype, torch.float32))))

    def gradient(self, query: Query, x: Tensor, draws: Tensor, known: Known) -> Tensor:
        """The gradients by copies x (M, C, H, W) of the loss at what they are transformed to."""
        return through(query, x, lambda points: self.transformed(points, draws, known)).gradient

    def transformed(self, x: Tensor, draws: Tensor, known: Known) -> Tensor:
        """`transform`, in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            return self.transform(x.to(draws.dtype), draws, *known.tensors).to(x.dtype)

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        total, left, stacked = torch.zeros_like(a), self.m, len(a) // len(step.iterate)
        while left:
            room = step.copies()
            copies = left if room is None else min(left, max(room // stacked, 1))
            points = torch.cat([a] * copies)
            found = self.gradient(query, points, step.draw.uniform(points, (self.draws(a),)), state)
            total.add_(found.reshape(copies, *a.shape).sum(0))
            left -= copies
        return Evaluation(total.div_(self.m), None), state


@dataclass(frozen=True, kw_only=True)
class SpectrumSimulation(Copies):
    """The mean gradient of J(IDCT(DCT(a + xi) * M)) over m copies ([SSA], Eqs. 5-7).

    xi is Gaussian noise, M uniform on [1 - rho, 1 + rho], each drawn for every element; the transform is the discrete
    cosine transform (II) of every channel.

    Args:
        m: number of copies, the paper's N, at least 1.
        sigma: standard deviation of the noise, in the units of the images, at least 0.
        rho: half the width of the range of factors, in [0, 1].
        by: "input" takes the gradient by a, through the transform; "transformed" that by the transformed image, as the
            released code does.
    """

    sigma: float = 16 / 255
    rho: float = 0.5
    by: str = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.number("sigma", self.sigma, low=0)
        validation.number("rho", self.rho, low=0, high=1)
        validation.choice("by", self.by, ("input", "transformed"))

    def draws(self, x: Tensor) -> int:
        return 2 * x[0].numel()

    def constants(self, x: Tensor) -> tuple[Tensor, ...]:
        return cosines(x.shape[2], x), cosines(x.shape[3], x)

    def gradient(self, query: Query, x: Tensor, draws: Tensor, known: Known) -> Tensor:
        if self.by == "input":
            return super().gradient(query, x, draws, known)
        return query(self.transformed(x, draws, known)).gradient

    def transform(self, x: Tensor, draws: Tensor, *constants: Tensor) -> Tensor:
        chance, factors = draws.unflatten(1, (2, *x.shape[1:])).unbind(1)
        noise = torch.special.ndtri(chance.clamp_min(torch.finfo(chance.dtype).eps / 2))
        vertical, horizontal = constants
        spectrum = vertical @ (x + self.sigma * noise) @ horizontal.mT
        changed: Tensor = vertical.mT @ (spectrum * (1 + self.rho * (2 * factors - 1))) @ horizontal
        return changed


def one_of(draws: Tensor, options: int) -> Tensor:
    """Draws from [0, 1) as numbers of options, of the same shape."""
    return (draws * options).floor().long().clamp_max(options - 1)


def cosines(side: int, like: Tensor) -> Tensor:
    """The matrix (side, side) of the orthonormal discrete cosine transform (II), of the dtype and device of `like`."""
    frequencies, places = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    matrix: Tensor = torch.cos(math.pi / side * frequencies * (places + 0.5)) * (2 / side) ** 0.5
    matrix[0] = (1 / side) ** 0.5
    return matrix.to(like.device, like.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed(Copies):
    """The mean gradient of J(a + eta x') over m images x' drawn from a pool ([Admix], Eq. 3).

    [Admix] draws from the batch itself, which would make examples depend on each other; here the pool is given. With
    `ScaleCopies` after it this is the paper's oracle.

    Args:
        m: number of images mixed in, one after the other, at least 1; the paper's m2.
        pool: images to draw from, (P, C, H, W), in the units of the images attacked, best of other classes.
        eta: their weight, at least 0.
    """

    m: int = 3
    pool: Tensor | None = None
    eta: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.number("eta", self.eta, low=0)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if self.pool is None:
            raise ValueError(
                "pool=None: the attack mixes other images into those attacked and needs them; pass pool=images, a "
                f"tensor (P, {', '.join(map(str, x.shape[1:]))}) of images that are not in the batch"
            )
        if self.pool.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"pool has shape {tuple(self.pool.shape)}, the images {tuple(x.shape)}; pass images of the same size"
            )

    def draws(self, x: Tensor) -> int:
        return 1

    def constants(self, x: Tensor) -> tuple[Tensor, ...]:
        assert self.pool is not None
        return (self.pool.to(x),)

    def gradient(self, query: Query, x: Tensor, draws: Tensor, known: Known) -> Tensor:
        return query(self.transformed(x, draws, known)).gradient  # that of a + eta x' by a is its own

    def transform(self, x: Tensor, draws: Tensor, *constants: Tensor) -> Tensor:
        (pool,) = constants
        return x + self.eta * pool[one_of(draws[:, 0], len(pool))]


def as_pool(value: object) -> Tensor | None:
    """Images to mix in as a tensor (P, C, H, W), from a tensor or an array; None as it is.

    Raises:
        ValueError: anything else, or none at all.
    """
    if value is None:
        return None
    try:
        images = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"pool is a {type(value).__name__}; pass a tensor of images (P, C, H, W)") from None
    if images.ndim != 4 or not len(images) or not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(
            f"pool has shape {tuple(images.shape)} and dtype {images.dtype}; pass at least one image, (P, C, H, W), of "
            "finite floating-point numbers"
        )
    return images.detach()
