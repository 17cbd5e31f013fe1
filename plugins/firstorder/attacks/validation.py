"""Checks of what a caller passes in, made before any work: each failure names the value and the remedy."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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


def size(name: str, value: object, *, above: bool = False) -> None:
    """Require a finite real number of at least 0, without 0 if `above`, or a floating-point tensor of such numbers."""
    if not isinstance(value, Tensor):
        number(name, value, low=0, above=above)
        return
    if not value.is_floating_point():
        raise ValueError(
            f"{name} is a tensor of {value.dtype}; pass floating-point numbers, for example {name}.float()"
        )
    low = value > 0 if above else value >= 0
    if not bool((low & value.isfinite()).all()):
        limits = "greater than" if above else "at least"
        raise ValueError(f"{name} spans [{value.min():g}, {value.max():g}]; all of it must be finite and {limits} 0")


def spread(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A tensor of sizes for examples x (N, ...), with as many dimensions as x, the first of 1 or N.

    Args:
        name: of the parameter, for messages.
        value: one number, one for every example (N, 1, ..., 1), or what broadcasts to one example.
        x: the examples.
    """
    n, shape = len(x), tuple(x.shape[1:])
    alone = value.ndim == x.ndim - 1 and not (value.ndim == 1 and value.shape[0] == n > 1)
    whole = value.ndim == x.ndim and value.shape[0] in (1, n)
    fits = value.ndim == 0 or all(
        have in (1, want) for have, want in zip(value.shape[1:] if whole else value.shape, shape, strict=False)
    )
    if not (value.ndim == 0 or alone or whole) or not fits:
        one = "x".join(map(str, shape))
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, the images {tuple(x.shape)}; pass one number, one for every "
            f"example, {name}.reshape(-1{', 1' * len(shape)}), or the shape of an example ({one})"
        )
    return value.to(x).reshape(*[1] * (x.ndim - value.ndim), *value.shape)


def count(name: str, value: object, *, low: int = 1) -> None:
    """Require an integer >= low."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low}")


def switch(name: str, value: object) -> None:
    """Require True or False, which 1 and 0 and NumPy's are too: a word in their place, "false", would count as True."""
    known = type(value).__name__ in ("bool", "bool_") or (isinstance(value, Integral) and value in (0, 1))
    if not known:
        raise ValueError(f"{name}={value!r} must be a bool")


def switches(part: DataclassInstance) -> None:
    """Require True or False for every field of a dataclass that is declared as such."""
    for field in fields(part):
        if field.type in (bool, "bool"):
            switch(field.name, getattr(part, field.name))


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    """Require one of `options`."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is not supported here; choose {' or '.join(map(repr, options))}")


def limits(bounds: Any) -> tuple[Any, Any]:
    """Require bounds as a pair; infinite ones for None."""
    if bounds is None:
        return -math.inf, math.inf
    if not hasattr(bounds, "__len__") or len(bounds) != 2 or any(limit is None for limit in bounds):
        raise ValueError(f"bounds={bounds!r} are no pair; give (lowest, highest), infinite where there is none")
    return bounds[0], bounds[1]


RESCALE = "divide bytes by 255, or undo the normalisation: the model is to normalise its input itself"
"""What to do with images outside [0, 1] where no other bounds can be passed."""


def images(x: object, low: Tensor, high: Tensor, *, remedy: str = "rescale them or pass the bounds they have") -> None:
    """Require floating-point examples (N, ...), finite and within [low, high]; `remedy` says what else to do."""
    assert isinstance(x, Tensor)
    widths = high - low
    if not float(widths.amin()) > 0:
        raise ValueError(f"the bounds ({low.min():g}, {high.max():g}) are empty; give (lowest, highest)")
    if x.numel() == 0:
        return
    room = float((x - low).amin()), float((high - x).amin())
    if any(map(math.isnan, room)):
        raise ValueError("the images contain NaN or infinity; clean the data first")
    width = float(widths.amax())
    if min(room) < -BOUNDS_TOLERANCE * (width if math.isfinite(width) else 1.0):
        raise ValueError(
            f"the images span [{x.min():g}, {x.max():g}], outside the bounds [{low.min():g}, {high.max():g}]; {remedy}"
        )


def finite(levels: int, low: Tensor, high: Tensor) -> None:
    """Require bounds between which so many levels have their place."""
    if not bool((high - low).isfinite().all()):
        raise ValueError(
            f"levels={levels} needs finite bounds; pass bounds=(lowest, highest), or clip_values to an ART estimator"
        )


def tensor(x: object) -> Tensor:
    """Require a floating-point tensor (N, ...) usable by autograd, and detach it."""
    if not isinstance(x, Tensor):
        raise ValueError(f"the images are a {type(x).__name__}; pass a torch tensor of shape (N, ...)")
    if not x.is_floating_point():
        raise ValueError(f"the images are {x.dtype}; convert them, for example x.float() / 255 for bytes")
    if x.layout != torch.strided:
        raise ValueError(f"the images are {x.layout}; pass x.to_dense()")
    if x.ndim < 2:
        raise ValueError(f"the images have shape {tuple(x.shape)}; a batch (N, ...) is needed, for one example x[None]")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise RuntimeError(
            "attacks need gradients, which inference mode forbids; use torch.no_grad() around the rest instead, "
            "and clone() images made in inference mode"
        )
    return x.detach()


class Labels(NamedTuple):
    """Labels of N examples.

    Attributes:
        indices: the classes (N,), int64; of rows of probabilities the largest entry.
        rows: probabilities (N, K) where the labels are no single classes; None otherwise.
        columns: K where rows were given, one-hot or not; None for indices.
    """

    indices: Tensor
    rows: Tensor | None = None
    columns: int | None = None


def labels(y: object, n: int, device: torch.device, *, ties: bool = False) -> Labels:
    """Labels from indices (N,), one-hot rows or rows of probabilities (N, K), on `device`.

    Raises:
        ValueError: anything else; rows of probabilities with several largest entries, unless `ties` are allowed.
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"the labels are a {type(y).__name__}; pass a tensor of indices (N,) or one-hot rows (N, K)")
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] < 2):
        raise ValueError(f"the labels have shape {tuple(y.shape)}; pass indices ({n},) or one-hot rows ({n}, K)")
    if len(y) != n:
        raise ValueError(f"there are {n} images but {len(y)} labels")
    y = y.detach().to(device)
    if y.ndim == 2:
        return _rows(y, ties)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"the labels are {y.dtype}; indices must be integers, for example y.long()")
    indices = y.long()
    if n and int(indices.min()) < 0:
        raise ValueError(f"labels span {int(indices.min())}..{int(indices.max())}; classes are counted from 0")
    return Labels(indices)


