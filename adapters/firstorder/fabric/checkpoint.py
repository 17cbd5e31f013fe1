"""The files of a run: its state, for resumption, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firstorder.fabric.identity import LATER
from firstorder.files import replacing, seals

STATE = "state.pt"
BEST = "best.safetensors"
LAST = "last.safetensors"
FORMAT = 2
KEYS = ("model", "optimizer", "schedule", "method", "precision", "step", "best", "sums")
"""What a state holds beside its format and the identity of its run."""


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically, with a digest of it."""
    seals.save(folder / STATE, {"format": FORMAT, **state})


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
    state = seals.load(path)
    if state is None or "format" not in state:
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
