"""Attacks as functions, against the core and adversarial-library, and in a harness with AttackBench's interface."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import firstorder.advlib
from attackbench import BenchModel, collected, evaluated, get_attack, run_attack
from cases import CASES, Case, Net, images, predicted
from firstorder.advlib import attackbench
from firstorder.attacks import DDN, DLR, FGSM, PGD, CrossEntropy, Margin, prepare
from test_validation import Untouched

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
X, Y = images(), torch.arange(6)


def function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(firstorder.advlib, name.replace("-", "_"))
    return found


@every_attack
def test_is_a_function_of_its_name(case: Case, model: Net) -> None:
    attack = function(case.name)
    assert inspect.isfunction(attack)
    assert (attack.__module__, attack.__name__) == ("firstorder.advlib", case.name.replace("-", "_"))
    assert list(inspect.signature(attack).parameters)[:5] == ["model", "inputs", "labels", "targets", "targeted"]
    assert pickle.loads(pickle.dumps(attack)) is attack
    assert (inspect.getdoc(case.cls) or "").split("\n")[0] in (attack.__doc__ or "")


def test_what_is_not_registered_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"no attack named 'pdg' is registered; firstorder\.advlib has .*, pgd,"):
        firstorder.advlib.pdg  # noqa: B018


def test_labels_and_targets(model: Net) -> None:
    """As adversarial-library has it the labels are the targets; as AttackBench has it there are targets besides."""
    attack, targets = partial(function("i-fgsm"), model, X), (Y + 3) % 10
    words: dict[str, Any] = {"eps": 0.05, "steps": 3}
    expected = attack(targets, targeted=True, **words)
    assert not torch.equal(expected, attack(targets, **words))
    assert torch.equal(attack(Y, targets=targets, targeted=True, **words), expected)
    assert torch.equal(attack(Y, targets, True, **words), expected)
    four = attack(torch.full((6,), 4), targeted=True, **words)
    assert torch.equal(attack(Y, targets=4, targeted=True, **words), four)


def test_steps_relative_to_the_radius(model: Net) -> None:
    expected = PGD(eps=0.06, alpha=0.015, steps=3, random_start=False)(model, X, Y)
    found = function("pgd")(model, X, Y, eps=0.06, relative_step_size=0.25, steps=3, random_init=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    both = function("pgd")(
        model, X, Y, eps=0.06, relative_step_size=0.5, absolute_step_size=0.015, steps=3, random_init=False
    )
    assert torch.equal(both, expected)


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_a_radius_for_every_example(norm: float, model: Net) -> None:
    eps = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05]) * (1 if norm == math.inf else 10)
    words: dict[str, Any] = {"norm": norm, "relative_step_size": 0.3, "steps": 4, "random_init": False}
    found = function("pgd")(model, X, Y, eps=eps, **words)
    alone = [function("pgd")(model, X[i : i + 1], Y[i : i + 1], eps=float(eps[i]), **words) for i in range(len(eps))]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)
    assert torch.equal(found[0], X[0])
    assert torch.equal(function("pgd")(model, X, Y, **{"ε": eps}, **words), found)


def test_the_losses_of_adversarial_library(model: Net) -> None:
    for name, loss in {"ce": CrossEntropy(), "dl": Margin(), "dlr": DLR()}.items():
        expected = PGD(eps=0.05, steps=3, random_start=False, loss=loss)(model, X, Y)
        for given in (name, loss):
            found = function("pgd")(model, X, Y, eps=0.05, steps=3, random_init=False, loss_function=given)
            assert torch.equal(found, expected)


def test_other_bounds_and_prepared_models(model: Net) -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(90, 10))
    found = function("fgsm")(wide, X * 255, Y, eps=8.0, bounds=(0, 255))
    assert torch.equal(found, FGSM(eps=8.0)(wide, X * 255, Y, bounds=(0, 255)))
    fast = prepare(model, X)
    assert torch.equal(function("fgsm")(fast, X, Y, eps=0.05), FGSM(eps=0.05)(fast, X, Y))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "targets but not targeted": ("pgd", {"targets": Y}, "targeted=False; pass targeted=True"),
    "targeted by position": ("pgd", {"targets": True}, "pass targeted=True by name"),
    "norm": ("pgd", {"norm": 1}, r"norm=1 is not supported; use float\('inf'\) or 2"),
    "norm the attack lacks": ("pqgd", {"norm": 2}, "norm='L2' is not supported"),
    "loss": ("pgd", {"loss_function": "cw"}, "loss_function='cw'.*'ce' or 'dl' or 'dlr'"),
    "share": ("pgd", {"relative_step_size": 0}, "relative_step_size=0 must be"),
    "eps": ("pgd", {"eps": -1.0, "relative_step_size": 0.1}, "eps=-1.0"),
    "eps for others": ("pgd", {"eps": torch.rand(5)}, r"eps has shape \(5, 1, 1, 1\)"),
    "steps": ("ddn", {"steps": 0}, "steps=0"),
    "inputs": ("ddn", {"inputs": X * 2}, r"outside the bounds \[0, 1\]; rescale them or pass the bounds"),
    "array": ("fgsm", {"inputs": X.numpy()}, "ndarray; pass a torch tensor"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_calls_are_refused_before_work(bad: str) -> None:
    name, words, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        function(name)(**{"model": Untouched(), "inputs": X, "labels": Y, **words})


def test_unknown_words_and_double_spellings() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        function("pgd")(Untouched(), X, Y, epsilon=0.1)
    with pytest.raises(TypeError, match=r"pgd\(\) got a parameter in two spellings: eps, ε"):
        function("pgd")(Untouched(), X, Y, **{"eps": 0.1, "ε": 0.1})


# adversarial-library


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """adversarial-library's attacks; it imports visdom for its plots, which is not asked for here."""
    pytest.importorskip("adv_lib", reason="compares with adversarial-library, which is not installed")
    if "visdom" not in sys.modules:
        monkeypatch.setitem(sys.modules, "visdom", types.ModuleType("visdom"))
    import adv_lib.attacks

    return adv_lib.attacks


