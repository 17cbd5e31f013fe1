"""The files of a run: its state, for resumption, and its weights."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firstorder.fabric.identity import LATER
from firstorder.files import replacing
from firstorder.hosts.description import description

STATE = "state.pt"
BEST = "best.safetensors"
LAST = "last.safetensors"
FORMAT = 2
KEYS = ("model", "optimizer", "schedule", "method", "precision", "step", "best", "sums")
"""What a state holds beside its format and the identity of its run."""

SEAL = "sha256"
"""The key of a state's digest; states of earlier versions have none. Torch does not notice bits that flip in a file."""


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically, with a digest of it."""
    whole = {"format": FORMAT, **state}
    with replacing(folder / STATE) as temporary:
        torch.save({**whole, SEAL: _digest(whole)}, temporary)


def load_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The saved state of a run, on the CPU; None where there is none.

    Raises:
        ValueError: it is that of a run of another identity, and the message says in what they differ; the file is
            damaged, or none of a run.
    """
    path = folder / STATE
    if not path.exists():
        return None
    damaged = ValueError(
        f"{path} is damaged or no state of a run; delete it to start anew, or put a copy that is whole in its place"
    )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:  # a cut-off file makes torch seek where nothing is
        if error.errno == errno.EINVAL:
            raise damaged from None
        raise
    except Exception:  # torch says what it stumbled over in as many ways as there are bytes
        raise damaged from None
    if not isinstance(state, dict) or "format" not in state:
        raise damaged
    if SEAL in state and state.pop(SEAL) != _digest(state):
        raise damaged
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}; train into another folder")
    if not state.keys() >= {"identity", *KEYS}:
        raise damaged
    other = state["identity"]
    compared = {*identity, *other} - (LATER - other.keys())
    differing = sorted(key for key in compared if identity.get(key) != other.get(key))
    if differing:
        differences = ", ".join(
            f"{key} was {other.get(key)!r} and is {identity.get(key)!r}"
            + (" (other contents)" if key.endswith(" data") else "")
            for key in differing
        )
        raise ValueError(
            f"{path} is of another run: {differences}; resume with what it was, or train into another folder"
        )
    found: dict[str, Any] = state
    return found


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights that `save_weights` wrote, on the CPU.

    Raises:
        ValueError: a file that is missing or truncated, or none of weights.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; put a copy in its place, or train anew") from None
    except SafetensorError:
        raise ValueError(f"{path} is damaged; put a copy that is whole in its place, or train anew") from None


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights of a bare module atomically; tensors that it shares are written once per name."""
    weights: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    with replacing(path) as temporary:
        save_file(weights, temporary)


def _digest(state: Mapping[str, Any]) -> str:
    """Of all values of a state, tensors included, in whatever way they are saved and on every device."""
    return hashlib.sha256(description(state).encode()).hexdigest()
