"""Seven ways to change what a model does: each is noticed by `firstorder evaluate` and by a state of AutoAttack."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

import evaluate_models
from firstorder.autoattack import AutoAttack
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.store import read
from firstorder.hosts.identity import Identity, identify
from firstorder.hosts.parts import parts

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))

SOURCE = """
import functools, torch
from torch import nn

SCALE = 1.0

def turned(x):
    return x + 0.0

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3, bias=False)
        self.head.weight.data = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        self.sharpness = 1.0
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        return self.head(turned(x - self.mean).flatten(1)) * SCALE * self.sharpness

class Net(Base):
    pass

def doubled(module, inputs, output):
    return output * 1.5

def make():
    model = Net()
    # here
    return model
"""

CHANGES = {
    "base class": ("* self.sharpness", "* self.sharpness ** 2 * 1.5", "code of Base.forward"),
    "helper": ("x + 0.0", "x + 0.25 * x", "code of turned"),
    "constant": ("SCALE = 1.0", "SCALE = 1.5", "constant SCALE"),
    "attribute": ("# here", "model.sharpness = 1.5", "attribute sharpness"),
    "non-persistent buffer": ("# here", "model.mean += 0.25", "buffer mean"),
    "hook": ("# here", "model.head.register_forward_hook(doubled)", "hook on head"),
    "own forward": (
        "# here",
        "model.forward = functools.partial(lambda self, x: 1.5 * Base.forward(self, x), model)",
        "attribute forward",
    ),
}
"""What is replaced in the source, by what, and what is said to differ."""

NUMBERS = itertools.count()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def loaded(name: str, old: str = "", new: str = "") -> ModuleType:
    """The source as a module, changed, in the place of the one that was there."""
    text = SOURCE.replace(old, new) if old else SOURCE
    assert not old or text != SOURCE
    Path(f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    work._worker.cache_clear()
    return importlib.import_module(name)


COMMANDS = {
    "evaluate": (["--pictures", "0", "--model"], "run"),
    "transfer": (["--steps", "2", "--source"], "run"),
    "leaderboard": (["--model"], "run/images.npz"),
}
"""How the model is named, and where the run is."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("old", "new", "said"), CHANGES.values(), ids=list(CHANGES))
def test_evaluate_notices(here: Path, old: str, new: str, said: str, command: str) -> None:
    name = f"identified{next(NUMBERS)}"
    made = loaded(name)
    with torch.no_grad():
        np.savez("images.npz", x=X.numpy(), y=made.make()(X).argmax(1).numpy())
    flags, folder = COMMANDS[command]
    words = [command, *flags, f"{name}:make", "--data", "images.npz", "--eps", "0.05", "--attack", "fgsm"]

    def evaluated() -> tuple[Any, str]:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--out", "run"])
        assert done.exit_code == 0, done.output
        return read(Path(folder)), done.output

    first, _ = evaluated()
    loss = first.table().loss
    again, output = evaluated()  # the same source once more
    assert again.cells == first.cells
    assert "is not the model" not in output
    loaded(name)
    assert evaluated()[0].cells == first.cells
    loaded(name, old, new)
    changed, output = evaluated()
    assert f"{name}:make is not the model that it was (" in output
    assert said in output
    assert not {cell.key for cell in changed.cells} & {cell.key for cell in first.cells}
    found = changed.table().loss
    assert len(found) != len(loss) or not np.allclose(found, loss)  # fewer images may be classified correctly
    loaded(name)  # and back: what is known is used
    paths = {path: path.stat().st_mtime_ns for path in Path(folder, "cells").iterdir()}
    assert evaluated()[0].cells == first.cells
    assert {path: path.stat().st_mtime_ns for path in Path(folder, "cells").iterdir()} == paths


@pytest.mark.parametrize(("old", "new", "said"), CHANGES.values(), ids=list(CHANGES))
def test_a_state_of_autoattack_notices(here: Path, old: str, new: str, said: str) -> None:
    name = f"identified{next(NUMBERS)}"
    model = loaded(name).make().eval()
    y = model(X).argmax(1)

    def attacked(model: nn.Module) -> None:
        adversary = AutoAttack(model, eps=0.1, seed=0, verbose=False, attacks_to_run=["fgsm"])
        adversary.run_standard_evaluation(X, y, state_path="state.json")

    attacked(model)
    attacked(model)
    attacked(loaded(name).make().eval())
    with pytest.raises(ValueError, match=r"of another model \(.*" + said):
        attacked(loaded(name, old, new).make().eval())
    assert name in sys.modules


