"""TI's convolution against a slow transcription, on every way of computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import references_transfer as slow
from firstorder.attacks import SINITIM, TIFGSM, TranslationInvariant
from firstorder.attacks.models import Evaluation
from firstorder.attacks.oracles import Query
from firstorder.attacks.transformations import BANDED
from firstorder.evaluation.bench import pairs as benchmark
from firstorder.evaluation.names import packaged

SHAPES = [(1, 6, 6), (3, 5, 8), (2, 41, 4), (1, 1, 30), (2, 1, 1)]
"""Non-square; both axes short or long for a kernel of 7, or one of each."""


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def smoothed(part: TranslationInvariant, g: Tensor) -> Tensor:
    """What the part makes of gradients g (N, C, H, W)."""
    query: Query = lambda points: Evaluation(g, None)  # noqa: E731
    step: Any = None
    found, _ = part(query, g, part.init(g), step)
    return found.gradient


def transcribed(part: TranslationInvariant, g: Tensor) -> Tensor:
    weights = slow.kernel(part.kernel_name, part.len_kernel, part.nsig)
    rows = [slow.convolve(row.flatten().tolist(), tuple(row.shape), weights) for row in g.double()]
    return torch.tensor(rows, dtype=torch.float64).reshape(g.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", [1, 3, 7, 11])
@pytest.mark.parametrize("name", ["gaussian", "linear", "uniform"])
def test_a_slow_convolution(name: Any, side: int, shape: tuple[int, ...]) -> None:
    part, g = TranslationInvariant(kernel_name=name, len_kernel=side), gradients(shape)
    torch.testing.assert_close(smoothed(part, g), transcribed(part, g), rtol=0, atol=1e-13)


def test_both_ways_are_taken_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    part, g = TranslationInvariant(len_kernel=7), gradients((3, 20, 7 * BANDED + 1))
    assert [band is None for band in part.init(g).bands] == [False, True]
    found = smoothed(part, g)
    for limit, shifted in ((0, True), (10**6, False)):
        monkeypatch.setattr("firstorder.attacks.transformations.BANDED", limit)
        assert {band is None for band in part.init(g).bands} == {shifted}
        torch.testing.assert_close(smoothed(part, g), found, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 31, 29)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    part, g = TranslationInvariant(), gradients(shape, dtype)
    found, wide = smoothed(part, g), smoothed(part, g.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wide, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 31, 29)], ids=str)
def test_layouts_and_autocast_change_nothing(shape: tuple[int, ...]) -> None:
    part, g = TranslationInvariant(), gradients(shape, torch.float32)
    expected, kept = smoothed(part, g), g.clone()
    last = g.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(smoothed(part, last), expected, rtol=0, atol=1e-6)
    one = gradients((1, *shape[1:]), torch.float32)
    torch.testing.assert_close(smoothed(part, one.expand(2, 3, -1, -1)), smoothed(part, one).expand(2, 3, -1, -1))
    with torch.autocast("cpu", torch.bfloat16):
        found = smoothed(part, g)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(g, kept), "the gradient itself is left alone"


def test_a_kernel_of_one_is_no_kernel() -> None:
    g = gradients((3, 9, 9), torch.float32)
    for name in ("gaussian", "linear", "uniform"):
        assert smoothed(TranslationInvariant(kernel_name=name, len_kernel=1), g) is g


def test_stacked_copies_and_single_examples_meet_the_same_matrices() -> None:
    images = packaged.mnist()
    model, x, y = packaged.mnist_cnn(), images.x[:6], images.y[:6]
    for attack in (TIFGSM(eps=0.3, steps=3), SINITIM(eps=0.3, steps=2, m=3)):
        singles = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(attack(model, x, y), singles, rtol=0, atol=1e-5)


def test_the_matrices_stay_whole_when_examples_leave() -> None:
    images = packaged.mnist()
    model, x = packaged.mnist_cnn(), images.x[:40]
    run = TIFGSM(eps=0.4, steps=8, early_stop=True).run(model, x, images.y[:40])
    assert 0 < int((run.gradients < 8).sum()) < 40


def test_its_cost_is_compared_with_mi_fgsm() -> None:
    images = packaged.mnist()
    costs = benchmark.per_step(
        packaged.mnist_cnn(), images.x[:8], images.y[:8], family="translation", steps=2, rounds=1, threads=1
    )
    assert [cost.name for cost in costs] == [
        "bare step",
        "firstorder MIFGSM",
        "firstorder TIFGSM",
        "firstorder TIFGSM, len_kernel 15",
    ]
    assert benchmark.baseline("translation") == "firstorder MIFGSM"
    assert benchmark.baseline("bounded") == "bare step"
