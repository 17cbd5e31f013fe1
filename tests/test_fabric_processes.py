"""Training through Lightning Fabric: runs that were killed, and runs of two processes."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import fabric_runs
from fabric_runs import (
    ATTACK,
    TWO,
    Kill,
    KilledError,
    State,
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
from firstorder.attacks import PGD
from firstorder.fabric import Trainer, drops, evaluate, make
from firstorder.fabric import run as running
from firstorder.fabric.identity import LATER
from firstorder.training import ENGM, MSGD, Vanilla

SCRIPT = Path(fabric_runs.__file__)
TABLES = ("steps.csv", "epochs.csv", "gradients.csv")


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for its duration and its events."""
    saved = torch.load(folder / "state.pt", weights_only=True)
    return {
        **{name: table(folder / name) for name in TABLES if (folder / name).exists()},
        **{name: saved[name] for name in ("step", "best", "method", "schedule", "precision", "identity")},
        "sums": saved["sums"].tolist(),
        "files": sorted(path.name for path in folder.iterdir() if path.name != "tensorboard"),
    }


def same(found: Path, expected: Path) -> bool:
    """Whether two runs left the same, bit for bit."""
    files = ("best.safetensors", "last.safetensors")
    weights = all(equal(load_file(found / name), load_file(expected / name)) for name in files)
    return weights and contents(found) == contents(expected)


def another(folder: Path) -> nn.Module:
    """A model of other first weights; of the same where no state tells them."""
    return network(99 if (folder / "state.pt").exists() else 0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a full run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, full())
    best = int(contents(folder)["best"]["epoch"])
    assert not equal(load_file(folder / "last.safetensors"), load_file(folder / "best.safetensors")) or best == 3
    assert 0 < min(numbers(folder / "steps.csv", "weight")) < 0.9
    assert len({row["gamma1"] for row in table(folder / "steps.csv")}) > 5
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs of `TWO`, and of one that was killed."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([sys.executable, SCRIPT, folder, "9"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


# Resumption


@pytest.mark.parametrize(
    "kills",
    [
        [Kill(1)],  # before the first save
        [Kill(3)],
        [Kill(9)],  # in the middle of an epoch
        [Kill(10)],  # before what is measured at an epoch's end
        [Kill(10, epoch=True)],
        [Kill(15, epoch=True)],  # before the last weights
        [Kill(step) for step in (1, 4, 5, 7, 7, 11, 15)],
    ],
    ids=lambda kills: "-".join(f"{kill.at}{'e' if kill.epoch else ''}" for kill in kills),
)
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path, uninterrupted: Path, kills: list[Kill]) -> None:
    for kill in kills:
        with pytest.raises(KilledError):
            fit(tmp_path, full(), another(tmp_path), resume=True, progress=kill)
        assert not (tmp_path / "last.safetensors").exists()
    found = fit(tmp_path, full(), another(tmp_path), resume=True)
    assert same(tmp_path, uninterrupted)
    assert equal(state(found), load_file(uninterrupted / "last.safetensors"))


def test_resumption_continues_where_the_state_was_saved(tmp_path: Path) -> None:
    steps: list[float] = []

    def progress(row: Any) -> None:
        steps.append(row["step"])
        Kill(9)(row)

    with pytest.raises(KilledError):
        fit(tmp_path, full(), progress=progress)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8
    assert numbers(tmp_path / "steps.csv", "step") == list(range(1, 10))
    steps.clear()
    with pytest.raises(KilledError):
        fit(tmp_path, full(), network(9), progress=progress, resume=True)
    assert steps == [9]
    fit(tmp_path, full(), network(9), resume=True)
    best = fit_again(tmp_path)
    assert numbers(tmp_path / "steps.csv", "step") == list(range(1, 16))
    assert best == contents(tmp_path)["best"]["epoch"]


