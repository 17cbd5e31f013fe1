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
from torch import nn

from firstorder.autoattack import AutoAttack, Record
from firstorder.evaluation import packaged
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
from firstorder.evaluation import packaged

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


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({}, "eps=None"),
    "x alone": ({"eps": 0.1, "x": torch.rand(2, 1, 28, 28)}, "x and y belong together"),
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