class Hidden(nn.Module):
    """Reads what it does from a file; notes how often it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.body, self.path, self.calls = evaluate_models.Linear(), path, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = float(self.path.read_text()) * self.body(x)
        return logits


def test_what_is_hidden_shows_in_what_the_model_does(tmp_path: Path) -> None:
    path = tmp_path / "factor"
    path.write_text("1")
    model = Hidden(path)
    one = identify(model, X)
    assert identify(model, X).differences(one) == []
    path.write_text("1.000001")
    assert identify(model, X).differences(one) == []
    path.write_text("1.01")
    two = identify(model, X)
    assert two.digest == one.digest
    assert two.differences(one) == ["its logits on the same images", "the gradient of its loss on the same images"]


def hidden() -> nn.Module:
    return Hidden(Path("factor"))


def test_evaluate_notices_what_is_hidden(here: Path) -> None:
    np.savez("images.npz", **evaluate_models.arrays(6))
    keys = []
    for factor in ("1", "2", "1", "1.000001"):
        Path("factor").write_text(factor)
        work._worker.cache_clear()
        done = planned("hidden", "--out", "run")
        assert done.exit_code == 0, done.output
        line = "not the model that it was (its logits on the same images, the gradient of its loss on the same images)"
        assert (line in " ".join(done.output.split())) == (bool(keys) and factor != "1.000001")
        keys.append(read(Path("run")).cells[0].key)
    assert keys[0] == keys[2] == keys[3] != keys[1]
    assert len(list(Path("run/cells").iterdir())) == 2


def test_a_worker_refuses_a_model_that_changed_meanwhile(here: Path) -> None:
    np.savez("images.npz", **evaluate_models.arrays(6))
    Path("factor").write_text("1")
    planned("hidden", "--out", "run")
    run = read(Path("run"))
    run.store.path(run.cells[0].key).unlink()
    Path("factor").write_text("2")
    report = work.Worker(Path("run"), run.facts).compute(run.cells[0])
    assert "not the one that the run began with (its logits on the same images" in str(report.error)
    Path("factor").write_text("1")
    assert work.Worker(Path("run"), run.facts).compute(run.cells[0]).error is None
    (path,) = Path("run/models").iterdir()
    path.unlink()
    run.store.path(run.cells[0].key).unlink()
    report = work.Worker(Path("run"), run.facts).compute(run.cells[0])
    assert f"{path} is missing or damaged" in str(report.error)


def parametrised(model: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.get_submodule("head"), "weight", Twice())


def members(model: nn.Module) -> None:
    model.others = [evaluate_models.Linear(1), evaluate_models.Linear(2)]  # no parts of it for torch


@pytest.mark.parametrize(
    "change",
    [
        parametrised,
        members,
        lambda model: model.head.weight.data.mul_(1.00001),
        lambda model: model.register_full_backward_hook(lambda module, inputs, outputs: None),
        lambda model: setattr(model.head, "weight", nn.Parameter(model.head.weight.double())),
    ],
    ids=["parametrised", "members", "weights", "backward hook", "dtype"],
)
def test_other_changes_are_noticed(change: Callable[[nn.Module], None]) -> None:
    one, two = evaluate_models.Linear(), evaluate_models.Linear()
    known = identify(one, X)
    assert identify(two, X).differences(known) == []
    assert identify(two, X).digest == known.digest
    change(two)
    dtype = next(two.parameters()).dtype
    assert identify(two, X.to(dtype)).differences(known)


class Settings(dict):  # type: ignore[type-arg]
    """A mapping of the user's own, with attributes."""


class Kind(Enum):
    PLAIN, SHARP = 1, 2


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: Any) -> None:
        self.size = size


def settings(**given: Any) -> Settings:
    found = Settings(given)
    found.more = found  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (settings(scale=1), settings(scale=1), settings(scale=2)),
        (Kind.PLAIN, Kind.PLAIN, Kind.SHARP),
        (Slotted(1), Slotted(1), Slotted(2)),
        (Slotted([torch.zeros(2000)]), Slotted([torch.zeros(2000)]), Slotted([torch.arange(2000) == 1000])),
        (np.zeros(3), np.zeros(3), np.zeros(3, np.float32)),
        ({0, 8}, {8, 0}, {0, 16}),  # of other orders
        (partial(max, 1), partial(max, 1), partial(max, 2)),
        (lru_cache(lambda x: x + 1), lru_cache(lambda x: x + 1), lru_cache(lambda x: x + 2)),
        (torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2).to_sparse(), torch.eye(2).to_sparse()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_attributes_of_every_kind(one: Any, same: Any, other: Any) -> None:
    found = []
    for value in (one, same, other):
        model = evaluate_models.Linear()
        model.extra = value
        found.append(identify(model, X))
    assert found[0].differences(found[1]) == []
    assert "attribute extra" in found[0].differences(found[2])


