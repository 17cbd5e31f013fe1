"""Options of commands made from pydantic models, so that a file and the command line know the same keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

PANEL = "Keys of the configuration"


def with_options(
    command: Callable[..., None], model: type[BaseModel], *, flags: Mapping[str, str] | None = None
) -> None:
    """Give the command the options that its `**options` means: one for every key of `model`.

    A key that holds several values is an option that may be repeated; one that holds a model of its own becomes an
    option for each of that model's keys.

    Args:
        command: a function with keyword arguments `**options`.
        model: whose keys these are.
        flags: names of options that are not their key's.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    made = [one for name, field in model.model_fields.items() for one in _options(name, field, flags or {})]
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if p.kind in kinds else p for p in own] + made
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def given(options: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The keys of `model` that the user gave as options."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        nested = _nested(field)
        if nested is not None:
            inner = {key: options[f"{name}_{key}"] for key in nested.model_fields}
            inner = {key: value for key, value in inner.items() if value is not None}
            found |= {name: inner} if inner else {}
        elif options[name] not in (None, []):
            found[name] = options[name]
    return found


def _options(name: str, field: FieldInfo, flags: Mapping[str, str], prefix: str = "") -> list[inspect.Parameter]:
    nested = _nested(field)
    if nested is not None:
        return [one for key, inner in nested.model_fields.items() for one in _options(key, inner, flags, f"{name}_")]
    kind, several = _kind(name, field)
    default = field.get_default(call_default_factory=True)
    shown = False if field.is_required() or default in (None, ()) else _shown(default)
    help_text = f"{field.description} Required." if field.is_required() else field.description
    flag = flags.get(name, f"--{prefix}{name}".replace("_", "-"))
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    option = typer.Option(flag, help=help_text, show_default=shown, rich_help_panel=PANEL)
    annotation = Annotated[(list[kind] if several else kind) | None, option]  # type: ignore[valid-type]
    return [inspect.Parameter(prefix + name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)]


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    alone = get_origin(kind) is None  # on Python 3.10 tuple[int, ...] is an instance of type too
    return kind if alone and isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _kind(name: str, field: FieldInfo) -> tuple[Any, bool]:
    """What an option takes, and whether it may be repeated. What is written in short form is text."""
    annotation: Any = field.annotation
    if get_origin(annotation) is tuple:
        inner: Any = get_args(annotation)[0]
        bare = get_args(inner)[0] if get_origin(inner) is Annotated else inner
        return (bare if bare is int or (bare is float and name != "eps") else str), True
    if name in ("eps", "alpha"):
        return str, False
    if get_origin(annotation) is Literal:
        return annotation, False
    return next((part for part in get_args(annotation) if part is not type(None)), annotation), False


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)
