"""What a stranger's distribution registers is everywhere its kind is named; what is broken harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstorder.attacks import PGD, Attack, BoundedAttack, Direction, Quantised, Sign, create, get, registry, rules
from firstorder.attacks.bounded import CLIP_COMPONENT
from firstorder.attacks.distribution import DISTRIBUTION
from firstorder.training import ENGM, METHODS, GradientMethod
from firstorder.training import registry as methods
from stranger import BROKEN_ATTACKS, BROKEN_METHODS, BROKEN_RULES, install, run

PLACES = """
import inspect, json, logging, sys
from functools import partial
import numpy as np, torch
from torch import nn
from art.estimators.classification import PyTorchClassifier
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

import foolbox
import firstorder.advlib, firstorder.advlib.attackbench, firstorder.art, firstorder.foolbox
import firstorder.robustbench, firstorder.torchattacks
from firstorder.attacks import BIM, Quantised, create, get, registry, rules
from firstorder.attacks.testing import check_attack
from firstorder.autoattack import AutoAttack
from firstorder.training import METHODS, Vanilla, registry as methods
from firstorder.fabric import Recipe, Trainer, make

from torch.utils.data import TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
x = torch.rand(8, 3, 2, 2); y = model(x).argmax(1)
classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 2, 2), 5, clip_values=(0, 1), device_type="cpu",
                               optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

def host(torchattacks, art, **words):
    steps = words.pop("steps", None)
    mine = torchattacks(model, **words, **({"alpha": 0.5, "steps": steps} if steps else {}))(x, y)
    art_words = {"eps_step": 0.5, "max_iter": steps} if steps else {}
    theirs = art(classifier, **words, **art_words, verbose=False).generate(x.numpy(), y.numpy())
    return mine, torch.as_tensor(theirs)

def error(call, *arguments, **words):
    try:
        call(*arguments, **words)
    except ValueError as exception:
        return str(exception)

def apart(*found):
    return max(float((a - found[0]).abs().max()) for a in found)

found = {}
words = dict(eps=0.1, boost=3.0)
raw = create("raw", **words, alpha=0.5, steps=4)(model, x, y)
in_foolbox = firstorder.foolbox.Raw(abs_stepsize=0.5, steps=4, boost=3.0)
found["attack"] = {
    "moved": float((raw - x).abs().max()),
    "apart": apart(raw, *host(firstorder.torchattacks.Raw, firstorder.art.Raw, **words, steps=4),
                   in_foolbox(foolbox.PyTorchModel(model, (0, 1), device="cpu"), x, y, epsilons=0.1)[0],
                   firstorder.advlib.raw(model, x, y, **words, absolute_step_size=0.5, steps=4)),
    "configured": inspect.getsource(firstorder.advlib.attackbench.firstorder_raw_linf),
    "signature": str(inspect.signature(firstorder.art.Raw)),
    "listed": ["Raw" in dir(firstorder.torchattacks), "Raw" in dir(firstorder.art), "Raw" in dir(firstorder.foolbox),
               "raw" in dir(firstorder.advlib)],
    "pgd": get("pgd").__module__,
    "error": error(get, "gone"),
}
check_attack(get("raw"))
check_attack(BIM(eps=0.1, alpha=0.02, steps=3, direction="top"))

top = BIM(eps=0.1, alpha=0.02, steps=3, direction="top")
by_hand = BIM(eps=0.1, alpha=0.02, steps=3, direction=rules().get("top")(share=0.5))
in_words = dict(eps=0.1, direction="top")
mine = firstorder.torchattacks.BIM(model, alpha=0.02, steps=3, **in_words)
later = firstorder.torchattacks.BIM(model, eps=0.1, alpha=0.02, steps=3)
later.direction = "top"
theirs = firstorder.art.BIM(classifier, eps_step=0.02, max_iter=3, verbose=False, **in_words)
found["rule"] = {
    "class": type(top.direction).__name__,
    "step": BIM(eps=0.1, steps=3, direction="capped").parts(12).schedule(1, 3),
    "apart": apart(by_hand(model, x, y), top(model, x, y), mine(x, y), later(x, y),
                   torch.as_tensor(theirs.generate(x.numpy(), y.numpy()))),
    "from sign": apart(top(model, x, y), BIM(eps=0.1, alpha=0.02, steps=3)(model, x, y)),
    "errors": [error(BIM, direction="gone"), error(firstorder.torchattacks.BIM, model, direction="tip"),
               error(firstorder.art.BIM, classifier, direction="tip"), error(BIM, direction=Quantised)],
}

