"""Gradients from CUDA graphs.

A step of a small model takes as long as the host needs to start its kernels one by one; a graph of them is started at
once. What was captured is fixed: shapes, the loss, autocast, the flags of torch.backends. Weights are read where they
are, so those that are changed in place are the graph's too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firstorder.attacks.losses import Loss, MeanLogits
from firstorder.attacks.models import Evaluation, TorchModel, Wrapper

AFTER = 4
"""At which call of a kind its graph is captured, which takes about as long as so many calls."""
KEPT = 4
"""How many graphs are kept, of the kinds that were asked for last."""

logger = logging.getLogger(__name__)


class Graph(NamedTuple):
    """What one kind of call starts on the device."""

    points: Tensor
    """(N, ...), which `replay` reads."""
    labels: Tensor
    """Of the points, likewise."""
    found: Evaluation
    """What `replay` writes; the next one writes over it."""
    replay: Callable[[], None]

    def __call__(self, x: Tensor, labels: Tensor) -> Evaluation:
        self.points.copy_(x.detach())
        self.labels.copy_(labels)
        self.replay()
        return Evaluation(*(None if part is None else part.clone() for part in self.found))  # type: ignore[arg-type]


class Graphed(Wrapper):
    """A model whose gradients are replayed from CUDA graphs, by rule and not by chance.

    A kind of call is its device, the shapes and types of points and labels, the loss, the member asked of an ensemble,
    and autocast. The `AFTER`th call of a kind captures its graph, compares it with what the model itself finds, and
    returns the latter; those after it are replays. All other calls are the model's own:

    - the first `AFTER` of a kind, as when early stopping leaves other numbers of examples at every step;
    - those at the begin of an attack whose logits and gradients are inspected;
    - those with a loss that is no frozen dataclass, as this package's are: a graph would not follow its changes;
    - those of a kind whose graph did not agree, which is logged.

    A graph that was dropped for others, as only `KEPT` are kept, comes again after twice as many calls.

    Args:
        model: on a CUDA device; its forward must not wait for the device, nor depend on more than points and weights.
        agrees: whether one evaluation may replace another.
    """

    _model: TorchModel

    def __init__(self, model: TorchModel, agrees: Callable[[Evaluation, Evaluation], bool]) -> None:
        super().__init__(model)
        self._agrees = agrees
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._wrong: set[Hashable] = set()
        self._calls: dict[Hashable, int] = {}
        self._price: dict[Hashable, int] = {}
        self._pool: Any = None

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        kind = None if self._model.inspecting else _kind(x, labels, loss, self._model.member)
        if kind is None or kind in self._wrong:
            return self._model.gradient(x, labels, loss)
        if kind in self._graphs:
            self._graphs.move_to_end(kind)
            return self._graphs[kind](x, labels)
        self._calls[kind] = self._calls.get(kind, 0) + 1
        found = self._model.gradient(x, labels, loss)
        if self._calls[kind] >= self._price.get(kind, AFTER):
            if self._agrees(self.captured(x, labels, loss), found):
                return found
            logger.warning("the CUDA graph for points %s is left out: it is not the model's gradient", tuple(x.shape))
            del self._graphs[kind]
            self._wrong.add(kind)
        return found

    def captured(self, x: Tensor, labels: Tensor, loss: Loss | None) -> Evaluation:
        """Capture the graph of such calls, and the gradient and logits that it gives at x (N, ...).

        Raises:
            RuntimeError: the model cannot be captured.
        """
        # The graph is made from other points than it is then tried on, so that what it should have read is noticed.
        points, its = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(labels)
        if self._pool is None and x.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        # One pool of memory for all: whatever a replay leaves in it is copied before the next one begins.
        replay, found = capture(lambda: self._model.gradient(points, its, loss), points.device, self._pool)
        kind = _kind(x, labels, loss, self._model.member)
        self._graphs[kind] = Graph(points, its, found, replay)
        self._calls[kind], self._price[kind] = 0, 2 * self._price.get(kind, AFTER)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return self._graphs[kind](x, labels)


def capture(run: Callable[[], Evaluation], device: torch.device, pool: Any) -> tuple[Callable[[], None], Evaluation]:
    """Record the kernels that `run` starts on a CUDA device; what starts them again, and the memory they write.

    Raises:
        RuntimeError: another device; something that cannot be recorded, as where the host waits.
    """
    if device.type != "cuda":
        raise RuntimeError(f"images on {device} have no CUDA graph")
    with torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels and take their memory
                run()
        here.wait_stream(side)
        graph, draws = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = draws.clone_state()
        try:
            with torch.cuda.graph(graph, pool=pool):
                found = run()
        except RuntimeError:
            # torch leaves the generator in the capture that failed, where it refuses to draw
            draws.graphsafe_set_state(before)
            raise
    return graph.replay, found


def _kind(x: Tensor, labels: Tensor, loss: Loss | None, member: int | None) -> Hashable | None:
    """What calls of one graph have in common; None where there can be none."""
    for one in (loss, loss.loss if isinstance(loss, MeanLogits) else None):
        if one is not None and not (dataclasses.is_dataclass(one) and type(one).__dataclass_params__.frozen):
            return None
    autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
    kind = x.device, x.shape, x.dtype, labels.shape, labels.dtype, loss, member, autocast
    try:
        hash(kind)
    except TypeError:  # a loss with a field that can change
        return None
    return kind
