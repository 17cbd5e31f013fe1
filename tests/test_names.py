"""What a word of a command line or of a specification means: one reader for each kind, and none that hangs."""

from __future__ import annotations

import ast
import inspect
import io
import json
import math
import re
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import firstorder.evaluation.names.data as datasets
from firstorder.attacks import ANU, DDN, MIFGSM, PGD, Attack, Quantised, registry
from firstorder.evaluation import names
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import code, documents, models, packaged
from firstorder.evaluation.names.attacks import AUTOATTACKS, RECOMMENDED, VERSIONS, at, autoattack, parse, relative
from firstorder.evaluation.names.data import family
from firstorder.evaluation.names.models import Zoo
from firstorder.evaluation.names.numbers import LONGEST, number, radius, short
from firstorder.evaluation.runs.adversaries import Registered
from firstorder.evaluation.runs.axes import adversary
from firstorder.evaluation.runs.plan import plan
from firstorder.evaluation.runs.specification import Specification, specify
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import configure

EVALUATION = Path(names.__path__[0]).parent
SECONDS = 5.0
"""Of the processor, within which hostile input is refused; it takes none, and all memory where nothing bounds it."""


@contextmanager
def at_once() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """The line with which a command refuses."""
    with at_once():
        done = invoke(*words)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- numbers and radii


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3), ("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("1e-3", 1e-3), (".5", 0.5), ("2.", 2.0),
        ("0.5/255", 0.5 / 255), ("-1", -1.0), ("+4", 4.0), ("1e308", 1e308), ("0", 0.0), ("1e-999", 0.0),
    ],
)  # fmt: skip
def test_numbers(text: str, value: float) -> None:
    assert number(text) == value


NONE = [
    "",
    "eps",
    "1e400",
    "1/0",
    "0/0",
    "nan",
    "inf",
    "1e999999999",
    "1e9999999/3",
    "1/1e999999999",
    "1/1e400",
    "0x10",
]
NONE += ["1_000", "1/2/3", "9" * (LONGEST + 1), "1e" + "9" * 10**6, "٣", "1 2", "--1", "1e", "True"]


@pytest.mark.parametrize("text", NONE, ids=[text[:20] for text in NONE])
def test_what_is_no_number(text: str) -> None:
    with at_once(), pytest.raises(ValueError, match=r"is not a finite number; write it as 0\.3 or 8/255") as caught:
        number(text)
    assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match=re.escape("write a finite number above 0, as 0.3 or 8/255")):
        radius(text)


def test_radii() -> None:
    assert [radius(value) for value in ("8/255", 0.3, 1, np.float32(0.5), torch.tensor(0.25))] == [
        8 / 255, 0.3, 1.0, 0.5, 0.25,
    ]  # fmt: skip
    for value in (0, -0.1, "0", "-8/255", "1e-999", math.nan, math.inf, True, None, [0.1], 10**400, object()):
        with pytest.raises(ValueError, match="a finite number above 0"):
            radius(value)
    with pytest.raises(ValueError, match=re.escape("eps='big' is not a finite number above 0; write 0.3 or 8/255")):
        radius("big", name="eps")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("0123456789./eE+-x "), max_size=60))
def test_a_number_or_a_value_error(text: str) -> None:
    try:
        assert math.isfinite(number(text))
    except ValueError:
        assert short(text)[:20] in short(text)


def test_a_radius_is_the_same_everywhere() -> None:
    """A specification, a configuration of training and a command's option."""
    base = {"models": "mnist-cnn", "data": "mnist", "attacks": "fgsm"}
    assert specify({**base, "eps": "8/255"}).eps == (8 / 255,)
    assert configure({"data": "mnist", "eps": "8/255"}).eps == 8 / 255
    for values in ("1e999999999", "1e9999999/3", 10**4000, "nan", ".inf", 0):
        with at_once(), pytest.raises(ValueError, match=r"eps\.0: write a finite number above 0") as caught:
            specify({**base, "eps": values})
        assert len(str(caught.value)) < 300
        with at_once(), pytest.raises(ValueError, match="eps: write a finite number above 0"):
            configure({"data": "mnist", "eps": values})
    for words in (
        ("evaluate", "--model", "mnist-cnn", "--data", "mnist", "--attack", "fgsm", "--dry-run"),
        ("train", "--data", "mnist", "--out", "nowhere"),
        ("transfer",),
        ("leaderboard",),
    ):
        assert "1e999999999" in refused(*words, "--eps", "1e999999999")


