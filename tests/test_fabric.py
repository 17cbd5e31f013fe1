"""Training through Lightning Fabric in one process, against a plain loop, and its parts."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fabric_runs import (
    ATTACK,
    BATCH,
    EPOCHS,
    FIXED,
    STEPS,
    State,
    augment,
    data,
    equal,
    fit,
    full,
    network,
    numbers,
    recipe,
    state,
    table,
)
from firstorder.attacks import ANU, DDN, PGD
from firstorder.fabric import Order, Robustness, Trainer, constant, cosine, drops, evaluate, loggers, make, one_cycle
from firstorder.fabric.loggers import logger
from firstorder.training import AENGM, AWP, ENGM, MGNC, MSGD, SNGM, TRADES, Vanilla, gradient_statistics


def number(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


# A run


class Mean:
    """losses.mean().backward(), without a method."""

    needs_inputs = False

    def backward(self, losses: Tensor, adversarial: Tensor) -> Any:
        losses.mean().backward()
        return type("Outcome", (), {"weights": torch.ones(len(losses))})


def count(model: nn.Module, attack: PGD, xs: Tensor, ys: Tensor, size: int = 256) -> tuple[float, float]:
    """Natural and robust accuracy, one example after the other, the attack's numbers those of its batch."""
    model = copy.deepcopy(model).eval()
    natural = robust = 0
    for i in range(0, len(xs), size):
        source = torch.Generator().manual_seed(number(0, 2, i // size))
        attacked = attack(model, xs[i : i + size], ys[i : i + size], generator=source)
        for x, near, y in zip(xs[i : i + size], attacked, ys[i : i + size], strict=True):
            right = int(model(x[None]).argmax()) == int(y)
            natural += right
            robust += right and int(model(near[None]).argmax()) == int(y)
    return natural / len(xs), robust / len(xs)


OBJECTIVES: dict[str, Callable[[float], Any]] = {
    "vanilla": lambda f: Vanilla(attack=PGD(eps=0.15 * f, alpha=0.1 * f, steps=2)),
    "trades": lambda f: TRADES(attack=PGD(eps=0.15 * f, alpha=0.1 * f, steps=2)),
    "awp": lambda f: AWP(base=TRADES(attack=PGD(eps=0.15 * f, alpha=0.1 * f, steps=2)), gamma=0.05),
}


@pytest.mark.parametrize(
    ("name", "method", "own", "accumulate"),
    [
        ("vanilla", MSGD, lambda model: Mean(), 1),
        ("vanilla", partial(ENGM, alpha=2.0), partial(ENGM, alpha=2.0), 2),
        ("trades", partial(ENGM, alpha=2.0), partial(ENGM, alpha=2.0), 1),
        ("awp", partial(AENGM, alpha=2.0, tau=2), partial(AENGM, alpha=2.0, tau=2), 2),
    ],
)
def test_a_run_is_a_plain_loop(tmp_path: Path, name: str, method: Any, own: Any, accumulate: int) -> None:
    chosen = full(objective=OBJECTIVES[name](1.0), method=method, accumulate=accumulate, diagnose=0)
    found = fit(tmp_path, chosen)

    model, (train, validated), total = network(), data(), STEPS * EPOCHS
    x_all, y_all = train.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = LambdaLR(optimizer, lambda step: 0.5 ** ((step / total >= 0.4) + (step / total >= 0.7)))
    weigher = own(model)
    order = Order(examples=84, batch_size=BATCH, parts=accumulate, seed=0)
    rows, epochs, best, kept, light = [], [], -1.0, state(model), 0
    for epoch in range(EPOCHS):
        total_loss = 0.0
        for now, parts in enumerate(order.indices(epoch)):
            step = epoch * STEPS + now
            model.train()
            optimizer.zero_grad()
            rate, losses_, weights, right = optimizer.param_groups[0]["lr"], [], [], 0
            for slot, indices in enumerate(parts):
                key = number(0, 1, step, slot)
                source = torch.Generator().manual_seed(key)
                x, y = augment(x_all[indices], source), y_all[indices]
                objective = OBJECTIVES[name](min(1.0, (step + 1) / total / 0.5))
                torch.manual_seed(number(0, 4, step, slot))
                adversarial = objective.adversarial(model, x, y, generator=source)
                adversarial.requires_grad_(weigher.needs_inputs)
                with objective.perturbed(model, x, adversarial, y):
                    seen: list[Tensor] = []
                    handle = model.register_forward_hook(lambda m, i, logits, seen=seen: seen.append(logits))
                    losses = objective.losses(model, x, adversarial, y)
                    handle.remove()
                    weights.append(weigher.backward(losses, adversarial).weights)
                losses_.append(losses.detach())
                right += int((seen[-1].argmax(1) == y).sum())
            for p in model.parameters():
                p.grad /= accumulate
            optimizer.step()
            schedule.step()
            loss, w = float(torch.cat(losses_).double().mean()), torch.cat(weights)
            light += int((w < 1).sum())
            rows.append(
                [step + 1, epoch + 1, rate, loss, right / 16, float(w.double().mean()), float((w < 1).sum()) / 16]
            )
            total_loss += loss
        natural, robust = count(model, chosen.judge, *validated.tensors)
        epochs.append([natural, robust, total_loss / STEPS])
        if robust > best:
            best, kept = robust, state(model)

    assert equal(state(found), state(model))
    assert not equal(state(found), state(network()))
    assert equal(load_file(tmp_path / "last.safetensors"), state(model))
    assert equal(load_file(tmp_path / "best.safetensors"), kept)
    assert method is MSGD or light > 0
    columns = ("step", "epoch", "lr", "loss", "robust", "weight", "clipped")
    for row, expected in zip(table(tmp_path / "steps.csv"), rows, strict=True):
        assert [float(row[key]) for key in columns] == pytest.approx(expected, rel=1e-12)
    columns = ("validation_natural", "validation_robust", "loss")
    for row, expected in zip(table(tmp_path / "epochs.csv"), epochs, strict=True):
        assert [float(row[key]) for key in columns] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("workers", "log_every"), [(0, 3), (1, 100)])
def test_listed_examples_make_the_same_run(tmp_path: Path, workers: int, log_every: int) -> None:
    class Listed(Dataset):  # type: ignore[type-arg]
        def __init__(self, pairs: TensorDataset) -> None:
            self.x, self.y = pairs.tensors

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.x[index], int(self.y[index])

    expected = fit(tmp_path / "a", recipe(epochs=1), log_every=log_every)
    train, validated = data()
    pairs = (Listed(train), Listed(validated))
    found = fit(tmp_path / "b", recipe(epochs=1), data=pairs, workers=workers, log_every=log_every)
    assert equal(state(found), state(expected))
    for folder in ("a", "b"):
        path = tmp_path / folder / "steps.csv"
        assert (numbers(path, "step") if log_every == 3 else path.exists()) == ([3.0] if log_every == 3 else False)
    assert table(tmp_path / "a" / "epochs.csv") == table(tmp_path / "b" / "epochs.csv")


def test_the_earliest_of_equals_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robust = iter([0.1, 0.5, 0.5, 0.3])
    monkeypatch.setattr("firstorder.fabric.run.evaluate", lambda *a, **o: Robustness(0.7, next(robust)))
    model, (train, validated) = network(), data()
    after: list[State] = []
    seen: list[dict[str, float]] = []

    def progress(row: Any) -> None:
        seen.append(dict(row))
        if "epoch" in row:
            after.append(state(model))

    best = Trainer(make(accelerator="cpu"), recipe(epochs=4), tmp_path).fit(model, train, validated, progress=progress)
    assert (best.epoch, best.validation) == (2, Robustness(0.7, 0.5))
    assert equal(load_file(tmp_path / "best.safetensors"), after[1])
    assert equal(load_file(tmp_path / "last.safetensors"), after[3])
    assert not equal(after[1], after[2])
    assert [row["step"] for row in seen if "epoch" not in row] == list(range(1, 21))
    assert [(row["epoch"], row["step"], row["validation_robust"]) for row in seen if "epoch" in row] == [
        (1, 5, 0.1),
        (2, 10, 0.5),
        (3, 15, 0.5),
        (4, 20, 0.3),
    ]
    assert {row["steps"] for row in seen} == {20}


def test_validation_may_skip_epochs_but_not_the_last(tmp_path: Path) -> None:
    fit(tmp_path, recipe(validate=2))
    assert [math.isnan(value) for value in numbers(tmp_path / "epochs.csv", "validation_robust")] == [
        True,
        False,
        False,
    ]
    assert [math.isnan(value) for value in numbers(tmp_path / "epochs.csv", "validation_natural")] == [
        True,
        False,
        False,
    ]


def test_tensorboard_has_the_rows(tmp_path: Path) -> None:
    fit(tmp_path, recipe(epochs=2), tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("steps", "epochs"):
        events = board.Scalars(f"{name}/loss")
        assert [event.step for event in events] == numbers(tmp_path / f"{name}.csv", "step")
        assert [event.value for event in events] == pytest.approx(numbers(tmp_path / f"{name}.csv", "loss"), rel=1e-6)
    assert not (tmp_path / "gradients.csv").exists()
    fit(tmp_path / "without", recipe(epochs=1), tensorboard=False)
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_the_fabrics_loggers_have_the_rows(tmp_path: Path) -> None:
    class Noted(CSVLogger):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.rows: list[tuple[int | None, dict[str, float]]] = []
            self.ends: list[str] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def finalize(self, status: str) -> None:
            self.ends.append(status)

    noted = Noted(tmp_path / "noted")
    fit(tmp_path / "run", recipe(epochs=2), fabric=make(accelerator="cpu", loggers=[noted]))
    for name in ("steps", "epochs"):
        found = [(step, row[f"{name}/loss"]) for step, row in noted.rows if f"{name}/loss" in row]
        own = tmp_path / "run" / f"{name}.csv"
        assert found == list(zip(numbers(own, "step"), numbers(own, "loss"), strict=True))
    assert len(noted.rows) == 12
    assert noted.ends == ["success"]
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_lightnings_loggers_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stand-ins are called: the packages are large and want a service."""
    calls: list[dict[str, Any]] = []
    runs: list[Any] = []

    class Client:
        def __init__(self, uri: str) -> None:
            self.uri = uri

        def get_experiment_by_name(self, wanted: str) -> Any:
            return types.SimpleNamespace(experiment_id="7") if runs else None

        def search_runs(self, experiments: list[str], wanted: str) -> Any:
            assert experiments == ["7"]
            (tag,) = calls[0]["tags"].items()
            return runs if wanted == f"tags.`{tag[0]}` = '{tag[1]}'" else []

    package = types.ModuleType(name)
    package.__spec__ = ModuleSpec(name, None)
    package.tracking = types.SimpleNamespace(MlflowClient=Client)  # type: ignore[attr-defined]
    host, made = types.ModuleType("pytorch_lightning"), types.ModuleType("pytorch_lightning.loggers")
    host.__spec__ = ModuleSpec("pytorch_lightning", None)
    for kind in ("WandbLogger", "MLFlowLogger"):
        setattr(made, kind, lambda kind=kind, **options: calls.append(options) or kind)
    for module in (package, host, made):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]
    assert logger(name, tmp_path / "run") == expected
    runs.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id="known")))
    assert logger(name, tmp_path / "run") == expected
    assert logger(name, tmp_path / "other") == expected
    if name == "wandb":
        assert calls[0] == calls[1]
        assert calls[0]["id"] != calls[2]["id"]
        assert (calls[0]["name"], calls[0]["resume"], calls[0]["save_dir"]) == ("run", "allow", tmp_path / "run")
    else:
        assert [call["run_id"] for call in calls] == [None, "known", None]
        assert calls[0]["tracking_uri"] == (tmp_path / "run" / "mlruns").as_uri()
        assert calls[0]["run_name"] == "run"


def test_what_a_logger_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="mlflow and pytorch_lightning: pip install mlflow pytorch-lightning"):
        logger("mlflow", tmp_path)
    with pytest.raises(ValueError, match="logger='csv ' is not known; choose csv, tensorboard, wandb, mlflow"):
        logger("csv ", tmp_path)


def test_gradients_are_diagnosed_at_the_full_budget(tmp_path: Path) -> None:
    model = fit(tmp_path, recipe(epochs=1, ramp=1.0, diagnose=6))
    x, y = data()[0][:6]
    adversarial = ATTACK(model, x, y, generator=torch.Generator().manual_seed(number(0, 3)))
    expected = gradient_statistics(model, Vanilla(attack=ATTACK), x, adversarial, y)
    (row,) = table(tmp_path / "epochs.csv")
    found = [float(row[key]) for key in ("mu", "sigma2", "correlation")]
    assert found == pytest.approx([expected.mean, expected.variance, expected.correlation], rel=1e-6)
    other = gradient_statistics(model, Vanilla(attack=ATTACK), x, adversarial, y, training=True)
    found = [float(row[f"{key}_training"]) for key in ("mu", "sigma2", "correlation")]
    assert found == pytest.approx([other.mean, other.variance, other.correlation], rel=1e-6)
    assert other.mean != expected.mean
    assert numbers(tmp_path / "gradients.csv", "norm") == pytest.approx(expected.norms.tolist(), rel=1e-6)
    assert numbers(tmp_path / "gradients.csv", "input_norm") == pytest.approx(expected.input_norms.tolist(), rel=1e-6)
    assert numbers(tmp_path / "gradients.csv", "step") == [5.0] * 6


def test_statistics_in_training_mode_add_up_to_the_gradient_of_the_batch() -> None:
    model, objective = network().eval(), Vanilla(attack=ATTACK)
    model[3].p = 0.0
    x, y = data()[0][:6]
    before = state(model)
    found = gradient_statistics(model, objective, x, x, y, training=True)
    assert equal(state(model), before)
    assert not any(part.training for part in model.modules())
    own = copy.deepcopy(model).double().train()
    loss = objective.losses(own, x.double(), x.double(), y).mean()
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.parameters()))])
    assert float(found.norms.square().mean()) - found.variance == pytest.approx(float(whole.square().sum()), rel=1e-4)
    plain = gradient_statistics(model, objective, x, x, y)
    assert found.mean != pytest.approx(plain.mean, rel=1e-2)


# Precision


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_trains(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    model, seen = network(), set()
    model[0].register_forward_hook(lambda layer, given, output: seen.add((layer.training, output.dtype)))
    chosen = recipe(epochs=8, validate=8, objective=Vanilla(attack=PGD(eps=0.02, alpha=0.02, steps=1)), method=MSGD)
    fit(tmp_path, chosen, model, fabric=make(accelerator="cpu", precision=precision))
    losses = numbers(tmp_path / "epochs.csv", "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    # float32 in evaluation mode is the evaluation attack, and in float16 the inner attack
    attack = {(False, dtype)} if precision == "bf16-mixed" else set()
    assert seen == {(True, dtype), (False, torch.float32), *attack}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_lightnings_own_mixed_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Autocast\('bf16-mixed', device\)"):
        Trainer(Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), recipe(), tmp_path)


# What is refused


@pytest.mark.parametrize("method", [MGNC, SNGM])
def test_global_methods_need_the_whole_batch(tmp_path: Path, method: Any) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}.*set accumulate=1"):
        fit(tmp_path, recipe(method=method, accumulate=2))
    fit(tmp_path, recipe(method=method, epochs=1))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    class Endless(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(data()[0])

    for pairs in ((Endless(), data()[1]), (data()[0], Endless())):
        with pytest.raises(ValueError, match="Endless, have no length; pass a map-style"):
            fit(tmp_path, recipe(), data=pairs)
    with pytest.raises(ValueError, match="batch_size=85 exceeds the 84 examples"):
        fit(tmp_path, recipe(batch_size=85))
    with pytest.raises(ValueError, match=r"does not split into 3 equal parts .* take a multiple of 3"):
        fit(tmp_path, recipe(accumulate=3))
    with pytest.raises(ValueError, match="no budget to scale; give it a max_norm"):
        recipe(objective=Vanilla(attack=DDN()))
    for wrong in ({"epochs": 0}, {"ramp": 1.5}, {"save": 0}, {"seed": -1}, {"accumulate": 0}, {"validate": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            recipe(**wrong)
    assert not list(tmp_path.iterdir())


# The order


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 9))
def test_every_example_at_most_once_an_epoch(examples: int, parts: int, each: int, seed: int, epoch: int) -> None:
    assume(examples >= parts * each)
    order = Order(examples=examples, batch_size=parts * each, parts=parts, seed=seed)
    indices = order.indices(epoch)
    assert indices.shape == (order.steps, parts, each)
    assert examples - parts * each < indices.numel() <= examples
    assert len(set(indices.flatten().tolist())) == indices.numel()
    assert set(indices.flatten().tolist()) <= set(range(examples))
    assert torch.equal(
        indices, Order(examples=examples, batch_size=parts * each, parts=parts, seed=seed).indices(epoch)
    )
    whole = Order(examples=examples, batch_size=parts * each, seed=seed).indices(epoch)
    assert torch.equal(indices.flatten(1), whole.flatten(1))  # the same batches whatever the parts


def test_every_epoch_and_seed_has_its_own_order() -> None:
    orders = [Order(examples=84, batch_size=12, seed=seed).indices(epoch) for seed in range(3) for epoch in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    left = [set(range(84)) - set(Order(examples=84, batch_size=16).indices(e).flatten().tolist()) for e in range(9)]
    assert set.intersection(*left) == set()


def test_orders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=9 exceeds the 8 examples"):
        Order(examples=8, batch_size=9)
    with pytest.raises(ValueError, match="batch_size=8 does not split into 3 equal parts"):
        Order(examples=8, batch_size=8, parts=3)
    for wrong in ({"batch_size": 0}, {"parts": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Order(**{"examples": 8, "batch_size": 4, **wrong})


# Schedules and budgets


def test_schedules_have_closed_forms() -> None:
    assert [constant(p) for p in (0, 0.7)] == [1, 1]
    assert [cosine(p) for p in (0, 1 / 3, 0.5, 2 / 3, 1)] == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-15)
    expected = [1 / 25, 1 / 25 + 0.24, 0.52, 1, 0.75, 0.5, 0]
    assert [one_cycle(p) for p in (0, 0.1, 0.15, 0.3, 0.3 + 0.7 / 3, 0.65, 1)] == pytest.approx(expected, abs=1e-15)
    two = drops(0.5, 0.75)
    assert [two(p) for p in (0, 0.499, 0.5, 0.749, 0.75, 1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert drops(0.5, factor=0.2)(0.6) == 0.2
    with pytest.raises(ValueError, match="share"):
        drops(1.5)


@pytest.mark.parametrize("schedule", [cosine, one_cycle, drops(0.6)])
def test_the_schedule_sets_the_rate(tmp_path: Path, schedule: Any) -> None:
    fit(tmp_path, recipe(epochs=2, schedule=schedule))
    assert numbers(tmp_path / "steps.csv", "lr") == pytest.approx([0.1 * schedule(step / 10) for step in range(10)])


@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_the_budget_grows_to_the_ramps_end(ramp: float, progress: float) -> None:
    assert recipe(ramp=ramp).budget(progress) == pytest.approx(progress / ramp if progress < ramp else 1)
    assert recipe().budget(progress) == 1


def test_budgets_are_scaled() -> None:
    attack = PGD(eps=0.2, alpha=0.05, steps=7, norm="L2")
    small = PGD(eps=0.05, alpha=0.0125, steps=7, norm="L2")
    assert Vanilla(attack=attack).scaled(0.25) == Vanilla(attack=small)
    assert Vanilla(attack=PGD(eps=0.2)).scaled(0.25) == Vanilla(attack=PGD(eps=0.05))
    assert TRADES(attack=attack, beta=2).scaled(0.25) == TRADES(attack=small, beta=2)
    awp = AWP(base=TRADES(attack=attack), gamma=0.1)
    assert awp.scaled(0.25) == AWP(base=TRADES(attack=small), gamma=0.1)
    assert awp.scaled(1.0) == awp
    assert Vanilla(attack=ANU(max_norm=2.0)).scaled(0.25) == Vanilla(attack=ANU(max_norm=0.5))
    for attack in (ANU(), DDN()):
        with pytest.raises(ValueError, match="no budget to scale"):
            Vanilla(attack=attack).scaled(0.5)


# Robust accuracy


def test_evaluation_counts(tmp_path: Path) -> None:
    model = fit(tmp_path, recipe(epochs=8, validate=8, method=MSGD, objective=Vanilla(attack=FIXED))).train()
    model[4].eval()
    before, modes = state(model), [part.training for part in model.modules()]
    _, validated = data()
    fabric, results = make(accelerator="cpu"), set()
    for size in (7, 25, 60, 256):
        found = evaluate(fabric, model, validated, ATTACK, batch_size=size)
        assert (found.natural, found.robust) == count(model, ATTACK, *validated.tensors, size=size)
        assert 0 < found.robust < found.natural < 1
        results.add(evaluate(fabric, model, validated, FIXED, batch_size=size))
    assert len(results) == 1
    helpful = PGD(eps=0.3, steps=5, loss=lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none"))
    found = evaluate(fabric, model, validated, helpful)
    assert found.robust == found.natural < 1  # an example that was wrong is never right
    assert equal(state(model), before)
    assert [part.training for part in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="bounds"):
        evaluate(fabric, model, validated, FIXED, bounds=(0.0, 0.1))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(fabric, model, validated, FIXED, batch_size=0)


# Statistics of gradients


@pytest.mark.parametrize("size", [1, 3, 7, 128])
@pytest.mark.parametrize("objective", [Vanilla(attack=ATTACK), TRADES(attack=ATTACK)])
def test_statistics_are_those_of_single_gradients(objective: Any, size: int) -> None:
    model = network().train()
    model[1].running_mean.uniform_(-0.5, 0.5)
    model[0].bias.requires_grad_(False)
    x, y = data()[0][:7]
    adversarial = (x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(max=1)
    before, modes = state(model), [part.training for part in model.modules()]
    found = gradient_statistics(model, objective, x, adversarial, y, batch_size=size)

    own = copy.deepcopy(model).double().eval()
    trained = [p for p in own.parameters() if p.requires_grad]
    rows, inputs = [], []
    for i in range(7):
        near = adversarial[i : i + 1].double().requires_grad_()
        (loss,) = objective.losses(own, x[i : i + 1].double(), near, y[i : i + 1])
        *gradients, by_input = torch.autograd.grad(loss, [*trained, near])
        rows.append(torch.cat([g.flatten() for g in gradients]))
        inputs.append(float(by_input.norm()))
    stacked = torch.stack(rows)
    norms = stacked.norm(dim=1)
    assert found.norms.tolist() == pytest.approx(norms.tolist(), rel=1e-5)
    assert found.input_norms.tolist() == pytest.approx(inputs, rel=1e-4)
    assert found.mean == pytest.approx(float(norms.mean()), rel=1e-5)
    assert found.variance == pytest.approx(float((stacked - stacked.mean(0)).square().sum(1).mean()), rel=1e-5)
    assert found.correlation == pytest.approx(float(np.corrcoef(inputs, norms.numpy())[0, 1]), abs=1e-4)
    assert equal(state(model), before)
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].bias.requires_grad
    assert math.isnan(gradient_statistics(model, objective, x[:1], adversarial[:1], y[:1]).correlation)
