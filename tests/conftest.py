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


SLOW = (
    "registry", "report_examples", "evaluation_report", "evaluate_engines", "random_cases", "robustbench",
    "train_report", "evaluate_verdict", "fabric_processes", "training_automatic", "train_command", "typing", "views",
    "shards", "memory", "distribution", "notebooks", "readme", "contract", "reproduce",
)  # fmt: skip
"""Files that take longest begin first, so that no process is left with one of them at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a long test without a sample, single rows may be asked for; slow files first."""
    require_samples(config.args, items)
    place = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOW)))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Net:
    """A network in evaluation mode."""
    return Net().eval()
