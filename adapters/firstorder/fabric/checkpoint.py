"""The files of a run: its state, for resumption, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from firstorder.hosts.files import replacing

STATE = "state.pt"
BEST = "best.safetensors"
LAST = "last.safetensors"
FORMAT = 1


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically."""
    with replacing(folder / STATE) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The saved state of a run, on the CPU; None where there is none.

    Raises:
        ValueError: it is that of a run of another identity; the message says in what they differ.
    """
    path = folder / STATE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}; train into another folder")
    other = state["identity"]
    differing = sorted(key for key in {*identity, *other} if identity.get(key) != other.get(key))
    if differing:
        told = ", ".join(f"{key} was {other.get(key)!r} and is {identity.get(key)!r}" for key in differing)
        raise ValueError(f"{path} is of another run: {told}; resume with what it was, or train into another folder")
    return state


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights of a bare module atomically; tensors that it shares are written once per name."""
    weights: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    with replacing(path) as temporary:
        save_file(weights, temporary)
