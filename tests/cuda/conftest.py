"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

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
