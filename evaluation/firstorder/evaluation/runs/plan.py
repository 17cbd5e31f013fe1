"""From a specification to cells: everything is loaded and checked before anything is written."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firstorder.attacks.distribution import versions
from firstorder.evaluation.names.defences import defence
from firstorder.evaluation.names.devices import processor
from firstorder.evaluation.runs import axes, examples, trust
from firstorder.evaluation.runs.adversaries import Adversary
from firstorder.evaluation.runs.cells import FORMAT, Cell, digest
from firstorder.evaluation.runs.columns import COLUMNS
from firstorder.evaluation.runs.examples import Examples
from firstorder.evaluation.runs.growth import Growth, grown
from firstorder.evaluation.runs.growth import known as known_facts
from firstorder.evaluation.runs.growth import left_out as lost
from firstorder.evaluation.runs.known import Known, changed, know
from firstorder.evaluation.runs.limits import Limits
from firstorder.evaluation.runs.limits import read as read_limits
from firstorder.evaluation.runs.loading import chosen
from firstorder.evaluation.runs.machine import machine, settings
from firstorder.evaluation.runs.specification import Specification
from firstorder.evaluation.runs.store import Store

PACKAGES = ("torch", "torchvision", "pyautoattack", "robustbench", "timm")
"""Whose versions a run records beside those of Python and firstorder."""

CELLS = 10**7
"""The most cells of a run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can begin, or go on.

    Attributes:
        models: those of the specification, then the ensembles of them that examples are made on.
        diagnoses: a cell for every model that is diagnosed.
        left_out: the attacks that `all` would have named, were a step of theirs within the budget.
        before: the facts of the run that goes on; empty for a new one.
        limits: what others know of the examples, where a file says it.
        notices: lines that its user must see: what changed in it since.
    """

    specification: Specification
    device: torch.device
    examples: Examples
    models: tuple[Known, ...]
    adversaries: tuple[Adversary, ...]
    left_out: tuple[str, ...]
    cells: tuple[Cell, ...]
    diagnoses: tuple[Cell, ...]
    limits: Limits | None
    before: dict[str, Any]
    notices: tuple[str, ...]

    def gradients(self, cell: Cell) -> int | None:
        """The most gradients of a cell; None where that is not known."""
        (attack,) = (one for one in self.adversaries if one.name == cell.attack)
        price = attack.price(cell.phase)
        return None if price is None else price * (cell.stop - cell.start)

    def facts(self, command: str) -> dict[str, Any]:
        """What `run.json` holds, as plain values.

        Args:
            command: that made the run.
        """
        return {
            "format": FORMAT,
            "command": command,
            "versions": {"python": platform.python_version(), **versions(PACKAGES)},
            "specification": self.specification.model_dump(mode="json"),
            "device": self.device.type,
            "machine": machine(self.device),
            "settings": settings(),
            "data": {
                "spec": self.specification.data,
                "name": self.examples.name,
                "digest": self.examples.digest,
                "count": self.examples.count,
                "shape": list(self.examples.shape),
                "classes": list(self.examples.classes),
            },
            "models": [
                {
                    "name": known.entry.label,
                    "spec": known.entry.model,
                    "digest": known.digest,
                    "weights": known.identity.weights,
                    "reported": known.entry.reported,
                    "parameters": known.parameters,
                    "architecture": known.architecture,
                    "preparation": list(known.preparation),
                    "precision": next((one for one in ("bfloat16", "float16") if one in known.preparation), "float32"),
                }
                for known in self.models
            ],
            "attacks": [
                {
                    **one.facts(),
                    "label": one.label,
                    "steps": one.steps,
                    "step_sizes": one.step_sizes(self.specification.eps, math.prod(self.examples.shape)),
                }
                for one in self.adversaries
            ],
            "limits": None if self.limits is None else self.limits.plain(),
            "left out": list(self.left_out),
            "cells": [cell.plain() for cell in self.cells],
            "diagnoses": [cell.plain() for cell in self.diagnoses],
        }


def plan(specification: Specification, store: Store | None = None, growth: Growth | None = None) -> Plan:
    """Load and check all that a specification names.

    Args:
        specification: what is asked for.
        store: of the run, if it has a folder. A run that is there keeps what it has, see `growth.grown`, and models are
            compared with those that are known there.
        growth: how it changes beside that.

    Raises:
        ValueError: anything that does not fit, under its name.
        FileNotFoundError: weights or data that are not there.
    """
    had, notices = ({}, []) if store is None else known_facts(store)
    specification = grown(specification, had, growth or Growth())
    device = processor(specification.device)
    for spec in specification.defences:
        defence(spec)
    keep, kept = chosen(specification, device)
    found = examples.survey(
        specification.data,
        skip=specification.skip,
        count=specification.count,
        shard=specification.shard,
        keep=keep,
        kept=kept,
    )
    if specification.count is not None and found.count < specification.count:
        notices.append(f"{found.count} of {specification.count} images asked for: {specification.data} has no more")
    limits = None if specification.limits is None else _limits(specification.limits, specification, found)
    adversaries, left_out = axes.attacks(specification, found.shape)
    count = len(found.shards) * len(specification.made_on) * len(specification.seeds)
    count *= sum(len(specification.eps) if one.bounded else 1 for one in adversaries)
    if count > CELLS:
        raise ValueError(f"these are {count} cells, which would not end; raise shard, or name less of something else")
    known = tuple(know(entry, specification, found, device, store) for entry in specification.interfaces)
    classes = min(one.identity.logits.shape[1] for one in known)
    if specification.targeted.isdecimal() and int(specification.targeted) >= classes:
        raise ValueError(f"targeted={specification.targeted} is no class of the models; they have 0 to {classes - 1}")
    cells = tuple(_cells(specification, device, found, known, adversaries, store))
    diagnosed = [(one.entry.label, one.digest) for one in known[: len(specification.models)]]
    if store is not None:
        notices += [*changed(known, had, store, specification), *lost(specification, cells, had, store)]
    return Plan(
        specification=specification,
        device=device,
        examples=found,
        models=known,
        adversaries=adversaries,
        left_out=left_out,
        cells=cells,
        diagnoses=tuple(trust.cells(specification, device.type, found, diagnosed)),
        limits=limits,
        before=had,
        notices=tuple(notices),
    )


def _limits(path: str, specification: Specification, found: Examples) -> Limits:
    if len(specification.models) > 1 or found.chosen is not None:
        raise ValueError(
            f"limits={path} are of one model and of the images as they come; leave out the others, select, and a class "
            "that is targeted"
        )
    return read_limits(path, skip=specification.skip, count=found.count)


def _cells(
    specification: Specification,
    device: torch.device,
    found: Examples,
    known: tuple[Known, ...],
    adversaries: tuple[Adversary, ...],
    store: Store | None,
) -> Iterator[Cell]:
    digests = {one.entry.label: one.digest for one in known}
    common = {
        "format": FORMAT,
        "columns": list(COLUMNS),
        "versions": versions(["torch"]),
        "device": device.type,
        "norm": specification.norm,
        "batch size": specification.batch_size,
        "targets": [[name, digests[name]] for name in specification.carried_to],
        "defences": [repr(defence(spec)) for spec in specification.defences],
        "draws": specification.draws if specification.defences else 0,
        "targeted": specification.targeted,
    }
    made_on = {one.entry.label: one for one in known}
    for name in specification.made_on:
        one = made_on[name]
        mine = {"model": [name, one.digest], "preparation": one.preparation}
        begun: list[Cell] = []
        for start, stop, shard in found.shards:
            pictures = max(min(stop, specification.pictures) - start, 0)
            for attack in adversaries:
                for eps in specification.eps if attack.bounded else (None,):
                    for seed in specification.seeds:
                        own = {"eps": eps, "seed": seed, "examples": shard, "start": start, "pictures": pictures}
                        key = _key({**common, **mine, **own}, attack.facts(), store)
                        begun.append(Cell(key, name, attack.name, eps, seed, start, stop))
        yield from begun
        for attack in adversaries:
            yield from _later(attack, [cell for cell in begun if cell.attack == attack.name], found.count)


def _key(facts: Mapping[str, Any], attack: Mapping[str, Any], store: Store | None) -> str:
    """The key of a cell, whose attack's citation is no part of it; of format 5 it was one, and cells that have such a
    key keep it.
    """
    cited = digest({**facts, "attack": dict(attack)})
    if store is not None and store.path(cited).exists():
        return cited
    return digest({**facts, "attack": {name: value for name, value in attack.items() if name != "paper"}})


def _later(attack: Adversary, begun: list[Cell], count: int) -> Iterator[Cell]:
    """The later phases of an attack that began in these cells: each a cell with all examples, after the one before."""
    for eps, seed in dict.fromkeys((cell.eps, cell.seed) for cell in begun if attack.later):
        first = tuple(cell.key for cell in begun if (cell.eps, cell.seed) == (eps, seed))
        before = first
        for phase, facts in attack.later.items():
            after = tuple(dict.fromkeys((*before, *first)))
            key = digest({"phase": phase, "facts": facts, "after": after})
            yield Cell(key, begun[0].model, attack.name, eps, seed, 0, count, phase, after)
            before = (key,)