adversary = AutoAttack(model, eps=0.3, attacks_to_run=["raw", "i-fgsm"], seed=0, device="cpu", verbose=False,
                       parameters={"raw": {"boost": 3.0}, "i-fgsm": {"direction": "top"}})
adversary.run_standard_evaluation(x, y)
found["autoattack"] = {
    "broken by": sorted(set(adversary.record.broken_by) - {None}),
    "error": error(AutoAttack, model, eps=0.3, attacks_to_run=["gone"], device="cpu"),
    "robustbench": firstorder.robustbench.benchmark(model, eps=0.3, attacks=["raw"], x=x, y=y, seed=0),
}

def trained(method):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    wrapped = PyTorchClassifier(net, nn.CrossEntropyLoss(), (3, 2, 2), 5, clip_values=(0, 1), device_type="cpu",
                                optimizer=torch.optim.SGD(net.parameters(), lr=0.5))
    attack = firstorder.art.BIM(wrapped, eps=0.1, max_iter=1, verbose=False)
    trainer = firstorder.art.AdversarialTrainerENGM(wrapped, attack, 0.3, "vanilla", method=method)
    trainer.fit(x.numpy(), y.numpy(), batch_size=8, nb_epochs=1, verbose=False)
    return trainer.method, net[1].weight.detach().clone()

def recipe(method):
    return Recipe(objective=Vanilla(attack=BIM(eps=0.1, steps=1)), method=method, judge=BIM(eps=0.1, steps=1),
                  optimizer=partial(torch.optim.SGD, lr=0.5), epochs=1, batch_size=8)

def fitted(method, folder):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    fabric = make(accelerator="cpu")
    pairs = TensorDataset(x, y)
    Trainer(fabric, recipe(method), folder).fit(net, pairs, pairs)
    return net[1].weight.detach().clone()

method, weight = trained("soft")
made = fitted("soft", sys.argv[1] + "/soft")
found["method"] = {
    "class": type(method).__name__,
    "alpha": method.alpha,
    "from msgd": apart(weight, trained("msgd")[1]),
    "fabric": apart(made, fitted(METHODS["soft"], sys.argv[1] + "/class")),
    "fabric from msgd": apart(made, fitted("msgd", sys.argv[1] + "/msgd")),
    "errors": [error(trained, "gone"), error(trained, "sift"), error(recipe, "sift"), error(recipe, method)],
}

found["failures"] = [dict(known().failures) for known in (registry, rules, methods)]
found["sources"] = [registry().sources["raw"], rules().sources["top"], methods().sources["soft"]]
found["ours"] = [rules().get("sign").__module__, METHODS["engm"].__module__]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the distribution `stranger` is installed beside firstorder."""
    return install(tmp_path_factory.mktemp("stranger"), tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def places(stranger: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found in every place, and what it logged."""
    done = run(stranger, "-c", textwrap.dedent(PLACES), str(tmp_path_factory.mktemp("runs")))
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


def test_a_third_partys_attack_is_under_every_host(places: dict[str, Any]) -> None:
    found = places["attack"]
    assert found["moved"] == pytest.approx(0.1, abs=1e-6)
    assert found["apart"] <= 1e-6
    assert "boost=2.0" in found["signature"]
    assert "max_iter=10" in found["signature"]
    assert found["listed"] == [True] * 4
    assert "    boost = 2.0\n" in found["configured"]
    assert found["pgd"] == "firstorder.attacks.catalogue", "a stranger must not replace our attack"
    assert "the attack 'gone' is registered but unusable: stranger.missing:Nothing" in found["error"]


def test_a_third_partys_rule_goes_into_every_host(places: dict[str, Any]) -> None:
    found = places["rule"]
    assert found["class"] == "Top"
    assert found["apart"] <= 1e-6
    assert found["from sign"] > 1e-3
    assert found["step"] == pytest.approx(CLIP_COMPONENT * 0.1 / 0.2), "the step of a rule of scale component"
    unusable, unknown, art, whole = found["errors"]
    assert "the update rule 'gone' is registered but unusable" in unusable
    assert unknown == art
    assert unknown.startswith("unknown update rule 'tip'; did you mean ")
    assert " top" in unknown
    assert "is no update rule; pass one, as in Quantised(), or its name" in whole


