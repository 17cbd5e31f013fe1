"""What users write in YAML: read with line numbers, and a mistake is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firstorder.evaluation.names.numbers import short
from firstorder.evaluation.names.packaged import ASSETS

UNKNOWN = "extra_forbidden"
"""Pydantic's name for a key that is not in the model."""

Place = tuple[str | int, ...]
"""Where a value is: the keys and positions that lead to it."""


LARGEST = 2**16
"""Bytes of a file."""

MOST = 10_000
"""Values in a file, those counted again that an alias repeats."""

LONGEST = 4096
"""Characters of a value."""

DEEPEST = 20
"""Levels of values within values."""


def find(name: Path | str) -> Path:
    """The YAML file that `name` names: a path, or the name of one of firstorder's own, as "evaluation".

    Raises:
        ValueError: neither.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    own = {path.stem.replace("_", "-"): path for path in sorted(ASSETS.glob("*.yaml"))}
    found = own.get(str(name).replace("_", "-"))
    if found is None and path.exists():
        return path
    if found is None:
        raise ValueError(
            f"{name} cannot be read: there is no such file; name a YAML file, or one of firstorder's own: "
            f"{', '.join(own)}"
        )
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping that a YAML file holds, and the line of everything in it.

    Args:
        path: of the file, or the name of one of firstorder's own.

    Raises:
        ValueError: a file that holds something else, or more than anyone writes.
    """
    path = find(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{path} has more than {LARGEST} bytes; it is no specification")
        loader = yaml.SafeLoader(content.decode("utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path} holds no keys; write one per line: data: mnist")
        lines: dict[Place, int] = {}
        _note(node, (), lines, path)
        return _constructed(loader, node, path), lines
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        at = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise ValueError(f"{path}, line {at}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def mistakes(
    error: ValidationError, keys: Sequence[str], *, source: str = "", lines: Mapping[Place, int] | None = None
) -> str:
    """What is wrong with values, a line each, with its line in `source` where it has one.

    Args:
        error: pydantic's.
        keys: the keys there are at the top.
        source: where the values come from.
        lines: of the values in `source`.
    """
    said, found = [], error.errors()
    for one in found:
        place = one["loc"]
        if any(len(place) < len(inner["loc"]) and inner["loc"][: len(place)] == place for inner in found):
            continue  # follows from a mistake further in
        name = ".".join(str(part) for part in place)
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None) if lines else None
        nowhere = not lines or not place or one["type"] == "missing"
        where = f"{source}, line {line}: " if line else f"{source}: " if source and nowhere else ""
        given = "" if one["type"] == "missing" or not place else f" (it is {short(one['input'])})"
        known = f"; the keys are {', '.join(keys)}" if one["type"] == UNKNOWN and len(place) == 1 else ""
        what = f"{name}: " if name else ""
        said.append(f"{where}{what}{one['msg'].removeprefix('Value error, ')}{given}{known}")
    return "\n".join(said)


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> dict[str, Any]:
    """The values of a file that was looked through."""
    try:
        values: dict[str, Any] = loader.construct_document(node)
    except ValueError as error:  # a value that is none, as a date in no calendar
        raise ValueError(f"{path} holds a value that cannot be read: {' '.join(str(error).split())}") from None
    return values


def _note(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    """Enter the lines of all that `node` holds."""
    if len(place) > DEEPEST:
        raise ValueError(f"{path}, line {node.start_mark.line + 1}: values within values, more than {DEEPEST} deep")
    if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST:
        raise ValueError(f"{path}, line {node.start_mark.line + 1}: a value of more than {LONGEST} characters")
    if isinstance(node, yaml.SequenceNode):
        for i, part in enumerate(node.value):
            _enter(part, (*place, i), part.start_mark.line + 1, lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        at = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str" or (*place, key.value) in lines:
            raise ValueError(f"{path}, line {at}: the key is no name, or there twice: {short(key.value)}")
        _enter(value, (*place, key.value), at, lines, path)


def _enter(node: yaml.Node, place: Place, at: int, lines: dict[Place, int], path: Path) -> None:
    if len(lines) >= MOST:
        raise ValueError(f"{path}, line {at}: the file holds, with its aliases, more than {MOST} values")
    lines[place] = at
    _note(node, place, lines, path)
