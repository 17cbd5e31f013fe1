"""The one ART class of every registered attack."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from functools import cache
from typing import Any, ClassVar

import art.attacks.evasion
import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from torch import Tensor
from tqdm.auto import tqdm

from firstorder.art import sizes
from firstorder.art.models import Cast, ChannelsLast, GivenRows, as_model, predictions
from firstorder.attacks import Attack, Model, StepHook, validation
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.catalogue import PGD
from firstorder.attacks.momenta import Accumulate, Momentum
from firstorder.hosts import Host, signature

Array = np.ndarray[Any, Any]

EXTRAS = {"targeted": False, "num_random_init": 0, "batch_size": 32, "summary_writer": False, "verbose": True}

HOST = Host(
    first="estimator",
    renames={"alpha": "eps_step", "steps": "max_iter", "random_start": None, "restarts": None},
    order=("norm", "eps", "eps_step", "max_iter", "*", *EXTRAS),
    extras={**EXTRAS, "seed": None},
)
"""ART's words; `num_random_init` is random_start and restarts in one."""

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

SWITCHES = ("targeted", "verbose", "minimal", "random_eps")

SIZES = {"eps": "eps", "alpha": "eps_step"}
"""Core fields that may be arrays, with ART's names."""

NORMS = {"inf": "Linf", "Linf": "Linf", np.inf: "Linf", 2: "L2", "2": "L2", "L2": "L2"}


