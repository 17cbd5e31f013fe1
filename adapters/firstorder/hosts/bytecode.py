"""What code does, as text that is the same in every process; and what it refers to."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any


def nested(code: CodeType) -> Iterator[CodeType]:
    """The code itself, and that of the functions made in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def read(code: CodeType) -> list[str]:
    """The global variables that code reads."""
    names = (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return list(dict.fromkeys(names))


def imported(code: CodeType, variables: dict[str, Any]) -> Iterator[ModuleType]:
    """The modules that code imports when it runs, as far as they are imported."""
    package = str(variables.get("__package__") or "")
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            for name in (step.argval, f"{package}.{step.argval}".strip(".")):
                if name in sys.modules:
                    yield sys.modules[name]


def text(code: CodeType, doc: str | None = None) -> str:
    """What code does, without its lines and comments, and without `doc`."""
    constants = [_literal(one) for one in code.co_consts if doc is None or one != doc]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    table = getattr(code, "co_exceptiontable", b"")
    return f"{code.co_code.hex()} {table.hex()} {constants} {names} {counts}"


def _literal(value: object) -> str:
    if isinstance(value, CodeType):
        return text(value)
    if isinstance(value, (tuple, frozenset)):
        inner = map(_literal, value)
        return f"{type(value).__name__}({', '.join(inner if isinstance(value, tuple) else sorted(inner))})"
    return f"{type(value).__name__} {value!r}"
