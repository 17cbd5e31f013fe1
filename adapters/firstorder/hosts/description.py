"""What tells a value from others, in another process too: for the identities of runs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor


def description(value: object) -> str:
    """As `repr`, but with all of every tensor, as a digest, and without addresses in memory.

    Goes through dataclasses, mappings, lists and tuples.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor({tuple(value.shape)}, {value.dtype}, {hashlib.sha256(data).hexdigest()})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [part.name for part in dataclasses.fields(value) if part.repr]
        parts = (f"{name}={description(getattr(value, name))}" for name in shown)
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {description(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(description, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
