"""Natural and robust accuracy, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import nn

from firstorder.attacks import Attack, predicted, validation
from firstorder.attacks.base import Bounds
from firstorder.attacks.models import preserved
from firstorder.fabric.batches import Pairs, Purpose, generator, load, size
from firstorder.fabric.launch import summed
from firstorder.hosts.transfer import ahead


@dataclass(frozen=True)
class Robustness:
    """Shares of the examples classified correctly.

    Attributes:
        natural: without an attack.
        robust: without and with the attack.
        doubtful: part of `robust`, those on which the attack met NaN or infinite logits or gradients.
    """

    natural: float
    robust: float
    doubtful: float = 0.0

    @property
    def certain(self) -> float:
        """The share that is robust without doubt: NaN makes no epoch the best."""
        return self.robust - self.doubtful


def evaluate(
    fabric: Fabric,
    model: nn.Module,
    data: Pairs,
    attack: Attack,
    *,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
    workers: int = 0,
) -> Robustness:
    """Attack every example of `data`; every process takes its share of the batches.

    The result does not depend on the number of processes.

    Args:
        fabric: what the processes talk through.
        model: the bare module on the fabric's device, left as it was.
        data: examples within `bounds` and labels, indices or rows; of probabilities the largest is the right class.
        attack: the attack.
        bounds: of the examples.
        batch_size: examples at a time.
        seed: of the attack's random numbers.
        workers: processes that load examples.

    Warns:
        RobustnessWarning: as the attack does.
    """
    validation.count("batch_size", batch_size)
    batches = torch.arange(size(data)).split(batch_size)
    mine = range(fabric.global_rank, len(batches), fabric.world_size)
    correct = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    with preserved(model):
        loaded = ahead(load(data, [batches[i] for i in mine], workers=workers), fabric.device)
        for i, (x, y) in zip(mine, loaded, strict=True):
            right = validation.labels(y, len(x), fabric.device).indices
            source = generator(fabric.device, seed, Purpose.JUDGE, i)
            with torch.no_grad():
                natural = predicted(model(x)) == right
            result = attack.run(model, x, y, bounds=bounds, generator=source)
            assert result.success is not None
            assert result.doubtful is not None
            robust = natural & ~result.success
            correct += torch.stack([kind.sum() for kind in (natural, robust, robust & result.doubtful)])
    return Robustness(*(summed(fabric, correct) / size(data)).tolist())
