"""What users write in YAML: read with line numbers, and a mistake told as one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firstorder.evaluation.names.numbers import short

UNKNOWN = "extra_forbidden"
"""Pydantic's name for a key that is not in the model."""

Place = tuple[str | int, ...]
"""Where a value stands: the keys and positions that lead to it."""


def read(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping that a YAML file holds, and the line of everything in it.

    Raises:
        ValueError: a file that holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path} holds no keys; write one per line: data: mnist")
        lines: dict[Place, int] = {}
        _note(node, (), lines, path)
        return yaml.safe_load(text), lines
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
    told, found = [], error.errors()
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
        told.append(f"{where}{what}{one['msg'].removeprefix('Value error, ')}{given}{known}")
    return "\n".join(told)


def _note(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    """Enter the lines of all that `node` holds."""
    if isinstance(node, yaml.SequenceNode):
        for i, part in enumerate(node.value):
            lines[(*place, i)] = part.start_mark.line + 1
            _note(part, (*place, i), lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        at = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str" or (*place, key.value) in lines:
            raise ValueError(f"{path}, line {at}: the key is no name, or there twice: {key.value!r}")
        lines[(*place, key.value)] = at
        _note(value, (*place, key.value), lines, path)
