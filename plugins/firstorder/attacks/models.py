"""The model's face: the only thing an attack knows of what it attacks.

An attack asks for logits and for the gradient of a per-example loss by the input. `TorchModel`
serves any PyTorch callable; host adapters bring their own `Model` (an ART estimator, for one).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.losses import CrossEntropy, Loss


class Evaluation(NamedTuple):
    """What one gradient query returns for points of shape (M, ...)."""

    gradient: Tensor
    """d loss_i / d point_i, shape (M, ...), detached."""
    logits: Tensor | None
    """Logits (M, K) at the points; None where they were not asked for and cost extra."""


class Model(ABC):
    """Per-example loss gradients and logits of a classifier."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) at x (N, ...), without a graph."""

    @abstractmethod
    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        """The gradient of the loss at x (N, ...) for label indices (N,).

        Args:
            loss: the per-example loss; None asks for the model's own.
            logits: whether the caller needs the logits.
        """

    @property
    def exact(self) -> Model:
        """The model that judges; another one where `gradient` and its logits are approximations."""
        return self

    def preserved(self) -> AbstractContextManager[None]:
        """A context that leaves the model as it found it, also after an exception."""
        return nullcontext()

    @abstractmethod
    def check(self, x: Tensor, labels: Tensor, loss: Loss | None) -> None:
        """Raise ValueError where x (N, ...), labels (N,) or the loss do not fit this model."""

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

    def check(self, x: Tensor, labels: Tensor, loss: Loss | None) -> None:
        self._model.check(x, labels, loss)

    def footprint(self, x: Tensor) -> int:
        return self._model.footprint(x)


class TorchModel(Model):
    """Any PyTorch callable from images to logits.

    Args:
        forward: maps (N, ...) to logits (N, K), differentiably.
        module: the module behind `forward`, whose state is preserved; `forward` itself by default.
        loss: the model's own per-example loss, used where the attack names none.
        mode: "eval" runs the module in evaluation mode, "keep" in the mode it is in.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        *,
        module: nn.Module | None = None,
        loss: Loss | None = None,
        mode: Literal["eval", "keep"] = "eval",
    ) -> None:
        self._forward = forward
        self._module = module if module is not None else forward if isinstance(forward, nn.Module) else None
        self._loss = loss if loss is not None else CrossEntropy()
        self._mode = mode
        self._footprints: dict[tuple[tuple[int, ...], torch.dtype], int] = {}

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._forward(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            scores = self._forward(point)
            losses = (loss if loss is not None else self._loss)(scores, labels)
            if not losses.requires_grad:
                raise ValueError(
                    "the model's logits do not depend differentiably on its input; "
                    "remove no_grad(), detach() or NumPy round trips from its forward"
                )
            (gradient,) = torch.autograd.grad(losses, point, grad_outputs=torch.ones_like(losses))
        return Evaluation(gradient, scores.detach())

    def preserved(self) -> AbstractContextManager[None]:
        keep_heap()
        return nullcontext() if self._module is None else preserved(self._module, evaluate=self._mode == "eval")

    def check(self, x: Tensor, labels: Tensor, loss: Loss | None) -> None:
        weight = None if self._module is None else next(self._module.parameters(), None)
        if weight is not None and weight.device != x.device:
            raise ValueError(
                f"the images are on {x.device}, the model on {weight.device}; "
                f"move the images with x.to({str(weight.device)!r})"
            )
        autocast = torch.is_autocast_enabled(x.device.type)
        if weight is not None and weight.is_floating_point() and weight.dtype != x.dtype and not autocast:
            raise ValueError(
                f"the images are {x.dtype}, the model's weights {weight.dtype}; convert with x.to({weight.dtype})"
            )
        try:
            scores = self.logits(x[:2].clone())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot take images of shape {tuple(x.shape[1:])}; pass the shape it expects ({error})"
            ) from error
        if not isinstance(scores, Tensor):
            raise ValueError(
                f"the model returned a {type(scores).__name__}, not a tensor of logits; "
                "wrap it: TorchModel(lambda x: model(x)[0], module=model)"
            )
        if scores.ndim != 2 or len(scores) != len(x[:2]):
            raise ValueError(
                f"the model returned shape {tuple(scores.shape)} for {len(x[:2])} images; logits are (N, classes)"
            )
        if scores.shape[1] < 2:
            raise ValueError("the model has one class only; an attack needs logits for at least two")
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("the model's logits are NaN or infinite; check its weights")
        validation.classes(labels, scores.shape[1])
        (loss if loss is not None else self._loss)(scores, labels[:2])

    def footprint(self, x: Tensor) -> int:
        """Measured once per shape: what three examples keep beyond what two do."""
        key = (tuple(x.shape[1:]), x.dtype)
        if key not in self._footprints:
            sample = x[:1].detach()
            two, three = (self._saved_bytes(torch.cat([sample] * n).requires_grad_(True)) for n in (2, 3))
            self._footprints[key] = max(three - two, 1)
        return self._footprints[key]

    def _saved_bytes(self, x: Tensor) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._forward(x)
        return total


def keep_heap() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    glibc trims its heap above a threshold of twice the largest block that was ever mapped and freed, up
    to 64 MiB. Until a large block was freed once, every step of a small model on the CPU gives its memory
    back and faults it in again, page by page: measured, 4 MB and 10 to 20 % of a step. The block
    is never touched, so this costs microseconds; other allocators do not notice.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def as_model(model: Model | Callable[[Tensor], Tensor]) -> Model:
    """The face of `model`: itself if it is a `Model`, else a `TorchModel` around the callable."""
    if isinstance(model, Model):
        return model
    if not callable(model):
        raise ValueError(f"the model is a {type(model).__name__}; pass a callable from images to logits")
    return TorchModel(model)


@contextmanager
def preserved(module: nn.Module, *, evaluate: bool = True) -> Iterator[None]:
    """Put `module` in evaluation mode (if `evaluate`) and restore its modes and buffers afterwards.

    The train/eval flag of every submodule and the contents of every buffer come back exactly, also
    after an exception. Parameters need no restoring: attacks differentiate by the input alone.
    """
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        if evaluate:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
        for part, name, buffer, saved in buffers:
            buffer.data.copy_(saved)
            if getattr(part, name, None) is not buffer:
                setattr(part, name, buffer)
