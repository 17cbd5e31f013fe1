"""What packages offer: sorted, complete, importable, with a docstring."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import get_origin

import pytest

from firstorder.attacks import registry

PACKAGES = {
    "attacks": "firstorder.attacks",
    "surrogates": "firstorder.attacks.surrogates",
    "training": "firstorder.training",
    "art": "firstorder.art",
    "torchattacks": "firstorder.torchattacks",
    "foolbox": "firstorder.foolbox",
    "advlib": "firstorder.advlib",
    "autoattack": "firstorder.autoattack",
    "robustbench": "firstorder.robustbench",
    "fabric": "firstorder.fabric",
    "hosts": "firstorder.hosts",
    "lightning": "firstorder.lightning",
    "transformers": "firstorder.transformers",
}
FOR_PLUGINS = """
    Attack Batch Result BoundedAttack IterativeAttack Parts Problem StepHook ascend Direction Momentum Oracle Schedule
    Stateless Step Query Draw Evaluation Model Wrapper TorchModel Loss Region BALLS Bound Bounds Size bound norm rows
    NormUpdate MinimumNormAttack MinimumNormResult Labels RobustnessWarning Select TwoLogits as_model preserved
"""


@pytest.mark.parametrize("package", PACKAGES.values())
def test_all_is_sorted_and_complete(package: str) -> None:
    module = importlib.import_module(package)
    offered = module.__all__
    assert offered == sorted(set(offered))
    for name in offered:
        found = getattr(module, name)
        if get_origin(found) is None and (inspect.isclass(found) or inspect.isfunction(found)):
            assert inspect.getdoc(found), f"{name} has no docstring"
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", package).startswith(package)
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert public <= set(offered), f"not in __all__: {sorted(public - set(offered))}"


@pytest.mark.parametrize("package", PACKAGES.values())
def test_a_star_import_brings_what_is_offered_alone(package: str) -> None:
    space: dict[str, object] = {}
    exec(f"from {package} import *", space)
    assert {name for name in space if not name.startswith("__")} == set(importlib.import_module(package).__all__)


def test_hosts_offer_every_attack() -> None:
    names = set(registry().by_class_name())
    for host in ("art", "torchattacks", "foolbox"):
        assert names <= set(importlib.import_module(PACKAGES[host]).__all__)
    functions = {name.replace("-", "_") for name in registry().attacks}
    assert functions == set(importlib.import_module("firstorder.advlib").__all__)


def test_plugin_authors_find_what_they_build_on() -> None:
    assert set(FOR_PLUGINS.split()) <= set(importlib.import_module("firstorder.attacks").__all__)
