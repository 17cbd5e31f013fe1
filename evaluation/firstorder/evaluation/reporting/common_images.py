"""Which images two runs have in common, by their pixels and labels, whatever their place in the data."""

from __future__ import annotations

import hashlib

from firstorder.evaluation.runs import examples
from firstorder.evaluation.runs.store import Run

BLOCK = 500
"""Images that are read at once."""


def places(one: Run, other: Run) -> tuple[dict[int, int], int]:
    """Where the second run has the images of the first, by their place there, and how many under another label."""
    data = one.facts["data"], other.facts["data"]
    if data[0]["digest"] == data[1]["digest"]:
        return {i: i for i in range(data[0]["count"])}, 0
    here, there = _images_of(one), {key: (i, label) for i, (key, label) in enumerate(_images_of(other))}
    found: dict[int, int] = {}
    relabelled = 0
    for i, (key, label) in enumerate(here):
        if key in there:
            place, known = there[key]
            found |= {i: place} if known == label else {}
            relabelled += known != label
    return found, relabelled


def _images_of(run: Run) -> list[tuple[tuple[bytes, int], int]]:
    """A name for the pixels of every image, with how often they were there before, and its label."""
    data, seen, found = run.facts["data"], dict[bytes, int](), []
    for start in range(0, data["count"], BLOCK):
        x, y = examples.rows(run.store.data, data["digest"], start, min(start + BLOCK, data["count"]))
        for image, label in zip(x, y.tolist(), strict=True):
            key = hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()
            found.append(((key, seen.get(key, 0)), label))
            seen[key] = seen.get(key, 0) + 1
    return found
