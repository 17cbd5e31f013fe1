"""The cost of a training step: the ratios by a clock of our own, the steps on a small network, and the command."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from firstorder.evaluation.bench import pairs as benchmark
from firstorder.evaluation.bench import training as training_cost
from firstorder.evaluation.bench.pairs import Cost
from firstorder.evaluation.bench.training import METHODS, TAU, Price, coupled_weights, prices, step
from firstorder.evaluation.cli import app
from firstorder.evaluation.commands import train_cost
from firstorder.evaluation.names import packaged
from firstorder.training import ENGM

SECONDS = {"MSGD": 2.0, "ENGM": 3.0, "N-ENGM": 5.0, "A-ENGM, between fits": 6.0, "A-ENGM, fitting": 8.0}
BYTES = {"MSGD": 10.0, "ENGM": 15.0, "N-ENGM": 30.0, "A-ENGM, between fits": 25.0, "A-ENGM, fitting": 20.0}
PERIOD = f"A-ENGM, tau = {TAU}"
TINY = {"batch_size": 2, "steps": 1, "rounds": 1, "threads": 1}


class Recorded(nn.Sequential):
    """A small network for images (N, 3, 32, 32) that notes the mode and the size of every batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10))
        self.seen: list[tuple[bool, tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, tuple(x.shape)))
        logits: Tensor = super().forward(x)
        return logits


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The networks that take the place of the ResNet-18, in the order they are made."""
    networks: list[Recorded] = []

    def model() -> Recorded:
        networks.append(Recorded().eval())
        return networks[-1]

    small = packaged.Packaged(model=model, data="cifar10")
    monkeypatch.setitem(packaged.MODELS, "cifar10-resnet18", small)
    monkeypatch.setattr(training_cost, "_peak", lambda name, *_: BYTES[name])
    return networks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Steps that do nothing and take SECONDS; notes what was asked for and the thread counts of the runs."""
    notes = SimpleNamespace(steps=[], peaks=[], threads=set(), now=0.0, broken=False)

    def fake_step(name: str, *, batch_size: int, steps: int) -> Callable[[], None]:
        notes.steps.append((name, batch_size, steps))

        def run() -> None:
            notes.threads.add(torch.get_num_threads())
            notes.now += SECONDS[name]
            if notes.broken:
                raise RuntimeError("broken")

        return run

    def fake_peak(name: str, *words: int) -> float:
        notes.peaks.append((name, *words))
        return BYTES[name]

    monkeypatch.setattr(training_cost, "step", fake_step)
    monkeypatch.setattr(training_cost, "_peak", fake_peak)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: notes.now))
    return notes


def test_rows_are_ratios_to_the_mean_gradient(clock: SimpleNamespace) -> None:
    found = {price.time.name: price for price in prices(batch_size=3, steps=4, rounds=5, threads=2)}
    assert list(found) == [*METHODS, PERIOD]
    for name in METHODS:
        ratio = SECONDS[name] / SECONDS["MSGD"]
        cost = found[name].time
        assert (cost.median, cost.low, cost.high) == pytest.approx((ratio, ratio, ratio))
        assert found[name].memory == pytest.approx(BYTES[name] / BYTES["MSGD"])
    mean = (49 * 3.0 + 4.0) / 50
    whole = found[PERIOD].time
    assert (whole.median, whole.low, whole.high) == pytest.approx((mean, mean, mean))
    assert found[PERIOD].memory == pytest.approx(2.5)
    assert clock.steps == [(name, 3, 4) for name in METHODS]
    assert clock.peaks == [(name, 3, 4, 2) for name in METHODS]


def test_the_thread_count_is_set_and_restored(clock: SimpleNamespace) -> None:
    before = torch.get_num_threads()
    prices(**{**TINY, "threads": before + 1})
    assert clock.threads == {before + 1}
    assert torch.get_num_threads() == before
    clock.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        prices(**{**TINY, "threads": before + 1})
    assert torch.get_num_threads() == before


def test_the_mean_gradient_against_itself_is_the_noise(made: list[Recorded]) -> None:
    found = prices(**{**TINY, "rounds": 5})
    noise = found[0]
    assert noise.time.name == "MSGD"
    assert noise.memory == 1.0
    assert noise.time.low <= 1.2
    assert noise.time.high >= 0.8
    assert noise.time.low <= noise.time.median <= noise.time.high
    assert len(made) == len(METHODS)
    for price in found:
        assert 0 < price.time.low <= price.time.median <= price.time.high


