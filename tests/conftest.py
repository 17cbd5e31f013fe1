"""Fixtures of all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from cases import Net
from report_pages import browser  # noqa: F401 (a fixture)
from samples import require_samples

os.environ.pop("COLUMNS", None)  # what runs the tests must not decide how wide the commands write

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a long test without a sample; single rows may be asked for."""
    require_samples(config.args, items)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Net:
    """A network in evaluation mode."""
    return Net().eval()
