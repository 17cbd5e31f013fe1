"""Files that say whether they are whole: a digest of their name and content within them."""

from __future__ import annotations

import hashlib
from pathlib import Path

MARK = b"firstorder-sha256="
"""What is before the digest in a file that is sealed in place."""

BLANK = b"0" * 64
"""What is there until the digest is."""


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


def _digest(name: str, content: bytes) -> bytes:
    whole = hashlib.sha256(name.encode())
    whole.update(content)
    return whole.hexdigest().encode()
