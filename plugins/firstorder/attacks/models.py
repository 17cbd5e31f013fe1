"""The model's interface: the only thing an attack knows of what it attacks.

An attack asks for logits and for the gradient of a per-example loss by the input. `TorchModel`
serves any PyTorch callable; host adapters bring their own `Model` (an ART estimator, for one).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks.ensemble import Ensemble, ensembles
from firstorder.attacks.expectation import expected, one_draw, randomised
from firstorder.attacks.inspection import Inspection
from firstorder.attacks.losses import CrossEntropy, Loss, MeanLogits, resolved
from firstorder.attacks.modes import preserved as preserved
from firstorder.attacks.outputs import logits_of, require_logits
from firstorder.attacks.validation import Labels


class Evaluation(NamedTuple):
    """What one gradient query returns for points of shape (M, ...)."""

    gradient: Tensor
    """d loss_i / d point_i, shape (M, ...), detached."""
    logits: Tensor | None
    """Logits (M, K) at the points; None where they were not asked for and cost extra."""
    losses: Tensor | None = None
    """loss_i (M,), detached; None where the model does not say."""


def stacked(found: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of pieces as one of all points; what some piece does not say is None."""
    scores = [one.logits for one in found if one.logits is not None]
    losses = [one.losses for one in found if one.losses is not None]
    return Evaluation(
        torch.cat([one.gradient for one in found]),
        torch.cat(scores) if len(scores) == len(found) else None,
        torch.cat(losses) if len(losses) == len(found) else None,
    )


class Model(ABC):
    """Per-example loss gradients and logits of a classifier."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) at x (N, ...), without a graph."""

    @abstractmethod
    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        """The gradient of the loss at x (N, ...) for label indices (N,), or rows of probabilities (N, K).

        Args:
            loss: the per-example loss; None asks for the model's own.
            logits: whether the caller needs the logits.
        """

    @property
    def exact(self) -> Model:
        """The model that decides on success; another one where `gradient` and its logits are approximations."""
        return self

    def take(self, index: Tensor) -> Model:
        """The model of the examples at `index` of those it was for; itself unless it knows examples apart."""
        return self

    def preserved(self) -> AbstractContextManager[None]:
        """A context that leaves the model as it found it, also after an exception."""
        return nullcontext()

    @property
    def members(self) -> int:
        """Of how many models it is the mean; 1 where it is none."""
        return 1

    def only(self, member: int) -> AbstractContextManager[None]:
        """A context in which gradients and logits are those of one member alone, counted from 0."""
        return nullcontext()

    @abstractmethod
    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        """Called once before an attack on x (N, ...).

        Raise ValueError where what is known without a forward does not fit. What needs logits is checked on those of
        the first gradient after this.
        """

    def footprint(self, x: Tensor) -> int:
        """Bytes that one example of x (N, ...) keeps from the forward for the backward; 1 where unknown."""
        return 1


