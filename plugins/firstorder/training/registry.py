"""The registry of gradient methods: the entry-point group `firstorder.training`.

A distribution registers a subclass of `GradientMethod` that can be made from a model alone:

    [project.entry-points."firstorder.training"]
    my-method = "my_package:MyMethod"

The name goes wherever a method is named: `firstorder train --method my-method`, Recipe(method="my-method"),
AdversarialTrainerENGM(..., method="my-method"). firstorder's own are registered the same way; an entry that cannot
be used is treated as in `firstorder.attacks.registry`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from firstorder.attacks import Registry
from firstorder.training.method import GradientMethod


@cache
def registry() -> Registry[GradientMethod]:
    """The registered gradient methods, read once per process; `registry.cache_clear()` rereads them."""
    return Registry[GradientMethod].read("firstorder.training", "gradient method", _no_method)


def gradient_method(method: str | Callable[..., GradientMethod]) -> Callable[..., GradientMethod]:
    """What makes a gradient method from a model; a name is that of a registered class.

    Raises:
        ValueError: a name that is not registered, or something that makes nothing.
    """
    if isinstance(method, str):
        return registry().get(method)
    if not callable(method):
        raise ValueError(f"method={method!r} makes no gradient method from a model; pass a class, as ENGM, or a name")
    return method


def takes_alpha(method: str | Callable[..., GradientMethod]) -> bool:
    """Whether a method has a limit `alpha` to set."""
    return "alpha" in inspect.signature(gradient_method(method)).parameters


class _Methods(Mapping[str, type[GradientMethod]]):
    """The registry's classes, read when they are asked for: not while this package is imported."""

    def __getitem__(self, name: str) -> type[GradientMethod]:
        return registry().classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(registry().classes)

    def __len__(self) -> int:
        return len(registry().classes)


METHODS: Mapping[str, Callable[..., GradientMethod]] = _Methods()
"""The registered methods by the names that trainers take."""


def _no_method(cls: type) -> str | None:
    if not issubclass(cls, GradientMethod):
        return "is not a subclass of firstorder.training.GradientMethod"
    try:
        inspect.signature(cls).bind(None)
    except TypeError as error:
        return f"cannot be made from a model alone: {error}; give its other parameters defaults"
    return None
