"""Files that are either complete or absent."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}(\.\w+)?")
"""Names of files that are being written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place on success and vanishes on failure.

    It is locked as long as its process lives, so that others know it from what a killed process leaves behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = _temporary(path)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clear(folder: Path) -> None:
    """Remove the temporary files in `folder` whose processes were killed.

    Where files cannot be locked, as on Windows and some network file systems, they stay.
    """
    if fcntl is None or not folder.is_dir():
        return
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError), path.open("rb") as file:  # gone, or in use
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A context that one process at a time is in, of those that name the same folder; not on Windows."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> tuple[int | None, str]:
    """A new file beside `path`, and the descriptor that locks it."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        if fcntl is None:
            os.close(descriptor)  # a file that is open cannot be renamed there
            return None, name
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # `clear` was faster
