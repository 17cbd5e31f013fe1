"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch

from cases import Net


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Net:
    """A network in evaluation mode."""
    return Net().eval()