def fit_again(folder: Path) -> int:
    """Resume a run that has ended: nothing is trained, and the model has the last weights."""
    model, calls = network(5), []
    before = contents(folder)
    trainer = Trainer(make(accelerator="cpu"), full(), folder, log_every=1, tensorboard=False)
    best = trainer.fit(model, *data(), resume=True, progress=calls.append)
    assert calls == []
    assert equal(state(model), load_file(folder / "last.safetensors"))
    assert contents(folder) == before
    return best.epoch


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("name", ["save_state", "save_weights"])
def test_killed_while_the_best_weights_and_the_state_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, epoch: int
) -> None:
    chosen = recipe(optimizer=partial(torch.optim.Adam, lr=0.02), method=MSGD, epochs=2, diagnose=4, seed=1)
    fit(tmp_path / "a", chosen)
    robust = numbers(tmp_path / "a" / "epochs.csv", "validation_robust")
    assert robust[1] > robust[0]  # both epochs write the best weights
    save, calls = getattr(running, name), []

    def broken(*given: Any) -> None:
        calls.append(1)
        if len(calls) == epoch:
            raise KilledError
        save(*given)

    monkeypatch.setattr(running, name, broken)
    with pytest.raises(KilledError):
        fit(tmp_path / "b", chosen)
    monkeypatch.undo()
    if epoch == 2:
        first = torch.load(tmp_path / "b" / "state.pt", weights_only=True)
        assert (first["step"], first["best"]["epoch"]) == (5, 1)
        assert equal(load_file(tmp_path / "b" / "best.safetensors"), first["model"]) == (name == "save_weights")
    fit(tmp_path / "b", chosen, another(tmp_path / "b"), resume=True)
    assert same(tmp_path / "b", tmp_path / "a")


def test_a_row_that_was_cut_off_is_written_anew(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, full(), progress=Kill(11))
    path = tmp_path / "steps.csv"
    text = path.read_text()
    path.write_text(text[: text.index("\n11,") + 2])  # what is left looks like step 1
    fit(tmp_path, full(), network(9), resume=True)
    assert same(tmp_path, uninterrupted)


def test_events_are_those_of_the_tables(tmp_path: Path) -> None:
    chosen = recipe(method=MSGD, save=2)
    with pytest.raises(KilledError):
        fit(tmp_path, chosen, progress=Kill(9), tensorboard=True)
    time.sleep(1.1)  # event files are ordered by the second
    fit(tmp_path, chosen, network(9), resume=True, tensorboard=True)
    events_match(tmp_path)


def events_match(folder: Path) -> None:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("steps", "epochs"):
        events = board.Scalars(f"{name}/loss")
        assert [event.step for event in events] == numbers(folder / f"{name}.csv", "step")
        assert [event.value for event in events] == pytest.approx(numbers(folder / f"{name}.csv", "loss"), rel=1e-6)


def test_kill_9(tmp_path: Path, uninterrupted: Path, pair: Path) -> None:
    shutil.copytree(pair / "kill", tmp_path, dirs_exist_ok=True)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8
    assert not (tmp_path / "last.safetensors").exists()
    time.sleep(1.1)  # event files are ordered by the second
    fit(tmp_path, full(), network(99), resume=True, tensorboard=True)
    assert same(tmp_path, uninterrupted)
    events_match(tmp_path)


def test_the_scaler_is_resumed(tmp_path: Path) -> None:
    def fabric(scale: float) -> Fabric:
        made = make(accelerator="cpu", precision="16-mixed")
        made.strategy.precision.scaler = GradScaler("cpu", init_scale=scale, growth_interval=4)
        return made

    fit(tmp_path / "a", full(), fabric=fabric(256.0))
    with pytest.raises(KilledError):
        fit(tmp_path / "b", full(), fabric=fabric(256.0), progress=Kill(10))
    fit(tmp_path / "b", full(), network(9), fabric=fabric(2.0), resume=True)
    assert same(tmp_path / "b", tmp_path / "a")
    precision = contents(tmp_path / "b")["precision"]
    assert (precision["scale"], precision["_growth_tracker"]) == (256.0 * 2**3, 3)


@dataclass(frozen=True, kw_only=True)
class Diverging(Vanilla):
    """Infinite losses in step 10."""

    calls: list[int] = field(default_factory=list, repr=False)

    def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        self.calls.append(1)
        return super().losses(model, x, adversarial, y) * (math.inf if len(self.calls) == 10 else 1.0)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    after: list[State] = []
    model = network()
    chosen = recipe(objective=Diverging(attack=ATTACK), method=MSGD)
    with pytest.raises(FloatingPointError, match=r"has diverged at step 10 of .* lower learning rate"):
        fit(tmp_path, chosen, model, progress=lambda row: after.append(state(model)) if "epoch" in row else None)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == 5
    assert equal(saved["model"], after[0])
    found = fit(tmp_path, chosen, network(9), resume=True)
    assert all(value.isfinite().all() for value in found.state_dict().values())


