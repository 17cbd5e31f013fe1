"""Radii, step sizes and clip values as ART has them: numbers, or arrays that broadcast to x as NumPy does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Size = float | Array


def limits(clip_values: Any, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """Clip values for examples of `shape`, in the layout of x: numbers, or arrays of that shape.

    They broadcast as in NumPy, over the last axis. A vector that does not is left as it is, one value per channel.
    """
    if clip_values is None:
        return None
    low, high = (_spread(limit, shape) for limit in clip_values)
    return low, high


def bounds(estimator: Any, last: bool, shape: tuple[int, ...] | None = None) -> Any:
    """The estimator's `clip_values` for examples of `shape`, if given; with the channels in front if they were `last`.

    Of an example's shape they broadcast as in ART, over its last axis.
    """
    given = estimator.clip_values if shape is None else limits(estimator.clip_values, shape)
    if given is None or not last:
        return given
    return tuple(np.moveaxis(limit, -1, 0) if np.ndim(limit) == 3 else limit for limit in given)


def remedy(clip: tuple[Any, Any] | None) -> str:
    """How bytes become what an estimator with these clip values takes."""
    if clip is None:
        return "x.astype(np.float32)"
    low, high = float(np.min(clip[0])), float(np.max(clip[1]))
    if low == 0:
        return f"x.astype(np.float32){'' if high == 255 else f' / {255 / high:g}'}"
    return f"x.astype(np.float32) / 255 * {high - low:g} + {low:g}"


def _spread(limit: Any, shape: tuple[int, ...]) -> Any:
    given = np.asarray(limit)
    if given.ndim == 0:
        return float(given)
    try:
        return np.array(np.broadcast_to(given, (1, *shape))[0])
    except ValueError:
        return given


def plain(value: Any) -> Any:
    """A value as a number where it is an array without dimensions; integers in arrays as floating-point numbers."""
    if not isinstance(value, np.ndarray):
        return value
    if not np.issubdtype(value.dtype, np.number) or np.iscomplexobj(value):
        return value
    return float(value) if value.ndim == 0 else value.astype(np.float64)


def finite(value: Any) -> Any:
    """A size with 1 in place of infinity, to check the rest of it; arrays as tensors, which the core reads."""
    value = plain(value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.where(np.isposinf(value), 1.0, value))
    return 1.0 if isinstance(value, (float, np.floating)) and value == np.inf else value


def fitted(name: str, value: Any, x: Array) -> Any:
    """A size as a number, or an array with the dimensions of x (N, ...).

    Raises:
        ValueError: an array that does not broadcast to x.
    """
    value = plain(value)
    if not isinstance(value, np.ndarray):
        return value
    try:
        if np.broadcast_shapes(value.shape, x.shape) != x.shape:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name} has shape {value.shape}, which does not broadcast to x {x.shape}; pass a number, the shape of an "
            f"example, or one per example, {name}.reshape(-1{', 1' * (x.ndim - 1)})"
        ) from None
    return value.reshape(*[1] * (x.ndim - value.ndim), *value.shape)


def radius(eps: Any, x: Array, clip: tuple[Any, Any] | None, norm: str) -> Any:
    """`eps` with a radius that reaches every point within the clip values in place of infinity.

    Args:
        eps: a number, or an array with the dimensions of x (N, ...).
        clip: the `limits` of x.
        norm: "Linf" or "L2".

    Raises:
        ValueError: infinity without finite clip values.
    """
    if not np.any(np.isposinf(eps)):
        return eps
    low, high = clip if clip is not None else (-np.inf, np.inf)
    width = np.max(np.subtract(high, low, dtype=np.float64))
    if not np.isfinite(width):
        raise ValueError("eps=inf needs finite clip_values of the estimator; set them, or give a finite eps")
    reach = float(width) if norm == "Linf" else float(width) * x[0].size ** 0.5
    return np.where(np.isposinf(eps), reach, eps) if isinstance(eps, np.ndarray) else reach


def step(eps_step: Any, eps: Any) -> Any:
    """`eps_step` with the diameter of the ball, of radius `eps`, in place of infinity."""
    if eps_step is None or not np.any(np.isposinf(eps_step)):
        return eps_step
    diameter = np.where(np.greater(eps, 0), 2 * np.asarray(eps, np.float64), 1.0)
    found = np.where(np.isposinf(eps_step), diameter, eps_step)
    return float(found) if found.ndim == 0 else found


def of_batch(value: Any, part: slice, last: bool) -> Any:
    """The sizes of the examples in `part`; an array as a tensor, with the channels in front if they were `last`."""
    if not isinstance(value, np.ndarray):
        return value
    rows = value[part] if len(value) > 1 else value
    return torch.from_numpy(np.array(np.moveaxis(rows, -1, 1) if last else rows))
