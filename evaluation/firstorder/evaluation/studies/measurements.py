"""Measurements behind items of the papers that are no run: tables for the claims, and figures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from firstorder.evaluation.reporting.paper_tables import Table


class Measured(NamedTuple):
    """What a measurement found: tables, and figures by name."""

    tables: list[Table]
    figures: dict[str, Figure]


PLACES = {
    "bounds": "firstorder.evaluation.studies.bounds",
    "components": "firstorder.evaluation.studies.components",
    "outliers": "firstorder.evaluation.studies.outliers",
}
"""The modules whose function `measured` measures something, by its name."""


def measure(name: str, values: Mapping[str, Any]) -> Measured:
    """Measure what is called `name` with options by name.

    Raises:
        ValueError: an option that it does not have.
    """
    function: Callable[..., Measured] = import_module(PLACES[name]).measured
    known = inspect.signature(function).parameters
    for key in values:
        if key not in known:
            raise ValueError(f"the measurement {name} has no {key}; leave it out")
    return function(**values)
