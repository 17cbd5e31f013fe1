"""An attack with ART's interface: what the classes of all registered attacks have in common."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from torch import Tensor
from tqdm.auto import tqdm

from firstorder.art import goals, labels, sizes
from firstorder.art.goals import Goals
from firstorder.art.labels import Array
from firstorder.art.minimal import minimal
from firstorder.art.models import Cast, ChannelsLast, GivenRows, as_model
from firstorder.attacks import Attack, Model, StepHook, validation
from firstorder.attacks.catalogue import PGD
from firstorder.attacks.momenta import Accumulate, Momentum
from firstorder.hosts import Host

EXTRAS = {"targeted": False, "num_random_init": 0, "batch_size": 32, "summary_writer": False, "verbose": True}

HOST = Host(
    first="estimator",
    renames={"alpha": "eps_step", "steps": "max_iter", "random_start": None, "restarts": None},
    order=("norm", "eps", "eps_step", "max_iter", "*", *EXTRAS),
    extras={**EXTRAS, "seed": None},
)
"""ART's words; `num_random_init` is random_start and restarts in one."""

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
    _estimator_requirements: ClassVar[tuple[type, ...]] = (BaseEstimator, LossGradientsMixin)

    def __init__(self, estimator: Any, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(type(self)).bind(estimator, *args, **kwargs)
        call.apply_defaults()
        super().__init__(estimator=estimator, summary_writer=call.arguments["summary_writer"])
        for name in self.attack_params:
            if name != "summary_writer":
                setattr(self, name, call.arguments[name])
        self._generator: torch.Generator | None = None
        self._check_params()

    def generate(self, x: Array, y: Goals | None = None, **kwargs: Any) -> Array:
        """Adversarial examples as an array of the shape and dtype of x.

        Args:
            x: inputs within the estimator's `clip_values`, floating point, shape (N, ...). Estimators without classes
                also take an array (N,) of objects, arrays of different shapes, which are attacked one by one.
            y: labels, or targets if `targeted`: rows (N, K) or indices (N,). None takes the estimator's own
                predictions as labels. The estimator's own loss gets rows as they are, soft or of several classes;
                success is then decided by their largest entry. Where the estimator has no classes, whatever its loss
                compares with: values (N, ...) or a list of N dictionaries, say.
            kwargs: `mask`, an array that broadcasts to x; where it is zero x stays as it is. Other keywords are
                ignored with a warning.

        Raises:
            ValueError: a bad input, before any gradient.
        """
        mask = kwargs.pop("mask", None)
        if not isinstance(x, np.ndarray):
            raise ValueError(f"x is a {type(x).__name__}; pass an array, np.asarray(x), of the estimator's dtype")
        if kwargs:
            warnings.warn(f"generate() ignores {', '.join(sorted(kwargs))}; it takes x, y and mask", stacklevel=2)
        if x.dtype == object and x.ndim == 1 and not self._classifies():
            return self._one_by_one(x, y, mask)
        clip = sizes.limits(self.estimator.clip_values, x.shape[1:])
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(
                f"x is {x.dtype}; convert it to what the estimator takes, for example {sizes.remedy(clip)}"
            )
        # Attacks know images as (N, C, H, W); some transform them as such.
        last = x.ndim == 4 and not getattr(self.estimator, "channels_first", True)
        dtype, device = self._placement()
        model, given, indices = self._targets(x, y)
        model = model if torch.from_numpy(x[:0]).dtype == dtype else Cast(model, dtype)
        model = ChannelsLast(model) if last else model
        mask = None if mask is None else _spread(mask, x.shape)
        radii = self._sizes(x, clip)
        if getattr(self, "max_iter", None) == 0:
            return x.copy()
        bounds = sizes.bounds(self.estimator, last, x.shape[1:])
        result = np.empty_like(x)
        starts = range(0, len(x), self.batch_size)
        for batch, start in enumerate(
            tqdm(starts, desc=f"{type(self).__name__} - Batches", leave=False, disable=not self.verbose)
        ):
            part = slice(start, start + self.batch_size)
            chosen = torch.as_tensor(indices[part], device=device)
            images = torch.as_tensor(x[part], device=device)
            free = None if mask is None else torch.tensor(mask[part], device=device)
            here = {name: sizes.of_batch(value, part, last) for name, value in radii.items()}
            attack = self._core(here)
            rows = chosen if chosen.ndim == 2 and attack.loss is None and not labels.one_hot(chosen) else None
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
                found = [minimal(self._core, here, *query, **words)]
            else:
                hook = self._hook(batch, given[part], last)
                found = [attack(*query, **words, hook=hook) for _ in range(self._repeats())]
            arrays = [(a.movedim(1, -1) if last else a).cpu().numpy() for a in found]
            one = len(arrays) == 1
            result[part] = (
                arrays[0] if one else goals.worst(self.estimator, arrays, given[part], targeted=self.targeted)
            )
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
        if getattr(self, "eps_step", None) is not None:
            validation.size("eps_step", sizes.finite(self.eps_step), above=True)
        if not self._classifies():
            goals.require(self)
        self._core()

    def _classifies(self) -> bool:
        return isinstance(self.estimator, ClassifierMixin)

    def _targets(self, x: Array, y: Goals | None) -> tuple[Model, Goals, Array]:
        """The estimator as a model, what it moves x (N, ...) away from (N entries), and that as labels for the core."""
        model = as_model(self.estimator)
        words: dict[str, Any] = {"targeted": self.targeted, "batch_size": self.batch_size}
        with model.preserved():
            if self._classifies():
                found = labels.classes(self.estimator, x, y, **words)
                return model, found, found
            given = goals.given(self.estimator, x, y, **words)
        return goals.GoalModel(self.estimator, given), given, np.arange(len(x))

    def _one_by_one(self, x: Array, y: Goals | None, mask: Any) -> Array:
        """Adversarial examples for an array (N,) of arrays, each of a shape of its own."""
        sized = [name for name in SIZES.values() if np.ndim(getattr(self, name, 0))]
        if mask is not None or sized:
            raise ValueError(
                f"x is an array of arrays, to which {' and '.join(sized) or 'a mask'} cannot broadcast; "
                "attack the examples one by one, or give numbers and no mask"
            )
        _, given, _ = self._targets(x, y)
        found = np.empty(len(x), dtype=object)
        for i, one in enumerate(x):
            found[i] = self.generate(np.asarray(one)[None], given[i : i + 1])[0]
        return found

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
            restarts = max(1, self._runs()) // self._repeats()
            parameters |= {"random_start": self._runs() > 0, "restarts": restarts}
        if "decay" not in fields and getattr(self, "decay", None) is not None:
            return _MomentumPGD(**parameters, decay=self.decay)
        return self.attack_class(**parameters)

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

    def _repeats(self) -> int:
        """How many runs are compared here: without classes the core cannot."""
        return 1 if self._classifies() else max(1, self._runs())

    def _placement(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the estimator's weights; float32 on the CPU where it has none in PyTorch."""
        if isinstance(self.estimator, PyTorchClassifier):
            weight = next(self.estimator.model.parameters(), None)
            dtype = torch.float32 if weight is None or not weight.is_floating_point() else weight.dtype
            return dtype, self.estimator.device
        return torch.float32, torch.device("cpu")

    def _source(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = validation.seeded(self.seed, device)
        return self._generator

    def _hook(self, batch: int, given: Goals, last: bool) -> StepHook | None:
        """Writes every step to the summary writer, as ART's own attacks do."""
        writer: Any = self.summary_writer
        if writer is None:
            return None
        indices = self._classifies() and np.ndim(given) == 1
        targets = np.eye(self.estimator.nb_classes, dtype=np.float32)[given] if indices else given

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


def _spread(mask: Any, shape: tuple[int, ...]) -> Array:
    """The mask in the shape of the inputs."""
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"the mask of shape {np.shape(mask)} does not broadcast to the inputs' {shape}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MomentumPGD(PGD):
    """PGD along accumulated gradients, as ART's with `decay`."""

    decay: float

    def __post_init__(self) -> None:
        validation.number("decay", self.decay, low=0)
        super().__post_init__()

    def momentum(self) -> Momentum:
        return Accumulate(decay=self.decay, normaliser="mean")