def test_the_order_of_members_counts() -> None:
    found = []
    for step in (1, -1, 1):
        model = evaluate_models.Linear()
        members(model)
        model.others = model.others[::step]  # type: ignore[index]
        found.append(identify(model, X))
    assert found[0].differences(found[2]) == []
    assert found[0].differences(found[1])


def test_a_function_put_into_a_class_of_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = identify(evaluate_models.Linear(), X)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 0.0)
    (name, *_) = identify(evaluate_models.Linear(), X).differences(known)
    assert name.startswith("code of test_a_function_put_into_a_class_of_torch_counts")


def test_what_a_package_put_into_a_class_of_torch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does once it loads a model: in one process and not in another."""
    before = parts(nn.Sequential(nn.Linear(2, 2, bias=False)))
    monkeypatch.setattr(nn.Module, "smart_apply", pd.DataFrame.apply, raising=False)
    assert parts(nn.Sequential(nn.Linear(2, 2, bias=False))).keys() == before.keys()


def test_it_is_kept_and_read(tmp_path: Path) -> None:
    known = identify(evaluate_models.Linear(), X).without(["attribute made"])
    torch.save(known.save(), tmp_path / "x.pt")
    again = Identity.load(torch.load(tmp_path / "x.pt", weights_only=True))
    assert again.digest == known.digest
    assert again.differences(known) == []
    other = evaluate_models.Linear()
    other.made = 3  # type: ignore[assignment]
    assert identify(other, X).differences(again) == []
    other.head.bias = nn.Parameter(torch.zeros(3))
    assert identify(other, X).differences(again) == ["part head", "weights head.bias"]


def test_the_model_and_the_random_numbers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    identify(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = evaluate_models.Linear()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x + 0.1 * torch.randn_like(x))
        return logits


def unseeded() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def unsteady() -> nn.Module:
    model = evaluate_models.Linear()
    model.made = next(NUMBERS)  # type: ignore[assignment]
    return model


def planned(model: str, *words: str) -> Any:
    given = ["--model", f"test_identity:{model}", "--data", "images.npz", "--eps", "0.05", "--attack", "fgsm"]
    return CliRunner().invoke(app, ["evaluate", *given, *words])


def test_a_random_model_is_found_while_planning(here: Path) -> None:
    np.savez("images.npz", **evaluate_models.arrays(6))
    assert identify(Random(), X).random
    done = planned("Random", "--dry-run")
    assert done.exit_code == 2
    assert "two forwards of the same images differ" in done.stderr
    assert not Path("run").exists()
    for _ in range(2):
        assert planned("Random", "--random", "--out", "run").exit_code == 0
    assert len(list(Path("run/cells").iterdir())) == 1


def test_a_model_that_is_another_each_time_is_found_while_planning(here: Path) -> None:
    np.savez("images.npz", **evaluate_models.arrays(6))
    done = planned("unseeded", "--dry-run")
    assert done.exit_code == 2
    assert "another model each time it is made (weights 1.bias, weights 1.weight)" in " ".join(done.stderr.split())
    for _ in range(2):  # what changes nothing of what it does is no part of what it is
        assert planned("unsteady", "--out", "run").exit_code == 0
    assert len(list(Path("run/cells").iterdir())) == 1


def test_code_is_that_of_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\n\n\nclass Twice(nn.Module):\n    def forward(self, x):\n        return x * 2\n"
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    commented = source.replace("    def", '    """Says it."""\n\n    # and why\n    def')
    for name, text in (("one", source), ("same", commented), ("other", source.replace("* 2", "* 3"))):
        (tmp_path / f"digested_{name}.py").write_text(text)
        model = importlib.import_module(f"digested_{name}").Twice()
        found.append(identify(model, torch.rand(2, 3)))
    assert found[0].digest == found[1].digest
    assert found[0].differences(found[2]) == ["code of Twice.forward"]
