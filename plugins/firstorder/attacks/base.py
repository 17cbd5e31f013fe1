"""What a user calls: an attack is its hyper-parameters; data come at the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Generic, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar

from firstorder.attacks import validation
from firstorder.attacks.core import StepHook
from firstorder.attacks.inspection import doubt
from firstorder.attacks.losses import Loss, named
from firstorder.attacks.models import Model, as_model, keep_heap
from firstorder.attacks.projections import Bound, bound, rows
from firstorder.attacks.verdicts import lost

Bounds = tuple[Bound, Bound] | None
"""(lowest, highest) pixel value, each a scalar or one value per channel; None for unbounded."""

Target = Model | Callable[[Tensor], Tensor]
"""A model to attack: any callable from images (N, ...) to logits (N, K), or a `Model`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an attack found for a batch of N.

    Attributes:
        adversarial: the perturbed examples, shape (N, ...).
        success: whether each is misclassified (as the target in targeted mode), by a forward of its
            own; None where the attack was called for its examples alone.
        gradients: how many gradients were spent on each example, shape (N,).
        restarts: success of every restart, shape (R, N); its maximum is `success` ("worst"), its mean
            "avg". None where not every restart ran on every example, and where `success` is None.
        doubtful: which examples, shape (N,), met NaN or infinite logits or gradients and are not counted as broken;
            where their last iterate was NaN it is replaced by the input.
    """

    adversarial: Tensor
    success: Tensor | None
    gradients: Tensor
    restarts: Tensor | None = None
    doubtful: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A validated batch: images (N, ...), label or target indices (N,), limits that broadcast to one image.

    `rows` (N, K) are the labels as probabilities where they are no single classes, `start` (N, ...) the first iterates
    where the caller gave them.
    """

    x: Tensor
    labels: Tensor
    rows: Tensor | None = None
    targeted: bool
    low: Tensor
    high: Tensor
    mask: Tensor | None
    start: Tensor | None = None
    generator: torch.Generator
    hook: StepHook | None


