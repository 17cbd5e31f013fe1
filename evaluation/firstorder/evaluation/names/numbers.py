"""Numbers as users write them, 0.3, 1e-3 or 8/255: bounded before they are computed."""

from __future__ import annotations

import math
import re

LONGEST = 40
"""Characters of a number; a longer one is a slip, or made to be slow to read."""

_DECIMAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"\s*({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?\s*")


def number(text: str) -> float:
    """The finite number that `text` writes: a decimal, or a quotient of two.

    Raises:
        ValueError: text that writes no number, or one beyond float64.
    """
    found = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if found is not None:
        upper, lower = float(found[1]), float(found[2] or 1)
        value = upper / lower if lower else math.nan
        if math.isfinite(value) and math.isfinite(lower):
            return value
    raise ValueError(f"{short(text)} is not a finite number; write it as 0.3 or 8/255")


def radius(value: object, *, name: str = "") -> float:
    """A radius, as "0.3", "8/255" or a number.

    Args:
        value: what the user gave.
        name: of the argument, where the message is to name it.

    Raises:
        ValueError: no finite number above 0.
    """
    try:
        size = number(value) if isinstance(value, str) else math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        size = math.nan
    if not 0 < size < math.inf:
        if name:
            raise ValueError(f"{name}={short(value)} is not a finite number above 0; write 0.3 or 8/255")
        raise ValueError("write a finite number above 0, as 0.3 or 8/255")
    return size


def short(value: object, longest: int = 120) -> str:
    """A value as Python writes it, cut where it is long: for messages."""
    if isinstance(value, int) and abs(value) >= 10**longest:
        return f"a whole number of about {int(value.bit_length() * math.log10(2))} digits"
    text = repr(value[: 2 * longest] if isinstance(value, str) else value)
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."
