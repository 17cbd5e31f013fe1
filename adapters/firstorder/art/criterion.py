"""ENGM and its relatives in ART's own training loops.

classifier = PyTorchClassifier(model, ENGMCriterion(ENGM(model, alpha=5.0)), input_shape, nb_classes, optimizer)
classifier.fit(x_train, y_train)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.training import GradientMethod


class ENGMCriterion(nn.Module):
    """The loss of a `PyTorchClassifier` whose `fit`, also within ART's own trainers, then is ENGM or a relative.

    While the model is in training mode with gradients enabled it is sum_i w_i L_i / N (source: ENGM, Eq. 5b), else
    the plain loss: attacks and `loss_gradient` run in evaluation mode. ART runs networks with RNN layers in training
    mode even there. It belongs to the method's model: `clone_for_refitting` gives its clone the same criterion, which
    refuses the clone's logits; `clone.set_params(loss=ENGMCriterion(ENGM(clone.model)))` gives it one of its own.

    Args:
        method: the method, with the model that the classifier has.
        loss: a loss on logits (N, K) and class indices, with a `reduction`; cross-entropy by default.

    Attributes:
        reduction: "mean", "sum" or "none", to be set at any time.

    Raises:
        ValueError: a method or a loss of another kind.
    """

    def __init__(self, method: GradientMethod, loss: nn.Module | None = None) -> None:
        super().__init__()
        loss = nn.CrossEntropyLoss() if loss is None else loss
        if not isinstance(method, GradientMethod):
            raise ValueError(f"the method is a {type(method).__name__}; pass one of firstorder.training: ENGM(model)")
        if not isinstance(getattr(loss, "reduction", None), str):
            raise ValueError(f"{type(loss).__name__} has no reduction; pass a loss that can return one per example")
        self.method, self.loss, self.reduction = method, loss, "mean"
        self._input: Tensor | None = None
        # ART runs the members of a Sequential one by one, so only its first sees the input.
        entry = next(iter(method.model), method.model) if isinstance(method.model, nn.Sequential) else method.model
        self._hook = entry.register_forward_pre_hook(self._record) if method.needs_inputs else None

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (N, K) and labels y, indices (N,), one-hot rows or probabilities (N, K).

        Returns:
            A scalar, or (N,) for reduction="none".

        Raises:
            ValueError: an unknown reduction; labels of another form; logits of another model than the method's; a
                method that needs inputs and did not see them.
        """
        validation.choice("reduction", self.reduction, ("mean", "sum", "none"))
        if self._foreign(logits):
            raise ValueError(
                "the logits are those of another model than the method's, as after clone_for_refitting(); give that "
                f"classifier a criterion of its own: set_params(loss=ENGMCriterion({type(self.method).__name__}"
                "(classifier.model)))"
            )
        found = validation.labels(y, len(logits), logits.device, ties=True)
        y = found.indices if found.rows is None else found.rows.to(logits.dtype)
        training = self.method.model.training and torch.is_grad_enabled()
        losses = self._values(logits, y, "none" if training else self.reduction)
        if not training:
            return losses
        inputs, self._input = self._input, None
        if self.method.needs_inputs and inputs is None:
            raise ValueError(
                f"{type(self.method).__name__} needs the model's input, which was not seen in training mode: use the "
                "method's own model, one forward for every loss, inputs in floating point, and no close() before"
            )
        weighted = self.method.weights(losses, inputs) * losses
        return weighted if self.reduction == "none" else weighted.sum() if self.reduction == "sum" else weighted.mean()

    def close(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()
        self._input = None

    def _foreign(self, logits: Tensor) -> bool:
        """Whether parameters are behind logits (N, K), but none of the model's. The last layer's are found at once."""
        own = {id(parameter) for parameter in self.method.model.parameters()}
        left, seen, others = [logits.grad_fn], set[Any](), False
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if id(variable) in own:
                return False
            others |= isinstance(variable, nn.Parameter)
            left += [behind for behind, _ in node.next_functions]
        return others

    def _values(self, logits: Tensor, y: Tensor, reduction: str) -> Tensor:
        loss: Any = copy.copy(self.loss)
        loss.reduction = reduction
        values: Tensor = loss(logits, y)
        return values

    def _record(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = given[0] if given else None
        training = self.method.model.training and torch.is_grad_enabled()
        if not (training and isinstance(x, Tensor) and x.is_floating_point()):
            return None
        if not x.requires_grad or x.is_leaf:
            self._input = x if x.requires_grad else x.detach().clone().requires_grad_()
            return (self._input, *given[1:])
        if self._input is not None:
            return None  # the first layer at work again, on the outputs of a later one
        # An input with a graph keeps it: the gradient by x is that by what is added to x.
        self._input = torch.zeros_like(x).requires_grad_()
        return (x + self._input, *given[1:])
