"""Checks of what a caller passes in, made before any work: each failure names the value and the remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

BOUNDS_TOLERANCE = 1e-5
"""How far clean inputs may exceed the bounds, relative to their width: rounding of a normalisation undone."""


def number(
    name: str, value: object, *, low: float, above: bool = False, high: float = math.inf, below: bool = False
) -> None:
    """Require a finite real number from low to high, without low if `above`, without high if `below`."""
    v = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(v) and low <= v <= high) or (above and v == low) or (below and v == high):
        limits = f"{'greater than' if above else 'at least'} {low:g}"
        if high < math.inf:
            limits += f" and {'less than' if below else 'at most'} {high:g}"
        raise ValueError(f"{name}={value!r} must be a finite number {limits}")


def count(name: str, value: object, *, low: int = 1) -> None:
    """Require an integer >= low."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low}")


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    """Require one of `options`."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is not supported here; choose {' or '.join(map(repr, options))}")


def images(x: object, low: Tensor, high: Tensor) -> None:
    """Require floating-point examples (N, ...), finite and within [low, high]."""
    assert isinstance(x, Tensor)
    if bool((low >= high).any()):
        raise ValueError(f"the bounds ({low.min():g}, {high.max():g}) are empty; give (lowest, highest)")
    if x.numel() == 0:
        return
    room = torch.stack([(x - low).amin(), (high - x).amin()])
    if bool(room.isnan().any()):
        raise ValueError("the images contain NaN or infinity; clean the data first")
    width = float((high - low).amax())
    if float(room.amin()) < -BOUNDS_TOLERANCE * (width if math.isfinite(width) else 1.0):
        raise ValueError(
            f"the images span [{x.min():g}, {x.max():g}], outside the bounds [{low.min():g}, {high.max():g}]; "
            "rescale them or pass the bounds they have"
        )


def tensor(x: object) -> Tensor:
    """Require a floating-point tensor (N, ...) usable by autograd, and detach it."""
    if not isinstance(x, Tensor):
        raise ValueError(f"the images are a {type(x).__name__}; pass a torch tensor of shape (N, ...)")
    if not x.is_floating_point():
        raise ValueError(f"the images are {x.dtype}; convert them, for example x.float() / 255 for bytes")
    if x.ndim < 2:
        raise ValueError(f"the images have shape {tuple(x.shape)}; a batch (N, ...) is needed, for one example x[None]")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise RuntimeError(
            "attacks need gradients, which inference mode forbids; use torch.no_grad() around the rest instead, "
            "and clone() images made in inference mode"
        )
    return x.detach()


def labels(y: object, n: int, device: torch.device) -> Tensor:
    """Label indices (N,) from indices (N,) or one-hot rows (N, K), on `device`."""
    if not isinstance(y, Tensor):
        raise ValueError(f"the labels are a {type(y).__name__}; pass a tensor of indices (N,) or one-hot rows (N, K)")
    if y.ndim == 2 and y.shape[1] > 1:
        indices = y.argmax(1)
        if not bool((y.to(torch.float64).gather(1, indices[:, None]) > 0).all()):
            raise ValueError("the one-hot labels have rows without a positive entry; pass one-hot rows or indices (N,)")
    elif y.ndim == 1:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"the labels are {y.dtype}; indices must be integers, for example y.long()")
        indices = y
    else:
        raise ValueError(f"the labels have shape {tuple(y.shape)}; pass indices ({n},) or one-hot rows ({n}, K)")
    if len(indices) != n:
        raise ValueError(f"there are {n} images but {len(indices)} labels")
    return indices.detach().long().to(device)


def classes(y: Tensor, k: int) -> None:
    """Require label indices within 0..k-1."""
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= k):
        raise ValueError(f"labels span {int(y.min())}..{int(y.max())}, but the model has classes 0..{k - 1}")


def mask(value: object, x: Tensor) -> Tensor:
    """Require a mask that broadcasts to x; True where it is nonzero, shape (N, ...)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"the mask is a {type(value).__name__}; pass a tensor that broadcasts to {tuple(x.shape)}")
    try:
        return (value != 0).to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask of shape {tuple(value.shape)} does not broadcast to the images' {tuple(x.shape)}"
        ) from None


def source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The caller's generator, required on `device`; a fresh one seeded with torch.initial_seed() for None."""
    if generator is None:
        return torch.Generator(device).manual_seed(torch.initial_seed())
    if generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device}, the images on {device}; use torch.Generator({device.type!r})"
        )
    return generator