@pytest.mark.parametrize("save", [None, 1])
def test_a_diverging_run_keeps_the_last_good_state(tmp_path: Path, save: int | None) -> None:
    with pytest.raises(FloatingPointError, match=r"has diverged at step .* lower learning rate"):
        fit(tmp_path, recipe(schedule=lambda progress: 1.0 if progress < 0.4 else 1e30, method=MSGD, save=save))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] in ({5} if save is None else {5, 6})
    assert all(value.abs().max() < 1e3 for value in state["model"].values())
    with pytest.raises(ValueError, match=r"schedule was \[1.0, .* and is \[1.0"):
        fit(tmp_path, recipe(method=MSGD, save=save), network(9), resume=True)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, recipe(epochs=1))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run already; resume it, or train into another folder"):
        fit(tmp_path, recipe(epochs=1))
    train, validated = data()
    others: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (r"objective was .*eps=0\.15.* and is .*eps=0\.2", {"objective": Vanilla(attack=PGD(eps=0.2, steps=2))}, {}),
        (r"seed was 0 and is 1", {"seed": 1}, {}),
        (r"bounds was .* and is '\(-1", {"bounds": (-1.0, 1.0)}, {}),
        (r"augment was .* and is ", {"augment": lambda x, generator: x}, {}),
        (r"method's parameters was .*alpha.* and is ", {"method": lambda model: ENGM(model, alpha=0.25)}, {}),
        (r"optimizer's parameters was .*lr.* and is ", {"optimizer": partial(torch.optim.SGD, lr=0.7)}, {}),
        (r"epochs was 1 and is 2", {"epochs": 2}, {}),
        (r"method was 'ENGM' and is 'MSGD'", {"method": MSGD}, {}),
        (r"optimizer was 'SGD' and is 'Adam'", {"optimizer": torch.optim.Adam}, {}),
        (r"judge was .* and is ", {"judge": ATTACK}, {}),
        (r"batch size was 16 and is 8", {"batch_size": 8}, {}),
        (r"parts of a batch was 1 and is 2", {"accumulate": 2}, {}),
        (r"ramp was 0\.0 and is 0\.1", {"ramp": 0.1}, {}),
        (r"examples was 84 and is 60", {}, {"data": (validated, validated)}),
        (r"validation examples was 60 and is 84", {}, {"data": (train, train)}),
        (r"weights was ", {}, {"model": network(norm=False)}),
    ]
    for message, changes, options in others:
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, recipe(**{"epochs": 1, **changes}), resume=True, **options)
    assert contents(tmp_path) == before


def pad(x: Tensor, generator: torch.Generator, *, k: int = 1) -> Tensor:
    return x * (1 - k / 100)


def shifted(k: float) -> Any:
    return lambda x, generator: x * (1 - k / 100)


@dataclass
class Padded:
    k: int

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return pad(x, generator, k=self.k)


class Layer(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self._last: Tensor | None = None
        self.where = torch.device("cpu")

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self._last = x
        return pad(x, generator, k=self.k)


AUGMENTS: dict[str, list[Any]] = {  # made anew each time
    "keywords of a partial": [lambda: partial(pad, k=1), lambda: partial(pad, k=5)],
    "partials of partials": [lambda: partial(partial(pad, k=1)), lambda: partial(partial(pad), k=2)],
    "code": [lambda: lambda x, generator: x * 0.9, lambda: lambda x, generator: x * 0.8],
    "closures": [lambda: shifted(1), lambda: shifted(2)],
    "objects": [lambda: Padded(1), lambda: Padded(2)],
    "modules": [lambda: Layer(1), lambda: Layer(2)],
    "methods": [lambda: Padded(1).__call__, lambda: Padded(2).__call__],
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_another_augmentation_is_another_run(tmp_path: Path, name: str) -> None:
    one, other = AUGMENTS[name]
    used = one()
    with pytest.raises(KilledError):
        fit(tmp_path, recipe(epochs=1, save=2, augment=used), progress=Kill(3))
    with pytest.raises(ValueError, match=r"augment's contents was '.*' and is '.*'; resume with what it was"):
        fit(tmp_path, recipe(epochs=1, save=2, augment=other()), resume=True)
    with pytest.raises(KilledError):
        fit(tmp_path, recipe(epochs=1, save=2, augment=one()), resume=True, progress=Kill(4))
    fit(tmp_path, recipe(epochs=1, save=2, augment=used), resume=True)


def test_other_rates_and_validations_are_another_run(tmp_path: Path) -> None:
    chosen = recipe(schedule=drops(0.51), validate=1)  # from step 8 of 15
    with pytest.raises(KilledError):
        fit(tmp_path, chosen, progress=Kill(5, epoch=True))
    with pytest.raises(KilledError):
        fit(tmp_path, chosen, progress=Kill(6), resume=True)
    for changes, message in [
        ({"schedule": drops(0.56)}, r"schedule of all steps was '.*' and is '.*'; resume"),  # from step 9
        ({"validate": 3}, "validate was 1 and is 3; resume"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, recipe(**{"schedule": drops(0.51), **changes}), resume=True)
    fit(tmp_path, recipe(schedule=drops(0.52)), resume=True)  # the same rates at every step


def test_a_state_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, full(), progress=Kill(9))
    path = tmp_path / "state.pt"
    state = torch.load(path, weights_only=True)
    for key in LATER:
        del state["identity"][key]
    del state["sha256"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="augment was 'augment' and is 'pad'"):
        fit(tmp_path, full(augment=pad), resume=True)
    fit(tmp_path, full(), resume=True)
    assert contents(tmp_path)["identity"].keys() >= LATER


@pytest.mark.parametrize("length", [None, 0, 100])
def test_a_run_whose_best_weights_are_gone_is_not_resumed(tmp_path: Path, length: int | None) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, recipe(save=2), progress=Kill(7))
    path = tmp_path / "best.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(whole[:length])
    found = "missing; put a copy in its place" if length is None else "damaged; put a copy that is whole in its place"
    with pytest.raises(ValueError, match=rf"best.safetensors is {found}, or train "):
        fit(tmp_path, recipe(save=2), resume=True)
    path.write_bytes(whole)
    fit(tmp_path, recipe(save=2), resume=True)


# Two processes


def close(found: State, expected: State, tolerance: float = 1e-5) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)


