"""What distinguishes data sets: a digest that equal data have in every process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from firstorder.fabric.batches import Pairs, size

SAMPLE = 64
"""How many examples are read of data that are not tensors in memory."""
CHUNK = 2**26
"""Bytes hashed at a time."""


def fingerprint(data: Pairs) -> str:
    """The number of examples and a digest of them, a line that equal data have in every process.

    Of a `TensorDataset` every byte counts. Of any other data set count its length, all of its labels where it keeps
    them as `targets` or `labels` (torchvision's do), and `SAMPLE` examples: the first, the last and others evenly
    between them. A change of other examples alone is not noticed. A `Subset` is read through its indices.

    Examples are read under fixed seeds of torch, NumPy and `random`, which are put back afterwards, so random
    transforms give the same every time. What differs all the same between two readings of an example (a data set with
    a generator of its own) is random, and only its type counts.
    """
    total = size(data)
    base: Any = data
    indices = torch.arange(total)
    while type(base) is Subset:
        base, indices = base.dataset, torch.from_numpy(np.asarray(base.indices, dtype=np.int64))[indices]
    digest = hashlib.sha256()
    if isinstance(base, TensorDataset):
        for tensor in base.tensors:
            _add(digest, tensor.detach(), indices)
    else:
        for labels in _labels(base):
            _add(digest, labels, indices)
        chosen = indices[torch.linspace(0, total - 1, min(total, SAMPLE)).long()]
        for line in _sample(base, chosen.tolist()):
            digest.update(line.encode())
    return f"{total} examples, sha256 {digest.hexdigest()[:32]}"


def _add(digest: Any, tensor: Tensor, indices: Tensor) -> None:
    """Add type, shape and bytes of the rows `indices` of a tensor."""
    digest.update(f"{tensor.dtype} {len(indices)} {tuple(tensor.shape[1:])};".encode())
    for rows in indices.split(max(1, CHUNK // max(1, tensor[:1].nbytes))):
        digest.update(_bytes(tensor[rows.to(tensor.device)]))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _labels(data: Any) -> Iterator[Tensor]:
    """The labels of all examples, where a data set keeps them together."""
    for name in ("targets", "labels"):
        values = getattr(data, name, None)
        if isinstance(values, (Tensor, np.ndarray, list)) and len(values) == size(data):
            array = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
            if array.dtype.kind in "biuf":
                yield torch.from_numpy(np.ascontiguousarray(array))


def _sample(data: Any, chosen: Sequence[int]) -> list[str]:
    """A line for every part (images, labels) of every example that is chosen."""
    with _put_back():
        twice = [(_read(data, index), _read(data, index)) for index in chosen]
    parts = [list(zip(*readings, strict=True)) for readings in zip(*twice, strict=True)]
    return [
        f"{kind} {content if one == other else 'random'};"
        for one, other in zip(*parts, strict=True)
        for kind, content in one
    ]


def _read(data: Any, index: int) -> list[tuple[str, str]]:
    """Type and content of every part of an example, as a batch of it has them."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    return [
        (str(part.dtype), f"{tuple(part.shape)} {hashlib.sha256(_bytes(part)).hexdigest()}")
        for part in default_collate([data[index]])
    ]


@contextmanager
def _put_back() -> Iterator[None]:
    """A context whose end puts the global random numbers back where they were."""
    plain, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