def _rows(y: Tensor, ties: bool) -> Labels:
    """Labels from rows (N, K)."""
    if y.is_complex():
        raise ValueError(f"the labels are {y.dtype}; pass indices (N,) or one-hot rows (N, K)")
    wide, columns = y.to(torch.promote_types(y.dtype, torch.float32)), y.shape[1]
    indices = wide.argmax(1)
    if bool((((wide == 1).sum(1) == 1) & ((wide != 0).sum(1) == 1)).all()):
        return Labels(indices, None, columns)
    slack = 1e-3 if y.dtype.itemsize >= 4 else 1e-2
    soft = y.is_floating_point() and bool(((wide.sum(1) - 1).abs() <= slack).logical_and((wide >= 0).all(1)).all())
    if not soft:
        raise ValueError(
            "the rows of labels are neither one-hot nor probabilities (several classes at once, or none?); pass "
            "one-hot rows (N, K) or indices (N,), or rows of probabilities that sum to 1"
        )
    if not ties and bool(((wide == wide.amax(1, keepdim=True)).sum(1) > 1).any()):
        raise ValueError(
            "rows of labels have several largest entries, so that no class counts as the right one; pass rows with "
            "one largest entry, one-hot rows or indices (N,)"
        )
    return Labels(indices, wide, columns)


def indices(y: object, n: int, device: torch.device) -> Tensor:
    """Label indices (N,) from indices or one-hot rows (N, K), where rows of probabilities have no meaning."""
    found = labels(y, n, device)
    if found.rows is not None:
        raise ValueError("the labels are rows of probabilities; pass one-hot rows (N, K) or indices (N,)")
    return found.indices


def classes(y: Tensor, k: int) -> None:
    """Require label indices within 0..k-1."""
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= k):
        raise ValueError(f"labels span {int(y.min())}..{int(y.max())}, but the model has classes 0..{k - 1}")


def mask(value: object, x: Tensor) -> Tensor:
    """Require a mask that broadcasts to x; True where it is nonzero, shape (N, ...)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"the mask is a {type(value).__name__}; pass a tensor that broadcasts to {tuple(x.shape)}")
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError("the mask contains NaN; pass 0 or False where a pixel stays, 1 or True where it may change")
    try:
        return (value != 0).to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask of shape {tuple(value.shape)} does not broadcast to the images' {tuple(x.shape)}"
        ) from None


def start(value: object, x: Tensor) -> Tensor:
    """Require finite first iterates of the shape of x; in its dtype, on its device, detached."""
    if not isinstance(value, Tensor) or value.shape != x.shape:
        found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise ValueError(f"the start {found}; pass a tensor of the images' shape {tuple(x.shape)}")
    begin = value.detach().to(x)
    if not bool(begin.isfinite().all()):
        raise ValueError("the start contains NaN or infinity; pass finite images")
    return begin


def source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The caller's generator, required on `device`; a fresh one seeded with torch.initial_seed() for None."""
    if generator is None:
        return torch.Generator(device).manual_seed(torch.initial_seed())
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator={generator!r} is none; pass torch.Generator({device.type!r}).manual_seed({generator!r})"
            if isinstance(generator, Integral)
            else f"the generator is a {type(generator).__name__}; pass a torch.Generator"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device}, the images on {device}; use torch.Generator({device.type!r})"
        )
    return generator


def seeded(seed: object, device: torch.device) -> torch.Generator:
    """A fresh generator on `device` with a seed, by default `torch.initial_seed()`."""
    if seed is None:
        return source(None, device)
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r} must be an integer, or None for torch's initial seed")
    return torch.Generator(device).manual_seed(int(seed))