@pytest.mark.parametrize("name", ["batch_size", "steps", "rounds", "threads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_are_refused_before_any_work(clock: SimpleNamespace, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be an integer of at least 1$"):
        prices(**{**TINY, name: value})
    assert not clock.peaks
    assert not clock.steps


@pytest.mark.parametrize("name", METHODS)
def test_a_step_attacks_and_trains_in_training_mode(made: list[Recorded], name: str) -> None:
    run = step(name, batch_size=2, steps=3)
    (model,) = made
    before = [p.detach().clone() for p in model.parameters()]
    run()
    assert model.training
    assert all(shape == (2, 3, 32, 32) for _, shape in model.seen)
    first = [training for training, _ in model.seen].count(False)
    assert [training for training, _ in model.seen] == [False] * first + [True]
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert float(moved[-1].norm()) > 0
    for change, g, p in zip(moved, gradients, before, strict=True):
        torch.testing.assert_close(change, -1e-6 * g, rtol=0, atol=1e-7 * float(p.abs().max()) + 1e-9)
    run()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert float((p.grad - g).norm()) < 0.5 * float(g.norm()) + 1e-6
    step(name, batch_size=2, steps=5)()
    assert [training for training, _ in made[1].seen].count(False) == first + 2


def test_the_rows_of_aengm_never_and_always_fit() -> None:
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    for name, fits in (("A-ENGM, between fits", False), ("A-ENGM, fitting", True)):
        model = Recorded().train()
        method = METHODS[name](model)
        for _ in range(3):
            x.requires_grad_()
            outcome = method.backward(nn.functional.cross_entropy(model(x), y, reduction="none"), x)
            assert (outcome.norms is not None) == fits


def test_coupled_weights_are_those_of_engm_in_both_meanings(made: list[Recorded]) -> None:
    found = coupled_weights(batch_size=4, alpha=0.3)
    assert list(found) == ["ignore", "exact"]
    for coupling, weights in found.items():
        assert weights.shape == (4,)
        assert not weights.requires_grad
        assert bool(((weights > 0) & (weights <= 1)).all())
        assert float(weights.min()) < 1
        model = Recorded().train()
        x, y = packaged.cifar10().x[:4], packaged.cifar10().y[:4]
        adversarial = training_cost.PGD(eps=8 / 255, alpha=2 / 255, steps=10)(model, x, y)
        losses = nn.functional.cross_entropy(model(adversarial), y, reduction="none")
        torch.testing.assert_close(weights, ENGM(model, alpha=0.3, coupling=coupling).weights(losses))
    gap = (found["ignore"] - found["exact"]).abs() / found["exact"]
    assert float(gap.max()) > 1e-2
    assert [training for training, _ in made[0].seen][-1]


def test_coupling_matters_on_the_resnet() -> None:
    found = coupled_weights(batch_size=2)
    for weights in found.values():
        assert weights.shape == (2,)
        assert bool(((weights > 0) & (weights <= 1)).all())
    assert float((found["ignore"] / found["exact"] - 1).abs().max()) > 1e-2


def test_growth_is_what_three_steps_add_to_the_peak(made: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100.0, 350.0])
    monkeypatch.setattr(training_cost, "_resident", lambda: next(peaks))
    assert training_cost._grow("ENGM", 2, 4, torch.get_num_threads()) == 250.0
    modes = [training for training, _ in made[0].seen]
    assert modes.count(True) == 3
    one = len(modes) // 3
    step("ENGM", batch_size=2, steps=1)()
    assert len(made[1].seen) == one


class Echo:
    """In the process that it is sent to, a function that returns its arguments and whether torch was there before."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("lambda *words: (*words, 'torch' in __import__('sys').modules)",)


def test_memory_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "_grow", Echo())
    found: Any = training_cost._peak("ENGM", 2, 3, 1)
    assert found == ("ENGM", 2, 3, 1, False)


def invoke(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["train-cost", *words])


def lines(done: Any) -> list[str]:
    return [line.strip() for line in done.output.splitlines()]


def test_the_command_prints_every_row(made: list[Recorded]) -> None:
    done = invoke("--batch-size", "2", "--steps", "1", "--rounds", "1", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert lines(done)[1] == "ResNet-18, CIFAR-10 shapes, batch 2, PGD-1, 1 thread"
    assert "median of 1" in done.output
    for name in (*METHODS, PERIOD):
        assert name in done.output
    (row,) = (line.split() for line in lines(done) if line.startswith("MSGD"))
    assert row[-1] == "1.00"
    assert "relative difference" in done.output
    assert {shape[0] for network in made for _, shape in network.seen} == {2}


def test_the_command_passes_its_options_and_formats_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def found(**words: int) -> list[Price]:
        asked.append(words)
        return [Price(time=Cost(name="METHOD", median=1.23456, low=1.1, high=2.0), memory=1.456)]

    def weights(**words: int) -> dict[str, Tensor]:
        asked.append(words)
        return {"ignore": torch.tensor([0.5, 1.0]), "exact": torch.tensor([1.0, 1.0])}

    monkeypatch.setattr(train_cost, "prices", found)
    monkeypatch.setattr(train_cost, "coupled_weights", weights)
    done = invoke("--batch-size", "64", "--steps", "3", "--rounds", "5", "--threads", "2")
    assert done.exit_code == 0, done.output
    assert asked == [{"batch_size": 64, "steps": 3, "rounds": 5, "threads": 2}, {"batch_size": 16}]
    assert lines(done)[1] == "ResNet-18, CIFAR-10 shapes, batch 64, PGD-3, 2 threads"
    (row,) = (line.split() for line in lines(done) if "METHOD" in line)
    assert row == ["METHOD", "1.235", "1.100", "2.000", "1.46"]
    assert "25.0 % on average, 50.0 % at most" in done.output


@pytest.mark.parametrize("option", ["--batch-size", "--steps", "--rounds", "--threads"])
def test_the_command_refuses_counts_below_one(option: str) -> None:
    done = invoke(option, "0")
    assert done.exit_code == 2
    assert option in done.stderr


def test_the_command_reports_a_refusal_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(packaged.MODELS, "cifar10-resnet18")
    monkeypatch.setattr(training_cost, "_peak", lambda *_: 1.0)
    done = invoke()
    assert done.exit_code == 2
    assert done.stderr.startswith("error: there is no packaged model 'cifar10-resnet18'")
    assert len(done.stderr.splitlines()) == 1
