"""Backwards that stop where the parameters enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from firstorder.training.graph import Graph, Use

Visit = Callable[[Use, Tensor], None]
"""Sees every use with the gradient by its operation's output, while the node still has its saved tensors."""


def check(losses: Tensor, inputs: Sequence[Tensor]) -> int:
    """Require per-example losses (N,) and inputs (N, ...) that can be differentiated by; N."""
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"the losses have shape {tuple(losses.shape)}; pass one per example, (N,): reduction='none'")
    if losses.is_complex():
        raise ValueError(f"the losses are complex ({losses.dtype}); a loss is a real number: take .real or .abs()")
    if losses.grad_fn is None:
        raise ValueError(
            "the losses have no graph; compute them under enable_grad from a model with trainable parameters"
        )
    for x in inputs:
        if not (x.requires_grad and x.is_leaf):
            raise ValueError(
                "the inputs' gradient is needed, but they are not leaves that require it; call inputs.requires_grad_() "
                "before the forward"
            )
        if len(x) != len(losses):
            raise ValueError(f"there are {len(losses)} losses but {len(x)} inputs")
    return len(losses)


def one_by_one(losses: Tensor, parameters: list[nn.Parameter], seeds: Tensor) -> Tensor:
    """The squared norms (N,) of the gradients of every single loss."""
    squares = losses.new_zeros(len(losses), dtype=torch.float64)
    with unhooked(parameters):
        for i in range(len(losses)):
            seed = torch.zeros_like(seeds)
            seed[i] = seeds[i]
            for g in torch.autograd.grad(losses, parameters, seed, retain_graph=True, allow_unused=True):
                if g is not None:
                    squares[i] += _squared_norm(g)
    return squares


@contextmanager
def unhooked(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients by `parameters` before their hooks: these see only what is accumulated."""
    hooks = [one for one in (p._backward_hooks for p in parameters) if one]
    kept = [dict(one) for one in hooks]
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, before in zip(hooks, kept, strict=True):
            one.update(before)


def _squared_norm(gradient: Tensor) -> Tensor:
    """||g||_2^2 in float64; of a complex gradient, over real and imaginary parts."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return values.abs().to(torch.float64).square().sum()


def backward(
    losses: Tensor, seeds: Tensor, graph: Graph, visit: Visit, inputs: Sequence[Tensor], *, retain: bool
) -> tuple[Tensor, ...]:
    """Run the backward to the lowest uses and the inputs; `visit` sees every use with its output's gradient."""
    at: dict[Node, list[Use]] = {}
    for use in graph.uses:
        at.setdefault(use.node, []).append(use)
    ends: list[Any] = [*graph.lowest, *inputs]
    if not ends:
        return ()

    def arrive(node: Node, gradient: Tensor | None) -> None:
        # A lowest node runs, and gives its saved tensors away, only where the inputs lie below it.
        for use in at.pop(node, ()):
            if gradient is not None:
                visit(use, gradient)

    with ExitStack() as stack:
        for node in at:
            handle = node.register_prehook(lambda gradients, node=node: arrive(node, gradients[0]))
            stack.callback(handle.remove)
        try:
            found = torch.autograd.grad(losses, ends, seeds, retain_graph=retain, allow_unused=True)
        except CheckpointError as error:
            raise ValueError(
                "checkpointed layers give their tensors out once only; train without checkpoints, or take the batch in "
                "parts and accumulate"
            ) from error
    for edge, gradient in zip(graph.lowest, found, strict=False):
        arrive(edge.node, gradient)
    by_inputs = found[len(graph.lowest) :]
    if any(g is None for g in by_inputs):
        raise ValueError("the losses do not depend on the inputs; pass those that the forward was called with")
    return by_inputs


@contextmanager
def uncoupled(node: Any) -> Iterator[None]:
    """BatchNorm's backward as if its statistics were constants."""

    def replace(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        scale = node._saved_result2 if node._saved_weight is None else node._saved_result2 * node._saved_weight
        gradient = outputs[0] * scale.reshape(-1, *[1] * (outputs[0].ndim - 2))
        return (None if inputs[0] is None else gradient.to(inputs[0].dtype), *inputs[1:])

    handle = node.register_hook(replace)
    try:
        yield
    finally:
        handle.remove()
