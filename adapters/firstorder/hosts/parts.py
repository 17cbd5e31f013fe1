"""What a model consists of: weights, buffers, attributes, hooks, and the code that its forward runs.

Code is what is loaded, not what a file says: the bytecode of every method of the model's classes and their bases, of
the functions these name, and so on through the user's own modules, with the constants on the way. Packages that are
installed count by their version, Python and torch not at all; a function of the user's put into one of their classes
counts.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections import defaultdict
from enum import Enum
from functools import cached_property, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.hosts import bytecode
from firstorder.hosts.description import description

LIMIT = 20_000
"""How many values are looked at beside the weights."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module keeps the hooks that can change what it does."""

INTERNAL = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}
"""Attributes of every module."""

UNTOLD = (
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate_func__"),
    *("__parameters__", "__slots__", "__orig_bases__", "__dataclass_fields__", "__dataclass_params__"),
    *("__match_args__", "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__"),
)
"""Attributes of a class that change nothing of what it does."""

CONTENT: tuple[Any, ...] = (dict, list, tuple, set, frozenset, str, bytes, bool, int, float)
"""Classes of values; what is made of them holds one, beside its attributes."""

BARE = frozenset({"torch", "numpy", "functorch", "builtins"} | sys.stdlib_module_names) - {"__main__"}
"""Packages of which nothing is said."""


def parts(model: object, *, tensors: bool = True) -> dict[str, str]:
    """What a model consists of: a digest of every part, by its name ("code of Net.forward", "attribute head.scale").

    Args:
        model: a module, or a function.
        tensors: parameters and buffers too.
    """
    walk = _Walk(tensors=tensors)
    walk.text(model, "")
    return {name: _digest("\n".join(sorted(note))) for name, note in walk.found.items()}


def contents(value: object) -> str:
    """A digest of what a function, or another value that is called, does: the same in every process, on every device.

    Of a partial counts what it holds, of a function its code and the values that it uses, of an object what it is made
    of. Versions of packages do not count, nor what modules note for themselves in attributes as `_last`.
    """
    walk = _Walk(tensors=True, devices=False)
    own = walk.text(value, "")
    kept = {name: sorted(note) for name, note in walk.found.items() if not _passing(name)}
    return _digest("\n".join([own, *(f"{name} {note}" for name, note in sorted(kept.items()))]))


