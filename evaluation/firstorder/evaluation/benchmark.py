"""What a step of an attack costs beyond the forward and backward that it cannot avoid.

The bare step is one forward, the cross-entropy and one backward by the input. Every run of a contender
is divided by the mean of the bare runs right before and after it, and the median over rounds is reported,
so that a machine whose speed drifts does not decide the comparison. The bare step competes with itself:
its row is the noise.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time per step of a contender over the bare step's: median, lowest and highest round."""

    name: str
    median: float
    low: float
    high: float


def per_step(
    model: nn.Module, x: Tensor, y: Tensor, *, rounds: int = 15, threads: int = 2, seed: int = 0
) -> list[Cost]:
    """Time PGD, NI-FGSM and PQGD through every host on x (N, C, H, W) in [0, 1] with labels y (N,).

    Sets torch's thread count for the measurement and restores it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = contenders(model, x, y)
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        order, shuffle = list(runs), random.Random(seed)
        for run in runs.values():
            run()
        for _ in range(rounds):
            shuffle.shuffle(order)
            bare = _seconds(runs["bare step"])
            for name in order:
                own, after = _seconds(runs[name]), _seconds(runs["bare step"])
                ratios[name].append(2 * own / (bare + after))
                bare = after
    finally:
        torch.set_num_threads(before)
    return [Cost(name=n, median=statistics.median(r), low=min(r), high=max(r)) for n, r in ratios.items()]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def contenders(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Runs of `STEPS` steps at eps 0.3, alpha 0.01 without random start, by name; "bare step" among them."""
    import art.attacks.evasion
    import torchattacks
    from art.estimators.classification import PyTorchClassifier

    import firstorder.art
    import firstorder.torchattacks

    model.eval()
    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), model(x[:1]).shape[1], clip_values=(0, 1), device_type="cpu"
    )
    words = {"eps": 0.3, "alpha": 0.01, "steps": STEPS}
    art_words = {"eps": 0.3, "eps_step": 0.01, "max_iter": STEPS, "batch_size": len(x), "verbose": False}
    images, labels = x.numpy(), np.eye(estimator.nb_classes, dtype=np.float32)[y.numpy()]
    torch_runs = {
        "firstorder.torchattacks PGD": firstorder.torchattacks.PGD(model, **words, random_start=False),
        "firstorder.torchattacks NIFGSM": firstorder.torchattacks.NIFGSM(model, **words),
        "firstorder.torchattacks PQGD": firstorder.torchattacks.PQGD(model, **words, random_start=False),
        "torchattacks PGD": torchattacks.PGD(model, **words, random_start=False),
        "torchattacks NIFGSM": torchattacks.NIFGSM(model, **words),
    }
    art_runs = {
        "firstorder.art PGD": firstorder.art.PGD(estimator, **art_words),
        "art ProjectedGradientDescent": art.attacks.evasion.ProjectedGradientDescent(estimator, **art_words),
    }

    def bare() -> None:
        for _ in range(STEPS):
            point = x.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(point), y), point)

    def torch_run(attack: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: attack(x, y)

    def art_run(attack: art.attacks.EvasionAttack) -> Callable[[], object]:
        return lambda: attack.generate(images, labels)

    return (
        {"bare step": bare}
        | {name: torch_run(attack) for name, attack in torch_runs.items()}
        | {name: art_run(attack) for name, attack in art_runs.items()}
    )
