"""Loss against the scale of the input: closed forms, files and the model's state."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.evaluation.studies.scale_invariance import SCALES, ScaleCurve, curve, losses, picture, write

CORRECT, TOTAL = 5, 7
"""The images below, and those of label 0, which `linear` predicts for all of them."""


def data() -> tuple[Tensor, Tensor]:
    """Images of which all pixels are (i + 1) / 8, and labels of which the first and the fourth are 1."""
    x = (torch.arange(TOTAL) + 1.0)[:, None, None, None].expand(-1, 1, 2, 2) / 8
    return x, torch.tensor([1, 0, 0, 1, 0, 0, 0])


def linear(points: Tensor) -> Tensor:
    """Logits (mean, -mean): the loss of label 0 at scale s is log(1 + exp(-2 s mean)), of label 1 with +."""
    mean = points.flatten(1).mean(1)
    return torch.stack([mean, -mean], 1)


def expected(scale: float) -> float:
    x, y = data()
    signs = [1 if label else -1 for label in y.tolist()]
    means = [(i + 1) / 8 for i in range(TOTAL)]
    return sum(math.log1p(math.exp(sign * 2 * scale * mean)) for sign, mean in zip(signs, means, strict=True)) / len(x)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_linear_model(batch_size: int) -> None:
    found = curve("linear", linear, *data(), batch_size=batch_size)
    assert len(SCALES) == 20
    assert found.scales.tolist() == [i / 10 for i in range(1, 21)]
    assert found.loss.tolist() == pytest.approx([expected(scale) for scale in SCALES], rel=1e-6)
    assert found.accuracy.tolist() == pytest.approx([CORRECT / TOTAL] * 20)
    assert torch.equal(losses(linear, *data(), batch_size=batch_size), found.loss)


def test_other_scales_are_not_clipped() -> None:
    found = losses(linear, *data(), scales=(0.0, 100.0))
    assert found.tolist() == pytest.approx([math.log(2), expected(100.0)], rel=1e-6)


def test_a_bias_makes_the_prediction_depend_on_the_scale() -> None:
    """Class 0 wins where scale * mean > 0.5: nowhere, from the fifth image on, and from the second on."""
    scales = (0.5, 0.9, 2.1)
    found = curve("m", lambda p: F.pad(p.flatten(1).mean(1, keepdim=True) - 0.5, (0, 1)), *data(), scales=scales)
    assert (found.accuracy * TOTAL).tolist() == pytest.approx([2, 5, 6])


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = losses(model, *data()), losses(model, *data(), batch_size=2)
    torch.testing.assert_close(first, second)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not first.requires_grad


def test_files(tmp_path: Path) -> None:
    perfect = ScaleCurve(
        model="a, with a comma", scales=torch.tensor([0.5, 1.0]), loss=torch.tensor([2.0, 0.0]), accuracy=torch.ones(2)
    )
    curves = [curve("linear", linear, *data()), perfect]
    (path,) = write(curves, tmp_path / "new")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["linear"] * 20 + ["a, with a comma"] * 2
    assert [row["scale"] for row in rows[:20]] == [f"{scale:g}" for scale in SCALES]
    assert [float(row["loss"]) for row in rows[:20]] == pytest.approx([expected(s) for s in SCALES], rel=1e-5)
    assert float(rows[0]["accuracy"]) == pytest.approx(CORRECT / TOTAL, rel=1e-5)
    assert (rows[-1]["loss"], rows[-1]["accuracy"]) == ("0", "1")
    assert picture(curves, tmp_path / "scale.png") == tmp_path / "scale.png"
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "scale.png").stat().st_size > 5000


def test_mistakes() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="7 images and 6 labels; pass one label per image"):
        losses(linear, x, y[:6])
    with pytest.raises(ValueError, match="0 images"):
        losses(linear, x[:0], y[:0])
    with pytest.raises(ValueError, match="scales is empty"):
        losses(linear, x, y, scales=())