class _Walk:
    """Goes once through all that is reached from a model."""

    def __init__(self, *, tensors: bool, devices: bool = True) -> None:
        self.found: defaultdict[str, list[str]] = defaultdict(list)
        self._tensors, self._devices = tensors, devices
        self._seen: dict[int, object] = {}  # held, so that their ids stay theirs
        self._places: dict[int, str] = {}
        self._open: set[int] = set()
        self._left = LIMIT

    def text(self, value: object, name: str) -> str:
        """Describe a value; what it reaches is noted.

        Args:
            name: how parts of a module in it are to be called.
        """
        self._left -= 1
        if self._left < 0 or id(value) in self._open:
            return "..."
        self._open.add(id(value))
        try:
            return self._text(value, name)
        finally:
            self._open.remove(id(value))

    def _text(self, value: object, name: str) -> str:
        if isinstance(value, nn.Module):
            return f"module {self._module(value, name)}"
        if isinstance(value, type):
            self._class(value)
            return value.__qualname__
        if isinstance(value, partial):
            return f"partial({self.text(value.func, name)}, {self.text((value.args, value.keywords), name)})"
        if isinstance(value, MethodType):
            return f"{self.text(value.__func__, name)} of {self.text(value.__self__, name)}"
        if isinstance(value, FunctionType):
            self._function(value)
            foreign = self._foreign(value.__module__)
            return value.__qualname__ if foreign else f"{value.__qualname__} {_digest(bytecode.text(value.__code__))}"
        if isinstance(value, BuiltinFunctionType):
            return value.__qualname__
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, logging.Logger):
            return value.name
        if isinstance(value, torch.device) and not self._devices:
            return "device"
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # as lru_cache keeps a function
        if wrapped is not None:
            return self.text(wrapped, name)
        cls = type(value)
        if not _bare(cls.__module__) and not isinstance(value, Tensor):
            self._class(cls)
            if cls.__repr__ is object.__repr__ or not _installed(cls.__module__):
                return f"{cls.__qualname__} {self.text((_content(value), _state(value)), name)}"
        return description(value, lambda one: self.text(one, name))

    def _note(self, name: str, note: str) -> None:
        self.found[name].append(note)

    def _first(self, value: object) -> bool:
        new = id(value) not in self._seen
        self._seen[id(value)] = value
        return new

    def _module(self, module: nn.Module, name: str) -> str:
        """Note a module's parts, under its name, or a new one where another module has it; the name."""
        if id(module) in self._places:
            return self._places[id(module)]
        while name in self._places.values():
            name += "'"
        self._places[id(module)] = name
        for own, part in module.named_modules():
            place = self._places.setdefault(id(part), ".".join(filter(None, (name, own))))
            if self._first(part):
                self._part(part, place)
        if not self._tensors:
            return name
        known = set()
        for kind, found in (("weights", module.named_parameters()), ("buffer", module.named_buffers())):
            for own, tensor in found:
                known.add(own)
                self._note(f"{kind} {'.'.join(filter(None, (name, own)))}", description(tensor))
        for own, value in module.state_dict().items():
            if own not in known:
                self._note(f"state {'.'.join(filter(None, (name, own)))}", description(value))
        return name

    def _part(self, part: nn.Module, place: str) -> None:
        self._note(f"part {place or 'itself'}", f"{type(part).__qualname__}({part.extra_repr()})")
        if isinstance(part, torch.jit.ScriptModule):
            self._note(f"code of {place or 'the model'}", str(getattr(part, "code", "")))
            return
        dot = f"{place}." if place else ""
        for key, value in vars(part).items():
            if key not in INTERNAL:
                self._note(f"attribute {dot}{key}", self.text(value, f"{dot}{key}"))
            elif key in HOOKS:
                for hook in value.values():
                    self._note(f"hook on {place or 'the model'}", f"{key} {self.text(hook, '')}")
        self._class(type(part))

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not self._first(base):
                continue
            foreign = self._foreign(base.__module__)
            if not foreign:
                self._note(f"class {base.__qualname__}", ", ".join(one.__qualname__ for one in base.__bases__))
            for key, value in list(vars(base).items()):
                if not foreign:
                    self._member(f"{base.__qualname__}.{key}", key, value)
                elif isinstance(value, FunctionType) and _users(value.__module__):
                    self._function(value)

    def _member(self, name: str, key: str, value: object) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            for one in (value.fget, value.fset):
                self.text(one, "")
        elif isinstance(value, cached_property):
            self.text(value.func, "")
        elif isinstance(value, FunctionType):
            self._function(value)
        elif key not in UNTOLD and not inspect.isdatadescriptor(value):
            self._note(f"constant {name}", self.text(value, ""))

    def _function(self, function: FunctionType) -> None:
        if not self._first(function) or self._foreign(function.__module__):
            return
        name, code = function.__qualname__, function.__code__
        given = self.text((function.__defaults__, function.__kwdefaults__), name)
        self._note(f"code of {name}", f"{bytecode.text(code, function.__doc__)} {given}")
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not yet there
                continue
            self._note(f"variable {variable} of {name}", self.text(value, variable))
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.text(wrapped, "")
        for inside in bytecode.nested(code):
            for variable in bytecode.read(inside):
                if variable in function.__globals__:
                    self._constant(variable, function.__globals__[variable], inside)
            for module in bytecode.imported(inside, function.__globals__):
                if _users(module.__name__):
                    self._constant(module.__name__, module, inside)

    def _constant(self, name: str, value: object, code: CodeType) -> None:
        if isinstance(value, ModuleType):
            if not self._foreign(value.__name__):
                for attribute in code.co_names:
                    if attribute in vars(value):
                        self._constant(attribute, vars(value)[attribute], code)
        elif id(value) not in self._seen or not isinstance(value, (type, FunctionType, nn.Module)):
            self._note(f"constant {name}", self.text(value, name))

    def _foreign(self, module: str | None) -> bool:
        """Whether a module is none of the user's; its package is noted."""
        if _bare(module):
            return True
        version = _installed(module)
        if version is None:
            return False
        name = f"package {str(module).partition('.')[0]}"
        if name not in self.found:
            self._note(name, version)
        return True


def _passing(name: str) -> bool:
    """Whether a part is not compared by `contents`."""
    kind, _, where = name.partition(" ")
    return kind == "package" or (kind == "attribute" and where.rpartition(".")[2].startswith("_"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bare(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in BARE


def _users(module: str | None) -> bool:
    """Whether a module is the user's. What packages have put into torch's classes, or will be imported by code when it
    runs, differs between processes that imported other things, for one model.
    """
    return not _bare(module) and _installed(module) is None


def _installed(module: str | None) -> str | None:
    """The version of the installed package that a module is of; None for a module of the user's."""
    name = module or ""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    package = sys.modules.get(name.partition(".")[0])
    version = getattr(package, "__version__", None)
    return str(version) if version is not None and ("site-packages" in file or "dist-packages" in file) else None


def _content(value: Any) -> object:
    """What a value of a class made of one of `CONTENT` holds."""
    return next((cls(value) for cls in CONTENT if isinstance(value, cls) and not isinstance(value, Enum)), None)


def _state(value: Any) -> dict[str, Any]:
    slots = [slot for base in type(value).__mro__ for slot in _slots(base) if hasattr(value, slot)]
    return {**{slot: getattr(value, slot) for slot in slots}, **getattr(value, "__dict__", {})}


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slot for slot in slots if not slot.startswith("__"))
