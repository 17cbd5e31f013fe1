"""The pages of the reference: every public name of every package, from its docstring, grouped by what it is for."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

PACKAGES = {
    "firstorder.attacks": "Attacks and their parts",
    "firstorder.attacks.surrogates": "Surrogates",
    "firstorder.attacks.testing": "Checks of an attack",
    "firstorder.training": "Training",
    "firstorder.torchattacks": "torchattacks",
    "firstorder.art": "ART",
    "firstorder.foolbox": "foolbox",
    "firstorder.advlib": "adversarial-library",
    "firstorder.autoattack": "AutoAttack",
    "firstorder.robustbench": "RobustBench",
    "firstorder.fabric": "Lightning Fabric",
    "firstorder.lightning": "Lightning",
    "firstorder.transformers": "Hugging Face",
    "firstorder.hosts": "What hosts share",
    "firstorder.evaluation": "Evaluation",
}
"""The packages with public names, and the titles of their pages."""

MODULES = {"firstorder.attacks.testing": ("CHECKS", "check_attack")}
"""What is for users of modules without `__all__`."""

GROUPS = {
    "Attacks within a ball": ("catalogue", "transfer", "clipped", "augmented", "interaction:BLOBQG,DAABLOB"),
    "Attacks that search for the smallest norm": ("minimum_norm", "norm_updates"),
    "The verdict": ("verdict", "stages"),
    "Interfaces of attacks and results": ("base", "bounded", "core", "roster", "verdicts", "validation", "inspection"),
    "Update rules": ("directions",),
    "Momenta": ("momenta",),
    "Gradients": ("oracles", "copies", "blocks", "neighbourhoods", "transformations", "interaction"),
    "Schedules and controls": ("schedules", "controls"),
    "Losses": ("losses",),
    "Models": ("models", "outputs", "ensemble", "expectation", "batched", "prepared", "modes"),
    "Balls and norms": ("projections",),
    "Registry": ("registry",),
}
"""Of the names of firstorder.attacks, by the module that defines them, or by single names of it."""


INTRODUCTIONS = {
    "Attacks within a ball": (
        "Parameters that all of them share are explained at :class:`~firstorder.attacks.BoundedAttack` and "
        ":class:`~firstorder.attacks.IterativeAttack`, the call at :class:`~firstorder.attacks.Attack`."
    ),
    "Attacks that search for the smallest norm": (
        "Parameters that they share are explained at :class:`~firstorder.attacks.MinimumNormAttack`."
    ),
}
"""Of groups whose members leave to others what they share."""


def offered(package: str) -> list[str]:
    """The names of a package's `__all__` that are ours; torchattacks' own are left to its documentation."""
    module = importlib.import_module(package)
    return [name for name in MODULES.get(package) or module.__all__ if _is_ours(getattr(module, name))]


def _is_ours(value: Any) -> bool:
    return not _defined(value) or str(value.__module__).startswith("firstorder")


def _is_class(value: Any) -> bool:
    return inspect.isclass(value) and get_origin(value) is None  # on Python 3.10 tuple[int, ...] is a class too


def _defined(value: Any) -> bool:
    """Whether a value knows the module that defines it."""
    return _is_class(value) or inspect.isfunction(inspect.unwrap(value) if callable(value) else value)


@cache
def _assigned(path: Path) -> frozenset[str]:
    """The names that a module's file assigns."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def home(module: ModuleType, name: str) -> str:
    """The name of the module that defines a public name of a package."""
    value = getattr(module, name)
    if _defined(value):
        return str(value.__module__)
    file = Path(str(module.__file__))
    files = sorted(file.parent.glob("*.py")) if hasattr(module, "__path__") else [file]
    places = [path for path in files if name in _assigned(path)]
    places.sort(key=lambda path: path.stem == "__init__")
    if not places:
        raise ValueError(f"{module.__name__}.{name} is assigned in no module of its package")
    stem = places[0].stem
    alone = stem == "__init__" or not hasattr(module, "__path__")
    return module.__name__ if alone else f"{module.__name__}.{stem}"


