"""Who of a batch is still attacked, what is known of those who left, and how near each came to success."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from firstorder.attacks.arbitration import asked, confirm
from firstorder.attacks.projections import rows

if TYPE_CHECKING:
    from firstorder.attacks.core import Problem

Tree = TypeVar("Tree")

ROUNDING = 1e-5
"""What a difference of logits must exceed to count as progress, as a share of the largest: more than rounding, which
depends on who else is in the batch."""


class Progress(NamedTuple):
    """The smallest distance of every example (N,) from success so far, and for how many iterates it has been that."""

    best: Tensor
    stalled: Tensor

    def after(self, distance: Tensor, least: Tensor, doubtful: Tensor) -> Progress:
        """After another iterate.

        Args:
            distance: from success, (N,).
            least: what counts as progress, (N,).
            doubtful: those (N,) that begin anew, as another model decides on them from now on.
        """
        closer = distance < self.best - least
        best = torch.where(doubtful, torch.inf, torch.where(closer, distance, self.best))
        return Progress(best, torch.where(closer | doubtful, 0, self.stalled + 1))


class Best(NamedTuple):
    """The iterate of every example that came nearest to success; tensors have a row per example.

    Attributes:
        a: the iterates (N, ...): a broken one where there is any.
        distance: their distance from success by the margin of the logits, (N,): negative for broken ones, infinite
            where no iterate had finite logits.
        logits: their logits (N, K).
    """

    a: Tensor
    distance: Tensor
    logits: Tensor

    def after(self, a: Tensor, distance: Tensor, logits: Tensor, better: Tensor) -> Best:
        """After iterates a (N, ...) at these distances (N,) with these logits (N, K), which are `better` (N,)."""
        return Best(
            torch.where(rows(better, a), a, self.a),
            torch.where(better, distance, self.distance),
            torch.where(better[:, None], logits, self.logits),
        )


class Outcome(NamedTuple):
    """The end of one run.

    Attributes:
        a: the last iterates (N, ...), or with a control those that it keeps.
        gradients: the gradients each example was part of, (N,).
        broken: which were found broken, (N,); none where nobody was to leave the batch.
        forwards: the forwards each example was part of, (N,): those of the gradients, the last look where the best
            iterate was asked for, and those in which an exact model confirmed what a copy of it took for broken.
        best: the best iterates, where asked for.
    """

    a: Tensor
    gradients: Tensor
    broken: Tensor
    forwards: Tensor
    best: Best | None = None


class Roster:
    """Who is still attacked, and what is known of those who left.

    Args:
        start: the first iterates (N, ...).
        drop: whether the broken leave.
        patience: for how many iterates in a row an example may come no closer; None for any number.
        best: whether to keep the best iterates.
    """

    def __init__(self, start: Tensor, *, drop: bool, patience: int | None, best: bool) -> None:
        self.active = torch.arange(len(start), device=start.device)
        self._final, self._gradients = start, torch.zeros_like(self.active)
        self._broken = torch.zeros_like(self.active, dtype=torch.bool)
        self._more = torch.zeros_like(self.active)
        """Forwards without a gradient."""
        self._drop, self._patience, self._keep = drop, patience, best
        self._progress = Progress(start.new_full((len(start),), torch.inf), torch.zeros_like(self.active))
        self._best: Best | None = None

    def spend(self, forwards: int) -> None:
        """Count so many forwards without a gradient of the active."""
        if forwards:
            self._more[self.active] += forwards

    def look(self, problem: Problem, count: int, a: Tensor, logits: Tensor) -> tuple[Tensor | None, Problem]:
        """Look at iterates a (M, ...) of the active, with the logits (M, K) of their `count`-th gradient.

        Returns:
            which of the active leave, (M,), or None where nobody does; the problem to go on with.
        """
        claimed = broken = problem.adversarial(logits)
        distance = problem.distance(logits) if self._keep or self._patience is not None else None
        if self._drop and bool(claimed.any()):
            self._more[self.active] += asked(problem.model, claimed)
            broken, model = confirm(problem.model, a, claimed, problem.adversarial)
            problem = replace(problem, model=model)
        if self._keep:
            assert distance is not None
            self._note(a, distance, logits, broken, claimed)
        if not self._drop:
            return None, problem
        leaving = broken
        if self._patience is not None:
            assert distance is not None
            self._progress = self._progress.after(distance, ROUNDING * logits.abs().amax(1), claimed & ~broken)
            leaving = broken | (self._progress.stalled >= self._patience)
        if not bool(leaving.any()):
            return None, problem
        gone = self.active[leaving]
        self._final = self._final.index_copy(0, gone, a[leaving])
        self._gradients[gone], self._broken[gone] = count, broken[leaving]
        return leaving, problem

    def last(self, problem: Problem, a: Tensor, logits: Tensor) -> None:
        """Look at the last iterates a (M, ...) of the active, with the logits (M, K) of a forward of their own."""
        self._more[self.active] += 1
        if self._keep:
            self._broken[self.active] = broken = problem.adversarial(logits)
            self._note(a, problem.distance(logits), logits, broken, broken)

    def keep(self, left: Tensor) -> None:
        """Go on with the examples at `left` of the active."""
        self.active, self._progress = self.active[left], take(self._progress, left)

    def outcome(self, a: Tensor, count: int) -> Outcome:
        """The end, where the active are at a (M, ...) after `count` gradients."""
        final = a if len(self.active) == len(self._final) else self._final.index_copy(0, self.active, a)
        self._gradients[self.active] = count
        return Outcome(final, self._gradients, self._broken, self._gradients + self._more, self._best)

    def _note(self, a: Tensor, distance: Tensor, logits: Tensor, broken: Tensor, claimed: Tensor) -> None:
        """Keep what is better of iterates a (M, ...) of the active; of the `claimed` only what is `broken`."""
        if self._best is None:
            self._best = Best(a.clone(), torch.full_like(distance, torch.inf), logits.clone())
        whole = len(self.active) == len(self._final)
        best = self._best if whole else take(self._best, self.active)
        nearer = (distance < best.distance) & distance.isfinite() & (broken | ~claimed)
        better = nearer | (broken & (best.distance >= 0))  # at a distance of 0 ties decide
        best = best.after(a, distance, logits, better)
        self._best = best if whole else put_(self._best, self.active, best)


def take(tree: Tree, index: Tensor) -> Tree:
    """The rows at `index` of every tensor in nested (named) tuples."""
    if isinstance(tree, Tensor):
        return cast(Tree, tree[index])
    if isinstance(tree, tuple):
        parts = [take(part, index) for part in tree]
        return cast(Tree, type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts))
    return tree


def put_(tree: Best, index: Tensor, values: Best) -> Best:
    """`tree` with `values` as its rows at `index`, in place."""
    for whole, part in zip(tree, values, strict=True):
        whole.index_copy_(0, index, part)
    return tree
