"""Gradients in float16, scaled into its range.

float16 has five bits of exponent: what is below 6e-8 is zero, what is above 65504 is infinite. Through a network that
treats every example by itself the backward is linear in the gradient of an example's logits. So that gradient is
scaled by a power of two on the way in, and what comes out is divided by it in float32, which rounds nothing. Every
example has its own power: a confident one does not vanish beside others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks.inspection import doubt
from firstorder.attacks.projections import rows

HIGHEST, LOWEST = 15, -9
"""The largest gradient of an example's logits is below 2^exponent, for exponents from LOWEST to HIGHEST."""
STEP = 4
"""By how much the exponent falls where gradients overflow, and by how much it stays below what did not."""


class Scaling:
    """To which power of two the gradients of logits are scaled. All of it is on the device, so nothing waits for it.

    Args:
        device: of the model.

    Attributes:
        exponent: the power, for all examples; it falls where gradients overflow.
    """

    def __init__(self, device: torch.device) -> None:
        self.exponent = torch.full((), HIGHEST, dtype=torch.int32, device=device)
        self._asked, self._lost, self._last = (torch.zeros_like(self.exponent, dtype=torch.long) for _ in range(3))
        self._too_high = torch.zeros_like(self.exponent, dtype=torch.bool)

    def around(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The float32 logits (N, K) of a forward in float16 at x (N, ...), with gradients that are scaled in it."""
        shift = _Shift(self)
        logits: Tensor = _Enter.apply(forward(_Leave.apply(x, shift)), x.dtype, shift)  # type: ignore[no-untyped-call]
        return logits

    def calibrate(self, run: Callable[[], object]) -> None:
        """Find the exponent at which a backward, which `run` makes, has room; the host waits for it."""
        self.exponent.fill_(HIGHEST)
        run()
        while self.again():
            run()
        self.exponent.sub_(STEP).clamp_(min=LOWEST)

    def again(self) -> bool:
        """Whether the last backward overflowed and another one, at the exponent that is lower now, may not.

        The host waits for the answer. What was lost is then forgotten.
        """
        again = bool(self._too_high)
        if again:
            self._lost.sub_(self._last)
        return again

    def report(self) -> None:
        """Warn of the gradients that were lost since the last report; the host waits for their number."""
        lost, asked = int(self._lost), int(self._asked)
        self.clear()
        if lost:
            doubt(
                f"{lost} of {asked} gradients overflowed in float16 and were taken for zero, so that the attack may be "
                "weaker than it should be; prepare the model with precision='bfloat16' or 'float32'"
            )

    def clear(self) -> None:
        """Begin to count anew."""
        self._lost.zero_()
        self._asked.zero_()

    def note(self, lost: Tensor, known: Tensor) -> None:
        """After a backward: which examples (N,) have no finite gradient, and of which that of the logits was finite."""
        self._last.copy_(lost.sum())
        self._lost.add_(self._last)
        self._asked.add_(len(lost))
        overflowed = (lost & known).any()
        self._too_high.copy_(overflowed & (self.exponent > LOWEST))
        self.exponent.sub_(STEP * overflowed).clamp_(min=LOWEST)


class _Shift:
    """By which powers of two (N,) the examples of one backward are scaled, and which have finite gradients at all."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self.exponents: Tensor
        self.known: Tensor


class _Enter(torch.autograd.Function):
    """Logits of float16 to another dtype; the gradient (N, K) is scaled on its way back."""

    @staticmethod
    def forward(context: Any, logits: Tensor, dtype: torch.dtype, shift: _Shift) -> Tensor:
        context.dtype, context.shift = logits.dtype, shift
        return logits.to(dtype, copy=True)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        shift = context.shift
        top = gradient.abs().amax(1)
        shift.known = top.isfinite()
        exponents = shift.scaling.exponent - torch.frexp(top).exponent
        shift.exponents = torch.where(shift.known & (top > 0), exponents, 0)
        return scaled(gradient, shift.exponents).to(context.dtype), None, None


class _Leave(torch.autograd.Function):
    """Points (N, ...) as they are; their gradient is divided by what that of the logits was multiplied by."""

    @staticmethod
    def forward(context: Any, x: Tensor, shift: _Shift) -> Tensor:
        context.shift = shift
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shift = context.shift
        lost = ~gradient.isfinite().reshape(len(gradient), -1).all(1)
        shift.scaling.note(lost, shift.known)
        return scaled(torch.where(rows(lost, gradient), 0.0, gradient), -shift.exponents), None


def scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """values (N, ...), float32, times 2^exponents (N,), int32 from -252 to 254, rounded only where the result is."""
    first = exponents.div(2, rounding_mode="floor")
    for part in (first, exponents - first):
        power = (part + 127).bitwise_left_shift(23).view(torch.float32)  # the bits of that power of two
        values = values * rows(power, values)
    return values
