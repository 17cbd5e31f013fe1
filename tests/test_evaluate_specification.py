"""What `firstorder evaluate` is asked: short and long forms, options, budgets; and how it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import evaluate_models
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import data, models
from firstorder.evaluation.names.attacks import AUTOATTACKS
from firstorder.evaluation.names.networks import SmallCNN
from firstorder.evaluation.reporting import page
from firstorder.evaluation.runs import engines
from firstorder.evaluation.runs.adversaries import Registered
from firstorder.evaluation.runs.axes import adversary, attacks
from firstorder.evaluation.runs.specification import Specification, specify
from firstorder.evaluation.runs.store import read

TESTS = Path(__file__).parent
LINEAR = "evaluate_models:linear"
BASE: dict[str, Any] = {"models": [LINEAR], "data": "good.npz", "eps": [0.1], "attacks": ["fgsm"]}


def specified(**given: Any) -> Specification:
    return specify({"models": "a", "data": "mnist", "eps": 0.1, "attacks": "pgd", **given})


def built(attack: object, shape: tuple[int, ...] = (1, 4, 4), **given: Any) -> Any:
    specification = specified(attacks=[attack], **given)
    return adversary(specification.attacks[0], specification, shape)


def evaluate(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", "--trust-code", *words])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad files."""
    folder = tmp_path_factory.mktemp("files")
    good = evaluate_models.arrays(20)
    x, y = good["x"], good["y"]
    nothing = x.copy()
    nothing[3] = np.nan
    for name, arrays in {
        "good": good,
        "layout": {"x": (x * 255).astype(np.uint8), "y": y},
        "range": {"x": x * 255, "y": y},
        "labels": {"x": x, "y": y + 5},
        "negative": {"x": x, "y": y - 1},
        "words": {"x": x, "y": np.array(["cat"] * 20)},
        "nan": {"x": nothing, "y": y},
        "unlabelled": {"x": x},
        "few": {"x": x, "y": y[:9]},
        "objects": {"x": x, "y": y.astype(object)},
        "none": {"x": x[:0], "y": y[:0]},
    }.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **good)
    content = (folder / "good.npz").read_bytes()
    (folder / "half.npz").write_bytes(content[: len(content) // 2])
    (folder / "bits.npz").write_bytes(content[:400] + bytes(20) + content[420:])
    content = (folder / "packed.npz").read_bytes()
    (folder / "packed.npz").write_bytes(content[:60] + bytes([255] * 40) + content[100:])
    (folder / "text.npz").write_text("x, y")
    save_file(SmallCNN().state_dict(), folder / "cnn.safetensors")
    save_file({"a": torch.ones(2, 2)}, folder / "other.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "cnn.safetensors").read_bytes()[:1000])
    (folder / "broken_module.py").write_text("def make(:\n")
    (folder / "file").touch()
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    yield place
    shutil.rmtree(place / "out", ignore_errors=True)


def test_short_and_long_forms_are_one() -> None:
    short = specified(models="mnist-cnn", eps="8/255", attacks="pgd", seeds=3)
    long = specified(models=[{"model": "mnist-cnn"}], eps=[8 / 255], attacks=[{"attack": "pgd"}], seeds=[3])
    assert short == long == specified(models={"model": "mnist-cnn"}, eps=["8/255"], attacks=["pgd"], seeds=[3])
    assert short.eps == (8 / 255,)
    assert specified(eps=["1e-2", "0.5", 1, "2/4e0"][:3]).eps == (0.01, 0.5, 1.0)


def test_labels_say_what_was_given() -> None:
    entries = ["pgd", "pgd:steps=3", {"attack": "pgd", "steps": 4, "alpha": "eps/4"},
               {"attack": "pgd:steps=3", "random_start": False},
               {"attack": "pgd", "name": "mine", "steps": 9}]  # fmt: skip
    assert [entry.label for entry in specified(attacks=entries).attacks] == [
        "pgd", "pgd:steps=3", "pgd:steps=4,alpha=eps/4", "pgd:steps=3,random_start=False", "mine",
    ]  # fmt: skip


def test_the_specification_survives_its_own_file() -> None:
    given = specified(
        attacks=["fgsm", {"attack": "pgd", "alpha": "eps/4", "steps": 3}], zoo={"folder": "x"},
        models=[{"model": "a", "mean": [0.5], "std": [0.2]}],
    )  # fmt: skip
    again = specify(given.model_dump(mode="json"))
    assert again == given
    assert [e.parameters for e in again.attacks] == [{}, {"alpha": "eps/4", "steps": 3}]


def test_a_file_and_options_say_the_same(here: Path) -> None:
    given = {**BASE, "eps": ["1/10", 0.2], "attacks": ["fgsm", "pgd:steps=2"], "seeds": [1, 2], "count": 9, "shard": 5,
             "budget": 3, "transfer": False, "early_stop": False, "pictures": 0, "norm": "Linf", "prepare": False,
             "zoo": {"threat": "L2"}}  # fmt: skip
    Path("spec.yaml").write_text(yaml.safe_dump(given))
    assert evaluate("spec.yaml", "--out", "out/a", "-q").exit_code == 0
    words = ["--model", LINEAR, "--data", "good.npz", "--eps", "1/10", "--eps", "0.2", "--attack", "fgsm", "--attack"]
    words += ["pgd:steps=2", "--seed", "1", "--seed", "2", "--count", "9", "--shard", "5", "--budget", "3"]
    words += ["--no-early-stop", "--pictures", "0", "--no-prepare", "--zoo-threat", "L2"]
    assert evaluate(*words, "--out", "out/b", "-q").exit_code == 0
    first, second = read(Path("out/a")), read(Path("out/b"))
    assert first.facts["specification"] == second.facts["specification"]
    assert first.cells == second.cells
    assert len(first.cells) == 2 * 2 * 2 * 2
    assert first.table()["success"].equals(second.table()["success"])
    assert evaluate("spec.yaml", "--eps", "0.3", "--out", "out/a", "-q").exit_code == 0
    assert read(Path("out/a")).facts["specification"]["eps"] == [0.1, 0.2, 0.3]


def test_fewer_images_than_asked_for_are_said_so(here: Path) -> None:
    words = ("--model", LINEAR, "--data", "good.npz", "--eps", "0.1", "--attack", "fgsm", "--count", "5000")
    known = len(data.load("good.npz").x)
    line = f"{known} of 5000 images asked for: good.npz has no more"
    for more in (["--dry-run"], ["--out", "out/a"]):
        done = evaluate(*words, *more)
        assert done.exit_code == 0, done.output
        assert line in done.output
    run = read(Path("out/a"))
    assert (run.facts["data"]["count"], run.facts["specification"]["count"]) == (known, 5000)
    page.write(run, Path("out/a"))
    assert f"{known} (of 5000 asked for) examples" in Path("out/a/report.html").read_text(encoding="utf-8")
    assert f"{known} (of 5000 asked for) examples" in Path("out/a/report.md").read_text(encoding="utf-8")
    assert "images asked for" not in evaluate(*words[:-2], "--count", str(known), "--dry-run").output


@pytest.mark.parametrize(
    ("attack", "budget", "steps", "spent"),
    [
        ("pgd:random_start=false", 12, 12, 12),
        ("vmi-fgsm:N=3", 12, 3, 12),  # a step takes N + 1 gradients
        ("si-ni-fgsm:m=3", 13, 4, 12),  # and here m
        ("pgd:restarts=3", 12, 4, 12),
        ({"attack": "pgd", "restarts": 3, "early_stop": True}, 12, 4, 12),
        ("pgd:steps=7", 12, 7, 7),
        ("fgsm", 12, None, 1),
        ("pgd", None, 10, 10),
    ],
)
def test_the_budget_is_spent_in_whole_steps(attack: object, budget: int | None, steps: int | None, spent: int) -> None:
    found = built(attack, budget=budget)
    assert isinstance(found, Registered)
    assert getattr(found.build(0.1), "steps", None) == steps
    x = torch.full((2, 1, 4, 4), 0.5)
    network = evaluate_models.linear()
    y = network(x).argmax(1)
    result = found.build(1e-6).run(network, x, y)  # nothing is broken: all is spent
    assert result.gradients.tolist() == [spent, spent]
    assert found.gradients == spent


def test_minimum_norm_attacks_have_no_radius() -> None:
    found = built("ddn", norm="L2", budget=30)
    assert not found.bounded
    assert found.build(0.1) == found.build(0.7)
    assert found.build(1.0).steps == 30
    assert not found.stops_early
    assert "eps" not in found.facts()["parameters"]


def test_a_step_dearer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vmi-fgsm:N=3': a step takes 4 gradients, budget=3 allows less; raise it"):
        built("vmi-fgsm:N=3", budget=3)


@pytest.mark.parametrize(
    ("attack", "given", "stops"),
    [
        ("pgd", {}, True),
        ("pgd", {"early_stop": False}, False),
        ("pgd", {"transfer": True}, False),
        ("pgd:early_stop=false", {}, False),
        ("pgd:early_stop=true", {"early_stop": False}, True),
        ("ni-fgsm", {}, False),  # never evaluates the model at the iterate
        ("mi-fgsm", {}, True),
    ],
)
def test_early_stop_where_the_oracle_allows_it(attack: str, given: dict[str, Any], stops: bool) -> None:
    found = built(attack, **given)
    assert found.stops_early == found.build(0.1).early_stop == stops


def test_patience_goes_with_early_stopping() -> None:
    found = built({"attack": "pgd", "steps": 20, "patience": 5})
    assert found.build(0.1).patience == 5
    assert found.build(0.1).early_stop
    with pytest.raises(ValueError, match=r"patience=5 .* set early_stop=True"):
        built({"attack": "pgd", "patience": 5}, early_stop=False)


def test_a_verdict_has_a_price_of_its_own() -> None:
    """Its stages are no steps of a budget, and `all`, which is at equal budgets, is without it."""
    for given in ({}, {"budget": 3}, {"early_stop": False}):
        found = built("verdict", **given)
        assert found.stops_early
        assert found.gradients == 20 + 10 + 8 * 10 + 20 + 10 + 10 * 15
    assert built("verdict:effort=0").gradients == found.gradients - 7 * 10
    assert built("verdict:effort=2").build(0.1).effort == 2
    everything = attacks(specified(attacks="all", budget=10), (1, 4, 4)).found
    assert "pgd" in {one.name for one in everything}
    assert "verdict" not in {one.name for one in everything}


def test_hyper_parameters_relative_to_the_radius() -> None:
    found = built({"attack": "pgd", "alpha": "eps/4"})
    assert found.build(0.2).alpha == pytest.approx(0.05)
    assert found.build(1.0).alpha == pytest.approx(0.25)
    assert built({"attack": "pgd", "alpha": "eps"}).build(0.3).alpha == pytest.approx(0.3)
    assert built({"attack": "pgd", "alpha": "eps/2.5"}).build(0.5).alpha == pytest.approx(0.2)
    assert built({"attack": "pgd", "alpha": "2/255"}).build(0.3).alpha == pytest.approx(2 / 255)
    assert found.facts()["parameters"]["alpha"] == "eps/4"
    with pytest.raises(ValueError, match="eps/0"):
        built({"attack": "pgd", "alpha": "eps/0"})
    with pytest.raises(ValueError, match="init_norm=eps/4 has no radius to refer to; write a number"):
        built({"attack": "ddn", "init_norm": "eps/4"}, norm="L2")


def m(name: str) -> dict[str, Any]:
    return {"models": [f"evaluate_models:{name}"]}


def d(name: str) -> dict[str, Any]:
    return {"data": f"{name}.npz"}


def weights(name: str, network: str = "small-cnn") -> dict[str, Any]:
    return {"models": [f"{network}@{name}.safetensors"], "data": "mnist"}


def a(attack: object, **more: Any) -> dict[str, Any]:
    return {"attacks": [attack], **more}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (a("pgdd"), "unknown attack 'pgdd'; did you mean pgd"),
    (a("pgd:stepz=3"), "pgd has no parameter 'stepz'; it has alpha"),
    (a({"attack": "pgd", "stepz": 3}), "pgd has no parameter 'stepz'; it has alpha"),
    (a({"attack": "pgd", "eps": 0.1}), "pgd has no parameter 'eps'"),
    (a({"attack": "pgd", "steps": 0}), "steps=0 must be an integer of at least 1"),
    (a("pgd:steps=ten"), "steps=ten is not JSON; write a number"),
    (a("apgd-ce:n_iter=3"), "apgd-ce takes no parameters here; leave them out"),
    (a("ni-fgsm:early_stop=true"), "early_stop=True cannot see success; leave it False"),
    (a("vmi-fgsm", budget=2), "a step takes 21 gradients, budget=2 allows less; raise it"),
    (a("verdict", defences="jpeg"), "'verdict' is done with an example once it is broken, so targets and defences"),
    (a("verdict", targets=LINEAR), "leave it out"),
    (a("verdict:effort=3"), "effort=3 is not known; choose 0, 1 or 2"),
    (a("ddn"), "'ddn' knows L2, not norm=Linf; leave it out"),
    ({"attacks": ["fgsm", "fgsm"]}, "bad.yaml: two attacks are called 'fgsm'; give one of them another name"),
    ({"attacks": []}, "attacks: "),
    ({"attacks": [{"name": "x"}]}, "attacks.0.attack: Field required"),
    ({"models": []}, "models: "),
    ({"models": None}, "models: "),
    ({"models": [LINEAR, {"model": "evaluate_models:other", "name": LINEAR}]}, f"two models are called {LINEAR!r}"),
    ({"models": ["mnist-cnnn"]}, "unknown model 'mnist-cnnn'; name one of mnist-cnn"),
    ({"models": [{"model": LINEAR, "mean": [0.5]}]}, "models.0: give both mean and std, a value for every channel"),
    ({"models": [{"model": LINEAR, "mean": [0.5], "std": [0]}]}, "models.0.std.0: Input should be greater than 0"),
    ({"models": [{"model": LINEAR, "nam": "x"}]}, "models.0.nam: Extra inputs are not permitted (it is 'x')"),
    ({"models": ["no_such_module:make"]}, "cannot be imported: No module named 'no_such_module'"),
    ({"models": ["broken_module:make"]}, "'broken_module:make' cannot be imported: invalid syntax"),
    (m("nowhere"), "cannot be imported: module 'evaluate_models' has no attribute 'nowhere'"),
    (m("SHAPE"), "is a tuple; name a function that returns the model"),
    (m("no_module"), "returned a str; a torch module is needed"),
    (m("cannot_be_made"), "fails: RuntimeError: the weights are lost"),
    (m("needs_an_argument"), "missing 1 required positional argument: 'depth'"),
    (m("broken"), "fails: TypeError: forward() got something else"),
    (m("colour"), "raised by the model for images of shape"),
    (m("not_a_number"), "the model's logits are NaN or infinite; check its weights"),
    (m("a_tuple"), "the model returned a tuple, not a tensor of logits"),
    (m("one_class"), "it has one output, one class only"),
    (weights("missing"), "missing.safetensors is not there; name a .safetensors or .pt file"),
    (weights("half"), "half.safetensors is not a .safetensors file, or a damaged one"),
    (weights("other"), "other.safetensors does not hold the weights of small-cnn"),
    (weights("cnn", "resnet18"), "cnn.safetensors does not hold the weights of resnet18"),
    (weights("cnn", "small-cnm"), "unknown network 'small-cnm'; name small-cnn"),
    (d("missing"), "unknown data 'missing.npz'; name mnist"),
    ({"data": "x" * 300}, "File name too long"),
    ({"data": "mnist:nowhere"}, "nowhere does not hold mnist in torchvision's layout; name its root folder"),
    (d("layout"), "layout.npz: uint8 images have shape (N, H, W, C), C 1 or 3; x has (20, 1, 4, 4)"),
    (d("range"), "range.npz: the images span [0, 228"),
    (d("labels"), "labels span 0..7, but the model has classes 0..2"),
    (d("negative"), "labels span -1..1, but the model has classes 0..2"),
    (d("words"), "words.npz: x is float32 and y <U3; uint8 or floating point and integers are needed"),
    (d("nan"), "nan.npz: the images contain NaN or infinity; clean the data first"),
    (d("unlabelled"), "unlabelled.npz has no array y; it has x"),
    (d("few"), "few.npz: x has shape (20, 1, 4, 4) and y (9,); images and labels (N,) are needed"),
    (d("objects"), "objects.npz holds Python objects"),
    (d("none"), "none.npz has no image; lower skip, or name others"),
    (d("half"), "half.npz is not an .npz file, or a damaged one"),
    (d("bits"), "bits.npz is not an .npz file, or a damaged one"),
    (d("packed"), "packed.npz is not an .npz file, or a damaged one"),
    (d("text"), "text.npz is not an .npz file, or a damaged one"),
    ({"skip": 20}, "good.npz has no image after the first 20; lower skip"),
    ({"eps": -0.1}, "bad.yaml, line 4: eps.0: write a finite number above 0, as 0.3 or 8/255 (it is -0.1)"),
    ({"eps": 0}, "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is 0)"),
    ({"eps": "big"}, "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is 'big')"),
    ({"eps": "1/0"}, "(it is '1/0')"),
    ({"eps": float("nan")}, "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is nan)"),
    ({"eps": [0.1, "1/10"]}, "eps: every value may be there once (it is [0.1, '1/10'])"),
    ({"count": 0}, "count: Input should be greater than or equal to 1 (it is 0)"),
    ({"skip": -1}, "skip: Input should be greater than or equal to 0 (it is -1)"),
    ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0 (it is -1)"),
    ({"seeds": [0, 0]}, "seeds: every value may be there once"),
    ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1 (it is 0)"),
    ({"batch_size": "many"}, "batch_size: Input should be a valid integer"),
    ({"shard": 0}, "shard: Input should be greater than or equal to 1"),
    ({"norm": "L7"}, "norm: Input should be 'Linf' or 'L2' (it is 'L7')"),
    ({"device": "tpu9"}, "device='tpu9' cannot be used: Invalid device string"),
    ({"precision": "bfloat16", "prepare": False}, "bad.yaml: precision=bfloat16 needs prepare=true"),
    ({"stepz": 4}, "stepz: Extra inputs are not permitted (it is 4); the keys are models, data"),
    ({"zoo": {"foldr": "x"}}, "zoo.foldr: Extra inputs are not permitted"),
]


def test_the_names_of_autoattacks_attacks_are_its_own() -> None:
    classic = pytest.importorskip("firstorder.autoattack.classic")
    assert classic.NAMES == AUTOATTACKS


def test_only_autoattacks_attacks_need_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] in ("autoattack", "pyautoattack"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in list(sys.modules):
        if name.split(".")[0] in ("autoattack", "pyautoattack") or name.startswith("firstorder.autoattack"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert built("pgd").line.name == "pgd"
    with pytest.raises(ValueError, match="unknown attack 'pgdd'"):
        built("pgdd")
    for name in (*AUTOATTACKS, "autoattack", "firstorder"):
        with pytest.raises(
            ModuleNotFoundError, match=r"needs AutoAttack: pip install .*firstorder-attacks\[robustbench\]"
        ):
            built(name)


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    here: Path, given: dict[str, Any], message: str
) -> None:
    Path("bad.yaml").write_text(yaml.safe_dump({**BASE, **given}))
    before = sorted(here.rglob("*.*"))
    done = evaluate("bad.yaml", "--out", "out")
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path("out").exists()
    assert [p for p in sorted(here.rglob("*.*")) if "__pycache__" not in str(p)] == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "bad.yaml, line 1: not YAML"),
        ("\tmodels: 3", "bad.yaml, line 1: not YAML"),
        ("- 1", "bad.yaml holds no keys; write one per line: data: mnist"),
        ("", "bad.yaml holds no keys"),
        ("data: a\ndata: b", "bad.yaml, line 2: the key is no name, or there twice: 'data'"),
        ("data: !!python/name:os.system", "bad.yaml, line 1: not YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_specification(here: Path, text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    done = evaluate("bad.yaml", "--out", "out")
    assert done.exit_code == 2
    assert not Path("out").exists()
    (line,) = done.stderr.splitlines()
    assert message in line


def test_every_mistake_has_a_line_of_its_own(here: Path) -> None:
    Path("bad.yaml").write_text(
        f"data: good.npz\nmodels:\n- {LINEAR}\n- model: x\n  mean: [0.5]\n  std: [1, no]\n"
        "eps:\n  - 0.1\n  - -3\nwhat: 1\n"
    )
    done = evaluate("bad.yaml", "--out", "out")
    assert done.exit_code == 2
    said = dict(line.removeprefix("error: ").split(": ", 2)[:2] for line in done.stderr.splitlines())
    assert said == {
        "bad.yaml, line 6": "models.1.std.1", "bad.yaml, line 9": "eps.1", "bad.yaml, line 10": "what",
        "bad.yaml": "attacks",
    }  # fmt: skip


@pytest.mark.parametrize("out", ["file", "file/deep/run", "o" * 300])
def test_a_folder_that_cannot_be(here: Path, out: str) -> None:
    Path("spec.yaml").write_text(yaml.safe_dump(BASE))
    done = evaluate("spec.yaml", "--out", out)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert out in line
    assert Path("file").read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spec.yaml"], "a run needs a folder; name it with --out"),
        (["none.yaml", "--out", "out"], "none.yaml cannot be read"),
        (
            ["spec.yaml", "--eps", "wide", "--out", "out"],
            "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is 'wide')",
        ),
        (["spec.yaml", "--out", "out", "--address", "10.0.0.1:1"], "--address and --gpus are Ray's; add --engine ray"),
        (["spec.yaml", "--out", "out", "--engine", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers at"),
        (["spec.yaml", "--out", "out", "--engine", "ray", "--address", "here:port"], "no Ray cluster answers at"),
    ],
)
def test_options_that_do_not_fit(here: Path, words: list[str], message: str) -> None:
    Path("spec.yaml").write_text(yaml.safe_dump(BASE))
    done = evaluate(*words)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not Path("out").exists()


def test_ray_that_is_not_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    Path("spec.yaml").write_text(yaml.safe_dump(BASE))
    done = evaluate("spec.yaml", "--out", "out", "--engine", "ray")
    assert done.exit_code == 2
    assert not Path("out").exists()
    assert done.stderr == 'error: engine=ray needs Ray: pip install "firstorder-attacks[ray]"\n'


def test_a_real_process_refuses_likewise(here: Path) -> None:
    Path("bad.yaml").write_text(yaml.safe_dump({**BASE, "attacks": ["pgd:stepz=1"], **m("a_tuple")}))
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "firstorder.evaluation", "evaluate", "bad.yaml", "--trust-code", "--out", "out"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert not Path("out").exists()
    assert done.stderr.startswith("error: 'pgd:stepz=1': pgd has no parameter 'stepz'")
    assert len(done.stderr.splitlines()) == 1


def test_weights_in_a_safetensors_file(place: Path) -> None:
    file = place / "cnn.safetensors"
    found = models.load(f"small-cnn@{file}")
    x = data.load("mnist", count=3).x
    again = SmallCNN().eval()
    again.load_state_dict(found.state_dict())
    assert torch.equal(found(x), again(x))
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    three = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    save_file(three.state_dict(), place / "three.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of evaluate_models:linear"):
        models.load(f"evaluate_models:linear@{place / 'three.safetensors'}")
    save_file({"head.weight": torch.ones(3, 16)}, place / "ones.safetensors")
    ones = models.load(f"evaluate_models:linear@{place / 'ones.safetensors'}")
    assert torch.equal(ones(torch.ones(1, 1, 4, 4)), torch.full((1, 3), 16.0))
