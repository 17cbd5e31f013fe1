"""robustbench from published packages.

robustbench imports a module `autoattack`, but depends on a distribution, pyautoattack, that installs one of another
name and signature, so that as published it fails on import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from firstorder.autoattack import AutoAttack
from firstorder.autoattack.classic import CLASSIC

MODULES = (
    "autopgd_base",
    "checks",
    "fab_base",
    "fab_projections",
    "fab_pt",
    "fab_tf",
    "other_utils",
    "square",
    "state",
)
"""pyautoattack's modules that need no TensorFlow, besides that of `AutoAttack` itself."""


def provide_autoattack() -> None:
    """Register a module `autoattack` over pyautoattack, unless one is installed or registered already.

    It has `AutoAttack` with the classic signature, also as `autoattack.autoattack.AutoAttack`, and pyautoattack's other
    modules, the same objects: `autoattack.autopgd_base`, `fab_pt`, `square`, `checks`, `other_utils`, `state`, ...
    Those for TensorFlow are loaded when they are imported.
    """
    if CLASSIC or "autoattack" in sys.modules:
        return
    original = import_module("pyautoattack")
    package: Any = ModuleType("autoattack", "AutoAttack with its classic signature, over pyautoattack.")
    package.__spec__ = ModuleSpec("autoattack", None, is_package=True)
    package.__path__ = list(original.__path__)
    package.AutoAttack = AutoAttack
    package.autoattack = ModuleType("autoattack.autoattack", "AutoAttack with its classic signature.")
    package.autoattack.AutoAttack = AutoAttack
    package.autoattack.__spec__ = ModuleSpec("autoattack.autoattack", None)
    sys.modules |= {"autoattack": package, "autoattack.autoattack": package.autoattack}
    for name in MODULES:
        module = import_module(f"pyautoattack.{name}")
        setattr(package, name, module)
        sys.modules[f"autoattack.{name}"] = module