class ARTAttack(EvasionAttack):  # type: ignore[misc]
    """An attack with ART's interface.

    `loss=None` is the estimator's own loss. `num_random_init` is the number of runs from random
    starts, merged to the worst per example; 0 starts once, at the input itself. The random draws come
    from a generator seeded with `seed`, or with `torch.initial_seed()` for None; it advances from call
    to call, and global random state is not touched.
    """

    attack_class: ClassVar[type[Attack]]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin)

    def __init__(self, estimator: Any, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(type(self)).bind(estimator, *args, **kwargs)
        call.apply_defaults()
        super().__init__(estimator=estimator, summary_writer=call.arguments["summary_writer"])
        for name in self.attack_params:
            if name != "summary_writer":
                setattr(self, name, call.arguments[name])
        self._generator: torch.Generator | None = None
        self._check_params()

    def generate(self, x: Array, y: Array | None = None, **kwargs: Any) -> Array:
        """Adversarial examples as an array of the shape and dtype of x.

        Args:
            x: inputs within the estimator's `clip_values`, floating point, shape (N, ...).
            y: labels, or targets if `targeted`: rows (N, K) or indices (N,). None takes the estimator's own
                predictions as labels. The estimator's own loss gets rows as they are, soft or of several classes;
                success is then judged by their largest entry.
            kwargs: `mask`, an array that broadcasts to x; where it is zero x stays as it is. Other keywords are
                ignored with a warning.

        Raises:
            ValueError: a bad input, before any gradient.
        """
        mask = kwargs.pop("mask", None)
        if kwargs:
            warnings.warn(f"generate() ignores {', '.join(sorted(kwargs))}; it takes x, y and mask", stacklevel=2)
        clip = sizes.limits(self.estimator.clip_values, x.shape[1:])
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"x is {x.dtype}; convert it to what the estimator takes, for example {_remedy(clip)}")
        # Attacks know images as (N, C, H, W); some transform them as such.
        last = x.ndim == 4 and not getattr(self.estimator, "channels_first", True)
        dtype, device = self._placement()
        model = as_model(self.estimator)
        model = model if torch.from_numpy(x[:0]).dtype == dtype else Cast(model, dtype)
        model = ChannelsLast(model) if last else model
        with model.preserved():
            labels = self._labels(x, y)
        mask = None if mask is None else np.broadcast_to(mask, x.shape)
        given = self._sizes(x, clip)
        if getattr(self, "max_iter", None) == 0:
            return x.copy()
        bounds = limits(self.estimator, last, x.shape[1:])
        result = np.empty_like(x)
        starts = range(0, len(x), self.batch_size)
        for batch, start in enumerate(
            tqdm(starts, desc=f"{type(self).__name__} - Batches", leave=False, disable=not self.verbose)
        ):
            part = slice(start, start + self.batch_size)
            chosen = torch.as_tensor(labels[part], device=device)
            images = torch.as_tensor(x[part], device=device)
            free = None if mask is None else torch.tensor(mask[part], device=device)
            here = {name: sizes.of_batch(value, part, last) for name, value in given.items()}
            attack = self._core(here)
            rows = chosen if chosen.ndim == 2 and attack.loss is None and not _one_hot(chosen) else None
            words: dict[str, Any] = {
                "targeted": self.targeted,
                "bounds": bounds,
                "mask": free.movedim(-1, 1) if last and free is not None else free,
                "generator": self._source(device),
            }
            query = (
                model if rows is None else GivenRows(model, rows),
                images.movedim(-1, 1) if last else images,
                chosen if rows is None else rows.argmax(1),
            )
            if getattr(self, "minimal", False):
                adversarial = self._minimal(here, *query, **words)
            else:
                adversarial = attack(*query, **words, hook=self._hook(batch, chosen, last))
            result[part] = (adversarial.movedim(1, -1) if last else adversarial).cpu().numpy()
        if self.summary_writer is not None:
            self.summary_writer.reset()
        return result

    def _check_params(self) -> None:
        super()._check_params()
        validation.count("batch_size", self.batch_size)
        validation.count("num_random_init", self._runs(), low=0)
        validation.count("max_iter", getattr(self, "max_iter", 0), low=0)
        for name in SWITCHES:
            if not isinstance(getattr(self, name, False), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a bool")
        several = self._runs() > 1 or getattr(self, "early_stop", False) or getattr(self, "minimal", False)
        if self.summary_writer is not None and several:
            raise ValueError(
                "summary_writer follows one run; use num_random_init<=1, early_stop=False and minimal=False"
            )
        if getattr(self, "minimal", False):
            validation.size("eps_step", sizes.finite(self.eps_step), above=True)
        self._core()

    def _core(self, given: dict[str, Any] | None = None) -> Attack:
        """The attack with the current parameters, in the core's words.

        Args:
            given: eps and eps_step for one batch; None takes any finite ones of the same kind.
        """
        fields = {f.name for f in dataclasses.fields(self.attack_class)}
        words = {HOST.word(name): name for name in fields}
        parameters = {words[name]: getattr(self, name) for name in self.attack_params if name in words}
        for name in SIZES.keys() & parameters.keys():
            word = SIZES[name]
            parameters[name] = sizes.finite(getattr(self, word)) if given is None else given[word]
        if "norm" in parameters:
            parameters["norm"] = self._norm()
        if parameters.get("steps") == 0:
            parameters["steps"] = 1
        if "restarts" in fields:
            parameters |= {"random_start": self._runs() > 0, "restarts": max(1, self._runs())}
        if "decay" not in fields and getattr(self, "decay", None) is not None:
            return _MomentumPGD(**parameters, decay=self.decay)
        return self.attack_class(**parameters)

    def _minimal(self, given: dict[str, Any], model: Model, x: Tensor, y: Tensor, **words: Any) -> Tensor:
        """Examples within the smallest multiple of eps_step that breaks them, at most eps; see `Attack.__call__`."""
        found, left, mask = x.clone(), torch.arange(len(x), device=x.device), words.pop("mask")
        step, eps = (torch.as_tensor(given[name], dtype=torch.float64, device=x.device) for name in ("eps_step", "eps"))
        size = step
        while len(left) and bool((size <= eps).all()):
            here = size[left] if size.ndim and len(size) > 1 else size
            attack = self._core({"eps": here if here.ndim else float(here)})
            attack = dataclasses.replace(attack, random_start=False, restarts=1)  # type: ignore[call-arg]
            free = None if mask is None else mask[left]
            result = attack.run(model.take(left), x[left], y[left], mask=free, **words)
            assert result.success is not None
            found[left], left, size = result.adversarial, left[~result.success], size + step
        return found

    def _sizes(self, x: Array, clip: tuple[Any, Any] | None) -> dict[str, Any]:
        """eps and eps_step for x (N, ...) within `clip`: finite numbers, or arrays with the dimensions of x."""
        found = {word: sizes.fitted(word, getattr(self, word), x) for word in SIZES.values() if hasattr(self, word)}
        if "eps" in found:
            found["eps"] = sizes.radius(found["eps"], x, clip, self._norm())
            if "eps_step" in found:
                found["eps_step"] = sizes.step(found["eps_step"], found["eps"])
        if getattr(self, "random_eps", False):
            # |N(0, eps / 2)| below eps, as ART draws it: once a call, by the quantile function.
            u = float(torch.rand((), generator=self._source(self._placement()[1]), device=self._placement()[1]))
            factor = float(torch.tensor(max(u, 1e-6) * math.erf(2**0.5)).erfinv()) / 2**0.5
            found = {name: None if value is None else factor * value for name, value in found.items()}
        return found

    def _norm(self) -> str:
        norm = getattr(self, "norm", np.inf)
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not supported; use np.inf or 2")
        return NORMS[norm]

    def _runs(self) -> int:
        """`num_random_init`, 0 for an attack that starts at the input always."""
        runs: int = getattr(self, "num_random_init", 0)
        return runs

    def _labels(self, x: Array, y: Array | None) -> Array:
        """Label indices (N,) or rows (N, K), which the core reads."""
        if y is None:
            if self.targeted:
                raise ValueError("y=None: a targeted attack needs the target classes; pass y")
            scores = predictions(self.estimator, x, self.batch_size)
            y = scores.argmax(1) if scores.shape[1] > 1 else scores[:, 0].round()
        y = np.asarray(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim not in (1, 2) or len(y) != len(x):
            raise ValueError(f"y has shape {y.shape}; pass one-hot rows ({len(x)}, K) or indices ({len(x)},)")
        if y.ndim == 2:
            if not np.isfinite(y).all():
                raise ValueError("y holds NaN or infinity; pass rows of finite numbers, or indices (N,)")
            return y
        if not np.array_equal(y, y.astype(np.int64)):
            raise ValueError("y holds fractions; class indices must be whole numbers")
        return y.astype(np.int64)

    def _placement(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the estimator's weights; float32 on the CPU where it has none in PyTorch."""
        if isinstance(self.estimator, PyTorchClassifier):
            weight = next(self.estimator.model.parameters(), None)
            dtype = torch.float32 if weight is None or not weight.is_floating_point() else weight.dtype
            return dtype, self.estimator.device
        return torch.float32, torch.device("cpu")

    def _source(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device.type != device.type:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self._generator = torch.Generator(device).manual_seed(seed)
        return self._generator

    def _hook(self, batch: int, labels: Tensor, last: bool) -> StepHook | None:
        """Writes every step to the summary writer, as ART's own attacks do."""
        writer: Any = self.summary_writer
        if writer is None:
            return None
        given = labels.cpu().numpy()
        targets = given if given.ndim == 2 else np.eye(self.estimator.nb_classes, dtype=np.float32)[given]

        def write(t: int, gradient: Tensor, a: Tensor) -> None:
            gradient, a = (v.movedim(1, -1) if last else v for v in (gradient, a))
            writer.update(
                batch_id=batch,
                global_step=t - 1,
                grad=gradient.cpu().numpy(),
                patch=None,
                estimator=self.estimator,
                x=a.cpu().numpy(),
                y=targets,
                targeted=self.targeted,
            )

        return write


def limits(estimator: Any, last: bool, shape: tuple[int, ...] | None = None) -> Any:
    """The estimator's `clip_values` for examples of `shape`, if given; with the channels in front if they were `last`.

    Of an example's shape they broadcast as in ART, over its last axis.
    """
    given = estimator.clip_values if shape is None else sizes.limits(estimator.clip_values, shape)
    if given is None or not last:
        return given
    return tuple(np.moveaxis(limit, -1, 0) if np.ndim(limit) == 3 else limit for limit in given)


def _one_hot(rows: Tensor) -> bool:
    """Whether every row of (N, K) names one class."""
    return bool((((rows == 1).sum(1) == 1) & ((rows != 0).sum(1) == 1)).all())


def _remedy(clip: tuple[Any, Any] | None) -> str:
    """How bytes become what an estimator with these clip values takes."""
    if clip is None:
        return "x.astype(np.float32)"
    low, high = float(np.min(clip[0])), float(np.max(clip[1]))
    if low == 0:
        return f"x.astype(np.float32){'' if high == 255 else f' / {255 / high:g}'}"
    return f"x.astype(np.float32) / 255 * {high - low:g} + {low:g}"


@cache
def host_class(attack: type[Attack]) -> type[ARTAttack]:
    """The ART class of a registered attack; the same class at every call."""
    peer: Any = getattr(art.attacks.evasion, PEERS.get(attack.__name__, ""), None)
    own = {f.name: f.default for f in dataclasses.fields(attack)}
    host: Host = HOST
    defaults: dict[str, Any] = {}
    if "random_start" in own:
        defaults["num_random_init"] = int(own["random_start"] is True)
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
        },
    )
    if issubclass(attack, BoundedAttack):
        # ART's composite attacks ask isinstance before they take an attack within a ball.
        (peer or art.attacks.evasion.ProjectedGradientDescent).register(made)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MomentumPGD(PGD):
    """PGD along accumulated gradients, as ART's with `decay`."""

    decay: float

    def __post_init__(self) -> None:
        validation.number("decay", self.decay, low=0)
        super().__post_init__()

    def momentum(self) -> Momentum:
        return Accumulate(decay=self.decay, normaliser="mean")
