"""The places in the five papers that classes name, against one table."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

import firstorder.attacks
import firstorder.training
from firstorder.evaluation.names.citations import PAPERS, PLACES

SIGNS = {
    "liu2020sharper": ("Liu & Tsang", "QG"),
    "lin2020nesterov": ("Lin et al. 2020", "NI"),
    "ngm2024provable": ("NGM (ICLR 2024 submission)", "NGM"),
    "liu2021selfadaptive": ("Liu & Cao", "ANU"),
    "dabouei2022revisiting": ("ENGM", "ENGM"),
}
"""Of each of the five papers: how `paper` begins with it, and its mark in docstrings."""
PLACE = re.compile(r"(?:Eqs?\.|Alg\.|App\.|Sec\.|Theorem|Lemma) [0-9A-Z](?:[0-9a-z.\-]|, (?=[0-9]))*")


def classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for package in (firstorder.attacks, firstorder.training):
        for module in pkgutil.iter_modules(package.__path__):
            space = importlib.import_module(f"{package.__name__}.{module.name}")
            found |= {n: c for n, c in vars(space).items() if inspect.isclass(c) and c.__module__ == space.__name__}
    return found


def named(cls: type) -> Iterator[tuple[str, str]]:
    """The papers and places that a class names."""
    paper = vars(cls).get("paper", "")
    for part in paper.split("; ") if isinstance(paper, str) and not paper.startswith("no paper's") else ():
        for key, (start, _) in SIGNS.items():
            if part.startswith(start):
                yield from ((key, place) for place in PLACE.findall(part))
    for key, (_, mark) in SIGNS.items():
        for places in re.findall(rf"\[{mark}\],?((?: [^);\[]*)?)", (cls.__doc__ or "").split("Args:")[0]):
            yield from ((key, place) for place in PLACE.findall(places))


@pytest.mark.parametrize("name", PLACES)
def test_a_class_names_its_places(name: str) -> None:
    key, *places = PLACES[name]
    assert key in PAPERS
    own = [place.rstrip(".,") for paper, place in named(classes()[name]) if paper == key]
    assert sorted({place for place in own if "Lemma" not in place}) == sorted(places)


def test_no_class_names_a_place_that_is_not_in_the_table() -> None:
    others = {name: places for name, cls in classes().items() if name not in PLACES and (places := [*named(cls)])}
    assert not others
