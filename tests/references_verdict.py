"""A slow transcription of the verdict: one example after the other, explicit loops, nothing shared with the package.

Only the gradients of single examples and the random draws come from torch. Draws have a row for every example of the
batch, or of the block, so they are made for all before any one is attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""From the logits (K,) of one point to a number."""


@dataclass
class Example:
    """What is known of one example."""

    x: Tensor
    y: int
    free: Tensor
    by: str | None = None
    nearest: float = math.inf
    point: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0
    complete: bool = False


@dataclass
class Slow:
    """The cascade on a batch; see `run`."""

    model: Callable[[Tensor], Tensor]
    examples: list[Example]
    eps: float
    norm: str
    low: float
    high: float
    generator: torch.Generator
    restarts: int
    last_class: int
    diversified: bool = True
    random: bool = True
    targets: bool = True
    searched: bool = True

    def run(self, population: bool) -> None:
        """All stages."""
        everyone = self.examples
        self.stage(everyone, "margin", self.margin, 20)
        for e in everyone:
            e.order = self.ranked(e)
        self.stage(everyone, "cross-entropy", self.cross_entropy, 10, start="random")
        for rank in range(2, self.last_class + 1):
            self.towards(everyone, f"class {rank}", rank, 10)
        for e in everyone:
            e.order = self.ranked(e)
        if not population:
            self.close(everyone)
            for e in everyone:
                e.complete = True
        else:
            self.close_population()
        for e in everyone:
            e.forwards += 1  # the last word

    def close_population(self) -> None:
        left = sorted((e for e in self.examples if e.by is None), key=lambda e: e.nearest)
        in_a_row = 0
        for e in self.examples:
            e.complete = e.by is not None
        for i in range(0, len(left), 10):
            block = left[i : i + 10]
            self.close(block)
            for e in block:
                e.complete = True
                in_a_row = in_a_row + 1 if e.by is None else 0
            if in_a_row >= 20:
                return

    def close(self, block: list[Example]) -> None:
        self.towards(block, "closing class 2", 2, 20, start="random")
        self.stage(block, "closing cross-entropy", self.cross_entropy, 10, start="random")
        for r in range(1, self.restarts + 1):
            self.restart(block, f"restart {r}")
        if self.searched and self.norm == "Linf":
            self.search(block, "square search", 300)

    def towards(self, block: list[Example], name: str, rank: int, steps: int, start: str = "input") -> None:
        if rank > len(block[0].order) if block else True:
            return

        def objective(e: Example) -> Objective:
            k = e.order[rank - 1] if self.targets else e.order[0]
            return lambda z: z[k] - z[e.y]

        self.stage(block, name, objective, steps, start=start)

    def stage(
        self,
        block: list[Example],
        name: str,
        objective: Callable[[Example], Objective],
        steps: int,
        *,
        start: str = "input",
    ) -> None:
        if all(e.by is not None for e in block):
            return
        starts = self.starts(block) if start == "random" and self.random else [e.x for e in block]
        for e, a in zip(block, starts, strict=True):
            if e.by is None:
                self.climb(e, name, objective(e), a, [self.size(t, steps) for t in range(1, steps + 1)])

    def restart(self, block: list[Example], name: str) -> None:
        """Five steps along random weights of the logits, then ten along the margin, of one run of sizes."""
        if all(e.by is not None for e in block):
            return
        starts = [e.x for e in block]
        classes = len(block[0].logits)
        draws = torch.rand(1, len(block), classes, generator=self.generator, dtype=torch.float64)[0] * 2 - 1
        for e, a, w in zip(block, starts, draws, strict=True):
            if e.by is not None:
                continue
            sizes = [self.size(t, 15) for t in range(1, 16)]
            if self.diversified:
                a = self.climb(e, name, lambda z, w=w: (w * z).sum(), a, sizes[:5], look=False)  # type: ignore[misc]
            if e.by is None:
                self.climb(e, name, self.margin(e), a, sizes[5:])

    def search(self, block: list[Example], name: str, steps: int) -> None:
        """Blocks of one sign at random places of the best points, kept where the margin becomes smaller."""
        best = [e.point for e in block]
        tried, top = list(best), [math.inf] * len(block)
        for t in range(steps + 1):
            if all(e.by is not None for e in block):
                return
            if t < steps:
                draws = torch.rand(1, len(block), 2, generator=self.generator, dtype=torch.float64)[0].tolist()
            for i, e in enumerate(block):
                if e.by is not None:
                    continue
                z = self.model(tried[i][None])[0].tolist()
                e.forwards += 1
                distance = z[e.y] - max(v for k, v in enumerate(z) if k != e.y)
                if distance < top[i]:
                    best[i], top[i] = tried[i], distance
                if not self.seen(e, name, tried[i], z) and t < steps:
                    length = max(round(len(e.x) * 0.05 * (0.002 / 0.05) ** (t / steps)), 1)
                    first, sign = int(draws[i][0] * (len(e.x) - length + 1)), 1 if draws[i][1] >= 0.5 else -1
                    tried[i] = best[i].clone()
                    for at in range(first, first + length):
                        if bool(e.free[at]):
                            tried[i][at] = min(max(float(e.x[at]) + sign * self.eps, self.low), self.high)

    def climb(
        self, e: Example, name: str, objective: Objective, a: Tensor, sizes: list[float], *, look: bool = True
    ) -> Tensor:
        a = a.clone()
        for size in sizes:
            point = a.clone().requires_grad_()
            z = self.model(point[None])[0]
            (g,) = torch.autograd.grad(objective(z), point)
            e.forwards, e.backwards = e.forwards + 1, e.backwards + 1
            if self.seen(e, name, a, z.tolist()):
                return a
            g = torch.where(e.free, g, 0.0)
            step = g.sign() if self.norm == "Linf" else g / max(float(g.square().sum()) ** 0.5, 1e-300)
            a = self.feasible(e, a + size * step)
        if look:
            e.forwards += 1
            self.seen(e, name, a, self.model(a[None])[0].tolist())
        return a

    def seen(self, e: Example, name: str, a: Tensor, z: list[float]) -> bool:
        distance = z[e.y] - max(v for k, v in enumerate(z) if k != e.y)
        if distance < e.nearest:
            e.nearest, e.point, e.logits = distance, a, z
        if distance < 0:
            e.by = "input" if name == "margin" and e.backwards == 1 and e.forwards == 1 else name
        return distance < 0

    def feasible(self, e: Example, a: Tensor) -> Tensor:
        delta = a - e.x
        if self.norm == "Linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = float(delta.square().sum()) ** 0.5
            delta = delta * min(1.0, self.eps / max(length, 1e-300))
        return (e.x + delta).clamp(self.low, self.high)

    def starts(self, block: list[Example]) -> list[Tensor]:
        """Uniform in the ball, every example's row of one draw."""
        x = torch.stack([e.x for e in block])
        if self.norm == "Linf":
            drawn = x + self.eps * (2 * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) - 1)
        else:
            way = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            radius = torch.rand(len(x), 1, generator=self.generator, dtype=x.dtype) ** (1 / x[0].numel())
            way = way.flatten(1)
            drawn = x + (self.eps * radius * way / way.norm(dim=1, keepdim=True)).reshape(x.shape)
        found = [self.feasible(e, a) for e, a in zip(block, drawn, strict=True)]
        return [torch.where(e.free, a, e.x) for e, a in zip(block, found, strict=True)]

    def size(self, t: int, steps: int) -> float:
        return 2 * self.eps * (1 + math.cos(math.pi * (t - 1) / steps)) / 2

    @staticmethod
    def margin(e: Example) -> Objective:
        return lambda z: torch.stack([z[k] for k in range(len(z)) if k != e.y]).max() - z[e.y]

    @staticmethod
    def cross_entropy(e: Example) -> Objective:
        return lambda z: z.exp().sum().log() - z[e.y]

    @staticmethod
    def ranked(e: Example) -> list[int]:
        """The wrong classes, largest logit first."""
        return sorted((k for k in range(len(e.logits)) if k != e.y), key=lambda k: -e.logits[k])
