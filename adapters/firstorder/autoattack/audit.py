"""What AutoAttack would still break of the examples that were given up: a random sample of them, attacked by it.

audit = drawn(given_up, 100, total=len(x), seed=0)
attacked(AutoAttack(model, eps=8/255, seed=0), x[audit.sample], y[audit.sample], audit)
audit.breaks, audit.bound
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.autoattack.record import CLEAN, Audit, Record

if TYPE_CHECKING:
    from firstorder.autoattack.attack import AutoAttack


NAMES = ("audit", "second audit")
"""Of the two samples, among the attacks that a record lists."""

REOPENED = "verdict reopened"
"""The closing stages for all that were given up, after the first sample had breaks."""


def rounds(
    record: Record,
    size: int,
    seed: int,
    *,
    attack: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Draw a sample and attack it; after a break reopen the closing stages, then draw and attack a fresh one.

    The first sample is of those given up, the second of all that are robust after the closing stages, without those
    that were drawn before. Where nobody was given up the first is of all that are robust, and the only one.

    Args:
        record: after a verdict; what it holds already is not done again.
        size: of a sample.
        seed: of the draws.
        attack: runs what has a name: AutoAttack on the last sample, or the closing stages on all that were given up;
            it enters what is broken into the record, and keeps it.
        save: keeps the record.

    Raises:
        ValueError: the record holds samples of another size.
    """
    if record.audits and record.audits[0].asked != size:
        raise ValueError(
            f"audit={size}: the state holds an audit of {record.audits[0].asked}; ask for that, or name another file"
        )
    for number, name in enumerate(NAMES):
        if len(record.audits) == number:
            pool = record.given_up if number == 0 and bool(record.given_up.any()) else record.robust
            pool[[i for audit in record.audits for i in audit.sample]] = False
            if not bool(pool.any()):
                return
            audit = drawn(pool.nonzero()[:, 0], size, total=len(pool), seed=seed + number)
            record.audits.append(audit)
            save()
        audit = record.audits[number]
        if audit.broken_by is None:
            attack(name)
        if number == 1 or not audit.breaks:
            return
        if REOPENED not in record.run:
            if not bool(record.given_up.any()):
                return
            attack(REOPENED)


def drawn(pool: Tensor, size: int, *, total: int, seed: int) -> Audit:
    """A sample to be attacked, each example with the same chance.

    Args:
        pool: indices (M,) of the examples it is drawn from, such as those given up.
        size: how many are drawn, all M of them if these are fewer.
        total: of all examples of the evaluation, of which the bound is a share.
        seed: of the draw.

    Raises:
        ValueError: size < 1.
    """
    validation.count("size", size)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]
    return Audit(asked=size, total=total, population=len(pool), sample=sorted(pool.cpu()[order].tolist()))


def attacked(
    standard: AutoAttack, x: Tensor, y: Tensor, audit: Audit, *, bs: int = 250, state_path: Path | None = None
) -> Record:
    """Attack the sample of an audit, and enter into it what was broken and at what price.

    Args:
        standard: AutoAttack(version="standard"), with the model, norm and radius of the evaluation.
        x: the examples (S, C, H, W) of `audit.sample`, with labels y (S,).
        audit: what it lacks is entered.
        bs: examples per batch.
        state_path: where the state of `standard` is kept meanwhile.

    Returns:
        the record of `standard`, over the sample.
    """
    standard.run_standard_evaluation(x, y, bs, state_path=state_path)
    record = standard.record
    assert record is not None
    audit.broken_by = [None if name == CLEAN else name for name in record.broken_by]
    audit.forwards, audit.gradients = sum(record.forwards.values()), sum(record.gradients.values())
    return record
