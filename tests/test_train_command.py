"""`firstorder train`: its options, what it leaves in the folder, kills and resumption; the landscape of the loss."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from cases import Net, images
from firstorder.attacks import PGD
from firstorder.attacks.losses import Margin
from firstorder.evaluation.cli import app
from firstorder.evaluation.commands import train as command
from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.documents import read
from firstorder.evaluation.names.networks import SmallCNN
from firstorder.evaluation.training import experiment
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import load
from firstorder.evaluation.training.landscape import landscape
from firstorder.fabric import Robustness, make

KEYS: dict[str, Any] = {
    "data": "mnist", "validation": 100, "examples": 60, "epochs": 3, "batch_size": 20, "eps": 0.1, "lr": 0.2,
    "attack": "pgd:steps=1,random_start=true", "judge_steps": 1, "diagnose": 8, "landscape": 2,
}  # fmt: skip
HOW = ["--logger", "csv", "--threads", "1", "--accelerator", "cpu"]


def words(**given: Any) -> list[str]:
    flags = {key: f"--{key.replace('_', '-')}" for key in given}
    return [word for key, one in given.items() for word in ([flags[key]] if one is True else [flags[key], str(one)])]


def invoke(out: Path, *more: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--out", str(out), *HOW, *more])


def refused(done: Any) -> str:
    assert done.exit_code == 2, done.output
    (line,) = str(done.stderr).splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `train` would have run."""
    found = []

    def run(chosen: Configuration, folder: Path, fabric: Any, **options: Any) -> None:
        found.append((chosen, folder, options))
        raise ValueError("stop")

    monkeypatch.setattr(command, "run", run)
    return found


GIVEN: dict[str, Any] = {
    "data": "a", "test": "b", "examples": 2, "test_examples": 3, "window": 5, "validation": 4, "model": "resnet18",
    "objective": "mart", "beta": 5.5, "awp": 0.5, "attack": "fgsm", "eps": "1/4", "prepare": True,
    "method": "n-engm", "alpha": 0.7, "alpha_parameters": 100.0,
    "optimizer": "adam", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.1, "schedule": "cosine", "drops": [0.5, 0.8],
    "epochs": 6, "batch_size": 7, "accumulate": 8, "ramp": 0.25, "augment": "crop-flip", "precision": "bf16-mixed",
    "seed": 9, "judge_steps": 10, "validate_every": 11, "save_every": 12, "diagnose": 0, "landscape": 0,
    "radii": [0.5, 0.25],
}  # fmt: skip


def test_every_key_is_an_option(tmp_path: Path, asked: list[Any]) -> None:
    assert GIVEN.keys() == Configuration.model_fields.keys()
    defaults, expected = configure({"data": "mnist"}), configure(GIVEN)
    assert all(getattr(defaults, name) != getattr(expected, name) for name in GIVEN)
    flat = [
        words(**{key: one}) for key, value in GIVEN.items() for one in (value if key in ("drops", "radii") else [value])
    ]
    assert refused(invoke(tmp_path, *chain.from_iterable(flat))) == "stop"
    more = ["--data", "mnist", "--workers", "3"]
    assert refused(CliRunner().invoke(app, ["train", "--out", str(tmp_path), *more])) == "stop"
    (chosen, folder, options), (plain, _, other) = asked
    assert (chosen, plain, folder) == (expected, defaults, tmp_path)
    assert (options["resume"], options["tensorboard"], other["tensorboard"]) == (False, False, True)
    assert (options["workers"], other["workers"]) == (0, 3)


