"""The device of these tests: CUDA's; importing this skips a file where there is none.

`FIRSTORDER_TEST_DEVICE=cpu` runs on the CPU what can be run there, to try the tests themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("FIRSTORDER_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"

if CUDA and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def note(text: str) -> None:
    """Leave a line in the summary of the run, also where several processes test."""
    warnings.warn(f"NOTE {text}", stacklevel=2)


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host must not wait for the device in here."""
    if not CUDA:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def between(last: int) -> tuple[Callable[[int, Tensor, Tensor], None], Callable[[], None]]:
    """A hook that forbids waiting from the first gradient to the `last`, and what ends that after a failure."""
    context = no_waiting()

    def hook(t: int, gradient: Tensor, a: Tensor) -> None:
        if t == 1:
            context.__enter__()
        if t == last:
            context.__exit__(None, None, None)

    def end() -> None:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
        with suppress(Exception):
            context.gen.close()  # type: ignore[attr-defined]

    return hook, end


def states() -> list[Tensor]:
    """The state of every global generator."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if CUDA else [])]


def on(value: Any) -> bool:
    """Whether a tensor is on the device."""
    return isinstance(value, Tensor) and value.device.type == DEVICE.type
