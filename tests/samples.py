"""Rows of which `make test` runs a sample; the others are marked long and run in `make test-long`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def sampled(rows: Iterable[tuple[Any, ...]], every: int, group: Callable[[tuple[Any, ...]], Hashable]) -> list[Any]:
    """The rows, for parametrize: the first and every `every`-th after it of each group is the sample."""
    seen: Counter[Hashable] = Counter()
    found = []
    for row in rows:
        found.append(pytest.param(*row, marks=() if seen[group(row)] % every == 0 else pytest.mark.long))
        seen[group(row)] += 1
    return found


def unsampled(items: Iterable[pytest.Item]) -> list[str]:
    """The tests all of whose rows are long."""
    names = {which: set[str]() for which in (True, False)}
    for item in items:
        names[item.get_closest_marker("long") is not None].add(item.nodeid.partition("[")[0])
    return sorted(names[True] - names[False])


def require_samples(words: Iterable[str], items: Iterable[pytest.Item]) -> None:
    """Refuse a long test without a sample; single rows may be asked for.

    Args:
        words: of the command line.
        items: what was collected.
    """
    left_out = [] if any("::" in word for word in words) else unsampled(items)
    if left_out:
        raise pytest.UsageError(f"all rows are long, leave some to `make test`: {', '.join(left_out)}")
