"""The one foolbox class of every registered attack."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from functools import cache
from inspect import Parameter
from typing import Any, ClassVar

import foolbox.attacks
import foolbox.distances
import torch
from foolbox.attacks.base import AttackWithDistance, FixedEpsilonAttack, MinimizationAttack, raise_if_kwargs

from firstorder.attacks import Attack, TorchModel, preserved, validation
from firstorder.foolbox.query import Broken, Query, Within, query
from firstorder.hosts import Host, relative_step, signature

HOST = Host(
    first=None,
    renames={"eps": None, "alpha": "abs_stepsize", "decay": "momentum", "init_norm": "init_epsilon"},
    extras={"rel_stepsize": None, "seed": None},
)
"""foolbox's words; the radius is given at the call."""

PEERS = {"BIM": "LinfBasicIterativeAttack", "DDN": "DDNAttack"}
"""foolbox's own classes for attacks of the catalogue, where they have other names than here."""

DISTANCES = {"Linf": Within(foolbox.distances.linf.p), "L2": Within(foolbox.distances.l2.p)}


class FoolboxAttack(AttackWithDistance):  # type: ignore[misc]
    """An attack with foolbox's interface.

    `abs_stepsize` is the step size; where it is None it is `rel_stepsize` times the radius, and where both are None the
    attack's own. `norm` is "Linf" or "L2". Hyper-parameters are attributes and may be changed between calls. The random
    draws come from a generator of the attack's own, seeded with `seed`, or with `torch.initial_seed()` for None; it
    advances from run to run, and global random state is not touched.

    The model is a `foolbox.PyTorchModel`, or one of foolbox's wrappers around one. It is attacked in evaluation mode
    and gets its modes and buffers back. Success is decided by finite logits alone.

    Raises:
        ValueError: bad parameters, when made; at the call, before any work, bad radii, inputs that are no tensor or
            outside the model's bounds, criteria other than `Misclassification` and `TargetedMisclassification`, models
            that are not PyTorch's. The message names the remedy.
    """

    attack_class: ClassVar[type[Attack]]

    def __init__(self, **kwargs: Any) -> None:
        call = inspect.signature(type(self)).bind(**kwargs)
        call.apply_defaults()
        self._parameters = tuple(call.arguments)
        for name, value in call.arguments.items():
            setattr(self, name, value)
        self._generator: torch.Generator | None = None
        self._core()

    @property
    def distance(self) -> Within:
        """foolbox's distance in the attack's norm, whose clipping keeps to the ball and to the bounds."""
        return DISTANCES[getattr(self, "norm", self.attack_class.norms[0])]

    def __call__(self, model: Any, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        """Attack inputs (N, ...) once for every radius, or for all of them where the smallest norm is searched.

        Args:
            model: a `foolbox.PyTorchModel`, or one of foolbox's wrappers around one.
            inputs: a tensor (N, ...) within the model's bounds, or eagerpy's wrapper of one.
            criterion: labels, or `Misclassification` of labels, or `TargetedMisclassification` of targets: indices
                (N,) or one-hot rows (N, K).
            epsilons: a radius or several; None, for attacks that search for the smallest norm, is no limit.

        Returns:
            raw examples (N, ...), examples clipped to the ball and their success (N,); for several radii lists of
            examples and success (K, N).
        """
        raise_if_kwargs(kwargs)
        radii = self._radii(epsilons)
        asked = query(model, inputs, criterion)
        aim = Broken(asked.labels, targeted=asked.targeted)
        with preserved(asked.module):
            return super().__call__(model, asked.restored(asked.x), aim, epsilons=radii)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._parameters)
        return f"{type(self).__name__}({shown})"

    def _search(self, asked: Query, epsilon: Any = None) -> Any:
        """The examples that an attack with radius `epsilon` finds, as what was given."""
        adversarial = self._core(epsilon)(
            TorchModel(asked.model, module=asked.module),
            asked.x,
            asked.labels,
            targeted=asked.targeted,
            bounds=tuple(asked.model.bounds),
            generator=self._source(asked.x.device),
        )
        return asked.restored(adversarial)

    def _radii(self, epsilons: Any) -> Any:
        """`epsilons` as a number or a list, each refused here where an attack cannot have it."""
        given = epsilons.tolist() if hasattr(epsilons, "tolist") else epsilons
        radii = list(given) if isinstance(given, Iterable) else [given]
        if not radii:
            raise ValueError(f"epsilons={epsilons!r} names no radius; pass one, or several in a list")
        for radius in radii:
            if radius is not None:
                self._core(radius)
            elif isinstance(self, FixedEpsilonAttack):
                raise ValueError(
                    f"epsilons={epsilons!r}: {type(self).__name__} stays within a ball; pass its radius, or take an "
                    "attack that searches for the smallest norm, such as DDN"
                )
        return radii if isinstance(given, Iterable) else given

    def _core(self, epsilon: Any = None) -> Attack:
        """The attack with the current hyper-parameters, and with the radius `epsilon` unless that is None."""
        fields = [f.name for f in dataclasses.fields(self.attack_class) if HOST.word(f.name) in self._parameters]
        parameters = {name: getattr(self, str(HOST.word(name))) for name in fields}
        own = {f.name: f.default for f in dataclasses.fields(self.attack_class)}
        if epsilon is not None and "eps" in own:
            parameters["eps"] = epsilon
        share = getattr(self, "rel_stepsize", None)
        if share is not None:
            step = relative_step("rel_stepsize", share, parameters.get("eps", own["eps"]))
            parameters["alpha"] = step if parameters["alpha"] is None else parameters["alpha"]
        return self.attack_class(**parameters)

    def _source(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = validation.seeded(self.seed, device)
        return self._generator


class Bounded(FoolboxAttack, FixedEpsilonAttack):  # type: ignore[misc]
    """An attack within a ball."""

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Examples (N, ...) within the ball of radius `epsilon`; see `__call__`."""
        raise_if_kwargs(kwargs)
        self._radii(epsilon)
        return self._search(query(model, inputs, criterion), epsilon)


class Minimal(FoolboxAttack, MinimizationAttack):  # type: ignore[misc]
    """An attack that searches for the smallest norm."""

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """The closest adversarial examples (N, ...), inputs where there is none; see `__call__`.

        `early_stop` is ignored, as foolbox's own attack of this kind ignores it.
        """
        raise_if_kwargs(kwargs)
        return self._search(query(model, inputs, criterion))


@cache
def host_class(attack: type[Attack]) -> type[FoolboxAttack]:
    """The foolbox class of a registered attack; the same class at every call."""
    own = {f.name for f in dataclasses.fields(attack)}
    peer = getattr(foolbox.attacks, PEERS.get(attack.__name__, attack.__name__), None)
    extras = {name: value for name, value in HOST.extras.items() if name != "rel_stepsize" or {"alpha", "eps"} <= own}
    shown = signature(dataclasses.replace(HOST, extras=extras), attack, peer if isinstance(peer, type) else None)
    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in shown.parameters.values()]
    return type(
        attack.__name__,
        (Bounded if "eps" in own else Minimal,),
        {
            "__module__": "firstorder.foolbox",
            "__doc__": f"{inspect.getdoc(attack)}\n\n{inspect.getdoc(FoolboxAttack)}",
            "__signature__": shown.replace(parameters=parameters),
            "attack_class": attack,
        },
    )
