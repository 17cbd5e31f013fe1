"""What a run records of the calls that made it: when, by which command, on what, and under which settings of torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the system, as plain values; nothing in it names the machine or its user."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": _memory(),
        "accelerator": None,
    }
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found["accelerator"] = f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}"
    return found


def settings() -> dict[str, Any]:
    """The settings of torch that can change a result, or its last digits."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32 in products": torch.backends.cuda.matmul.allow_tf32,
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
    }


def called(before: Sequence[Mapping[str, Any]], command: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a run with one more, now; the same call as the last one again is no other.

    Args:
        before: those that the run had.
        command: of this one.
        facts: what else is to be known of it, as plain values.
    """
    calls, own = [dict(call) for call in before], {"command": command, **facts}
    if calls and {key: value for key, value in calls[-1].items() if key != "date"} == own:
        return calls
    return [*calls, {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **own}]


def _processor() -> str:
    """The name of the processor, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> str | None:
    """How much memory there is; None where the system does not say."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return f"{size / 2**30:.0f} GiB"