class Wrapper(Model):
    """A model around another one: what a subclass does not define is the other's.

    Args:
        model: the other one.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def exact(self) -> Model:
        exact = self._model.exact
        if exact is self._model:
            return self
        around = copy.copy(self)
        around._model = exact
        return around

    def logits(self, x: Tensor) -> Tensor:
        return self._model.logits(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        return self._model.gradient(x, labels, loss, logits=logits)

    def preserved(self) -> AbstractContextManager[None]:
        return self._model.preserved()

    @property
    def members(self) -> int:
        return self._model.members

    def only(self, member: int) -> AbstractContextManager[None]:
        return self._model.only(member)

    def take(self, index: Tensor) -> Model:
        narrowed = self._model.take(index)
        if narrowed is self._model:
            return self
        around = copy.copy(self)
        around._model = narrowed
        return around

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        self._model.check(x, labels, loss)

    def footprint(self, x: Tensor) -> int:
        return self._model.footprint(x)


class TorchModel(Model):
    """Any PyTorch callable from images to logits, or to an output with an attribute or an entry `logits`.

    Args:
        forward: maps (N, ...) to logits (N, K), differentiably.
        module: the module behind `forward`, whose state is preserved; `forward` itself by default.
        loss: the model's own per-example loss, used where the attack names none.
        mode: "eval" runs the module in evaluation mode, "keep" in the mode it is in.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Any],
        *,
        module: nn.Module | None = None,
        loss: Loss | None = None,
        mode: Literal["eval", "keep"] = "eval",
    ) -> None:
        self._forward = forward
        self._module = module if module is not None else forward if isinstance(forward, nn.Module) else None
        self._loss = loss if loss is not None else CrossEntropy()
        self._mode = mode
        self._random = randomised(self._module)
        self._ensemble: Ensemble | None = next(ensembles(self._module), None)
        self._footprints: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
        self._inspection: Inspection | None = None

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._scores(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        if not self._random:
            return self._single(x, labels, loss)
        return Evaluation(*expected(self._random, lambda points, rows: self._single(points, rows, loss), x, labels))

    @property
    def inspecting(self) -> bool:
        """Whether the next logits and gradients are looked at, for which the host waits."""
        return self._inspection is not None

    def _single(self, x: Tensor, labels: Tensor, loss: Loss | None) -> Evaluation:
        """The gradient from one forward."""
        inspection = self._inspection
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            scores = self._scores(point)
            if inspection is not None:
                inspection.logits(scores.detach())
            # In half precision small losses would be rounded to one value, and their gradients to zero.
            widened = scores.to(torch.promote_types(scores.dtype, torch.float32))
            losses = resolved(loss, self._loss)(widened, labels)
            gradient = self._by_input(losses, point)
        if inspection is not None:
            inspection.gradient(gradient)
            self._inspection = None if inspection.done else inspection
        return Evaluation(gradient, scores.detach(), None if isinstance(loss, MeanLogits) else losses.detach())

    def _by_input(self, losses: Tensor, point: Tensor) -> Tensor:
        return by_input(losses, point)

    def preserved(self) -> AbstractContextManager[None]:
        return nullcontext() if self._module is None else preserved(self._module, evaluate=self._mode == "eval")

    @property
    def members(self) -> int:
        return 1 if self._ensemble is None else len(self._ensemble)

    def only(self, member: int) -> AbstractContextManager[None]:
        return nullcontext() if self._ensemble is None else self._ensemble.only(member)

    @property
    def member(self) -> int | None:
        """Which member alone is asked, in a context of `only`."""
        return None if self._ensemble is None else self._ensemble.member

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        used = loss if loss is not None else self._loss
        if labels.rows is not None and not getattr(used, "soft", True):
            raise ValueError(
                f"{type(used).__name__} is not defined for rows of probabilities; pass one-hot rows or indices (N,), "
                "or take CrossEntropy()"
            )
        self._inspection = Inspection(labels)

    def _scores(self, x: Tensor) -> Tensor:
        """The logits (N, K) of x (N, ...). The model's own exceptions pass, with a note of what was being done."""
        version = x._version
        try:
            output = self._forward(x)
        except Exception as error:
            if "leaf Variable that requires grad is being used in an in-place" in str(error):
                raise ValueError(IN_PLACE) from error
            noted(error, self._circumstances(x))
            raise
        if x._version != version:
            raise ValueError(IN_PLACE)
        scores = logits_of(output)
        require_logits(scores, len(x))
        return scores

    def _circumstances(self, x: Tensor) -> str:
        """What a reader of the model's own exception may want to know."""
        said = f"raised by the model for images of shape {tuple(x.shape)}, {x.dtype} on {x.device}"
        if not torch.is_grad_enabled():
            said += (
                ", without gradients, for its logits alone (a forward that differentiates needs torch.enable_grad())"
            )
        weight = None if self._module is None else next(self._module.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (x.dtype, x.device):
            said += (
                f"; its first weight is {weight.dtype} on {weight.device}: if that is the cause, convert the images "
                f"with x.to({str(weight.device)!r}, {weight.dtype})"
            )
        return said

    def footprint(self, x: Tensor) -> int:
        """Measured once per shape: what three examples keep beyond what two do."""
        key = (tuple(x.shape[1:]), x.dtype)
        if key not in self._footprints:
            sample = x[:1].detach()
            with self.preserved(), one_draw(self._random) as copies:
                two, three = (self._saved_bytes(torch.cat([sample] * n).requires_grad_(True)) for n in (2, 3))
            self._footprints[key] = max(three - two, 1) * copies
        return self._footprints[key]

    def _saved_bytes(self, x: Tensor) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._scores(x)
        return total


IN_PLACE = (
    "the model changes its input (or a weight) in place, as x.sub_(mean) does; attacks need the input as it is: write "
    "x = x - mean, or begin the forward with x = x.clone()"
)


def by_input(losses: Tensor, point: Tensor, *, again: bool = False) -> Tensor:
    """The gradient of every loss (N,) by its point of (N, ...).

    Args:
        again: whether it may be asked for once more.

    Raises:
        ValueError: there is none.
    """
    gradient = None
    if losses.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(losses.sum(), point, retain_graph=again, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(
                    "the model's checkpoints do not let the input's gradient be asked for alone; "
                    "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in it"
                ) from error
            raise
    if gradient is None:
        raise ValueError(
            "the model's logits do not depend differentiably on its input; "
            "remove no_grad(), detach() or NumPy round trips from its forward"
        )
    return gradient


def noted(error: BaseException, note: str) -> None:
    """Add a note to an exception; Python shows it from 3.11 on, pytest and our own messages before as well."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]


def keep_heap() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    glibc trims its heap above a threshold of twice the largest block that was ever mapped and freed, up
    to 64 MiB. Until a large block was freed once, every step of a small model on the CPU gives its memory
    back and faults it in again, page by page: measured, 4 MB and 10 to 20 % of a step. The block
    is never touched, so this costs microseconds; other allocators do not notice.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def as_model(model: Model | Callable[[Tensor], Tensor]) -> Model:
    """`model` itself if it is a `Model`, else a `TorchModel` around the callable."""
    if isinstance(model, Model):
        return model
    if not callable(model):
        raise ValueError(f"the model is a {type(model).__name__}; pass a callable from images to logits")
    return TorchModel(model)
