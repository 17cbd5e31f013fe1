"""What a host multiplies losses by before it differentiates them."""

from __future__ import annotations

from torch import Tensor

from firstorder.training.method import Scaler


class Share:
    """Scales a loss to its share of a step of several backwards, and as the host's scaler does.

    Args:
        parts: backwards a step.
        scaler: torch's GradScaler, or None.
    """

    def __init__(self, parts: int, scaler: Scaler | None) -> None:
        self._parts, self._scaler = parts, scaler

    def scale(self, outputs: Tensor) -> Tensor:
        """The loss times its factor."""
        scaled = outputs / self._parts
        return scaled if self._scaler is None else self._scaler.scale(scaled)
