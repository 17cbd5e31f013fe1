"""`firstorder bench --device`, tried on the CPU."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firstorder.evaluation.bench import device
from firstorder.evaluation.cli import app
from firstorder.evaluation.names.models import NETWORKS
from firstorder.evaluation.names.networks import ResNet18


def test_steps_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, to see that all of it runs; a figure is a ratio to the bare step."""
    monkeypatch.setattr(device, "ResNet18", SmallColour)
    monkeypatch.setitem(device.SHAPES, SmallColour, (3, 32, 32))
    words = ["bench", "--device", "cpu", "--batch-size", "4", "--steps", "2", "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(tmp_path / "device.csv")
    names = set(rows["contender"])
    assert {device.BARE, "firstorder PGD", "firstorder PGD, prepared, bfloat16", "torchattacks PGD", "ENGM"} <= names
    assert (rows[rows["contender"].isin([device.BARE, "plain"])]["ratio"] == 1).all()
    assert (rows["images_per_second"] > 0).all()
    assert rows["model"].nunique() == 4
    assert "| small CNN, batch 4 | firstorder PGD |" in (tmp_path / "device.md").read_text()


def test_a_step_takes_longer_where_there_are_more() -> None:
    """What is timed are steps: four times as many take longer, and the time of one does not grow."""
    cpu = torch.device("cpu")
    few, many = (
        {row.contender: row for row in device.attacks("", device.SmallCNN, cpu, batch=64, steps=steps, rounds=3)}
        for steps in (3, 12)
    )
    for name in (device.BARE, "firstorder PGD"):
        assert many[name].milliseconds < 3 * few[name].milliseconds


def test_a_device_that_is_not_there() -> None:
    done = CliRunner().invoke(app, ["bench", "--device", "cuda:77"])
    assert done.exit_code == 2
    assert "cuda:77" in done.output


class SmallColour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(x)
        return logits


def test_the_resnet_is_the_one_of_checkpoints() -> None:
    """Names and shapes of its parameters, and what it computes, are those of a packaged checkpoint's own network."""
    resnet = pytest.importorskip("pyautoattack.examples.resnet")
    theirs, ours = resnet.ResNet18().eval(), ResNet18().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert NETWORKS["resnet18"] is ResNet18
