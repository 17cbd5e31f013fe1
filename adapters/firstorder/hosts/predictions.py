"""What a model predicts at given inputs, from the forwards that somebody else does with it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks.models import preserved


class Predictions:
    """Notes forwards of a model, to say afterwards what it predicts at `inputs`.

        with Predictions(model, adversarial) as predictions:
            losses = objective.losses(model, x, adversarial, y)
        predictions.classes()

    Only a forward that is sure to have been one of `inputs` counts: its input was that tensor or shares its memory, or
    holds its values, alone or as a block of a larger batch ([x, x'], say). The last of several counts. Where there was
    none, `classes` does one forward without gradients, in the model's mode, and leaves its buffers and the random
    numbers as they were.

    Args:
        model: a module from (N, ...) to logits (N, K).
        inputs: (N, ...).
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs.detach()
        self._seen: list[tuple[Tensor, int, Tensor]] = []

    def __enter__(self) -> Predictions:
        self._hook = self._model.register_forward_hook(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def classes(self) -> Tensor:
        """The predicted classes (N,), detached."""
        seen = [(x, logits) for x, version, logits in reversed(self._seen) if x._version == version]
        self._seen.clear()
        for x, logits in seen:
            if self._shares(x):
                return logits.argmax(1)
        for x, logits in seen:
            start = self._found(x)
            if start is not None:
                return logits[start : start + len(self._inputs)].argmax(1)
        device = self._inputs.device
        same_draws = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with preserved(self._model, evaluate=False), torch.no_grad(), same_draws:
            found: Tensor = self._model(self._inputs).argmax(1)
        return found

    def _note(self, module: nn.Module, given: tuple[Any, ...], logits: Any) -> None:
        x = given[0] if len(given) == 1 else None
        # Tensors within torch.func and inference mode cannot be looked at later.
        if isinstance(x, Tensor) and not x.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            fits = x.dtype == self._inputs.dtype and x.device == self._inputs.device
            if fits and x.shape[1:] == self._inputs.shape[1:] and len(x) >= len(self._inputs):
                self._seen.append((x.detach(), x._version, logits.detach()))

    def _shares(self, x: Tensor) -> bool:
        own = self._inputs
        return x.shape == own.shape and x.stride() == own.stride() and x.data_ptr() == own.data_ptr()

    def _found(self, x: Tensor) -> int | None:
        """Where the block `inputs` begins in x; None where it is not there or cut up."""
        n = len(self._inputs)
        starts = {*range(0, len(x) - n + 1, n), len(x) - n}
        return next((start for start in sorted(starts) if torch.equal(x[start : start + n], self._inputs)), None)
