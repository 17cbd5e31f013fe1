"""The models of a run: what is known of each before it is attacked, and which changed since the run was called last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import Model, Prepared, TorchModel
from firstorder.attacks.inspection import Inspection
from firstorder.attacks.validation import Labels
from firstorder.evaluation.runs.examples import Examples
from firstorder.evaluation.runs.identity import examined, placed
from firstorder.evaluation.runs.loading import interface, module, usable
from firstorder.evaluation.runs.specification import ModelEntry, Specification
from firstorder.evaluation.runs.store import Store
from firstorder.hosts.identity import Identity, summary


class Known(NamedTuple):
    """What a run knows of a model.

    Attributes:
        entry: of the specification.
        digest: its name in the store, of what it consists of and does.
        identity: that.
        parameters: their number.
        architecture: name of its class.
        preparation: what its faster copy consists of; empty without one.
        seconds: that a forward and backward of one example took, roughly.
    """

    entry: ModelEntry
    digest: str
    identity: Identity
    parameters: int
    architecture: str
    preparation: tuple[str, ...]
    seconds: float


def know(
    entry: ModelEntry, specification: Specification, found: Examples, device: torch.device, store: Store | None
) -> Known:
    """Load a model and look at it, on the first images of the run.

    Raises:
        ValueError: it cannot be attacked as asked.
        FileNotFoundError: weights that are not there.
    """
    x, labels = found.first.to(device), torch.tensor(found.labels, device=device)

    def made() -> nn.Module:
        network = module(entry, specification).to(device)
        bare = TorchModel(network)
        with bare.preserved():
            Inspection(Labels(labels)).logits(bare.logits(x[:2]))
        return network

    def known(_: ModelEntry) -> Known:
        network, identity = examined(entry.model, made, x, random=specification.random)
        attacked = interface(network, x, specification, specification.precision)
        return Known(
            entry=entry,
            digest=placed(identity, store),
            identity=identity,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            architecture=type(network).__name__,
            preparation=attacked.parts if isinstance(attacked, Prepared) else (),
            seconds=_seconds(attacked, x[:2]),
        )

    return usable(entry, known)


def _seconds(attacked: Model, x: Tensor) -> float:
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with attacked.preserved():
        attacked.gradient(x, labels, None)
        start = time.perf_counter()
        attacked.gradient(x, labels, None)
        return (time.perf_counter() - start) / len(x)


def changed(
    models: tuple[Known, ...], had: Mapping[str, Any], store: Store, specification: Specification
) -> Iterator[str]:
    """A line for every model that is another than when the run was last called.

    On other images it does something else, and is the same if it consists of the same.
    """
    before = {one["name"]: one["digest"] for one in had.get("models", ())}
    now, then = specification.model_dump(mode="json"), had.get("specification", {})
    decide = ("data", "skip", "select", *(("models",) if specification.select != "all" else ()))
    moved = any(now[key] != then.get(key) for key in decide)
    for known in models:
        was = before.get(known.entry.label)
        if was is not None and was != known.digest:
            kept = store.identity(was)
            if moved and kept is not None and kept.digest == known.identity.digest:
                continue
            how = "what it was is not known" if kept is None else summary(known.identity.differences(kept))
            yield f"{known.entry.label} is not the model that it was ({how}): it is evaluated anew"
