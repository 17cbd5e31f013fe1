"""Folders of runs with made-up results, as `firstorder evaluate` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from firstorder.evaluation.runs.cells import FORMAT, Cell
from firstorder.evaluation.runs.columns import schema
from firstorder.evaluation.runs.store import Run, Store, read

MINIMUM_NORM = "DDN-1000"
ATTACKS = {"PGD-40": 0.95, "MI-FGSM": 0.85, "NI-FGSM": 0.8, "FGSM": 0.5, "AutoAttack": 1.0, MINIMUM_NORM: 0.9}
KINDS = {MINIMUM_NORM: "minimum-norm", "AutoAttack": "autoattack"}
SHAPE = (3, 8, 8)


def facts(
    models: Sequence[str],
    attacks: Sequence[str],
    eps: Sequence[float],
    seeds: Sequence[int],
    count: int,
    *,
    norm: str = "Linf",
    shard: int = 1000,
    transfer: bool = False,
) -> dict[str, Any]:
    """What run.json holds; the cells are in the order of the models."""
    cells = [
        Cell(f"{m:02}-{i:02}-{k}-{seed}-{start}", model, attack, radius, seed, start, min(start + shard, count))
        for m, model in enumerate(models)
        for start in range(0, count, shard)
        for i, attack in enumerate(attacks)
        for k, radius in enumerate([None] if attack == MINIMUM_NORM else eps)
        for seed in seeds
    ]
    return {
        "format": FORMAT,
        "command": "firstorder evaluate spec.yaml --out runs/x",
        "versions": {"firstorder": "0.1.0", "torch": "2.12.0", "python": "3.11.2"},
        "specification": {
            "models": [{"model": model, "name": ""} for model in models], "data": "mnist", "count": count, "norm": norm,
            "eps": list(eps), "seeds": list(seeds), "transfer": transfer, "early_stop": True, "zoo": {"threat": None},
            "sources": [], "targets": [], "defences": [], "draws": 5, "steps": [], "targeted": "",
            "pictures": 8,
        },
        "device": "cpu",
        "data": {"spec": "cifar10", "digest": "d" * 32, "count": count, "shape": list(SHAPE),
                 "classes": ["cat", "dog", "ship"]},
        "models": [
            {"name": name, "spec": name, "digest": "0123456789abcdef" * 2, "parameters": 215370,
             "weights": "fedcba9876543210" * 2, "architecture": "SmallCNN",
             "preparation": ["folded", "channels_last"], "precision": "float32"}
            for name in models
        ],
        "attacks": [
            {"name": name, "attack": name.lower(), "class": name.partition("-")[0], "paper": "Author et al. 2018",
             "source": "firstorder 0.1.0", "kind": KINDS.get(name, "bounded"),
             "label": name, "steps": 40, "parameters": {"steps": 40, "alpha": "eps/4", "decay": 0.9},
             "stops_early": name not in KINDS}
            for name in attacks
        ],
        "cells": [cell._asdict() for cell in cells],
    }  # fmt: skip


def table(columns: dict[str, Any]) -> pa.Table:
    """Rows from some of the columns of the schema; the others are null."""
    count = len(columns["example"])
    return pa.table(
        {field.name: pa.array(columns.get(field.name, [None] * count), type=field.type) for field in schema()},
        schema=schema(),
    )


def make(folder: Path, found: dict[str, Any], *, pictures: int = 0, unfinished: Sequence[str] = ()) -> Run:
    """A run whose cells are all finished, but for those with a key that starts with one of `unfinished`.

    The first `pictures` examples are kept as pictures, and with any of them those that are broken.
    """
    store, count, models = Store(folder), found["data"]["count"], [model["name"] for model in found["models"]]
    store.write(found)
    random, others = np.random.default_rng(7), np.random.default_rng(8)
    labels = random.integers(0, 3, count)
    images = random.integers(60, 200, (count, *SHAPE), dtype=np.uint8)
    store.data.mkdir(parents=True)
    np.save(store.data / f"{found['data']['digest']}-x.npy", images)
    np.save(store.data / f"{found['data']['digest']}-y.npy", labels)
    largest = max(found["specification"]["eps"])
    hard = {model: largest * random.gamma(3, 0.25, count) * (1 + 0.6 * i) for i, model in enumerate(models)}
    clean = {model: np.where(random.random(count) < 0.94, labels, (labels + 1) % 3) for model in models}
    for cell in (Cell(**cell) for cell in found["cells"]):
        if cell.key.startswith(tuple(unfinished) or ("-",)):
            continue
        own = np.arange(cell.start, cell.stop)
        y, before, draw = labels[own], clean[cell.model][own], random.random(len(own))
        nearest = hard[cell.model][own] / (ATTACKS[cell.attack] * (0.9 + 0.1 * draw))
        attacked, radius = before == y, np.inf if cell.eps is None else cell.eps
        size = np.where(attacked, np.minimum(nearest, largest * 3) if cell.eps is None else cell.eps, 0.0)
        passes = np.where(
            attacked, np.minimum(1 + 39 * nearest / (largest if cell.eps is None else cell.eps), 40).round(), 0
        )
        tables = []
        for target in models if found["specification"]["transfer"] else [cell.model]:
            guess = clean[target][own]
            hit = (nearest if target == cell.model else 2.2 * hard[target][own]) <= radius
            after = np.where(attacked & hit, (y + 2) % 3, guess)
            kept = (own < pictures) | (attacked & hit & (pictures > 0)) if target == cell.model else np.zeros_like(hit)
            shown = [
                (images[i] / np.float32(255) + np.float32(0.04) * source.choice([-1, 1], SHAPE))
                .clip(0, 1).astype("<f4").tobytes() if pictured else None
                for i, pictured, source in zip(own, kept, np.where(own < pictures, random, others), strict=True)
            ]  # fmt: skip
            columns = {
                "model": [cell.model] * len(own), "target": [target] * len(own), "attack": [cell.attack] * len(own),
                "eps": [cell.eps] * len(own), "seed": [cell.seed] * len(own), "example": own, "label": y,
                "clean_label": guess, "adversarial_label": after, "success": after != y,
                "doubtful": np.zeros(len(own), dtype=bool), "unverified": np.zeros(len(own), dtype=bool),
                "linf": size, "l2": 3 * size,
                "share": (after != y) * 1.0, "wrong_share": (after != y) * 1.0, "clean_share": (guess != y) * 1.0,
                "rounded_success": after != y, "clean_confidence": [0.9] * len(own), "confidence": [0.8] * len(own),
                "logit_margin": np.where(after == y, 1.0, -1.0) * (1 + own),
                "loss": nearest, "forwards": passes + 1.0, "backwards": passes, "seconds": [0.0123] * len(own),
                "adversarial": shown,
            }  # fmt: skip
            tables.append(table(columns))
        store.save(cell, pa.concat_tables(tables))
    return read(folder)
