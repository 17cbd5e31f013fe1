"""The models of a run: whether they are the same each time, and the same as when the run began."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from firstorder.evaluation.names.code import runs_code
from firstorder.evaluation.runs.cells import digest
from firstorder.evaluation.runs.store import Store
from firstorder.hosts.identity import Identity, identify, summary


def examined(spec: str, make: Callable[[], nn.Module], x: Tensor, *, random: bool) -> tuple[nn.Module, Identity]:
    """A model and what it is. One that a function of the user's makes is made twice.

    Args:
        spec: its name.
        make: makes it, on its device.
        x: the run's first images, there too.
        random: whether it may be random.

    Raises:
        ValueError: it is random and may not be, or another one each time it is made.
    """
    network = make()
    found = identify(network, x)
    if runs_code(spec):
        del network  # one in memory at a time
        network = make()
        found = _steady(found, identify(network, x))
    if found.random and not random:
        raise ValueError(
            "two forwards of the same images differ, so each result would be one draw of many; make its forward "
            "deterministic, or say random: true (--random) to have it evaluated all the same"
        )
    return network, found


def placed(found: Identity, store: Store | None) -> str:
    """The name of a model in the store: that under which it is kept there, else a new one.

    It is made of what the model consists of, and of what it does where the store has one of the same parts that does
    something else.
    """
    kept = {} if store is None else dict(store.identities())
    for name, other in kept.items():
        if not found.differences(other):
            return name
    if found.digest not in kept:
        return found.digest
    logits, gradient = (part.double().tolist() for part in (found.logits.nan_to_num(), found.gradient.nan_to_num()))
    return digest({"parts": found.digest, "logits": logits, "gradient": gradient})


def require_same(network: nn.Module, x: Tensor, name: str, store: Store) -> None:
    """Check that a model is the one that the run began with.

    Raises:
        ValueError: it is another, or what it was is not there any more.
    """
    kept = store.identity(name)
    if kept is None:
        raise ValueError(f"{store.identity_path(name)} is missing or damaged; call firstorder evaluate again")
    differences = identify(network, x).differences(kept)
    if differences:
        raise ValueError(
            f"the model is not the one that the run began with ({summary(differences)}); call firstorder evaluate again"
        )


def _steady(one: Identity, two: Identity) -> Identity:
    """What a model is that was made twice, without what is another each time and does nothing.

    Raises:
        ValueError: the two have other weights or do something else.
    """
    differences = one.differences(two)
    grave = [name for name in differences if name.startswith(("weights", "buffer", "state", "its ", "the gradient"))]
    if not grave:
        two = two.without(differences)
        grave = one.differences(two)
    if grave:
        raise ValueError(
            f"it is another model each time it is made ({summary(grave)}), so that no result could be reproduced; "
            "load its weights, or set the seed in the function that makes it"
        )
    return two
