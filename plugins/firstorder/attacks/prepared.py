"""Prepared models: a private copy of a module that gives the gradients of attacks in less time.

    model = prepare(model, x[:8])
    result = PGD(eps=8 / 255, steps=100, early_stop=True).run(model, x, y)

Every part of the preparation is compared with the module on examples and left out where it disagrees. Success is
always decided by the module itself, in its own precision; examples that only the copy takes for broken go on being
attacked with the module's own gradients.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from firstorder.attacks import validation
from firstorder.attacks.folding import fold
from firstorder.attacks.graphs import Graphed
from firstorder.attacks.losses import Loss, Margin
from firstorder.attacks.models import Evaluation, Model, TorchModel
from firstorder.attacks.modes import preserved
from firstorder.attacks.private import Private, Way, agrees, probe
from firstorder.attacks.scaling import Scaling
from firstorder.attacks.validation import Labels

Precision = Literal["float32", "bfloat16", "float16", "auto"]
Made = TypeVar("Made")

logger = logging.getLogger(__name__)


class Prepared(Model):
    """A module with a faster copy; `prepare` makes it.

    Attributes:
        module: that was prepared.
        exact: the module itself as a model, which decides on success.
        parts: what the preparation consists of.
    """

    def __init__(
        self,
        module: nn.Module,
        copied: Model,
        parts: tuple[str, ...],
        *,
        loss: Loss | None = None,
        renew: Callable[[], None] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.module = module
        self.parts = parts
        self._exact = TorchModel(module, loss=loss)
        self._copy = copied
        self._renew = renew
        self._scaling = scaling
        if scaling is not None:
            scaling.clear()

    def refresh(self) -> None:
        """Give the copy the module's current weights and statistics, without comparing the two again.

        For training, where they change at every step: the structure of the module, its shapes and which of its
        parameters are shared must be what they were.
        """
        if self._renew is not None:
            self._renew()

    @property
    def exact(self) -> Model:
        return self._exact

    def logits(self, x: Tensor) -> Tensor:
        return self._exact.logits(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        return self._copy.gradient(x, labels, loss, logits=logits)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        with self._exact.preserved():
            yield
        if self._scaling is not None:
            self._scaling.report()

    @property
    def members(self) -> int:
        return self._copy.members

    def only(self, member: int) -> AbstractContextManager[None]:
        return self._copy.only(member)

    def check(self, x: Tensor, labels: Labels, loss: Loss | None) -> None:
        self._copy.check(x, labels, loss)

    def footprint(self, x: Tensor) -> int:
        return self._copy.footprint(x)


def prepare(
    model: nn.Module,
    example: Tensor,
    *,
    precision: Precision = "float32",
    compile: bool = False,  # noqa: A002
    graph: bool = False,
    loss: Loss | None = None,
) -> Prepared:
    """Prepare `model` for attacks on images like `example`.

    The copy has its weights frozen, BatchNorm folded where torch.fx can follow the module, and the channels_last
    layout for images; on request half precision (under autocast), torch.compile and CUDA graphs. What fails or
    disagrees with the module on the example is left out, with a log line. Changes of the module after this are not seen
    by the copy until it is refreshed.

    Args:
        model: from images to logits; it is not changed, and runs in evaluation mode.
        example: a few images (N, ...) as they will be attacked.
        precision: of the copy; "auto" takes bfloat16 where it agrees and was faster on the example. float16 is three
            bits finer and of a smaller range: gradients are scaled into it, example by example, and where they still
            overflow a `RobustnessWarning` says how many.
        compile: whether to compile the copy.
        graph: whether to replay the copy's gradients from CUDA graphs, for models so small that starting their kernels
            takes longer than running them. Taken where it agrees and was faster on the example, which should then be a
            whole batch. Only shapes that come again and again are captured: `firstorder.attacks.graphs` has the rule.
        loss: the model's own per-example loss, used where the attack names none; cross-entropy by default.

    Raises:
        ValueError: another kind of model or of example; a model that cannot be copied, or whose output is random.
    """
    validation.choice("precision", precision, ("float32", "bfloat16", "float16", "auto"))
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}; only a torch module can be prepared")
    example = validation.tensor(example)
    if not example.numel():
        raise ValueError(f"the example has shape {tuple(example.shape)}; pass at least one image")
    with preserved(model), torch.no_grad():
        interface = TorchModel(model)
        labels = interface.logits(example).argmax(1)
        interface.check(example, Labels(labels), None)
        expected, again = (probe(interface, example, labels) for _ in range(2))
        if not agrees(again, expected, torch.float32):
            raise ValueError("the model answers the same images differently; a random model cannot be prepared")
        try:
            private = copy.deepcopy(model).eval().requires_grad_(False)
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot be copied: {error}; weight_norm of torch.nn.utils.parametrizations can"
            ) from None
    return _Preparation(example, labels, expected, loss).run(model, private, precision, compile, graph)


class _Preparation:
    """Takes parts one by one, each only where the copy still agrees with the module."""

    def __init__(self, example: Tensor, labels: Tensor, expected: Evaluation, loss: Loss | None = None) -> None:
        self._example, self._labels, self._expected, self._loss = example, labels, expected, loss
        self._parts: list[str] = []
        self._changes: list[Callable[[nn.Module], nn.Module | None]] = []

    def run(self, model: nn.Module, private: nn.Module, precision: Precision, compiled: bool, graph: bool) -> Prepared:
        way = Way()
        if any(isinstance(part, _BatchNorm) for part in private.modules()):
            folded = self._with("folded BatchNorm", private, _folded, way)
            private = private if folded is None else folded
        if self._example.ndim == 4 and any(isinstance(part, nn.Conv2d) for part in private.modules()):
            turned = self._with("channels_last", private, _turned, way._replace(layout=torch.channels_last))
            if turned is not None:
                private, way = turned, way._replace(layout=torch.channels_last)
        if precision != "float32":
            private, way = self._lowered(private, way, precision)
        changes = list(self._changes)  # torch.compile changes no weights
        if compiled:
            fast = self._with("torch.compile", private, _compiled, way)
            private = private if fast is None else fast  # a compiled module has no truth value
        plain, weights = Private(private, way, self._loss), _state(private)
        interface = (self._graphed(plain, way.dtype) if graph else None) or plain

        def renew() -> None:
            fresh: nn.Module | None = copy.deepcopy(model).eval().requires_grad_(False)
            for change in changes:
                assert fresh is not None
                fresh = change(fresh)
            assert fresh is not None
            with torch.no_grad():
                for mine, new in zip(weights, _state(fresh), strict=True):
                    mine.copy_(new)

        return Prepared(model, interface, tuple(self._parts), loss=self._loss, renew=renew, scaling=way.scaling)

    def _lowered(self, private: nn.Module, way: Way, precision: Precision) -> tuple[nn.Module, Way]:
        """The copy in half precision and how it is run then, or both as they are."""
        name = "float16" if precision == "float16" else "bfloat16"
        scaling = Scaling(self._example.device) if name == "float16" else None
        low = way._replace(dtype=getattr(torch, name), scaling=scaling)
        rival = Private(private, way) if precision == "auto" else None
        halved = self._with(name, private, partial(_halved, dtype=low.dtype), low, faster_than=rival)
        return (private, way) if halved is None else (halved, low)

    def _with(
        self,
        name: str,
        private: nn.Module,
        change: Callable[[nn.Module], nn.Module | None],
        way: Way,
        *,
        faster_than: Model | None = None,
    ) -> nn.Module | None:
        """A changed copy; None where there is nothing to change, it fails, disagrees, or is not faster than another."""

        def make() -> nn.Module | None:
            changed = change(copy.deepcopy(private))
            if way.scaling is not None and changed is not None:
                own = Private(changed, way)
                way.scaling.calibrate(lambda: probe(own, self._example, self._labels))
            return changed

        module = self._taken(name, make, lambda made: Private(made, way), way.dtype, faster_than=faster_than)
        if module is not None:
            self._changes.append(change)
        return module

    def _graphed(self, plain: TorchModel, dtype: torch.dtype) -> Graphed | None:
        """The copy with CUDA graphs, or None, likewise."""

        def captured() -> Graphed:
            graphed = Graphed(plain, lambda found, expected: agrees(found, expected, dtype))
            graphed.captured(self._example, self._labels, Margin())
            return graphed

        return self._taken("CUDA graph", captured, lambda graphed: graphed, dtype, faster_than=plain)

    def _taken(
        self,
        name: str,
        make: Callable[[], Made | None],
        interface: Callable[[Made], Model],
        dtype: torch.dtype,
        *,
        faster_than: Model | None,
    ) -> Made | None:
        """What `make` makes, which then is a part; None where that is nothing or its interface is not to be taken."""
        try:
            made = make()
            if made is None:
                return None
            found = probe(interface(made), self._example, self._labels)
            if not agrees(found, self._expected, dtype):
                logger.warning("%s is left out: its gradient is not the model's on the example", name)
                return None
            slow = faster_than is not None and self._seconds(interface(made)) >= self._seconds(faster_than)
        except Exception as error:  # a compiler or a backend may fail in any way; the copy does without
            logger.warning("%s is left out: %s: %s", name, type(error).__name__, error)
            return None
        if slow:
            logger.info("%s is left out: it was not faster on the example", name)
            return None
        self._parts.append(name)
        return made

    def _seconds(self, interface: Model, *, rounds: int = 3) -> float:
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            probe(interface, self._example, self._labels)
            if self._example.is_cuda:
                torch.cuda.synchronize(self._example.device)
            times.append(time.perf_counter() - start)
        return min(times[1:])


def _state(module: nn.Module) -> list[Tensor]:
    """Weights and statistics, in the order of the module's structure."""
    return [*module.parameters(), *module.buffers()]


def _folded(module: nn.Module) -> nn.Module | None:
    folded, count = fold(module)
    return folded if count else None


def _compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module)
    return cast(nn.Module, compiled)


def _turned(module: nn.Module) -> nn.Module:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _halved(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights that autocast would convert at every forward, converted once."""
    for part in module.modules():
        if isinstance(part, (_ConvNd, nn.Linear)):
            part.to(dtype)
    return module
