"""The ART class of every registered attack, and ART's own names for some of them."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import art.attacks.evasion
import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.classification.classifier import ClassifierMixin

from firstorder.art.attack import HOST, ARTAttack
from firstorder.attacks import Attack
from firstorder.attacks.bounded import BoundedAttack
from firstorder.hosts import Host, signature

PEERS = {
    "FGSM": "FastGradientMethod",
    "BIM": "BasicIterativeMethod",
    "PGD": "ProjectedGradientDescent",
    "MIFGSM": "MomentumIterativeMethod",
}
"""ART's own classes for attacks of the catalogue."""

NAMES = {theirs: ours for ours, theirs in PEERS.items()} | {
    "ProjectedGradientDescentNumpy": "PGD",
    "ProjectedGradientDescentPyTorch": "PGD",
}
"""ART's names of attacks of the catalogue; one class of ours is for all frameworks."""


@cache
def host_class(attack: type[Attack]) -> type[ARTAttack]:
    """The ART class of a registered attack; the same class at every call."""
    peer: Any = getattr(art.attacks.evasion, PEERS.get(attack.__name__, ""), None)
    own = {f.name: f.default for f in dataclasses.fields(attack)}
    host: Host = HOST
    defaults: dict[str, Any] = {}
    if "random_start" in own:
        defaults["num_random_init"] = own["restarts"] if own["random_start"] is True else 0
    else:
        host = dataclasses.replace(HOST, extras={k: v for k, v in HOST.extras.items() if k != "num_random_init"})
    if "norm" in own:
        defaults["norm"] = {"Linf": np.inf, "L2": 2}[str(own["norm"])]
    if peer is not None:
        theirs = {name: p.default for name, p in inspect.signature(peer).parameters.items() if name != HOST.first}
        known = {HOST.word(name) for name in own}
        defaults |= {name: value for name, value in theirs.items() if name not in known | host.extras.keys()}
    parameters = signature(host, attack, peer, **defaults)
    names = [name for name in parameters.parameters if name != HOST.first]
    made: type[ARTAttack] = type(
        attack.__name__,
        (ARTAttack,),
        {
            "__module__": "firstorder.art",
            "__doc__": f"{inspect.getdoc(attack)}\n\n{inspect.getdoc(ARTAttack)}",
            "__signature__": parameters,
            "attack_params": [*EvasionAttack.attack_params, *names],
            "attack_class": attack,
            "_estimator_requirements": (
                ARTAttack._estimator_requirements
                if issubclass(attack, BoundedAttack)
                else (*ARTAttack._estimator_requirements, ClassifierMixin)  # which class is the nearest?
            ),
        },
    )
    if issubclass(attack, BoundedAttack):
        # ART's composite attacks ask isinstance before they take an attack within a ball.
        (peer or art.attacks.evasion.ProjectedGradientDescent).register(made)
    return made
