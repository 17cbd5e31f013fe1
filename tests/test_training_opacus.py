"""Norms of per-example gradients as Opacus, an independent implementation, finds them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from firstorder.training import PerExample


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 16),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def losses(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 8, 8, generator=generator)
    return F.cross_entropy(model(x), torch.randint(4, (6,), generator=generator), reduction="none")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", ["dense", "ghost"])
def test_norms_are_those_of_opacus(kind: str) -> None:
    model = network()
    ours = PerExample(model)(losses(model), keep=False).norms
    if kind == "dense":
        wrapped = GradSampleModule(network(), loss_reduction="sum")
        losses(wrapped).sum().backward()
        squares = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()])
        theirs = squares.sum(0).sqrt()
    else:
        fast = GradSampleModuleFastGradientClipping(network(), loss_reduction="sum", max_grad_norm=1.0)
        losses(fast).sum().backward()
        theirs = fast.get_norm_sample()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
