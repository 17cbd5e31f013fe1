"""Weights in files, read without running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Of files that hold weights and no network."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep a state dict."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
"""The prefix of every name in the state dict of a network that DataParallel, torch.compile or Lightning wrapped,
or a script of the same habit."""


def read(file: Path) -> dict[str, Tensor]:
    """The tensors in a file by name: safetensors, or torch.load with weights_only=True.

    Raises:
        ValueError: a file that holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        kind = "a .safetensors file" if file.suffix == ".safetensors" else "a PyTorch file of tensors alone"
        raise ValueError(f"{file} is not {kind}, or a damaged one: {str(error).splitlines()[0][:200]}") from None
    for key in WRAPPERS:
        inner = found.get(key) if isinstance(found, Mapping) else None
        found = inner if isinstance(inner, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} holds no weights by name; save model.state_dict()")
    return {str(name): value for name, value in found.items()}


def bare(weights: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The weights without the prefixes that all their names share, as long as they are not the names wanted."""
    while weights.keys() != set(wanted):
        prefix = next((one for one in PREFIXES if weights and all(name.startswith(one) for name in weights)), None)
        if prefix is None:
            return weights
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def fill(model: nn.Module, weights: dict[str, Tensor], *, network: str, file: Path) -> nn.Module:
    """The model itself, with the weights of a file.

    A model that normalises its images also takes the weights of the classifier in it.

    Raises:
        ValueError: weights of another network.
    """
    own = model.state_dict()
    found = bare(weights, own)
    inner = getattr(model, "model", None)
    if found.keys() != own.keys() and isinstance(inner, nn.Module):
        within = bare(weights, inner.state_dict())
        if within.keys() == inner.state_dict().keys():
            found = {**own, **{f"model.{name}": value for name, value in within.items()}}
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {network}: {' '.join(str(error).split())}") from None
    return model
