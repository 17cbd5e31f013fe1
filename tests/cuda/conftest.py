"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 without TF32, and the same kernels every time."""
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32, convolutions.deterministic
    convolutions.allow_tf32, convolutions.deterministic = False, True
    yield
    convolutions.allow_tf32, convolutions.deterministic = before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests noted."""
    for line in getattr(sys.modules.get("cuda_device"), "NOTES", []):
        terminalreporter.write_line(f"NOTE {line}")
