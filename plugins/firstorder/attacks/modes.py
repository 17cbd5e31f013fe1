"""A module lent to an attack comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn

from firstorder.attacks.outputs import Select, TwoLogits

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.DataParallel, Select, TwoLogits)
"""Modules that do the same in training mode as in evaluation mode; what they contain may not."""


def training(module: nn.Module) -> list[str]:
    """The names of the parts of `module`, itself among them, that are in training mode; of containers, what is in them.

    The module itself is "all of it".
    """
    parts = [(name, part) for name, part in module.named_modules() if not isinstance(part, CONTAINERS)]
    return [name or "all of it" for name, part in parts if getattr(part, "training", False)]


@contextmanager
def preserved(module: nn.Module, *, evaluate: bool = True) -> Iterator[None]:
    """Put `module` in evaluation mode (if `evaluate`) and restore its modes and buffers afterwards.

    The train/eval flag of every submodule and the contents of every buffer come back exactly, also
    after an exception. Parameters need no restoring: attacks differentiate by the input alone. An exported or frozen
    module has no modes and keeps the one it was made in.
    """
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        if evaluate:
            with suppress(NotImplementedError):  # torch.export: the mode is part of the graph
                module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
        for part, name, buffer, saved in buffers:
            buffer.data.copy_(saved)
            if getattr(part, name, None) is not buffer:
                setattr(part, name, buffer)
