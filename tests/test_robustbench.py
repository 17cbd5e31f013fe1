"""RobustBench's workflow, over pyautoattack alone and over an installed `autoattack`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firstorder.attacks import RobustnessWarning
from firstorder.autoattack import AutoAttack, Record
from firstorder.evaluation.names import packaged
from firstorder.robustbench import benchmark, load_model
from test_autoattack import small

NAME = "Sehwag2021Proxy_R18"
"""A zoo model of the architecture that pyautoattack ships weights for."""

STAND_IN = '''
"""The interface of the original autoattack, over the code of pyautoattack."""
from pyautoattack import AutoAttack as _AutoAttack

class AutoAttack(_AutoAttack):
    def __init__(self, model, norm="Linf", eps=.3, seed=None, verbose=True, attacks_to_run=[], version="standard",
                 is_tf_model=False, device="cuda", log_path=None):
        if version != "custom" and attacks_to_run:
            raise ValueError("attacks_to_run will be overridden unless you use version='custom'")
        super().__init__(model, attacks=attacks_to_run or None, norm=norm, eps=eps, seed=seed, version=version,
                         device=device)
        self.attacks_to_run = self.attacks_to_run or []
        self.verbose = verbose

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
        return (x_adv, y_adv) if return_labels else x_adv
'''

WORKFLOW = """
import json, sys, torch
import firstorder.robustbench
import autoattack
from robustbench import benchmark, load_model
import robustbench.eval
from firstorder.evaluation.names import packaged

torch.set_num_threads(1)
images = packaged.cifar10()
robustbench.eval.load_clean_dataset = lambda *args: (images.x[:2], images.y[:2])
model = load_model("Sehwag2021Proxy_R18", model_dir=sys.argv[1], dataset="cifar10", threat_model="Linf")
result = benchmark(model, n_examples=2, dataset="cifar10", threat_model="Linf", eps=8 / 255, batch_size=2, to_disk=True,
                   model_name="Sehwag2021Proxy_R18")
ours = firstorder.robustbench.benchmark(model, n_examples=2, eps=8 / 255, batch_size=2, x=images.x, y=images.y, seed=0,
                                        attacks=["pqgd", "autoattack"], details=True)
print(json.dumps({"module": getattr(autoattack, "__file__", None), "result": result, "ours": ours[:2],
                  "run": ours[2].run, "base": [c.__module__ for c in firstorder.autoattack.AutoAttack.__mro__]}))
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the zoo's own layout, with the checkpoint of another model of the same architecture."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "cifar10" / "Linf").mkdir(parents=True)
    state = {f"module.{name}": value for name, value in packaged.cifar10_resnet18().state_dict().items()}
    torch.save({"state_dict": state}, folder / "cifar10" / "Linf" / f"{NAME}.pt")
    return folder


