"""robustbench from published packages.

robustbench imports a module `autoattack`, but depends on a distribution, pyautoattack, that installs one of another
name and signature, so that as published it fails on import.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from firstorder.autoattack import AutoAttack
from firstorder.autoattack.classic import CLASSIC


def provide_autoattack() -> None:
    """Register a module `autoattack` over pyautoattack, unless one is installed or registered already.

    It has `AutoAttack` with the classic signature, and `autoattack.state.EvaluationState`.
    """
    if CLASSIC or "autoattack" in sys.modules:
        return
    import pyautoattack.state

    package: Any = ModuleType("autoattack", "AutoAttack with its classic signature, over pyautoattack.")
    package.__spec__ = ModuleSpec("autoattack", None, is_package=True)
    package.__path__ = []
    package.AutoAttack, package.state = AutoAttack, pyautoattack.state
    sys.modules["autoattack"] = package
    sys.modules["autoattack.state"] = pyautoattack.state
