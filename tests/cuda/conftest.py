"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where FIRSTORDER_PART is "2/8", keep the third of eight parts of the tests."""
    part, of = map(int, os.environ.get("FIRSTORDER_PART", "0/1").split("/"))
    items[:] = items[part::of]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 without TF32, and the same kernels every time."""
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32, convolutions.deterministic
    convolutions.allow_tf32, convolutions.deterministic = False, True
    yield
    convolutions.allow_tf32, convolutions.deterministic = before
