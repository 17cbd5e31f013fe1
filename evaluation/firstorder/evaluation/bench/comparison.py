"""The comparison itself: contenders side by side, and what is kept of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from firstorder.evaluation.bench import contenders
from firstorder.evaluation.bench.contenders import BARE, PLAIN, PREPARED, Found
from firstorder.evaluation.bench.pairs import Cost, paired
from firstorder.evaluation.bench.scenes import TORCHATTACKS, Case, Scene, Setting
from firstorder.evaluation.bench.worker import Worker

Progress = Callable[[str], None]
"""Called with a contender's name before each of its runs."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a step costs on one model.

    Attributes:
        scene: the model.
        costs: time per step over the bare step's, a row per contender.
        memory: by contender, the memory it adds to its process at its peak over the bare step's.
    """

    scene: Scene
    costs: Sequence[Cost]
    memory: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One contender until robust accuracy is known.

    Attributes:
        name: of the contender.
        speed: how many times faster than torchattacks' PGD, the median of the rounds.
        robust: the share of images that it says are robust.
        gradients: per image; NaN where the host does not say.
        verified: the share of the images it says are broken that the module itself, in its own precision, takes for
            another class, within the ball and the bounds; 1 where none is broken.
        memory: what it adds to its process at its peak, over torchattacks' PGD.
    """

    name: str
    speed: float
    robust: float
    gradients: float
    verified: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """All contenders on one setting.

    Attributes:
        scene, setting: the model, and the attack.
        rows: the contenders.
        differing: the share of images on which the attack on the prepared model and that on the module itself
            disagree.
    """

    scene: Scene
    setting: Setting
    rows: Sequence[Verdict]
    differing: float


def steps(scene: Scene, *, rounds: int, threads: int, progress: Progress) -> Steps:
    """Time the contenders on the scene's step; every run between two runs of the bare step."""
    names = [name for name in contenders.STEPS if contenders.missing(name) is None]
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(partial(contenders.step, scene, name), threads=threads)) for name in names
        }

        def run(name: str) -> None:
            progress(name)
            workers[name].run()

        costs = paired({name: partial(run, name) for name in names}, BARE, rounds=rounds, threads=threads)
        peaks = {name: worker.peak() for name, worker in workers.items()}
    return Steps(scene=scene, costs=costs, memory={name: peak / peaks[BARE] for name, peak in peaks.items()})


def verdicts(
    scene: Scene, setting: Setting, *, rounds: int, threads: int, everything: bool, progress: Progress
) -> Verdicts:
    """Time the contenders until the verdict: in each round once, in random order."""
    names = entered(setting, everything=everything)
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Found] = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(partial(contenders.verdict, scene, setting, name), threads=threads))
            for name in names
        }
        order, shuffle = list(names), random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                progress(name)
                start = time.perf_counter()
                found[name] = workers[name].run()
                times[name].append(time.perf_counter() - start)
        peaks = {name: worker.peak() for name, worker in workers.items()}
    case, unit = scene.case(setting), times[TORCHATTACKS]
    rows = [
        Verdict(
            name=name,
            speed=statistics.median(base / own for base, own in zip(unit, times[name], strict=True)),
            robust=1 - float(found[name].broken.mean()),
            gradients=found[name].gradients,
            verified=_verified(case, found[name]),
            memory=peaks[name] / peaks[TORCHATTACKS],
        )
        for name in names
    ]
    differing = float((found[PLAIN].broken != found[PREPARED].broken).mean())
    return Verdicts(scene=scene, setting=setting, rows=rows, differing=differing)


def entered(setting: Setting, *, everything: bool) -> list[str]:
    """Who takes part in a setting."""
    own = [name for name in contenders.VERDICTS if name.startswith("firstorder")]
    rivals = [name for name in contenders.VERDICTS if name not in own and (everything or name in setting.rivals)]
    return [name for name in own + rivals if contenders.missing(name) is None]


def _verified(case: Case, found: Found) -> float:
    broken = torch.from_numpy(found.broken)
    if not bool(broken.any()):
        return 1.0
    true = contenders.verified(case, torch.from_numpy(found.adversarial))
    return float(np.mean(true[broken].numpy()))
