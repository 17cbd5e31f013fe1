"""Oracles of the transfer papers that transform images, or gradients as images: tensors of shape (N, C, H, W).

[DI] Xie et al. 2019, Improving transferability of adversarial examples with input diversity; [TI] Dong et al. 2019,
Evading defenses to transferable adversarial examples by translation-invariant attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Query, Stateless, Step
from firstorder.attacks.projections import rows

Kernel = Literal["gaussian", "linear", "uniform"]

BANDED = 4
"""Up to which side, in kernel lengths, a banded matrix convolves faster than shifted sums: measured from 28 to 384."""


class OfImages(Stateless):
    """An oracle for images (N, C, H, W) alone."""

    def check(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} transforms images (N, C, H, W), these have shape {tuple(x.shape)}; "
                "reshape them, or take an attack without it"
            )


def through(query: Callable[[Tensor], Evaluation], a: Tensor, transform: Callable[[Tensor], Tensor]) -> Evaluation:
    """The gradient by points a (M, ...) of what is asked at transform(a), of the same shape."""
    with torch.enable_grad():
        point = a.detach().requires_grad_(True)
        transformed = transform(point)
    inner = query(transformed.detach())
    with torch.enable_grad(), torch.autocast(a.device.type, enabled=False):
        along = (transformed * inner.gradient).sum()
        (gradient,) = torch.autograd.grad(along, point)
    return inner._replace(gradient=gradient)


@dataclass(frozen=True, kw_only=True)
class DiverseInput(OfImages):
    """The gradient through a random resize and padding, drawn for every example by itself ([DI], Sec. 3.3).

    With probability `diversity_prob` an image of side s is resized (bilinear) to a random side between s and
    int(resize_rate * s), the larger excluded, and padded with zeros at a random place to the larger one. For rates
    above 1 the result is resized back to s, as models may insist on it. Both sides of an image that
    is not square are treated alike.

    Args:
        resize_rate: the far end of the random side, relative to s; [DI] has 330 / 299. Positive.
        diversity_prob: the paper's p, in [0, 1].
    """

    resize_rate: float = 1.1
    diversity_prob: float = 0.5

    def __post_init__(self) -> None:
        validation.number("resize_rate", self.resize_rate, low=0, above=True)
        validation.number("diversity_prob", self.diversity_prob, low=0, high=1)

    @property
    def at_iterate(self) -> bool:
        return not self.diversity_prob

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.numel() and not all(int(side * self.resize_rate) for side in x.shape[2:]):
            raise ValueError(
                f"resize_rate={self.resize_rate!r} leaves nothing of images of shape {tuple(x.shape[1:])}; raise it"
            )

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        if not self.diversity_prob:
            return query(a), state
        draws = step.draw.uniform(a, (4,))
        return through(query, a, lambda points: self.transform(points, draws)), state

    def transform(self, x: Tensor, draws: Tensor) -> Tensor:
        """The transformed x (N, C, H, W) for draws (N, 4) from [0, 1): whether, side, place in height, in width."""
        sides, place, larger = [], [], []
        for axis, side in enumerate(x.shape[2:]):
            low, high = sorted((side, int(side * self.resize_rate)))
            chosen = low + (draws[:, 1] * (high - low)).floor()
            sides.append(chosen)
            place.append((draws[:, 2 + axis] * (high - chosen)).floor())
            larger.append(high)
        placed = _resize_and_pad(x, sides, place, (larger[0], larger[1]))
        if placed.shape != x.shape:
            placed = F.interpolate(placed, size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.where(rows(draws[:, 0] < self.diversity_prob, x), placed, x)


@dataclass(frozen=True)
class _Smoothing:
    """What the convolution needs on one run's images, made once: not per example, so the loop carries it as it is.

    Attributes:
        weights: the kernel in one dimension, from the middle to the end.
        bands: for height and width the convolution along it as a matrix; None where shifted sums are faster.
    """

    weights: tuple[float, ...]
    bands: tuple[Tensor | None, ...]

    def __call__(self, g: Tensor) -> Tensor:
        """The convolution of g (N, C, H, W), of its dtype; at least float32 inside."""
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        vertical, horizontal = self.bands
        with torch.autocast(g.device.type, enabled=False):
            wide = self._shifted(wide, 3) if horizontal is None else wide @ horizontal
            wide = self._shifted(wide, 2) if vertical is None else vertical @ wide
        return wide.to(g.dtype)

    def _shifted(self, g: Tensor, axis: int) -> Tensor:
        found, side = g * self.weights[0], g.shape[axis]
        for offset, weight in enumerate(self.weights[1:], 1):
            left = side - offset
            found.narrow(axis, 0, left).add_(g.narrow(axis, offset, left), alpha=weight)
            found.narrow(axis, offset, left).add_(g.narrow(axis, 0, left), alpha=weight)
        return found


@dataclass(frozen=True, kw_only=True)
class TranslationInvariant(OfImages):
    """The gradient convolved, channel by channel, with a normalised kernel; zeros beyond the border ([TI], Eq. 8).

    The kernel is an outer product, so rows and columns are convolved one after the other: along a side of at most
    `BANDED` kernel lengths as a product with a banded matrix, along a longer one as a sum of shifted images.

    Args:
        kernel_name: "gaussian", with `nsig` standard deviations from the middle to the end; "linear", falling
            to zero just beyond the end; or "uniform".
        len_kernel: the kernel's side, odd; 1 leaves the gradient as it is.
        nsig: see `kernel_name`.
    """

    kernel_name: Kernel = "gaussian"
    len_kernel: int = 7
    nsig: float = 3.0

    def __post_init__(self) -> None:
        validation.choice("kernel_name", self.kernel_name, ("gaussian", "linear", "uniform"))
        validation.count("len_kernel", self.len_kernel)
        if self.len_kernel % 2 == 0:
            raise ValueError(f"len_kernel={self.len_kernel} must be odd, so that the kernel has a middle")
        validation.number("nsig", self.nsig, low=0, above=True)

    def profile(self) -> Tensor:
        """The kernel in one dimension, float64 of shape (len_kernel,); the kernel is its outer product with itself."""
        half = self.len_kernel // 2
        offsets = torch.arange(-half, half + 1, dtype=torch.float64)
        if self.kernel_name == "gaussian":
            values = torch.exp(-0.5 * (offsets * self.nsig / max(half, 1)) ** 2)
        elif self.kernel_name == "linear":
            values = 1 - offsets.abs() / (half + 1)
        else:
            values = torch.ones_like(offsets)
        return values / values.sum()

    def init(self, x: Tensor) -> _Smoothing:
        weights = self.profile()[self.len_kernel // 2 :]
        dtype = torch.promote_types(x.dtype, torch.float32)
        banded = [side <= BANDED * self.len_kernel for side in x.shape[2:]]
        bands = [_band(weights, n).to(x.device, dtype) if b else None for n, b in zip(x.shape[2:], banded, strict=True)]
        return _Smoothing(tuple(weights.tolist()), tuple(bands))

    def __call__(self, query: Query, a: Tensor, state: _Smoothing, step: Step) -> tuple[Evaluation, _Smoothing]:
        evaluation = query(a)
        if self.len_kernel == 1:
            return evaluation, state
        return evaluation._replace(gradient=state(evaluation.gradient)), state


def _band(weights: Tensor, side: int) -> Tensor:
    """The symmetric matrix (side, side) of a symmetric kernel that is `weights` from its middle to its end."""
    places = torch.arange(side)
    offsets = (places[:, None] - places).abs()
    return torch.cat([weights, weights.new_zeros(1)])[offsets.clamp_max(len(weights))]


def _resize_and_pad(x: Tensor, sides: list[Tensor], place: list[Tensor], larger: tuple[int, int]) -> Tensor:
    """Every image of x (N, C, H, W) resized to its own sides (N,), at its own place (N,) in zeros of size `larger`.

    The pixel at i of the padded image is the resized image's at i - place, which lies at
    (i - place + 1/2) / side of the original's height: what `F.interpolate(mode="bilinear")` computes, for all at once.
    Such places in half precision would be wrong by a good part of a pixel: they, and what is read there, are float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grid, inside = [], []
    for side, start, size in zip(sides, place, larger, strict=True):
        i = torch.arange(size, device=x.device) - start[:, None]
        inside.append((i >= 0) & (i < side[:, None]))
        grid.append((2 * (i + 0.5) / side[:, None] - 1).to(wide))
    vertical = grid[0][:, :, None].expand(-1, -1, larger[1])
    horizontal = grid[1][:, None, :].expand(-1, larger[0], -1)
    sampled = F.grid_sample(
        x.to(wide), torch.stack([horizontal, vertical], -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.to(x.dtype) * (inside[0][:, None, :, None] & inside[1][:, None, None, :])