@pytest.mark.parametrize("classic", [False, True], ids=["pyautoattack alone", "autoattack installed"])
def test_robustbenchs_own_workflow(classic: bool, zoo: Path, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if classic:
        package = tmp_path / "site" / "autoattack"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(STAND_IN)
        (package / "state.py").write_text("from pyautoattack.state import EvaluationState\n")
        environment["PYTHONPATH"] = str(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", WORKFLOW, str(zoo)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["result"] == [1.0, 0.0]
    assert found["ours"] == [1.0, 0.0]
    assert found["run"] == ["pqgd"], "nothing is left for the others"
    if classic:
        assert found["module"] == str(tmp_path / "site" / "autoattack" / "__init__.py")
        assert "autoattack" in found["base"]
    else:
        assert found["module"] is None
        assert "pyautoattack.autoattack" in found["base"]
    info = json.loads((tmp_path / "model_info" / "cifar10" / "Linf" / f"{NAME}.json").read_text())
    assert (info["clean_acc"], info["autoattack_acc"]) == ("100.0", "0.0")


def test_load_model_passes_through(zoo: Path) -> None:
    model = load_model(NAME, model_dir=zoo)
    images = packaged.cifar10()
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(images.x[:4]), packaged.cifar10_resnet18()(images.x[:4]))


def test_a_missing_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("gdown.download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_model(NAME, model_dir=tmp_path)
    message = str(caught.value)
    assert "no route to host" in message
    assert str(tmp_path / "cifar10" / "Linf" / f"{NAME}.pt") in message
    assert "1-ZgoSlD_AMhtXdnUElilxVXnzK2DcHuu" in message
    assert "by hand" in message
    assert "checksum" in message


class Foreign:
    """Something that only unpickling brings back."""


def test_unpickling_is_refused_unless_allowed(zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    state = torch.load(zoo / "cifar10" / "Linf" / f"{NAME}.pt", weights_only=True)
    torch.save({**state, "more": Foreign()}, folder / f"{NAME}.pt")
    before = dict(os.environ)
    with pytest.raises(ValueError, match="allow_pickle=True if you trust"):
        load_model(NAME, model_dir=tmp_path)
    assert isinstance(load_model(NAME, model_dir=tmp_path, allow_pickle=True), nn.Module)
    assert dict(os.environ) == before


def test_a_broken_download_is_not_an_invitation_to_unpickle(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.pt").write_text("<html>quota exceeded</html>")
    for allow in (False, True):
        with pytest.raises(ValueError, match=r"not a PyTorch checkpoint.*delete it") as caught:
            load_model(NAME, model_dir=tmp_path, allow_pickle=allow)
        assert "allow_pickle" not in str(caught.value)


def test_unknown_models_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no cifar10 Linf model 'Sehwag2021Proxy_R19'; did you mean {NAME}"):
        load_model("Sehwag2021Proxy_R19", model_dir=tmp_path)
    with pytest.raises(ValueError, match="no cifar100 models for threat_model='L2'"):
        load_model("Rice2020Overfitting", model_dir=tmp_path, dataset="cifar100", threat_model="L2")


def test_benchmark_on_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, images = packaged.mnist_cnn().train(), packaged.mnist()
    words: dict[str, Any] = {"x": images.x, "y": images.y, "n_examples": 30, "eps": 0.3, "seed": 0, "batch_size": 30}
    words |= {"attacks": ["pqgd", "si-ni-fgsm"], "parameters": {"pqgd": {"steps": 5}}}
    state = tmp_path / "state.json"
    clean, robust, record = benchmark(model, **words, details=True, aa_state_path=state)
    assert isinstance(record, Record)
    assert record.run == ["pqgd", "si-ni-fgsm"]
    assert clean == record.accuracy["clean"] >= robust == float(record.robust.float().mean())
    assert len(record.adversarial) == 30
    assert all(part.training for part in model.modules())
    assert benchmark(model, **words, aa_state_path=state) == (clean, robust)


def test_the_standard_figure_is_filed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build = AutoAttack.__init__

    def cheap(self: AutoAttack, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        small(self)

    monkeypatch.setattr(AutoAttack, "__init__", cheap)
    images = packaged.mnist()
    words: dict[str, Any] = {"x": images.x, "y": images.y, "n_examples": 20, "eps": 0.33, "seed": 0, "batch_size": 20}
    clean, robust, record = benchmark(packaged.mnist_cnn(), **words, details=True, to_disk=True, model_name="Mine")
    assert record.run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert robust < clean
    info = json.loads((tmp_path / "model_info" / "cifar10" / "Linf" / "Mine.json").read_text())
    assert float(info["clean_acc"]) == pytest.approx(100 * clean, abs=0.01)
    assert float(info["autoattack_acc"]) == pytest.approx(100 * robust, abs=0.01)
    assert info["eps"] == 0.33


def test_benchmark_on_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    images = packaged.cifar10()
    monkeypatch.setattr("firstorder.robustbench.bench.load_clean_dataset", lambda *args: (images.x[:4], images.y[:4]))
    model = packaged.cifar10_resnet18()
    clean, robust = benchmark(model, n_examples=4, eps=8 / 255, attacks=["pqgd"], batch_size=4)
    assert (clean, robust) == (1.0, 0.0)
    with pytest.raises(ValueError, match="the model has 10 classes, cifar100 has 100"):
        benchmark(model, dataset="cifar100", eps=8 / 255, attacks=["pqgd"])

    class Paired(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return model(x), x

    with pytest.raises(ValueError, match=r"Select\(model, 0\)"):
        benchmark(Paired().eval(), n_examples=4, eps=8 / 255, attacks=["pqgd"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({}, "eps=None"),
    "x alone": ({"eps": 0.1, "x": torch.rand(2, 1, 28, 28)}, "x and y belong together"),
    "no number": ({"eps": 0.1, "x": torch.rand(2, 1, 28, 28), "y": torch.arange(2), "n_examples": -1}, "n_examples=-1"),
    "no batch": ({"eps": 0.1, "x": torch.rand(2, 1, 28, 28), "y": torch.arange(2), "batch_size": 0}, "batch_size=0"),
    "labels": ({"eps": 0.1, "x": torch.rand(2, 1, 28, 28), "y": torch.arange(3), "n_examples": 2}, "2 images and 3 l"),
    "no images": ({"eps": 0.1, "x": torch.rand(0, 1, 28, 28), "y": torch.arange(0)}, "0 images and 0 labels"),
    "bytes": ({"eps": 0.1, "x": 255 * torch.rand(2, 1, 28, 28), "y": torch.arange(2)}, "divide bytes by 255"),
    "to_disk": ({"eps": 0.1, "to_disk": True}, "model_name"),
    "another figure": ({"eps": 0.1, "to_disk": True, "model_name": "A", "attacks": ["pqgd"]}, "leave attacks out"),
    "corruptions": ({"threat_model": "corruptions", "attacks": ["pqgd"]}, "corruptions.*has no attacks"),
    "name": (
        {"eps": 0.1, "attacks": ["pqdg"], "x": torch.rand(2, 1, 28, 28), "y": torch.arange(2)},
        "unknown attack 'pqdg'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad: str) -> None:
    words, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        benchmark(packaged.mnist_cnn(), **words)


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)).eval()


def test_benchmark_on_a_model_in_training_mode(recwarn: pytest.WarningsRecorder) -> None:
    model = with_norm()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    words: dict[str, Any] = {"x": x, "y": model(x).argmax(1), "eps": 0.01, "seed": 0, "attacks": ["pgd", "apgd-t"]}
    expected = benchmark(model, **words)
    assert not [w for w in recwarn if "eval mode" in str(w.message)]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(RobustnessWarning, match=r"The given model is \*not\* in eval mode") as caught:
        assert benchmark(model, **words) == expected
    assert len([w for w in caught if "eval mode" in str(w.message)]) == 1
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_benchmark_of_corruptions_is_in_evaluation_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_norm().train()

    def asked(given: nn.Module, *args: Any, device: torch.device, **words: Any) -> tuple[float, float]:
        assert not any(part.training for part in given.modules())
        assert device == torch.device("cpu")
        return 0.5, 0.25

    monkeypatch.setattr("firstorder.robustbench.bench.original", asked)
    with pytest.warns(RobustnessWarning, match="eval mode"):
        assert benchmark(model, threat_model="corruptions") == (0.5, 0.25)
    assert all(part.training for part in model.modules())


def test_benchmark_on_few_classes_and_permuted_images() -> None:
    model = with_norm()
    pictures = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    words: dict[str, Any] = {"y": model(pictures).argmax(1), "eps": 1e-4, "seed": 0, "attacks": ["apgd-ce", "apgd-t"]}
    found = benchmark(model, x=pictures, **words)
    assert found == benchmark(model, x=pictures.contiguous(), **words)
    assert found[0] == 1


def test_the_stand_in_has_the_modules_that_people_import() -> None:
    program = """
import importlib, torch
from torch import nn
import firstorder.autoattack, firstorder.robustbench
import autoattack.checks, autoattack.state
from autoattack import AutoAttack, checks, square as module
from autoattack.autoattack import AutoAttack as same
from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection
from autoattack.fab_base import FABAttack
from autoattack.fab_projections import projection_linf
from autoattack.fab_pt import FABAttack_PT
from autoattack.fab_tf import FABAttack_TF
from autoattack.other_utils import L2_norm, Logger
from autoattack.square import SquareAttack
from autoattack.state import EvaluationState
import pyautoattack.autopgd_base

assert AutoAttack is same is firstorder.autoattack.AutoAttack
assert APGDAttack is pyautoattack.autopgd_base.APGDAttack and module.SquareAttack is SquareAttack
assert autoattack.checks is checks is importlib.import_module("autoattack.checks")
model = nn.Sequential(nn.Flatten(), nn.Linear(75, 5)).eval()
adversary = AutoAttack(model, eps=0.1)
assert isinstance(adversary.apgd, APGDAttack) and isinstance(adversary.fab, FABAttack_PT)
x = torch.rand(4, 3, 5, 5)
y = model(x).argmax(1)
attack = APGDAttack(model, n_iter=5, eps=0.1, seed=0, device="cpu")
assert (attack.perturb(x, y) - x).abs().max() <= 0.1 + 1e-6
try:
    import autoattack.utils_tf2
except ModuleNotFoundError as error:
    assert error.name == "tensorflow", error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "pip install --force-reinstall --no-deps robustbench"),
        ("import pkg_resources_that_is_not_there", "No module named 'pkg_resources_that_is_not_there'"),
        ("raise ModuleNotFoundError(name='pkg_resources')", 'pkg_resources: pip install "firstorder-attacks['),
    ],
)
def test_what_is_amiss_with_robustbench_is_said(body: str, said: str, tmp_path: Path) -> None:
    """torchattacks' wheel has a `robustbench` whose `eval` is empty; setuptools from 81 on is without pkg_resources."""
    package = tmp_path / "robustbench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "data.py").write_text(f"{body}\nget_preprocessing = load_clean_dataset = None\n")
    (package / "eval.py").touch()
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "import firstorder.robustbench"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