# --- attacks on one line


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("pgd:alpha=eps/10", PGD(eps=0.4, alpha=0.04)),
        ("pgd:alpha=eps,steps=3", PGD(eps=0.4, alpha=0.4, steps=3)),
        ("pgd:alpha=eps/2.5", PGD(eps=0.4, alpha=0.16)),
        ("pgd:alpha=2/255", PGD(eps=0.4, alpha=2 / 255)),
        ("mi-fgsm+quantised:decay=1e-1,alpha=eps/4", MIFGSM(eps=0.4, decay=0.1, alpha=0.1, direction=Quantised())),
        ('mi-fgsm:normaliser="sum"', MIFGSM(eps=0.4, normaliser="sum")),
        ("ddn:steps=7", DDN(steps=7)),
    ],
)
def test_lines(label: str, expected: Attack) -> None:
    line = parse(label)
    assert line.build(eps=0.4) == expected
    assert line.bounded == hasattr(expected, "eps")
    assert line.cls is type(expected) is registry().attacks[line.name]


LONG = "pgd:" + "steps=1," * 10**5
WRONG = {
    "pgd:steps=1,": "has no parameter ''",
    "pgd:steps=1,steps=2": "steps is given twice; leave out one of them",
    "pgd:alpha=eps/0": "alpha=eps/0 is not JSON",
    "pgd:alpha=eps/-2": "alpha=eps/-2 is not JSON",
    "pgd:alpha=eps/1e999999999": "alpha=eps/1e999999999 is not JSON",
    "pgd:alpha=1e999999999": "alpha=inf is not finite; write a number",
    "pgd:alpha=NaN": "alpha=nan is not finite",
    "pgd:alpha=[1,Infinity]": "alpha=inf is not finite",
    "pgd:alpha=8/0": "alpha=8/0 is not JSON",
    f"pgd:steps={10**18}": f"steps={10**18} is too large; at most 10000000 is possible",
    f"pgd:steps={'9' * 500}": "steps=a whole number of about 500 digits is too large",
    f"pgd:steps=-{10**18}": "is too large",
    f"si-ni-fgsm:m={10**9}": "at most 1000 is possible",
    f"pgd:alpha={'[' * 900}": "is not JSON",
    LONG: "characters; an attack is named with at most 1000",
    "pgd:alpha": "alpha= is not JSON",
}


@pytest.mark.parametrize("label", WRONG, ids=[label[:30] for label in WRONG])
def test_wrong_lines(label: str) -> None:
    with at_once(), pytest.raises(ValueError, match=re.escape(WRONG[label])) as caught:
        parse(label)
    assert len(str(caught.value)) < 600


