"""Gradient methods on one line, NAME[:KEY=VALUE,...], as in "engm:alpha=auto", "a-engm:tau=10", "mgnc:clip=5"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from firstorder.evaluation.names.attacks import LONGEST, options
from firstorder.evaluation.names.numbers import short
from firstorder.training import GradientMethod, gradient_method

OTHERS = ("coupling", "memory_budget")
"""Parameters of methods that a line does not set."""


def method(label: str) -> Callable[..., GradientMethod]:
    """What makes the gradient method that `label` names from a model.

    Args:
        label: a registered name, optionally ":" and KEY=VALUE, ..., with values as on the lines of attacks.

    Raises:
        ValueError: no such method or parameter, one given twice, or a value that it does not take.
    """
    if len(label) > LONGEST:
        raise ValueError(f"{short(label)} has {len(label)} characters; a method is named with at most {LONGEST}")
    name, _, words = label.partition(":")
    made = gradient_method(name)
    if not words:
        return made
    known = [key for key in inspect.signature(made).parameters if key not in ("model", *OTHERS)]
    given = options(label, words, known, plain=("auto",))
    try:
        made(nn.Linear(1, 1), **given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{short(label)}: {error}") from None
    return partial(made, **given)