R = TypeVar("R", bound=Result, default=Result, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC, Generic[R]):
    """An attack of any kind. Subclasses are frozen keyword-only dataclasses and define `search`.

    `Attack[R]` is an attack whose `run` returns an R, a `Result` or more.
    """

    paper: ClassVar[str] = ""
    """Authors, year and equation or algorithm."""
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    """The norms it supports."""
    population: ClassVar[bool] = False
    """Whether the examples of a batch influence each other."""
    starts: ClassVar[bool] = False
    """Whether it begins at `start` where that is given."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Parameters without which it refuses to run: data, which have no default and no place on a command line."""

    loss: Loss | str | None = None

    @abstractmethod
    def search(self, model: Model, batch: Batch, *, verify: bool) -> R:
        """Attack a batch of at least one example.

        Args:
            verify: whether the caller needs `Result.success`, worth another forward.
        """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("__eq__", "__hash__"):  # before the dataclass makes its own, which compares no tensors
            if name not in cls.__dict__:
                setattr(cls, name, getattr(Attack, name))

    def __eq__(self, other: object) -> bool:
        """Whether the other is of the same class with equal parameters, tensors by their values."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, name), getattr(other, name)) for name in self._compared())

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in self._compared())
        return hash((type(self), *(tuple(v.shape) if isinstance(v, Tensor) else v for v in values)))

    def _compared(self) -> list[str]:
        return [field.name for field in fields(self) if field.compare]

    def check(self, batch: Batch) -> None:
        """Raise ValueError where the batch does not fit the attack's parameters, before the model is called."""

    def nothing(self, x: Tensor) -> R:
        """The result for a batch without elements; to be overridden where R is not `Result` itself."""
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return cast(R, Result(adversarial=x.clone(), success=none.bool(), gradients=none, doubtful=none.bool()))

    def __call__(
        self,
        model: Target,
        x: Tensor,
        y: Tensor,
        *,
        targeted: bool = False,
        bounds: Bounds = (0.0, 1.0),
        mask: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        hook: StepHook | None = None,
    ) -> Tensor:
        """Adversarial examples for a batch.

        Args:
            model: a callable from images to logits (N, K), such as a module, or a `Model`.
            x: clean examples within `bounds`, floating point, shape (N, ...).
            y: true labels, or target classes if `targeted`: indices (N,) of any integer type or one-hot rows (N, K).
                Untargeted also rows of probabilities (N, K), for losses that are defined for them; success is then
                that the model's class is not the row's largest entry.
            targeted: move towards y instead of away from it.
            bounds: lowest and highest value of a pixel.
            mask: nonzero where x may change; broadcasts to x.
            start: where to begin, of the shape of x: projected onto the ball and the bounds, and x itself where the
                mask is zero. For bounded attacks of one run, in place of a random start.
            generator: source of the random draws, on the device of x. None uses a fresh one seeded
                with `torch.initial_seed()`: the same draws at every call, and no global state touched.
            hook: called after every gradient, see `StepHook`.

        Returns:
            Examples of the shape, dtype and device of x, detached, in the ball and the bounds.

        Raises:
            ValueError: a bad input, before any work, or logits that do not fit it, before their backward; the message
                names the value and the remedy. The model's own exceptions pass as they are, with a note.

        Warns:
            RobustnessWarning: what runs but looks wrong: outputs that are probabilities, gradients that are zero, a
                radius beyond the bounds' width, examples that met NaN.
        """
        search = partial(self.search, verify=False)
        return self._attack(search, model, x, y, targeted, bounds, mask, generator, hook, start).adversarial

    def run(
        self,
        model: Target,
        x: Tensor,
        y: Tensor,
        *,
        targeted: bool = False,
        bounds: Bounds = (0.0, 1.0),
        mask: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        hook: StepHook | None = None,
    ) -> R:
        """As `__call__`, with the outcome verified by one more forward and returned in detail."""
        search = partial(self.search, verify=True)
        return self._attack(search, model, x, y, targeted, bounds, mask, generator, hook, start)

    def _attack(
        self,
        search: Callable[[Model, Batch], R],
        model: Target,
        x: Tensor,
        y: Tensor,
        targeted: bool,
        bounds: Bounds,
        mask: Tensor | None,
        generator: torch.Generator | None,
        hook: StepHook | None,
        start: Tensor | None = None,
    ) -> R:
        """Check what the caller passed in, search, and say what is doubtful."""
        attacked = as_model(model)
        validation.switch("targeted", targeted)
        x = validation.tensor(x)
        low, high = (bound(limit, x) for limit in validation.limits(bounds))
        validation.images(x, low, high)
        labels = validation.labels(y, len(x), x.device)
        if targeted and labels.rows is not None:
            raise ValueError("targeted mode needs one target class per example; pass one-hot rows or indices (N,)")
        batch = Batch(
            x=x,
            labels=labels.indices,
            rows=labels.rows,
            targeted=bool(targeted),
            low=low,
            high=high,
            mask=None if mask is None else validation.mask(mask, x),
            start=None if start is None else validation.start(start, x),
            generator=validation.source(generator, x.device),
            hook=hook,
        )
        if start is not None and not self.starts:
            raise ValueError(f"{type(self).__name__} does not begin at a given start; leave start=None")
        self.check(batch)
        if not x.numel():
            return self.nothing(x)
        attacked.check(x, labels, named(self.loss))
        keep_heap()
        with attacked.preserved(), torch.no_grad():
            return _finished(search(attacked, batch), x)


def _equal(one: object, other: object) -> bool:
    """Whether two parameters are equal; tensors where dtype, device, shape and values are."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other))


Found = TypeVar("Found", bound=Result)


def _finished(result: Found, x: Tensor) -> Found:
    """The result with the input in place of what is no number, and a warning of what is doubtful."""
    bad = lost(result.adversarial)
    doubtful = result.doubtful
    if bad is not None:
        doubtful = bad if doubtful is None else bad | doubtful
        success = None if result.success is None else result.success & ~bad
        result = replace(result, adversarial=torch.where(rows(bad, x), x, result.adversarial), success=success)
    if doubtful is None:
        doubtful = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    elif bool(doubtful.any()):
        doubt(
            f"{int(doubtful.sum())} of {len(x)} examples met NaN or infinite logits or gradients; they do not "
            "count as broken, and where the iterate itself became NaN the input is returned"
        )
    return replace(result, doubtful=doubtful)