def test_lines_that_need_a_radius() -> None:
    with pytest.raises(ValueError, match=re.escape("'ddn:gamma=eps/2': gamma=eps/2 has no radius to refer to")):
        parse("ddn:gamma=eps/2").build(steps=3)
    assert parse("ddn:init_norm=eps/2").build(eps=1.0, max_norm=1.0) == DDN(init_norm=0.5, max_norm=1.0)
    assert at("eps/8", 2.0) == 0.25
    assert at("sum", 2.0) == "sum"
    assert [relative(text) for text in ("eps", "eps/4", "eps/0", "eps*4", "4", 4)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_defaults_give_way_to_the_line() -> None:
    assert parse("pgd:steps=3").build(eps=0.1, steps=9, alpha=0.05, max_norm=1.0) == PGD(eps=0.1, steps=3, alpha=0.05)
    with pytest.raises(ValueError, match=re.escape("'pgd:steps=0': steps=0 must be")):
        parse("pgd:steps=0").build()
    with pytest.raises(ValueError, match="pgd:alpha=true"):
        parse("pgd:alpha=true").build()


def test_a_file_adds_to_a_line() -> None:
    line = parse("pgd:steps=3", more={"alpha": "eps/10", "random_start": True})
    assert line.build(eps=0.5) == PGD(eps=0.5, steps=3, alpha=0.05, random_start=True)
    for more, message in (
        ({"steps": 4}, "steps is given twice"),
        ({"m": 4}, "pgd has no parameter 'm'"),
        ({"restarts": 10**18}, "is too large"),
        ({"alpha": math.inf}, "is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            parse("pgd:steps=3", more=more)


def test_presets_are_the_data_sets() -> None:
    assert [family(spec) for spec in ("mnist", "mnist:/x", "cifar10:d", "robustbench:cifar10:d", "x.npz", "timm")] == [
        "mnist", "mnist", "cifar10", "cifar10", "", "",
    ]  # fmt: skip
    assert parse("anu", data="mnist").build() == ANU(preset="mnist")
    assert parse("anu", data="mnist:/some/where").build() == ANU(preset="mnist")
    assert parse("anu", data="mine.npz").build() == ANU()
    assert parse("anu", data="fashion-mnist:/x").build() == ANU()
    assert parse('anu:preset="imagenet"', data="mnist").build() == ANU(preset="imagenet")
    assert parse("pgd", data="mnist").build() == PGD()


@pytest.mark.parametrize(
    "label", ["anu", RECOMMENDED["anu"], "ddn", "pgd:alpha=eps/10,steps=7", "mi-fgsm+quantised:steps=7"]
)
def test_a_line_means_the_same_in_every_command(label: str) -> None:
    """In runs, which all commands but this one are views of, and as the inner attack of `train`."""
    line = parse(label, data="mnist")
    words = {"models": "mnist-cnn", "data": "mnist", "eps": 0.2, "attacks": label, "early_stop": False}
    words["norm"] = line.cls.norms[0]
    specification = specify(words)
    run = adversary(specification.attacks[0], specification, (1, 28, 28))
    assert isinstance(run, Registered)
    trained = parts.inner(configure({"data": "mnist", "eps": 0.2, "attack": label}))
    if line.bounded:
        expected = line.build(eps=0.2)
        assert run.build(0.2) == expected
        assert trained == line.build(eps=0.2, alpha=0.05)
    else:
        assert run.build(0.2) == line.build()
        assert trained == line.build(max_norm=0.2)
        assert label.partition(":")[0] == line.name


def test_autoattack_and_its_parts() -> None:
    assert {name: autoattack(name) is not None for name in (*VERSIONS, *AUTOATTACKS, "pgd", "pgd:steps=1")} == {
        **dict.fromkeys((*VERSIONS, *AUTOATTACKS), True), "pgd": False, "pgd:steps=1": False,
    }  # fmt: skip
    for label in ("autoattack:steps=1", "apgd-t+sign"):
        with pytest.raises(ValueError, match="takes no parameters here; leave them out"):
            autoattack(label)


PIECES = st.sampled_from(
    ["pgd", "anu", "mi-fgsm", "+", "sign", ":", "steps", "alpha", "m", "=", ",", "1", "eps", "/", "255"]
)
WORDS = st.lists(
    PIECES | st.text(max_size=3) | st.sampled_from(['"', "[", "]", "{", "1e9", "NaN", "null", "-"]), max_size=12
)


@settings(max_examples=400, deadline=None)
@given(WORDS.map("".join))
def test_a_line_is_read_or_refused_with_a_value_error(label: str) -> None:
    for read in (parse, autoattack, models.finder, code.runs_code, code.split, family, datasets.stream):
        with suppress(ValueError, FileNotFoundError):
            read(label)
    with suppress(ValueError):
        parse(label).build(eps=0.1)


# --- models


MAKER = """
from pathlib import Path
import torch
from torch import nn
from helper import WIDTH

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(784, WIDTH)
    def forward(self, x):
        return self.head(x.flatten(1))

def make():
    Path("ran").touch()
    torch.manual_seed(0)
    return Flat()

def late():
    import lately
    return Flat()

three = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in a file, a module beside it, and weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MAKER)
    (tmp_path / "helper.py").write_text("WIDTH = 10\n")
    (tmp_path / "lately.py").write_text("")
    monkeypatch.setattr(code, "_beside", {})
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_function_in_a_file(place: Path) -> None:
    """With the modules beside it, also those imported late; found once while the file stays as it is."""
    model = models.load("net.py:make")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert type(model) is type(models.load(f"{place}/net.py:make")) is type(models.load("net.py:late"))
    assert str(place) not in sys.path
    assert "class Flat" in inspect.getsource(type(model))
    assert models.architecture("net.py:make", 10)().head.out_features == 10
    (place / "net.py").write_text(MAKER.replace("class Flat", "class Other").replace("Flat()", "Other()"))
    assert type(models.load("net.py:make")).__name__ == "Other"


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
def test_a_function_in_a_file_with_weights(place: Path, ending: str) -> None:
    """A path with an @ in it too; what PyTorch's own loops save around the weights is taken off."""
    weights = {"head.weight": torch.full((10, 784), 0.25), "head.bias": torch.arange(10.0)}
    if ending == "safetensors":
        save_file(weights, "w.safetensors")
    elif ending == "pt":
        torch.save(weights, "w.pt")
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, "w.pth")
    folder = place / "a@b"
    folder.mkdir()
    for name in ("net.py", "helper.py", f"w.{ending}"):
        (folder / name).write_bytes((place / name).read_bytes())
    for spec in (f"net.py:make@w.{ending}", f"{folder}/net.py:make@{folder}/w.{ending}"):
        code._beside.clear()
        assert code.split(spec) == tuple(spec.replace("make@", "make|").split("|"))
        assert torch.equal(models.load(spec).head.weight, weights["head.weight"])
    assert code.split(f"{folder}/net.py:make") == (f"{folder}/net.py:make", "")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def test_models_in_files_that_do_not_fit(place: Path) -> None:
    save_file({"a": torch.ones(2)}, "other.safetensors")
    torch.save(Evil(), "evil.pt")
    torch.save([1, 2], "list.pt")
    Path("half.pt").write_bytes(Path("list.pt").read_bytes()[:100])
    Path("broken.py").write_text("def make(:\n")
    Path("exits.py").write_text("import sys\nsys.exit('no')\n")
    for spec, message in {
        "none.py:make": "none.py is not there; name a Python file",
        "net.py:nothing": "'net.py:nothing' cannot be imported: module 'net_",
        "net.py:three": "is a int; name a function that returns the model",
        "net.py:": "unknown model 'net.py:'",
        "broken.py:make": "cannot be imported: ",
        "exits.py:make": "cannot be imported: no",
        "net.py:make@none.pt": "none.pt is not there; name a .safetensors or .pt file with the weights of net.py:make",
        "net.py:make@other.safetensors": "other.safetensors does not hold the weights of net.py:make",
        "net.py:make@evil.pt": "evil.pt is not a PyTorch file of tensors alone",
        "net.py:make@half.pt": "half.pt is not a PyTorch file of tensors alone",
        "net.py:make@list.pt": "list.pt holds no weights by name; save model.state_dict()",
        "net.py:late@net.py": "net.py is not a PyTorch file of tensors alone",
        "net.py:no such": "names no function; write module:function or FILE.py:function",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
            models.load(spec)
        assert "\n" not in str(caught.value)
    assert not Path("unpickled").exists()


def test_two_folders_whose_modules_share_a_name(place: Path) -> None:
    """The second would be given the first's helper: refused, not mixed."""
    models.load("net.py:make")
    other = place / "other"
    other.mkdir()
    (other / "net.py").write_text(MAKER)
    (other / "helper.py").write_text("WIDTH = 7\n")
    with pytest.raises(ValueError, match="both hold a module 'helper'; rename one, or evaluate them apart"):
        models.load("other/net.py:make")


def test_the_packaged_models_are_one_table() -> None:
    assert set(packaged.MODELS) < set(models.SOURCES)
    for name, entry in packaged.MODELS.items():
        assert models.finder(name) is entry.model
        assert not entry.data or entry.data in packaged.DATA
    with pytest.raises(ValueError, match="brings no images"):
        packaged.get("fashion-cnn").images()


# --- a stranger's specification


def specification(place: Path, model: object, **values: Any) -> Path:
    base = {"models": [model], "data": "mnist", "count": 4, "eps": 0.1, "attacks": ["fgsm"], "pictures": 0}
    path = place / "spec.yaml"
    path.write_text(json.dumps({**base, **values}))
    return path


REMEDY = "which runs code; add --trust-code (trust_code=True in Python) if you trust whoever wrote it"


@pytest.mark.parametrize("spec", ["net.py:make", "net:make", "net:make@w.safetensors", "net.py:make@w.pt"])
@pytest.mark.parametrize("words", [("--dry-run",), ("--out", "run")])
def test_a_file_runs_no_code_without_trust(
    place: Path, spec: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(place))
    (place / "net.py").write_text(f"from pathlib import Path\nPath('imported').touch()\n{MAKER}")
    path = specification(place, {"model": spec, "name": "mnist-cnn"})
    assert f"spec.yaml names '{spec}', {REMEDY}" in refused("evaluate", path, *words)
    assert not (place / "imported").exists()
    assert not (place / "run").exists()


def test_trust_is_said_or_typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = specification(place, "net.py:make")
    assert invoke("evaluate", path, "--dry-run", "--trust-code").exit_code == 0
    assert (place / "ran").exists()
    (place / "ran").unlink()
    done = invoke("evaluate", path, "--model", "net.py:make", "--out", "run", "-q")
    assert done.exit_code == 0, done.output
    assert (place / "ran").exists()
    (place / "ran").unlink()
    assert "run.json names 'net.py:make', which runs code" in refused("evaluate", "--out", "run")
    assert "run.json names 'net.py:make', which runs code" in refused("evaluate", "--out", "run", "--dry-run")
    assert not (place / "ran").exists()
    assert invoke("evaluate", "--out", "run", "--trust-code", "-q").exit_code == 0
    assert invoke("report", "run").exit_code == 0
    for safe in ("mnist-cnn", {"model": "small-cnn@x.safetensors"}):
        assert "trust" not in (invoke("evaluate", specification(place, safe), "--dry-run").stderr or "")


def test_trust_in_python(place: Path) -> None:
    values = {"models": ["mnist-cnn", "net.py:make"], "data": "mnist", "eps": 0.1, "attacks": "fgsm"}
    assert isinstance(specify(values), Specification)
    with pytest.raises(ValueError, match=r"the specification names 'net\.py:make', which runs code"):
        specify(values, trust_code=False)
    with pytest.raises(ValueError, match=r"the configuration names 'net\.py:make', which runs code"):
        configure({"data": "mnist", "model": "net.py:make"}, trust_code=False)
    kinds = ("mnist-cnn", "timm:resnet18", "torchvision:resnet18", "robustbench:Wong2020Fast", "resnet18@a.pt", "x")
    assert not any(map(code.runs_code, kinds))
    assert all(map(code.runs_code, ("a:b", "a.b:c", "a.py:b", "a.py:b@c.pt", "a:b@c.pt", "/x@y/a.py:b", "timm.x:f")))


def test_training_from_a_file_runs_no_code_without_trust(place: Path) -> None:
    (place / "config.yaml").write_text("data: mnist\nmodel: net.py:make\n")
    assert f"config.yaml names 'net.py:make', {REMEDY}" in refused("train", "--config", "config.yaml", "--out", "run")
    assert "run/config.yaml cannot" not in refused("train", "--resume", "--out", "run")
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("data: mnist\nmodel: net.py:make\n")
    assert "names 'net.py:make', which runs code" in refused("train", "--resume", "--out", "run")
    study = {"base": {"data": "mnist", "model": "net.py:make"}, "variants": {"MSGD": {"method": "msgd"}}}
    (place / "study.yaml").write_text(json.dumps(study))
    assert "names 'net.py:make', which runs code" in refused("train-study", "study.yaml", "--out", "study")
    assert not (place / "ran").exists()


BOMBS = {
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "itself": "models: &a [*a]\n",
    "deep": "models: " + "[" * 100 + "]" * 100 + "\n",
    "deeper": "models: " + "[" * 10**4 + "\n",
    "long": "models: " + "x" * 5000 + "\n",
    "large": "# " + "x" * 2**16 + "\n",
    "digits": "count: " + "9" * 5000 + "\n",
    "hours": "count: " + "1:" * 2000 + "1\n",
    "date": "data: 2001-99-99\n",
    "count": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: [fgsm]\ncount: 1000000000000000000\n",
    "steps": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: ['pgd:steps=1000000000000000000']\n",
    "steps, long": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: [{attack: pgd, steps: 1000000000000000000}]\n",
    "budget": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: [pgd]\nbudget: 999999999\n",
    "restarts": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: ['pgd:steps=10000000,restarts=1000']\n",
    "cells": "models: [mnist-cnn]\ndata: mnist\neps: [0.1, 0.2, 0.3]\nattacks: [fgsm]\nshard: 1\n"
    f"seeds: {list(range(9000))}\n",
    "seeds": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: [fgsm]\nseeds: [99999999999999999999]\n",
    "eps": "models: [mnist-cnn]\ndata: mnist\neps: ['1e999999999']\nattacks: [fgsm]\n",
    "alpha": "models: [mnist-cnn]\ndata: mnist\neps: 0.1\nattacks: [{attack: pgd, alpha: eps/1e999999999}]\n",
}
SAID = {
    "laughs": "the file holds, with its aliases, more than", "itself": "more than 20 deep", "deep": "more than 20 deep",
    "deeper": "is not YAML", "long": "more than 4096 characters", "large": "it is no specification",
    "digits": "more than 4096 characters", "hours": "count: ", "date": "a value that cannot be read",
    "count": "line 5: count: ",
    "steps": "steps=1000000000000000000 is too large", "steps, long": "steps=1000000000000000000 is too large",
    "budget": "which would not end", "restarts": "which would not end", "cells": "cells, which would not end",
    "seeds": "seeds.0: ", "eps": "line 3: eps.0: write a finite number above 0", "alpha": "alpha='eps/1e999999999'",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_specifications_end_at_once(name: str, place: Path) -> None:
    (place / "bomb.yaml").write_text(BOMBS[name])
    with at_once():
        done = invoke("evaluate", "bomb.yaml", "--dry-run")
    assert done.exit_code == 2, done.output
    assert SAID[name] in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 1000


def test_aliases_that_people_write_are_read(place: Path) -> None:
    Path("spec.yaml").write_text("models: &m [mnist-cnn]\nattacks: [fgsm]\nseeds: &s [1, 2]\nmore: {a: *s, b: *m}\n")
    values, lines = documents.read(Path("spec.yaml"))
    assert values["more"] == {"a": [1, 2], "b": ["mnist-cnn"]}
    assert lines["more", "a", 1] == 3


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(st.sampled_from("ab:[]{}&*!<>-'\"\n 01,#|?%@"), max_size=80).map(str.encode))
def test_a_file_is_read_or_refused_with_a_value_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        values, _ = documents.read(path)
    except ValueError:
        return
    assert isinstance(values, dict)


def test_packaged_specifications_by_name(place: Path) -> None:
    assert documents.read(Path("evaluation")) == documents.read(packaged.ASSETS / "evaluation.yaml")
    assert documents.find("robustbench-linf") == packaged.ASSETS / "robustbench-linf.yaml"
    assert documents.find("engm_study") == documents.find("engm-study")
    Path("evaluation").mkdir()
    assert documents.find("evaluation") == packaged.ASSETS / "evaluation.yaml"
    Path("engm-study").write_text("data: mine\n")
    assert documents.read(Path("engm-study"))[0] == {"data": "mine"}
    demos = "demo-cifar10, demo-mnist, demo-verdict-cifar10, demo-verdict-mnist"
    own = f"auto-study, {demos}, engm-protocol, engm-study, evaluation, robustbench-linf"
    said = refused("evaluate", "nothing", "--dry-run")
    assert f"name a YAML file, or one of firstorder's own: {own}, transfer-compositions, transfer-frontier" in said
    assert invoke("evaluate", "evaluation", "--model", "mnist-cnn", "--count", "4", "--dry-run").exit_code == 0


# --- data


def arrays(n: int, *, side: int = 4, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"x": rng.random((n, 1, side, side), np.float32), "y": rng.integers(3, size=n)}


def test_several_files_follow_one_another(place: Path) -> None:
    parts = [arrays(3), arrays(4, seed=1), arrays(2, seed=2)]
    for name, part in zip("abc", parts, strict=True):
        np.savez(f"{name}.npz", **part)
    found = datasets.load("a.npz,b.npz,c.npz")
    assert found.name == "a+b+c"
    assert np.array_equal(found.x.numpy(), np.concatenate([part["x"] for part in parts]))
    assert found.y.tolist() == [int(y) for part in parts for y in part["y"]]
    few = datasets.load("a.npz,b.npz,c.npz", count=5)
    assert np.array_equal(few.x.numpy(), found.x[:5].numpy())
    sizes = [len(y) for _, y in datasets.stream("a.npz,b.npz,c.npz", skip=4, size=2).parts]
    assert sum(sizes) == 5
    np.savez("a.npz,b.npz", **parts[2])
    assert len(datasets.load("a.npz,b.npz").x) == 2, "a file of that name goes first"


def test_several_files_in_a_run(place: Path) -> None:
    for name, n in (("a", 3), ("b", 4)):
        np.savez(f"{name}.npz", x=np.random.default_rng(n).integers(0, 256, (n, 28, 28, 1), np.uint8), y=np.arange(n))
    path = specification(place, "mnist-cnn", data=["a.npz", "b.npz"], count=None)
    assert "7 examples of shape (1, 28, 28)" in " ".join(invoke("evaluate", path, "--dry-run").output.split())
    words = ("--model", "mnist-cnn", "--eps", "0.1", "--attack", "fgsm", "--data", "a.npz,b.npz", "--dry-run")
    assert "7 examples of shape (1, 28, 28)" in " ".join(invoke("evaluate", *words).output.split())


def test_several_files_that_are_not_alike(place: Path) -> None:
    np.savez("a.npz", **arrays(3))
    np.savez("large.npz", **arrays(3, side=5))
    np.savez("bytes.npz", x=np.zeros((2, 4, 4, 1), np.uint8), y=np.zeros(2, int))
    for spec, message in {
        "a.npz,large.npz": r"large.npz has images of shape \(1, 5, 5\), torch.float32, and a.npz of \(1, 4, 4\)",
        "a.npz,bytes.npz": "bytes.npz has images of shape .*uint8, and a.npz of .* floating point; they must be alike",
        "a.npz,none.npz": "none.npz not found; the .npz files of",
        "a.npz,mnist": "unknown data",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            datasets.load(spec)


def bomb(path: Path, shape: tuple[int, ...], dtype: str, content: bytes = b"") -> None:
    """An .npz file whose x claims a shape."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, claimed, kind in (("x", shape, dtype), ("y", shape[:1], "<i8")):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"shape": claimed, "fortran_order": False, "descr": kind})
            archive.writestr(f"{name}.npy", header.getvalue() + content)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**12, 1, 4, 4), "and ends before; it is damaged"),
        ((2, 10**9, 10**9, 1), "and ends before; it is damaged"),
        ((-1, 1, 4, 4), "and ends before; it is damaged"),
        ((0, 1, 4, 4), "has no image"),
    ],
)
def test_arrays_that_claim_too_much(place: Path, shape: tuple[int, ...], message: str) -> None:
    bomb(place / "bomb.npz", shape, "<f4", bytes(2**20))
    with at_once(), pytest.raises(ValueError, match=message):
        datasets.load("bomb.npz")


def png(width: int, height: int) -> bytes:
    """A picture's header that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def pictures(folder: Path) -> dict[str, str]:
    """Hostile pictures and labels, and what is said of them."""
    good = folder / "good.png"
    Image.new("RGB", (4, 3), (255, 0, 51)).save(good)
    (folder / "bomb.png").write_bytes(png(60000, 60000))
    (folder / "wide.png").write_bytes(png(12000, 10000))
    (folder / "half.png").write_bytes(good.read_bytes()[:-30])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    Image.fromarray(np.full((3, 4), 1000, np.uint16)).save(folder / "sixteen.png")
    mode = Image.open(folder / "sixteen.png").mode  # I in older versions of Pillow, I;16 in newer ones
    Image.new("F", (4, 3)).save(folder / "float.tiff")
    return {
        "bomb.png": "bomb.png is no picture, or a damaged one: Image size (3600000000 pixels) exceeds limit",
        "wide.png": "wide.png has 12000 x 10000 pixels, too many; make it smaller",
        "half.png": "half.png is no picture, or a damaged one",
        "text.png": "text.png is no picture, or a damaged one",
        "empty.png": "empty.png is no picture, or a damaged one",
        "folder.png": "folder.png is no picture, but something else than a file",
        "sixteen.png": f"sixteen.png has values of another kind than 8 bits ({mode}); save it as RGB",
        "float.tiff": "float.tiff has values of another kind than 8 bits (F); save it as RGB",
        "../out.png": "names '../out.png', which lies outside the folder",
        "none.png": "none.png",
        "nul\0.png": "is no picture, or a damaged one",
        "long" * 2000: "is no picture, or a damaged one",
    }


def test_hostile_pictures_end_in_one_line(place: Path) -> None:
    folder = place / "set"
    folder.mkdir()
    said = pictures(folder)
    (folder / "labels.json").write_text('{"good.png": 1}')
    assert datasets.load("set").x[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    for name, message in said.items():
        (folder / "labels.json").write_text(json.dumps({name: 0}))
        line = refused(
            "evaluate", "--model", "mnist-cnn", "--data", "set", "--eps", "0.1", "--attack", "fgsm", "--dry-run"
        )
        assert message in line
        assert len(line) < 500


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_rgb(mode: str, place: Path) -> None:
    (place / "set").mkdir()
    name = "a.tiff" if mode == "CMYK" else "a.png"
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(place / "set" / name)
    (place / "set" / "labels.json").write_text(json.dumps({name: 2}))
    found = datasets.load("set")
    assert found.x.shape == (1, 3, 3, 4)
    assert float(found.x.min()) == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**5, "labels.json is not JSON"),
        ('{"a.png": ' + "9" * 5000 + "}", "labels.json is not JSON"),
        ('{"a.png": ' + "9" * 30 + "}", "must map file names to class indices"),
        ('{"a.png": 1.5}', "must map file names to class indices"),
        ('{"a.png": true}', "must map file names to class indices"),
        ("[1]", "must map file names to class indices"),
        ("{}", "names no picture"),
        ("", "labels.json is not JSON"),
    ],
)
def test_hostile_labels_end_in_one_line(place: Path, content: str, message: str) -> None:
    (place / "set").mkdir()
    (place / "set" / "labels.json").write_text(content)
    with at_once(), pytest.raises(ValueError, match=message) as caught:
        datasets.load("set")
    assert "\n" not in str(caught.value)


# --- RobustBench's models


def test_robustbench_by_one_command(place: Path) -> None:
    """On a checkpoint made for the test, of the smallest of the models: random weights in the zoo's layout."""
    pytest.importorskip("timm")
    from firstorder.robustbench import provide_autoattack

    provide_autoattack()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    known = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    values, _ = documents.read(Path("robustbench-linf"))
    specification = specify(values, trust_code=False)
    assert all(entry.model == f"robustbench:{entry.name}" for entry in specification.models)
    assert {entry.name for entry in specification.models} <= set(known)
    reported = [entry.reported or 0.0 for entry in specification.models]
    assert reported == sorted(reported)
    assert reported[0] > 40
    assert specification.eps == (8 / 255,)
    (place / "zoo" / "cifar10" / "Linf").mkdir(parents=True)
    torch.manual_seed(0)
    network = known["Wong2020Fast"]["model"]()
    torch.save(
        {f"{name}": value for name, value in network.state_dict().items()}, place / "zoo/cifar10/Linf/Wong2020Fast.pt"
    )
    (place / "one.yaml").write_text(json.dumps({**values, "models": values["models"][:1]}))
    words = (
        "--data",
        "cifar10",
        "--count",
        "2",
        "--zoo-folder",
        "zoo",
        "--attack",
        "pgd:steps=1",
        "--out",
        "run",
        "-q",
    )
    done = invoke("evaluate", "one.yaml", *words)
    assert done.exit_code == 0, done.output
    assert "reported" in done.output
    assert "43.21" in done.output
    facts = json.loads((place / "run" / "run.json").read_text())
    assert facts["models"][0]["reported"] == 43.21
    loaded = models.load("robustbench:Wong2020Fast", zoo=Zoo(folder=place / "zoo"))
    x = packaged.cifar10().x[:2]
    torch.testing.assert_close(loaded(x), network.eval()(x))


def test_published_figures_are_no_part_of_a_cell() -> None:
    base = {"data": "mnist", "count": 4, "eps": 0.1, "attacks": "fgsm"}
    keys = [
        [cell.key for cell in plan(specify({**base, "models": {"model": "mnist-cnn", "reported": value}})).cells]
        for value in (None, 50.0)
    ]
    assert keys[0] == keys[1]
    for value in (-1, 101, "much", math.nan):
        with pytest.raises(ValueError, match="reported"):
            specify({**base, "models": {"model": "mnist-cnn", "reported": value}})


# --- one of each


def imports(path: Path) -> set[str]:
    """What a module of evaluation/ imports, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_one_reader_of_each_kind() -> None:
    """The model table, the attack grammar and the radius parser: who has them, and that nobody has another."""
    sources = {str(path.relative_to(EVALUATION)): path for path in EVALUATION.rglob("*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sources.items()}
    imported = {name: imports(path) for name, path in sources.items()}
    prefix = "firstorder.evaluation.names"

    def users(module: str) -> set[str]:
        return {name for name, known in imported.items() if any(one.startswith(f"{prefix}.{module}") for one in known)}

    assert {"runs/loading.py", "training/parts.py"} <= users("models")
    assert {"runs/axes.py", "training/parts.py"} <= users("attacks")
    assert {"runs/specification.py", "training/configuration.py"} <= users("numbers")
    assert not [name for name, known in imported.items() if "fractions" in known or "fractions.Fraction" in known]
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if name != "names/attacks.py" and isinstance(node, ast.Attribute) and node.attr == "raw_decode":
                pytest.fail(f"{name} reads attacks' parameters itself")
    tables = [name for name, path in sources.items() if re.search(r"mnist_cnn_natural\b", path.read_text("utf-8"))]
    assert tables == ["names/packaged.py"]
    builders = {
        name
        for name, path in sources.items()
        if re.search(r"from firstorder\.attacks import [^\n]*\b(get|create|registry)\b", path.read_text("utf-8"))
    }
    assert builders <= {"names/attacks.py", "runs/adversaries.py", "runs/axes.py", "commands/attacks.py"}