def group(module: ModuleType, name: str) -> str:
    """The heading under which a name of firstorder.attacks is."""
    stem = home(module, name).rpartition(".")[2]
    for title, places in GROUPS.items():
        for place in places:
            part, _, names = place.partition(":")
            if part == stem and (not names or name in names.split(",")):
                return title
    raise ValueError(f"{module.__name__}.{name} is in the module {stem}, which has no group in docs/site/reference.py")


def _directive(module: ModuleType, name: str) -> str:
    value, full = getattr(module, name), f"{module.__name__}.{name}"
    if _is_class(value):
        made = module.__name__ in {"firstorder.art", "firstorder.torchattacks", "firstorder.foolbox"}
        lines = [f".. autoclass:: {full}", "   :show-inheritance:", *([] if made else ["   :members:"])]
        if "__call__" in vars(value) and not made:
            lines.append("   :special-members: __call__")
        explained = [
            *getattr(value, "__dataclass_fields__", ()),
            *_constants(value),
            *_attributes(inspect.getdoc(value) or ""),
        ]
        if explained and not made:
            lines.append(f"   :exclude-members: {', '.join(dict.fromkeys(explained))}")
        source = vars(value).get("paper")
        return "\n".join(
            [
                *lines,
                *(
                    ["", f"   Source: {literal(source)}. :doc:`All papers </equations>`."]
                    if isinstance(source, str) and source
                    else []
                ),
            ]
        )
    if _defined(value):
        return f".. autofunction:: {full}{_bare(inspect.signature(value))}"
    return f".. py:data:: {full}\n\n   {_comment(home(module, name), name)}"


def _constants(value: type) -> list[str]:
    """Class attributes that are settings of an attack, of which its own docstring says what matters."""
    return [name for name, kind in vars(value).get("__annotations__", {}).items() if "ClassVar" in str(kind)]


def _attributes(text: str) -> list[str]:
    """The names that a docstring explains under "Attributes:"."""
    section = text.partition("Attributes:\n")[2].split("\n\n")[0]
    return [name for names in re.findall(r"^ {4}([\w, ]+):", section, flags=re.M) for name in names.split(", ")]


def _bare(signature: inspect.Signature) -> str:
    """A signature without types, which the text below it explains."""
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function (?:<lambda>|(\w+)) at 0x\w+>", lambda found: found[1] or "...", text)


def _comment(module: str, name: str) -> str:
    """The text below an assignment, or the assignment itself."""
    path = Path(str(importlib.import_module(module).__file__))
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return literal(inspect.cleandoc(str(after.value.value))).replace("\n", "\n   ")
            return f"``{ast.unparse(node)}``"
    raise ValueError(f"{module} assigns no {name}")


def literal(text: str) -> str:
    """Text of a docstring with the characters escaped that mean something in reStructuredText, `code` as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick that is closed elsewhere
        return text.replace("*", "\\*").replace("|", "\\|")
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("_ ", "\\_ ")
    made = [part if i % 2 == 0 else f"``{part}``" for i, part in enumerate(parts)]
    return "".join(f"\\ {part}" if i and i % 2 == 0 and part[:1].isalnum() else part for i, part in enumerate(made))


def page(package: str) -> str:
    """The page of a package, in reStructuredText."""
    module = importlib.import_module(package)
    heading = PACKAGES[package]
    parts = [f"{heading}\n{'=' * len(heading)}", f".. automodule:: {package}\n   :no-members:"]
    names = offered(package)
    sections: Mapping[str, list[str]] = {"": names}
    if package == "firstorder.attacks":
        sections = {title: [name for name in names if group(module, name) == title] for title in GROUPS}
    for title, members in sections.items():
        if title:
            parts.append(f"{title}\n{'-' * len(title)}")
            parts += [INTRODUCTIONS[title]] if title in INTRODUCTIONS else []
        parts += [_directive(module, name) for name in members]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """The reference by file name, its index first."""
    entries = [f"   {package}" for package in PACKAGES]
    lines = [
        "Reference\n=========",
        "Every public name, from its docstring. Names of the hosts are made from the registry: an attack has the same",
        "class name everywhere, and parameters in the host's words.",
        "",
        ".. toctree::\n   :maxdepth: 1\n",
        *entries,
    ]
    return {"index.rst": "\n".join(lines) + "\n"} | {f"{package}.rst": page(package) for package in PACKAGES}