class Recorded(nn.Module):
    """Keeps what it is asked with gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points = model, []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.points.append(x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


@pytest.mark.parametrize("name", ["ddn", "pgd_linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_walks_like_adversarial_librarys(name: str, targeted: bool, theirs: Any, model: Net) -> None:
    """Called alike, with its defaults: every iterate is the same; and the result of DDN, whose last it does not see."""
    x = (images(8) * 255).round().double() / 255
    y = (predicted(model.double(), x) + 3 * targeted) % 10
    words: dict[str, Any] = {"steps": 60, "targeted": targeted}
    if name == "pgd_linf":
        words |= {"ε": 0.05, "random_init": False, "relative_step_size": 0.01 / 0.3}
    one, two = Recorded(model).eval(), Recorded(model).eval()
    found = function(name.removesuffix("_linf"))(one, x, y, **words)
    expected = getattr(theirs, name)(two, x, y, **words)
    torch.testing.assert_close(torch.stack(one.points), torch.stack(two.points), rtol=0, atol=1e-6)
    if name == "ddn":
        result = DDN(steps=60, levels=256).run(model, x, y, targeted=targeted)
        same = result.iterations < 60
        assert same.sum() >= 5
        torch.testing.assert_close(found[same], expected[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ddn", "pgd_linf"])
def test_adversarial_librarys_words_are_understood(name: str, theirs: Any) -> None:
    own = inspect.signature(function(name.removesuffix("_linf"))).parameters
    spelled = {"ε": "eps", "γ": "gamma"}
    for parameter in inspect.signature(getattr(theirs, name)).parameters.values():
        if parameter.name != "callback":
            assert spelled.get(parameter.name, parameter.name) in own
    assert own["targeted"].default is False
    if name == "ddn":
        assert own["levels"].default == inspect.signature(theirs.ddn).parameters["levels"].default


# AttackBench


def loader(model: nn.Module, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Two batches of images and the classes that the model sees in them."""
    x = images(n)
    return list(zip(x.split(n // 2), predicted(model, x).split(n // 2), strict=True))


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_the_harness_counts_as_many_passes_as_steps(case: Case, targeted: bool, model: Net) -> None:
    configurations, _ = collected(attackbench)
    for threat_model in ("linf", "l2"):
        name = f"firstorder_{case.name.replace('-', '_')}"
        key = name if name in configurations else f"{name}_{threat_model}"
        values = evaluated(configurations[key]) if key in configurations else {}
        if values.get("threat_model") != threat_model:
            continue
        theirs = {"steps": "num_steps", "restarts": "num_restarts"}
        words = {theirs.get(word, word): value for word, value in case.parameters.items()}
        eps = {"epsilon": {"linf": 0.06, "l2": 0.5}[threat_model]} if case.bounded else {}
        attack = get_attack(attackbench, evaluated(configurations[key], **words, **eps))
        bench, batches = BenchModel(model), loader(model)
        found = run_attack(bench, batches, attack, 3 if targeted else None, threat_model)
        assert found["batch_failures"] == [None, None]
        assert not any(found["box_failures"])
        steps = case.parameters.get("steps", 1)
        n = sum(len(x) for x, _ in batches)
        if case.early:
            assert n < sum(found["num_backwards"]) < sum(found["num_forwards"])
            continue
        assert sum(found["num_backwards"]) == steps * case.per_step * n
        last = not case.bounded or case.name == "apgd"  # looks at its last iterate too
        assert sum(found["num_forwards"]) == (steps * case.per_step + last) * n
        if case.per_step == 1 and "resize_rate" not in case.parameters:  # who is asked about can be seen
            assert set(found["num_backwards"]) == {steps}
        norm = {"linf": "Linf", "l2": "L2"}[threat_model]
        core = case.cls(norm=norm, eps=eps["epsilon"], **case.parameters) if eps else case.cls(**case.parameters)
        core = dataclasses.replace(core, levels=256) if case.name == "ddn" else core
        expected = [core(model, x, torch.full_like(y, 3) if targeted else y, targeted=targeted) for x, y in batches]
        torch.testing.assert_close(torch.cat(found["adv_inputs"]), torch.cat(expected), rtol=0, atol=1e-6)
        assert sum(size > 0 for size in found["distances"]) >= 6
        if not case.bounded:
            assert found["ASR"] == 1.0
            assert found["best_optim_distances"] == pytest.approx(found["distances"], abs=1e-6)


def test_a_query_budget_ends_the_walk(model: Net) -> None:
    """What is found within a budget of 2 k passes is what k steps find; later steps are answered by nothing."""
    batches = loader(model)
    words: dict[str, Any] = {"norm": 2, "eps": 2.0, "absolute_step_size": 0.2, "random_init": False}
    for name, more in (("pgd", words), ("ddn", {})):
        attack = function(name)
        limited = run_attack(BenchModel(model, 8), batches, partial(attack, steps=30, **more))
        whole = run_attack(BenchModel(model), batches, partial(attack, steps=30, **more))
        assert limited["batch_failures"] == [None, None]
        spent = [f + b for f, b in zip(limited["num_forwards"], limited["num_backwards"], strict=True)]
        assert spent == [8] * 8
        assert sum(whole["best_optim_distances"]) < sum(limited["best_optim_distances"])
        if name == "pgd":
            short = run_attack(BenchModel(model), batches, partial(attack, steps=4, **more))
            assert limited["best_optim_distances"] == short["best_optim_distances"]


def test_early_stopping_spends_what_it_needs(model: Net) -> None:
    x, y = images(8), predicted(model, images(8))
    words: dict[str, Any] = {"eps": 0.1, "steps": 12}
    stopped = partial(function("pgd"), **words, absolute_step_size=0.005, random_init=False, early_stop=True)
    found = run_attack(BenchModel(model), [(x, y)], stopped, threat_model="linf")
    alone = PGD(**words, alpha=0.005, random_start=False, early_stop=True).run(model, x, y)
    assert found["num_backwards"] == alone.gradients.tolist()
    assert len(set(found["num_backwards"])) > 1
    stopped_early = [count < 12 for count in found["num_backwards"]]
    assert sum(stopped_early) >= 4
    for early, best, size in zip(stopped_early, found["best_optim_distances"], found["distances"], strict=True):
        assert not early or best == pytest.approx(size)


def test_the_search_for_the_smallest_radius_takes_ours(model: Net) -> None:
    """AttackBench's wrapper gives attacks within a ball a radius for every example, and narrows it down."""
    (x, y), *_ = loader(model)
    attack = partial(function("pgd"), relative_step_size=0.2, random_init=False)
    low, high = torch.zeros(len(x)), torch.full((len(x),), 0.2)
    for _ in range(8):
        eps = (low + high) / 2
        found = attack(model=model, inputs=x, labels=y, targeted=False, eps=eps)
        hit = predicted(model, found) != y
        low, high = torch.where(hit, low, eps), torch.where(hit, eps, high)
    assert (high < 0.2).all()
    assert len(set(high.tolist())) > 1
    assert (predicted(model, attack(model=model, inputs=x, labels=y, eps=high)) != y).all()


def test_every_attack_has_configurations_and_a_getter() -> None:
    configurations, getters = collected(attackbench)
    assert getters.keys() == {case.name.replace("-", "_") for case in CASES}
    for case in CASES:
        name = case.name.replace("-", "_")
        threats = [threat for threat, norm in (("linf", "Linf"), ("l2", "L2")) if norm in case.cls.norms]
        for threat in threats:
            values = evaluated(configurations[f"firstorder_{name}{f'_{threat}' if len(threats) > 1 else ''}"])
            assert (values["name"], values["source"], values["threat_model"]) == (name, "firstorder", threat)
            assert values.get("memory_budget") is None
            assert set(inspect.signature(getters[name]).parameters) <= values.keys()
    assert evaluated(configurations["firstorder_pgd_l2"])["epsilon"] == 1.0
    with pytest.raises(ValueError, match="threat_model='l1' is not supported; use 'linf' or 'l2'"):
        get_attack(attackbench, evaluated(configurations["firstorder_pgd_l2"], threat_model="l1"))
    with pytest.raises(AttributeError, match="no configuration 'firstorder_nothing'"):
        attackbench.firstorder_nothing  # noqa: B018
