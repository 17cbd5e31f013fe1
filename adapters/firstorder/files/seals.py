"""Tensors in files that say whether they are whole: a digest of what is saved, saved with it."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstorder.files import replacing

SEAL = "sha256"
"""The entry of the digest."""


def save(path: Path, content: Mapping[str, Any], *, name: str = "") -> None:
    """Write tensors, numbers and text with their digest, atomically.

    Args:
        content: what is kept by name; dictionaries, lists and tuples of it too.
        name: what the content is of: under another one it counts as damaged.
    """
    with replacing(path) as temporary:
        torch.save({**content, SEAL: _digest(content, name)}, temporary)


def load(path: Path, *, name: str = "") -> dict[str, Any] | None:
    """What `save` kept under that name, on the CPU; None where the file is damaged, or holds something else.

    What an earlier version wrote, without a digest, is taken as it is.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # a cut-off file makes torch seek where nothing is
            raise
        return None
    except Exception:  # torch says what it stumbled over in as many ways as there are bytes
        return None
    if not isinstance(content, dict):
        return None
    found: dict[str, Any] = content
    kept = found.pop(SEAL, None)
    return found if kept is None or kept == _digest(found, name) else None


def _digest(content: Mapping[str, Any], name: str) -> str:
    digest = hashlib.sha256(repr(name).encode())
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """The bytes of a value, with what keeps those of one from being another's."""
    if isinstance(value, Tensor):
        yield repr((tuple(value.shape), value.dtype)).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"{len(value)} entries".encode()
        for key in value:
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values".encode()
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()