def alone(name: str, folder: Path, **changes: Any) -> nn.Module:
    """A run of `TWO` in one process."""
    chosen = TWO[name]
    given = {key: getattr(chosen, key) for key in chosen.__dataclass_fields__}
    return fit(folder, type(chosen)(**{**given, **changes}), fabric_runs.alike(name))


def rows_close(found: Path, expected: Path, tolerance: float = 1e-4) -> None:
    for name in ("steps.csv", "epochs.csv"):
        for row, other in zip(table(found / name), table(expected / name), strict=True):
            assert {k: float(v) for k, v in row.items()} == pytest.approx(
                {k: float(v) for k, v in other.items()}, rel=tolerance, abs=tolerance
            )


@pytest.mark.parametrize("name", ["vanilla", "trades"])
def test_two_processes_are_two_accumulated_parts(tmp_path: Path, pair: Path, name: str) -> None:
    model = alone(name, tmp_path, accumulate=2)
    close(load_file(pair / name / "last.safetensors"), state(model))
    close(load_file(pair / name / "best.safetensors"), load_file(tmp_path / "best.safetensors"))
    rows_close(pair / name, tmp_path)
    assert min(numbers(tmp_path / "steps.csv", "weight")) < 0.9


@pytest.mark.parametrize("name", ["fixed", "awp"])
def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path, pair: Path, name: str) -> None:
    model = alone(name, tmp_path)
    close(load_file(pair / name / "last.safetensors"), state(model), 1e-4)
    rows_close(pair / name, tmp_path)


@pytest.mark.parametrize("name", TWO)
def test_processes_agree(pair: Path, name: str) -> None:
    ranks: list[State] = [torch.load(pair / name / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert equal(*ranks)
    assert not equal(ranks[0], state(fabric_runs.alike(name)))
    if name == "norm":
        assert float(ranks[0]["1.running_mean"].abs().max()) > 0.01
    if name != "killed":
        assert equal(load_file(pair / name / "last.safetensors"), ranks[0])


def test_two_processes_evaluate_as_one(pair: Path) -> None:
    model = fabric_runs.alike("norm")
    model.load_state_dict(load_file(pair / "norm" / "last.safetensors"))
    expected = vars(evaluate(make(accelerator="cpu"), model, data()[1], ATTACK, batch_size=7))
    assert expected["natural"] > 0
    assert [torch.load(pair / f"validated{rank}.pt", weights_only=True) for rank in range(2)] == [expected] * 2


def test_one_process_resumes_what_two_began(tmp_path: Path, pair: Path) -> None:
    shutil.copytree(pair / "killed", tmp_path / "killed")
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 6
    expected = alone("killed", tmp_path / "whole", accumulate=2)
    resumed: Callable[[], nn.Module] = partial(
        fit, tmp_path / "killed", recipe(augment=fabric_runs.augment, save=2, accumulate=2), network(9, norm=False)
    )
    found = resumed(resume=True)
    close(state(found), state(expected))
    rows_close(tmp_path / "killed", tmp_path / "whole")