def test_autoattack_and_robustbench_take_both(places: dict[str, Any]) -> None:
    found = places["autoattack"]
    assert "raw" in found["broken by"]
    assert "the attack 'gone' is registered but unusable" in found["error"]
    clean, robust = found["robustbench"]
    assert robust < clean == 1.0


def test_a_third_partys_method_trains(places: dict[str, Any]) -> None:
    found = places["method"]
    assert (found["class"], found["alpha"]) == ("Soft", 0.3)
    assert found["from msgd"] > 1e-3
    assert found["fabric"] == 0
    assert found["fabric from msgd"] > 1e-3
    unusable, unknown, early, instance = found["errors"]
    assert "the gradient method 'gone' is registered but unusable" in unusable
    assert unknown == early
    assert unknown.startswith("unknown gradient method 'sift'; did you mean soft")
    assert "makes no gradient method from a model" in instance


def test_broken_ones_break_nothing(places: dict[str, Any]) -> None:
    assert places["sources"] == ["stranger"] * 3
    assert places["ours"] == ["firstorder.attacks.directions", "firstorder.training.methods"]
    broken = (BROKEN_ATTACKS, BROKEN_RULES, BROKEN_METHODS)
    ours = (registry().classes, rules().classes, methods().classes)
    nouns = ("attack", "update rule", "gradient method")
    for failures, expected, taken, noun in zip(places["failures"], broken, ours, nouns, strict=True):
        assert set(failures) == {f"{name} (stranger)" if name in taken else name for name in expected}
        for name, (_, reason) in expected.items():
            assert reason in failures[f"{name} (stranger)" if name in taken else name]
            said = f"the {noun} '{name}' of stranger is not available: "
            assert said in places["log"], "a failure is logged by name"


def test_the_command_line_lists_them(stranger: dict[str, str]) -> None:
    done = run(stranger, "-m", "firstorder.evaluation", "attacks")
    assert done.returncode == 0, done.stderr
    words = "raw|Raw|A. Stranger, private note|boost=2.0|from stranger|clipped-ngm|torchattacks art foolbox advlib"
    words += "|capped|Capped|share=0.5 (from stranger)|levels=200|soft|Soft|alpha=1.0 (from stranger)|clip=25.0"
    for word in words.split("|"):
        assert word in done.stdout
    for name in ("attack gone", "update rule uncapped", "gradient method greedy"):
        assert f"the {name} is not available" in done.stdout
    listed = json.loads(run(stranger, "-m", "firstorder.evaluation", "attacks", "--json").stdout)
    raw = next(row for row in listed["attacks"] if row["name"] == "raw")
    assert raw["distribution"] == "stranger"
    assert raw["norms"] == ["Linf", "L2"]
    assert raw["hosts"] == ["torch", "torchattacks", "art", "foolbox", "advlib"]
    assert raw["defaults"]["boost"] == 2.0
    assert {"name": "top", "class": "Top", "defaults": {"share": 0.5}, "distribution": "stranger"} in listed["rules"]
    assert {"name": "soft", "class": "Soft", "defaults": {"alpha": 1.0}, "distribution": "stranger"} in listed[
        "methods"
    ]
    for kind, name in (("failures", "no-attack"), ("rules failures", "uncapped"), ("methods failures", "greedy")):
        assert name in listed[kind]


