"""What distinguishes a value from others, in another process too: for the identities of runs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor


def description(value: object, inner: Callable[[object], str] | None = None) -> str:
    """As `repr`, but with all of every tensor and array, as a digest, and without addresses in memory.

    Goes through dataclasses, mappings, lists, tuples and sets.

    Args:
        inner: describes what these hold; this function by default.
    """
    inner = inner or description
    if isinstance(value, Tensor):
        return f"tensor({tuple(value.shape)}, {value.dtype}, {_digest(value)})"
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array({value.shape}, {value.dtype}, {data})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [part.name for part in dataclasses.fields(value) if part.repr]
        parts = (f"{name}={inner(getattr(value, name))}" for name in shown)
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(key)}: {inner(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(inner, value))
        return f"[{text}]" if isinstance(value, list) else f"({text}{',' if len(value) == 1 else ''})"
    if isinstance(value, (set, frozenset)):  # whose order is another in every process
        return f"{type(value).__name__}({', '.join(sorted(map(inner, value)))})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(tensor: Tensor) -> str:
    if tensor.device.type == "meta":
        return "no data"
    if tensor.is_quantized:
        return f"{_digest(tensor.int_repr())} of {_digest(tensor.dequantize())}"
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = dense.cpu().resolve_conj().resolve_neg().contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