def test_loggers(tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(command, "named", lambda name, folder: made.append((name, folder)) or "other")
    monkeypatch.setattr(command, "make", lambda **options: made.append(options["loggers"]) or make(accelerator="cpu"))
    given = words(**GIVEN | {"drops": 0.5, "radii": 0.5})
    for more, board, loggers in (
        ([], True, []),
        (["--logger", "csv"], False, []),
        (["--logger", "wandb", "--logger", "csv"], False, ["other"]),
        (["--logger", "tensorboard", "--logger", "mlflow"], True, ["other"]),
    ):
        assert refused(CliRunner().invoke(app, ["train", "--out", str(tmp_path), *given, *more])) == "stop"
        assert asked[-1][2]["tensorboard"] is board
        assert made[-1] == loggers
    assert [one for one in made if isinstance(one, tuple)] == [("wandb", tmp_path), ("mlflow", tmp_path)]


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "--out", str(tmp_path), "--data", "mnist", "--logger", "paper"])
    assert refused(done) == "logger='paper' is not known; choose csv, tensorboard, wandb, mlflow"
    assert not list(tmp_path.iterdir())


def test_a_missing_logger_is_named_with_its_command(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['wandb'] = None\n"
        "from importlib import util; find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'wandb' else find(name)\n"
        f"sys.argv = ['firstorder', 'train', '--out', {str(tmp_path)!r}, '--data', 'mnist', '--logger', 'wandb']\n"
        "from firstorder.evaluation.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    found = re.fullmatch(
        r"missing: the logger wandb needs .*wandb.*: pip install wandb pytorch-lightning\n", done.stderr
    )
    assert found, done.stderr


def test_a_prepared_copy_and_a_hyperparameter_log(tmp_path: Path) -> None:
    from lightning_fabric.loggers import CSVLogger

    class Noted(CSVLogger):
        found: Any = None

        def log_hyperparams(self, params: Any) -> None:
            self.found = params

    noted = Noted(tmp_path / "noted")
    chosen = configure({**KEYS, "prepare": True, "epochs": 1, "landscape": 0})
    experiment.run(chosen, tmp_path / "run", make(accelerator="cpu", loggers=[noted]), tensorboard=False)
    assert configure(noted.found) == chosen
    assert read(tmp_path / "run" / "config.yaml")[0]["prepare"] is True
    assert {row["epochs/loss"] for row in rows(Path(noted.log_dir) / "metrics.csv")} - {""}


def test_help_shows_every_key() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"]).output.split()
    assert {f"--{name.replace('_', '-')}" for name in Configuration.model_fields} <= {*shown}
    train: Any = typer.main.get_command(app)
    helps = {option.name: option.help for option in train.get_command(None, "train").loaded().params}
    for name, field in Configuration.model_fields.items():
        assert field.description
        assert helps[name].startswith(field.description)
    assert helps["data"].endswith("Required.")


def test_options_override_the_file(tmp_path: Path, asked: list[Any]) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("data: mnist\neps: 8/255\nbeta: -1\nlr: 1e-3\ndrops: [0.2]\nsave_every:\n")
    assert refused(invoke(tmp_path, "--config", str(file), "--beta", "2", "--drops", "0.6")) == "stop"
    values = {"data": "mnist", "eps": 8 / 255, "beta": 2, "lr": 1e-3, "drops": [0.6]}
    assert asked[0][0] == configure(values)
    message = refused(invoke(tmp_path, "--config", str(file), "--beta", "-2"))
    assert message == "beta: Input should be greater than or equal to 0 (it is -2.0)"


