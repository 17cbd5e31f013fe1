"""Models whose finding runs code: functions of the user's, `module:function` and `FILE.py:function`, and programs."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from firstorder.evaluation.names.numbers import short

_FILE = re.compile(r"(.+\.py):([^\W\d]\w*)")
_WEIGHTED = re.compile(r"(.+?\.py:[^\W\d]\w*)@(.+)")
_MODULE = re.compile(r"((?:[^\W\d]\w*\.)*[^\W\d]\w*):([^\W\d]\w*)")
KNOWN = ("hf", "robustbench", "timm", "torchvision")
"""What is no module of the user's before a colon."""

_SURROGATE = re.compile(r"(sgm|linbp)(?:\(([^()]*)\))?:(.+)")

_beside: dict[str, Path] = {}
"""Modules that a file of the user's imported from its own folder, by name."""


def split(spec: str) -> tuple[str, str]:
    """The network and the file of weights of NETWORK@FILE; without weights the second is empty."""
    if _FILE.fullmatch(spec):  # a path may hold an @
        return spec, ""
    if found := _WEIGHTED.fullmatch(spec):
        return found[1], found[2]
    network, _, weights = spec.rpartition("@")
    return (network, weights) if network else (spec, "")


def surrogate(spec: str) -> tuple[str, str, str]:
    """The surrogate, its options and the model of "sgm(gamma=0.5):MODEL"; of another name the first two are empty."""
    found = _SURROGATE.fullmatch(spec)
    return (found[1], found[2] or "", found[3]) if found else ("", "", spec)


def runs_code(spec: str) -> bool:
    """Whether finding the model that `spec` names runs code of whoever wrote the name."""
    kind, _, inner = surrogate(spec)
    if kind:
        return runs_code(inner)
    network = split(spec)[0]
    if network.endswith(".pt2"):  # torch evaluates expressions in it, and may unpickle
        return True
    source, _, name = network.partition(":")
    return bool(name) and source not in KNOWN


def require_trust(specs: Iterable[str], *, source: str, trusted: bool) -> None:
    """Refuse models whose names run code, where a file names them that is not known to be the user's own.

    Args:
        specs: names of models.
        source: the file that holds them, for the message.
        trusted: whether the user trusts its code.

    Raises:
        ValueError: there are such models, and no trust.
    """
    found = [] if trusted else [spec for spec in specs if runs_code(spec)]
    if found:
        raise ValueError(
            f"{source} names {', '.join(map(short, found))}, which runs code; add --trust-code (trust_code=True in "
            "Python) if you trust whoever wrote it, or name the model on the command line"
        )


def function(spec: str) -> Callable[[], Any]:
    """The function that `module:function` or `FILE.py:function` names; the module is imported.

    A file may import the modules beside it, as if Python ran it.

    Raises:
        ValueError: a module that cannot be imported, or no function of that name.
        FileNotFoundError: a file that is not there.
    """
    in_file = _FILE.fullmatch(spec)
    source, _, name = spec.partition(":")
    if in_file is not None:
        path, name = Path(in_file[1]), in_file[2]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; name a Python file, as in FILE.py:{name}")
    elif _MODULE.fullmatch(spec) is None:
        raise ValueError(f"{short(spec)} names no function; write module:function or FILE.py:function")
    try:
        made = getattr(import_module(source) if in_file is None else _imported(path), name)
    except (Exception, SystemExit) as error:  # a module of the user's can fail in any way
        raise ValueError(f"the model {spec!r} cannot be imported: {' '.join(str(error).split())}") from None
    if not callable(made):
        raise ValueError(f"the model {spec!r} is a {type(made).__name__}; name a function that returns the model")
    found: Callable[[], Any] = made
    if in_file is None:
        return found

    def make() -> Any:
        with _siblings(path.resolve().parent):
            return found()

    return make


def _imported(path: Path) -> ModuleType:
    """The module in a file, under a name of its own; read once while the file stays as it is."""
    whole = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(whole).encode() + whole.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where classes are looked up by name
    try:
        with _siblings(whole.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Imports find the modules of a folder first.

    Raises:
        ValueError: a module of another model's folder has the name of one in this.
    """
    for name, other in _beside.items():
        if other != folder and ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
            raise ValueError(f"{other} and {folder} both hold a module {name!r}; rename one, or evaluate them apart")
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if "." not in name and file and Path(file).resolve().parent in (folder, folder / name):
                _beside[name] = folder
