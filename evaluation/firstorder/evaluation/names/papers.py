"""The items of the papers: every table, figure, algorithm and ablation, and what it takes to check it here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from firstorder.evaluation.names.citations import PAPERS
from firstorder.evaluation.names.documents import mistakes
from firstorder.evaluation.names.packaged import ASSETS

FILE = ASSETS / "papers" / "items.yaml"

Reading = Literal["agrees", "differs", "undecided"]
"""What the figures here say of the paper's claims."""

Kind = Literal["run", "transfer", "norms", "study", "measurement", "command"]
"""What computes an item: a run of attacks at radii, one in which examples are carried to other models, one of attacks
of minimum norm, a study of training, something measured at once, or a command of its own.
"""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Claim(_Strict):
    """Something that the paper's figures show, as an inequality between rows of the item's table.

    A row is named, or two rows whose difference is meant; larger and smaller may also be a number.

    Attributes:
        says: it in words.
        more, than: the one is larger than the other.
        least: the smallest difference that is the claim's; below it the two are the same. By default half of the
            paper's, where it prints both.
        same, as_, within: the two are no further apart than that.
        rising, falling: the rows, in order, become larger or smaller.
    """

    says: str
    more: str | tuple[str, str] | float = ""
    than: str | tuple[str, str] | float = ""
    least: float | None = Field(None, gt=0)
    same: str | tuple[str, str] = ""
    as_: str | tuple[str, str] = Field("", alias="as")
    within: float = Field(1.0, gt=0)
    rising: tuple[str, ...] = ()
    falling: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one(self) -> Claim:
        forms = [
            self.more != "" and self.than != "",
            bool(self.same and self.as_),
            bool(self.rising),
            bool(self.falling),
        ]
        if sum(forms) != 1:
            raise ValueError("write more and than, same and as, rising, or falling")
        return self

    def smallest(self, published: Mapping[str, float]) -> float | None:
        """The smallest difference that counts, where one is known.

        Args:
            published: the paper's figures by row.
        """
        if self.least is not None or self.same:
            return self.least
        order = self.rising or self.falling[::-1]
        more, than = (_of(side, published) for side in ((order[-1], order[0]) if order else (self.more, self.than)))
        return None if more is None or than is None or more <= than else (more - than) / 2

    @property
    def rows(self) -> list[str]:
        """The rows that it is about."""
        named = (self.more, self.than, self.same, self.as_, self.rising, self.falling)
        parts = [(part,) if isinstance(part, str) else part for part in named if part and not isinstance(part, float)]
        return [one for part in parts for one in part]


def _of(side: str | tuple[str, str] | float, published: Mapping[str, float]) -> float | None:
    """A side of a claim in the paper's figures; None where it does not print them."""
    if isinstance(side, float):
        return side
    if isinstance(side, str):
        return published.get(side)
    first, second = (published.get(row) for row in side)
    return None if first is None or second is None else first - second


class Item(_Strict):
    """A table, a figure, an algorithm or an ablation of a paper.

    Attributes:
        paper: its key among the citations.
        item: what the paper calls it.
        shows: what it shows there.
        kind: what computes it here.
        specification: of that: of a run, or of a study of training; the name and the options of a measurement.
        runs: the item whose runs of training it reads, where it has none of its own.
        report: whether the figures of `firstorder train-report` are written too.
        worst: whether the table of a run with several seeds has the lowest run, and the runs merged, as rows too.
        claims: what is read off the table.
        needs: the option without which it has no images or no model.
        published: the paper's figures by row, on its own networks, in the unit of the table.
        theirs: the paper's figures in words, where `published` does not say it.
        cost: what it takes, on one core.
        small: keys of the specification that make it as small as it can be.
        command: that shows it, for what the mechanism here does not compute.
        reading: what that found; none for what the mechanism here computes, or what nobody has run.
        here: the figures that it found, in words.
        reason: why it is out of reach, or left open.
    """

    paper: str
    item: str
    shows: str
    kind: Kind = "command"
    specification: dict[str, Any] = {}
    runs: str = ""
    report: bool = False
    worst: bool = False
    needs: str = ""
    claims: tuple[Claim, ...] = ()
    published: dict[str, float] = {}
    theirs: str = ""
    cost: str = ""
    small: dict[str, Any] = {}
    command: str = ""
    reading: Reading | Literal["", "out of reach"] = ""
    here: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Item:
        if self.paper not in PAPERS:
            raise ValueError(f"paper={self.paper!r} is not among the citations")
        runs = self.kind != "command"
        if runs != bool(self.specification) or runs != bool(self.claims) or (runs and (self.command or self.reading)):
            raise ValueError("what is computed has a specification and claims, and no command and reading")
        if (self.runs or self.report) and self.kind != "study":
            raise ValueError("a study alone has runs of training")
        if not runs and not (self.command or self.reason):
            raise ValueError("name a command, or the reason why there is none")
        if self.reading in ("differs", "undecided", "out of reach") and not self.reason:
            raise ValueError(f"give the reason why it {self.reading}")
        return self


class _Items(_Strict):
    items: dict[str, Item]


@cache
def items() -> dict[str, Item]:
    """All items by their names, in the order of the papers.

    Raises:
        ValueError: a file that holds something else.
    """
    values = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    try:
        return _Items(items=values).items
    except ValidationError as error:
        raise ValueError(mistakes(error, tuple(Item.model_fields), source=str(FILE))) from None


def item(name: str) -> Item:
    """The item of a name.

    Raises:
        ValueError: there is none.
    """
    found = items().get(name)
    if found is None:
        near = difflib.get_close_matches(name, items(), 1)
        hint = f"did you mean {near[0]}?" if near else "firstorder reproduce list shows them"
        raise ValueError(f"the papers have no item {name!r}; {hint}")
    return found
