"""The memory of a process: its peak, and how its allocator is set to keep what is freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


def resident() -> float:
    """The highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had before it became this process
        (peak,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return float(peak.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def keep_memory() -> bool:
    """Make glibc keep freed memory for the rest of this process; False where the C library is another one.

    For processes that do nothing but attack, never for a user's own. An attack frees the activations of every step and
    allocates them again at the next. Blocks above 32 MiB, as large images need, go back to the system each time, and
    every page of them is faulted in and zeroed anew. Memory that is kept is not seen by other processes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return all(mallopt(*pair) == 1 for pair in ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**28)))
