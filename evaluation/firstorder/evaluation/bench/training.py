"""What a step of adversarial training costs beyond the mean gradient's: time and peak memory, as ratios.

A step is the inner attack (PGD), a forward, the method's backward and one step of SGD, on a network in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from firstorder.attacks import PGD, validation
from firstorder.evaluation.bench.pairs import Cost, paired
from firstorder.evaluation.names import packaged
from firstorder.evaluation.runs.memory import resident as _resident
from firstorder.training import AENGM, ENGM, MSGD, NENGM, Coupling, GradientMethod, Vanilla

TAU = 50
"""Batches from fit to fit of A-ENGM."""

METHODS: dict[str, Callable[[nn.Module], GradientMethod]] = {
    "MSGD": MSGD,
    "ENGM": ENGM,
    "N-ENGM": NENGM,
    "A-ENGM, between fits": lambda model: _between_fits(AENGM(model, tau=2**31)),
    "A-ENGM, fitting": lambda model: AENGM(model, tau=1),
}
"""What is compared, by the row's name; the first is the unit."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """A method's time and peak memory over MSGD's."""

    time: Cost
    memory: float


def prices(*, batch_size: int = 32, steps: int = 10, rounds: int = 7, threads: int = 2) -> list[Price]:
    """Measure every method on the CIFAR-10 ResNet-18, and A-ENGM over a whole period.

    Args:
        batch_size: examples a step.
        steps: steps of the inner attack.
        rounds: paired rounds to take the median of.
        threads: for torch.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps), ("rounds", rounds), ("threads", threads)):
        validation.count(name, value)
    peaks = {name: _peak(name, batch_size, steps, threads) for name in METHODS}
    runs = {name: step(name, batch_size=batch_size, steps=steps) for name in METHODS}
    costs = {cost.name: cost for cost in paired(runs, "MSGD", rounds=rounds, threads=threads)}
    found = [Price(time=cost, memory=peaks[name] / peaks["MSGD"]) for name, cost in costs.items()]
    between, fitting = found[-2:]
    return [*found, Price(time=_period(between.time, fitting.time), memory=max(between.memory, fitting.memory))]


def step(name: str, *, batch_size: int, steps: int) -> Callable[[], None]:
    """One step of training by METHODS[name] on random images."""
    model = packaged.get("cifar10-resnet18").model()
    method = METHODS[name](model)
    objective = Vanilla(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=steps))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    y = torch.randint(10, (batch_size,), generator=generator)

    def run() -> None:
        model.train()
        adversarial: Tensor = objective.adversarial(model, x, y)
        if method.needs_inputs:
            adversarial.requires_grad_()
        optimizer.zero_grad()
        method.backward(objective.losses(model, x, adversarial, y), adversarial)
        optimizer.step()

    return run


def coupled_weights(*, batch_size: int = 16, alpha: float = 5.0) -> dict[Coupling, Tensor]:
    """ENGM's weights (N,) through the BatchNorm of the ResNet-18 in training mode, in both meanings."""
    images = packaged.cifar10()
    x, y = images.x[:batch_size], images.y[:batch_size]
    found: dict[Coupling, Tensor] = {}
    couplings: tuple[Coupling, Coupling] = ("ignore", "exact")
    for coupling in couplings:
        model = packaged.get("cifar10-resnet18").model()
        objective = Vanilla(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10))
        adversarial = objective.adversarial(model, x, y)
        method = ENGM(model.train(), alpha=alpha, coupling=coupling)
        found[coupling] = method.weights(objective.losses(model, x, adversarial, y))
    return found


def _period(between: Cost, fitting: Cost) -> Cost:
    def mean(a: float, b: float) -> float:
        return ((TAU - 1) * a + b) / TAU

    return Cost(
        name=f"A-ENGM, tau = {TAU}",
        median=mean(between.median, fitting.median),
        low=mean(between.low, fitting.low),
        high=mean(between.high, fitting.high),
    )


def _peak(name: str, batch_size: int, steps: int, threads: int) -> float:
    """Bytes that a step adds to the resident memory of a fresh process at its peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_grow, name, batch_size, steps, threads).result()


def _grow(name: str, batch_size: int, steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    run = step(name, batch_size=batch_size, steps=min(steps, 1))
    before = _resident()
    for _ in range(3):
        run()
    return _resident() - before


def _between_fits(method: AENGM) -> AENGM:
    """The method behind its first batch, at which it always fits."""
    method.load_state_dict({**method.state_dict(), "batches": 1})
    return method