def test_evaluate_takes_them(stranger: dict[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.random((6, 1, 28, 28), np.float32), y=rng.integers(10, size=6))
    spec = "models: [mnist-cnn]\ndata: images.npz\neps: [0.1]\nattacks:\n"
    spec += "".join(f"  - {attack}\n" for attack in ("raw:boost=3.0,steps=2", "i-fgsm+top:steps=2", "i-fgsm:steps=2"))
    (tmp_path / "spec.yaml").write_text(spec)
    command = ("-m", "firstorder.evaluation", "evaluate")
    for _ in range(2):  # the second run finds every cell done: a rule without a repr of its own has the same key again
        done = run(stranger, *command, "spec.yaml", "--out", "out", "--threads", "1", folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "cells").rglob("*.parquet"))) == 3
    raw, top, plain = json.loads((tmp_path / "out" / "run.json").read_text())["attacks"]
    assert raw["source"] == "stranger 1.0"
    assert top["source"] == f"{plain['source']}, stranger 1.0"
    assert plain["source"].startswith(f"{DISTRIBUTION} ")
    for attack, message in (
        ("gone", "the attack 'gone' is registered but unusable: stranger.missing:Nothing"),
        ("pgd+quits", "'pgd+quits': the update rule 'quits' is registered but unusable"),
        ("pgd+tap", "'pgd+tap': unknown update rule 'tap'; did you mean"),
    ):
        options = ("--model", "mnist-cnn", "--data", "mnist", "--eps", "0.1", "--attack", attack)
        done = run(stranger, *command, *options, "--dry-run", folder=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr


def test_train_takes_them(stranger: dict[str, str], tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "data": "mnist", "validation": 20, "examples": 20, "batch-size": 10, "epochs": 1, "eps": 0.1, "judge-steps": 1,
        "diagnose": 0, "landscape": 0, "lr": 0.1, "threads": 1, "accelerator": "cpu",
    }  # fmt: skip
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = ["-m", "firstorder.evaluation", "train", "--logger", "csv", *options]
    asked = ("--attack", "raw:steps=1,direction=1", "--method", "soft", "--alpha", "0.3")
    done = run(stranger, *command, "--out", "no", *asked, folder=tmp_path)
    assert done.returncode == 2
    assert "raw has no parameter 'direction'" in done.stderr
    asked = ("--attack", "raw+top:steps=1", "--method", "soft", "--alpha", "0.3")
    done = run(stranger, *command, "--out", "soft", *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "method: soft" in (tmp_path / "soft" / "config.yaml").read_text()
    for name, message in (("quits", "is registered but unusable"), ("sift", "did you mean soft")):
        done = run(stranger, *command, "--out", "no", "--method", name, folder=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr


def test_ours_are_registered_like_a_strangers() -> None:
    for group, known, kind in (
        ("firstorder.attacks", registry(), Attack),
        ("firstorder.rules", rules(), type),
        ("firstorder.training", methods(), GradientMethod),
    ):
        ours = {e.name for e in entry_points(group=group) if e.dist and e.dist.name == DISTRIBUTION}
        assert ours
        assert ours <= set(known.classes)
        assert all(issubclass(cls, kind) for cls in known.classes.values()) or kind is type
        assert not known.failures
    assert all(isinstance(cls(), Direction) for cls in rules().classes.values())
    assert dict(METHODS) == dict(methods().classes)
    assert METHODS["engm"] is ENGM
    assert "up" not in METHODS


def test_lookup_by_name_and_by_class_name() -> None:
    assert get("si-ni-fgsm") is get("SINIFGSM")
    assert create("pqgd", b=7) == get("pqgd")(b=7)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [name for name, cls in registry().attacks.items() if issubclass(cls, BoundedAttack)])
def test_every_bounded_attack_takes_a_rule_by_its_name(name: str) -> None:
    assert create(name, direction="quantised") == create(name, direction=Quantised())
    with pytest.raises(ValueError, match=r"unknown update rule 'quantized'; did you mean quantised"):
        create(name, direction="quantized")


def test_what_is_no_rule_is_refused_before_work() -> None:
    for wrong in (Sign, 3, [Sign()]):
        with pytest.raises(ValueError, match="is no update rule; pass one"):
            PGD(direction=wrong)  # type: ignore[arg-type]


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown attack 'ni-fgms'.*ni-fgsm"):
        get("ni-fgms")


def test_the_core_imports_torch_and_no_host() -> None:
    script = (
        "import sys, firstorder.attacks as a; a.registry(); a.rules();"
        "bad = [m for m in ('art', 'torchattacks', 'matplotlib', 'typer', 'rich', 'firstorder.training')"
        " if m in sys.modules];"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_importing_training_reads_no_registry(stranger: dict[str, str]) -> None:
    done = run(stranger, "-c", "import sys, firstorder.art, firstorder.fabric; sys.exit('stranger' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_namespace_has_no_init() -> None:
    root = Path(__file__).parent.parent
    for folder in ("plugins", "adapters", "evaluation"):
        assert [p.name for p in (root / folder).iterdir()] == ["firstorder"]
        assert not (root / folder / "firstorder" / "__init__.py").exists()