KNOWN = ", ".join(Configuration.model_fields)
MISTAKES = {
    "data: mnist\nepochs: 0": "LINE 2: epochs: Input should be greater than or equal to 1 (it is 0)",
    "data: mnist\n\nepoch: 3": f"LINE 3: epoch: Extra inputs are not permitted (it is 3); the keys are {KNOWN}",
    "lr: fast\ndata: mnist": "LINE 1: lr: Input should be a valid number, unable to parse string as a number",
    "data: mnist\nmomentum: 1.0": "LINE 2: momentum: Input should be less than 1 (it is 1.0)",
    "data: mnist\nmethod: sgd": "LINE 2: method: unknown gradient method 'sgd'; did you mean msgd, ",
    "data: mnist\neps: 8/0": "LINE 2: eps: write a finite number above 0, as 0.3 or 8/255 (it is '8/0')",
    "data: mnist\ndrops: [0.5, 1.5]": "LINE 2: drops: name shares of the training between 0 and 1 (it is [0.5, 1.5])",
    "data: mnist\ndrops: 0.5": "LINE 2: drops: Input should be a valid tuple (it is 0.5)",
    "data:\n  - mnist": "LINE 1: data: Input should be a valid string (it is ['mnist'])",
    "epochs: 3": "FILE: data: Field required",
    **dict.fromkeys(("", "- data: mnist", "mnist"), "FILE holds no keys; write one per line: data: mnist"),
    "data: nowhere": "unknown data 'nowhere'; name mnist or cifar10, an .npz file with x and y, a folder",
    "data: mnist\nexamples: 9\nmethod: msgd\nalpha: 1": "alpha=1.0 has no meaning for method=msgd; leave it out",
    "data: mnist\nvalidation: 500": "validation=500 leaves none of the 500 training images; lower it",
    "data: mnist\nvalidation: 490": "batch_size=128 exceeds the 10 examples; lower it",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_reported_on_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    expected = MISTAKES[text].replace("LINE", f"{file}, line").replace("FILE", str(file))
    assert refused(invoke(tmp_path / "out", "--config", str(file))).startswith(expected)


def test_files_that_are_not_yaml(tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("data: mnist\neps: [0.1\n")
    done = invoke(tmp_path, "--config", str(file))
    assert re.match(rf"error: {file}, line 3: not YAML: [^\n]*\n$", done.stderr)
    assert f"{file}.no cannot be read: there is no such file" in refused(invoke(tmp_path, "--config", f"{file}.no"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run evaluated on test images."""
    folder = tmp_path_factory.mktemp("finished")
    done = invoke(folder, *words(**KEYS, test="mnist", test_examples=70))
    assert done.exit_code == 0, done.output
    (folder / "output.txt").write_text(done.output)
    return folder


def evaluated(path: Path, x: Tensor, y: Tensor, eps: float = 0.1) -> Robustness:
    """Accuracies, one example after the other."""
    model = SmallCNN().eval()
    model.load_state_dict(load_file(path))
    attack = PGD(eps=eps, alpha=eps / 10, steps=1, loss=Margin(), random_start=True, early_stop=True)
    seed = int(np.random.SeedSequence([0, 2, 0]).generate_state(1, np.uint64)[0])
    attacked = attack(model, x, y, generator=torch.Generator().manual_seed(seed))
    natural, robust = ([int(model(one[None]).argmax()) for one in batch] for batch in (x, attacked))
    right = [a == label for a, label in zip(natural, y.tolist(), strict=True)]
    both = [a and b == label for a, b, label in zip(right, robust, y.tolist(), strict=True)]
    return Robustness(sum(right) / len(x), sum(both) / len(x))


def test_a_run_leaves_its_result(finished: Path) -> None:
    names = {"config.yaml", "state.pt", "best.safetensors", "last.safetensors", "epochs.csv", "gradients.csv"}
    assert {path.name for path in finished.iterdir()} >= names | {"result.json", "landscape.npz"}
    assert configure(read(finished / "config.yaml")[0]) == configure({**KEYS, "test": "mnist", "test_examples": 70})
    x, y = packaged.mnist().x, packaged.mnist().y
    best, last = (evaluated(finished / f"{name}.safetensors", x[:70], y[:70]) for name in ("best", "last"))
    outcome = load(finished)
    assert (outcome.images, outcome.count) == ("test", 70)
    assert (outcome.best, outcome.last) == (best, last)
    assert outcome.overfitting == pytest.approx((best.robust - last.robust) / best.robust)
    table = rows(finished / "epochs.csv")
    shares = [float(row["validation_robust"]) for row in table]
    assert len(shares) == 3
    assert outcome.best_epoch == 1 + shares.index(max(shares))
    for name, share in (("best", max(shares)), ("last", shares[-1])):
        assert evaluated(finished / f"{name}.safetensors", x[-100:], y[-100:]).robust == pytest.approx(share)
    stored = json.loads((finished / "result.json").read_text())
    assert stored["versions"] == {
        "firstorder": version("firstorder-attacks"),
        **{name: version(name) for name in ("torch", "lightning-fabric")},
    }
    output = (finished / "output.txt").read_text()
    assert f"epoch 3 of 3: loss {float(table[2]['loss']):.4f}" in output
    message = f"{100 * best.natural:.2f} % natural, {100 * best.robust:.2f} % robust on 70 test images"
    assert f"best (epoch {outcome.best_epoch}): {message}" in output
    assert f"overfitting: {100 * outcome.overfitting:.1f} %" in output


def test_the_landscapes_are_those_of_both_weights(finished: Path) -> None:
    x, y = packaged.mnist().x[:2], packaged.mnist().y[:2]
    with np.load(finished / "landscape.npz") as arrays:
        assert set(arrays.files) == {"offsets", "best", "last"}
        np.testing.assert_allclose(arrays["offsets"], np.linspace(-2, 2, 21), atol=1e-7)
        for which in ("best", "last"):
            model = SmallCNN()
            model.load_state_dict(load_file(finished / f"{which}.safetensors"))
            assert arrays[which].shape == (2, 21, 21)
            plain = F.cross_entropy(model(x), y, reduction="none").detach()
            np.testing.assert_allclose(arrays[which][:, 10, 10], plain, rtol=1e-5)


def test_further_radii(finished: Path, tmp_path: Path) -> None:
    chosen = configure({**KEYS, "test": "mnist", "test_examples": 70, "landscape": 0, "radii": [0.05, 0.2]})
    outcome = experiment.run(chosen, tmp_path, make(accelerator="cpu"), tensorboard=False)
    assert load(tmp_path) == outcome
    x, y = packaged.mnist().x[:70], packaged.mnist().y[:70]
    expected = {f"{eps:g}": evaluated(tmp_path / "best.safetensors", x, y, eps).robust for eps in (0.05, 0.2)}
    assert outcome.radii == expected
    assert (outcome.best, load(finished).radii) == (load(finished).best, {})


@pytest.mark.parametrize(("best", "last", "expected"), [(0.4, 0.3, 0.25), (0.5, 0.5, 0.0), (0.0, 0.0, 0.0)])
def test_overfitting(tmp_path: Path, monkeypatch: Any, best: float, last: float, expected: float) -> None:
    found = iter([Robustness(0.6, best), Robustness(0.7, last)])
    monkeypatch.setattr(experiment, "evaluate", lambda *_, seed, **__: next(found) if seed == 5 else None)
    chosen = configure({**KEYS, "epochs": 1, "landscape": 0, "diagnose": 0, "seed": 5})
    outcome = experiment.run(chosen, tmp_path, make(accelerator="cpu"), tensorboard=False)
    assert outcome.overfitting == pytest.approx(expected)
    assert (outcome.best.natural, outcome.last.natural) == (0.6, 0.7)
    assert (outcome.images, outcome.count) == ("validation", 100)
    assert load(tmp_path) == outcome
    assert not (tmp_path / "landscape.npz").exists()
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match=f"finish the run: firstorder train --out {tmp_path} --resume"):
        load(tmp_path)


def test_folders_that_do_not_fit_are_refused(finished: Path, tmp_path: Path) -> None:
    message = f"{finished} holds a run already; add --resume, or name another folder"
    assert refused(invoke(finished, *words(**KEYS))) == message
    own = finished / "config.yaml"
    message = f"--resume takes every key from {own}; leave out "
    assert refused(invoke(finished, "--resume", "--lr", "3", "--drops", "0.1")) == f"{message}lr, drops"
    assert refused(invoke(finished, "--resume", "--config", str(own))) == f"{message}--config"
    message = f"{tmp_path} holds no run to resume (config.yaml is missing); leave out --resume"
    assert refused(invoke(tmp_path, "--resume")) == message
    (tmp_path / "state.pt").write_bytes((finished / "state.pt").read_bytes())
    (tmp_path / "config.yaml").write_text(own.read_text().replace("batch_size: 20", "batch_size: 30"))
    message = f"{tmp_path / 'state.pt'} is of another run: batch size was 20 and is 30"
    assert refused(invoke(tmp_path, "--resume")).startswith(message)
    (tmp_path / "config.yaml").write_text(own.read_text())
    whole = (finished / "state.pt").read_bytes()
    for length in (0, 100, len(whole) - 1):
        (tmp_path / "state.pt").write_bytes(whole[:length])
        message = f"{tmp_path / 'state.pt'} is damaged or no state of a run; delete it to start anew"
        assert refused(invoke(tmp_path, "--resume")).startswith(message)


def test_files_of_a_finished_run_that_are_cut_off_are_one_line(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "result.json"
    path.write_bytes(path.read_bytes()[:40])
    remedy = f"delete it, then firstorder train --out {tmp_path} --resume"
    with pytest.raises(ValueError, match=rf"{path} is damaged, or of another config\.yaml; {remedy}"):
        load(tmp_path)
    path = tmp_path / "landscape.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{path} is damaged; {remedy}"):
        experiment.arrays(tmp_path)
    path = tmp_path / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(invoke(tmp_path, "--resume")).startswith(f"{path} is damaged; ")


def test_a_result_is_what_was_written_of_this_configuration(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path, config = tmp_path / "result.json", tmp_path / "config.yaml"
    whole, values = path.read_text(), json.loads(path.read_text())
    values["best"]["robust"] = 0.99
    for text in (json.dumps(values), "[]", whole.replace('"count": 70', '"count": 71')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"result\.json is damaged, or of another config\.yaml; delete it"):
            load(tmp_path)
    path.write_text(whole)
    written = config.read_text()
    config.write_text(written.replace("batch_size: 20", "batch_size: 30"))
    with pytest.raises(ValueError, match=r"of another config\.yaml"):
        load(tmp_path)
    config.write_text(f"# mine\n{written}")
    assert load(tmp_path) == load(finished)
    del values["sha256"]  # as an earlier version wrote it
    path.write_text(json.dumps(values))
    assert load(tmp_path).best.robust == 0.99


@pytest.mark.parametrize("what", ["data", "test"])
def test_a_run_whose_data_file_was_replaced_is_not_resumed(tmp_path: Path, what: str) -> None:
    files = {name: tmp_path / f"{name}.npz" for name in ("data", "test")}
    for i, file in enumerate(files.values()):
        x, y = packaged.mnist().x[100 * i : 100 * (i + 1)], packaged.mnist().y[100 * i : 100 * (i + 1)]
        np.savez(file, x=x.numpy(), y=y.numpy())
    out = tmp_path / "run"
    keys = {**KEYS, **files, "validation": 20, "examples": 40, "epochs": 1, "landscape": 0}
    assert invoke(out, *words(**keys)).exit_code == 0
    assert invoke(out, "--resume").exit_code == 0
    with np.load(files[what]) as arrays:
        x, y = arrays["x"], arrays["y"].copy()
    y[7] = (y[7] + 1) % 10
    np.savez(files[what], x=x, y=y)
    message = refused(invoke(out, "--resume"))
    assert f"is of another run: {'training' if what == 'data' else 'test'} data was" in message
    assert "other contents" in message


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    given = words(**{**KEYS, "epochs": 5}, save_every=2, augment="crop-flip", method="a-engm", ramp=0.5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "firstorder.evaluation", "train", "--out", str(killed), *HOW, *given],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (killed / "state.pt").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    assert torch.load(killed / "state.pt", weights_only=True)["step"] < 15
    done = invoke(killed, "--resume")
    assert "epoch 5 of 5" in done.output
    assert invoke(whole, *given).exit_code == 0
    for name in ("last.safetensors", "best.safetensors", "result.json", "config.yaml", "gradients.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(killed / "epochs.csv") == rows(whole / "epochs.csv")
    assert [row["epoch"] for row in rows(killed / "epochs.csv")] == ["1", "2", "3", "4", "5"]


def test_the_landscape_is_the_loss_at_every_point() -> None:
    model, x, y = Net().train(), images(4), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    found = landscape(model, x, y, eps=0.05, points=5, generator=torch.Generator().manual_seed(3))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    model.eval()
    moved = x.clone()
    for _ in range(20):  # PGD-20 with steps of eps / 10
        inputs = moved.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs), y, reduction="sum"), inputs)
        moved = (x + (moved + 0.005 * gradient.sign() - x).clamp(-0.05, 0.05)).clamp(0, 1)
    offsets = [-2.0, -1.0, 0.0, 1.0, 2.0]
    torch.testing.assert_close(found.offsets, torch.tensor(offsets))
    for n in range(4):
        d, r = (moved - x)[n], noise[n]
        r = r - (r * d).sum() / (d * d).sum() * d
        r = r * d.norm() / r.norm()
        assert abs(float((r * d).sum())) < 1e-5
        for (i, a), (j, b) in product(enumerate(offsets), repeat=2):
            one = F.cross_entropy(model((x[n : n + 1] + a * d + b * r).clamp(0, 1)), y[n : n + 1])
            torch.testing.assert_close(found.loss[n, i, j], one, rtol=1e-3, atol=1e-4)


def test_the_loss_rises_along_the_gradient() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(90, 16), nn.Tanh(), nn.Linear(16, 10))
    x = 0.3 + 0.4 * images(6)
    found = landscape(model, x, torch.arange(6), eps=0.01, points=7).loss
    assert bool((found[:, 1:, 3] > found[:, :-1, 3]).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: !foo bar\n", "line 1: not YAML: "),
        ("data: mnist\n? [a, b]\n: 1\n", "line 2: the key is no name"),
        ("1: 2\n", "line 1: the key is no name"),
        ("data: mnist\ndata: cifar10\n", "line 2: the key is no name, or there twice: 'data'"),
        ("data: mnist\neps: '1e400'\n", "line 2: eps: write a finite number above 0, as 0.3 or 8/255"),
        ("data: mnist\nlr: .inf\n", "line 2: lr: "),
    ],
)
def test_odd_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    done = invoke(tmp_path, "--config", str(file))
    assert done.exit_code == 2
    assert re.match(rf"error: {file}, {re.escape(message)}[^\n]*\n$", done.stderr)


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    folder = invoke(tmp_path, "--config", str(tmp_path))
    assert re.match(rf"error: {tmp_path} cannot be read: [^\n]*\n$", folder.stderr)
    words = ["--data", "mnist", "--validation", "100", "--accelerator", "nowhere"]
    done = invoke(tmp_path, *words)
    assert done.exit_code == 2
    assert "error: accelerator='nowhere' with devices=1 is not there" in done.stderr


def test_divergence_is_one_line(tmp_path: Path) -> None:
    words = [
        "--data",
        "mnist",
        "--validation",
        "100",
        "--examples",
        "60",
        "--batch-size",
        "20",
        "--eps",
        "0.1",
        "--method",
        "msgd",
        "--lr",
        "1e30",
    ]
    done = invoke(tmp_path, *words, "--attack", "pgd:steps=1", "--accelerator", "cpu")
    assert done.exit_code == 2
    assert "the network has diverged at step" in done.stderr
