"""Files that say whether they are whole: a digest of their name and content within them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = b"firstorder-sha256="
"""What is before the digest in a file that is sealed in place."""

BLANK = b"0" * 64
"""What is there until the digest is."""

SEAL = "sha256"
"""The key of the digest in JSON."""


def seal(path: Path, name: str) -> None:
    """Write the digest of a file that holds `MARK` and `BLANK` into it; of several, into the last."""
    content = path.read_bytes()
    at = content.rindex(MARK + BLANK) + len(MARK)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(_digest(name, content))


def sealed(path: Path, name: str) -> bool:
    """Whether the file was sealed under that name and is as it was then; False where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    at = content.rfind(MARK) + len(MARK)
    if at < len(MARK):
        return False
    end = at + len(BLANK)
    return content[at:end] == _digest(name, content[:at] + BLANK + content[end:])


def to_json(values: Mapping[str, Any], *of: object) -> str:
    """Values as JSON text with their digest; `of` is what they belong to, in plain values."""
    return json.dumps({**values, SEAL: _sum(values, of)}, indent=2, ensure_ascii=False) + "\n"


def from_json(path: Path, *of: object) -> dict[str, Any] | None:
    """The values that `to_json` made the text of a file from; None where it is damaged, or belongs to something else.

    What an earlier version wrote, without a digest, is taken as it is.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    found: dict[str, Any] = values
    kept = found.pop(SEAL, None)
    return found if kept is None or kept == _sum(found, of) else None


def _sum(values: Mapping[str, Any], of: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps([values, *of], sort_keys=True, default=str).encode()).hexdigest()


def _digest(name: str, content: bytes) -> bytes:
    whole = hashlib.sha256(name.encode())
    whole.update(content)
    return whole.hexdigest().encode()
