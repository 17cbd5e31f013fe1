"""Statistics of per-example gradients, the diagnostics of [ENGM]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.models import preserved
from firstorder.training.objectives import Objective
from firstorder.training.per_example import PerExample


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """Of the gradients g_i = grad_theta L_i of N examples.

    Attributes:
        norms: ||g_i||_2, (N,).
        input_norms: ||grad_x L_i||_2 at the adversarial examples, (N,).
        mean: mu = E ||g_i||_2 (ENGM, Fig. 2).
        variance: sigma^2 = E ||g_i - E g||_2^2 (ENGM, Fig. 2).
        correlation: Pearson's, of `input_norms` and `norms` (ENGM, Fig. 3); nan where either is constant.
    """

    norms: Tensor
    input_norms: Tensor
    mean: float
    variance: float
    correlation: float


def gradient_statistics(
    model: nn.Module,
    objective: Objective,
    x: Tensor,
    adversarial: Tensor,
    y: Tensor,
    *,
    batch_size: int = 128,
    training: bool = False,
) -> GradientStatistics:
    """Measure the per-example gradients of an objective.

    In evaluation mode every example has a gradient of its own. In training mode BatchNorm ties the examples of a batch
    together; there the gradient of one is what its own activations contribute, see `PerExample`. What the model draws
    there, as dropout does, is the same in every call, and torch's generators are left as they were.

    Args:
        model: the module, left as it was; its trainable parameters count.
        objective: gives the losses.
        x: clean examples (N, ...).
        adversarial: the objective's examples for them, (N, ...).
        y: labels (N,).
        batch_size: examples at a time.
        training: whether the model is in training mode (ENGM, Fig. 3b), else in evaluation mode (Fig. 3a).
    """
    validation.count("batch_size", batch_size)
    differentiate = PerExample(model)
    norms, input_norms, total = [], [], None
    batches = zip(x.split(batch_size), adversarial.detach().split(batch_size), y.split(batch_size), strict=True)
    devices = [x.device] if x.device.type == "cuda" else []
    forked = torch.random.fork_rng(devices, enabled=training)
    with forked, preserved(model, evaluate=not training), torch.enable_grad():
        if training:
            torch.manual_seed(0)
            model.train()
        for clean, attacked, labels in batches:
            inputs = attacked.clone().requires_grad_()
            found = differentiate(objective.losses(model, clean, inputs, labels), (inputs,))
            assert found.norms is not None
            assert found.input_norms is not None
            norms.append(found.norms)
            input_norms.append(found.input_norms)
            mean = found.weighted(torch.ones_like(found.norms))
            real = (torch.view_as_real(g) if g.is_complex() else g for g in mean if g is not None)
            flat = torch.cat([g.flatten().double() for g in real]) * (len(labels) / len(y))
            total = flat if total is None else total + flat
    assert total is not None
    sizes, by_inputs = torch.cat(norms).double(), torch.cat(input_norms).double()
    return GradientStatistics(
        norms=sizes,
        input_norms=by_inputs,
        mean=float(sizes.mean()),
        variance=float(sizes.square().mean() - total.square().sum()),
        correlation=float(torch.corrcoef(torch.stack([by_inputs, sizes]))[0, 1]) if len(sizes) > 1 else torch.nan,
    )
