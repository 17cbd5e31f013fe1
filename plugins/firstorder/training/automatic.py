"""A limit that is measured: a quantile of the norms that the examples of the first epoch have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firstorder.attacks import validation

QUANTILE = 0.25
"""Of alpha="auto"."""

LEAST = 100
"""Backwards over all processes: a few steps see no more than the first weights."""


class FirstEpoch:
    """Collects the norms of the first epoch, or of as many first epochs as have `LEAST` backwards.

    Args:
        quantile: the quantile to take, in (0, 1].
        warmup: how many backwards of this process to measure instead; None for what the trainer says of its epochs.
    """

    def __init__(self, quantile: float, warmup: int | None) -> None:
        validation.number("quantile", quantile, low=0, above=True, high=1)
        if warmup is not None:
            validation.count("warmup", warmup)
        self.quantile, self.warmup = float(quantile), warmup
        self.epoch: int | None = None
        """Backwards of this process in an epoch."""
        self.parts = 0
        """Backwards so far, over all processes."""
        self._norms: list[Tensor] = []

    def length(self, processes: int) -> int | None:
        """How many backwards of this process to measure; None where nobody has said."""
        if self.warmup is not None or self.epoch is None:
            return self.warmup
        return self.epoch * -(-LEAST // (self.epoch * processes))

    def require(self) -> None:
        """Require a length.

        Raises:
            ValueError: nobody has said how long an epoch is.
        """
        if self.length(1) is None:
            raise ValueError(
                'alpha="auto" measures the first epoch, and how many backwards it has is not known here; pass '
                "warmup=len(loader), or a number for alpha"
            )

    def add(self, norms: Tensor, processes: int) -> float | None:
        """Take in the norms (N,) of one backward of every process; the limit, once all are there.

        Norms that are 0 or not finite do not count: an example without a gradient, an overflow that a scaler skips.

        Raises:
            FloatingPointError: an epoch without any norm that counts.
        """
        length = self.length(processes)
        assert length is not None
        self._norms.append(norms.detach())
        self.parts += processes
        if self.parts < length * processes:
            return None
        values = torch.cat([norms.double().cpu() for norms in self._norms])
        values = values[values.isfinite() & (values > 0)]
        if not len(values):
            raise FloatingPointError(
                'alpha="auto" found no gradient in the first epoch whose norm is finite and above 0; lower the '
                "learning rate, or pass a number for alpha"
            )
        self._norms = []
        return quantile(values, self.quantile)

    def norms(self) -> list[float]:
        """What has been collected, as plain numbers."""
        return [float(norm) for norms in self._norms for norm in norms.tolist()]

    def restore(self, parts: int, norms: list[float]) -> None:
        """Take up what another had collected."""
        self.parts, self._norms = parts, [torch.tensor(norms, dtype=torch.float64)] if norms else []


def quantile(values: Tensor, share: float) -> float:
    """The quantile of values (N,), linear between two of them."""
    ordered = values.sort().values
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return float(torch.lerp(ordered[low], ordered[high], at - low))
