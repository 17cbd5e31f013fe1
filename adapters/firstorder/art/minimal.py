"""ART's `minimal`: the smallest radius, on a grid, at which an attack breaks an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import Attack, Model


def minimal(
    core: Callable[[dict[str, Any]], Attack],
    given: dict[str, Any],
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None,
    **words: Any,
) -> Tensor:
    """Examples within the smallest multiple of eps_step that breaks them, at most eps.

    Args:
        core: from the sizes of a batch to the attack.
        given: `eps` and `eps_step`, numbers or tensors that broadcast against x.
        model, x, y, mask, words: as in `Attack.__call__`.
    """
    found, left = x.clone(), torch.arange(len(x), device=x.device)
    step, eps = (torch.as_tensor(given[name], dtype=torch.float64, device=x.device) for name in ("eps_step", "eps"))
    size = step
    while len(left) and bool((size <= eps).all()):
        here = size[left] if size.ndim and len(size) > 1 else size
        attack = replace(core({"eps": here if here.ndim else float(here)}), random_start=False, restarts=1)  # type: ignore[call-arg]
        free = None if mask is None else mask[left]
        result = attack.run(model.take(left), x[left], y[left], mask=free, **words)
        assert result.success is not None
        found[left], left, size = result.adversarial, left[~result.success], size + step
    return found
