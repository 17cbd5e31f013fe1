"""What an attack adds to its process: each measurement is a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from firstorder.attacks import PGD
from firstorder.evaluation.names import packaged

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from firstorder.attacks import DIFGSM, PGD
from firstorder.evaluation.names import packaged
from firstorder.evaluation.runs.memory import resident

torch.set_num_threads(1)
before = resident()
images, model = packaged.mnist(), packaged.mnist_cnn()
x, y = images.x[:128], images.y[:128]

def bare():
    for _ in range(5):
        point = x.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(model(point), y), point)

def attack(kind):
    return lambda: kind(eps=0.3, alpha=0.01, steps=5)(model, x, y)

run = {"bare": bare, "PGD": attack(PGD), "DIFGSM": attack(DIFGSM)}[sys.argv[1]]
known = set(sys.modules)
for _ in range(4):
    run()
print(resident() - before)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - known}))
"""


def measured(contender: str) -> tuple[float, set[str]]:
    """Bytes at the peak, and the packages that were imported while the contender ran."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, contender], capture_output=True, text=True, check=True)
    peak, modules = done.stdout.splitlines()[:2]
    return float(peak), set(modules.split())


@pytest.mark.skipif(sys.platform != "linux", reason="another allocator, and other libraries in memory")
def test_an_attack_takes_little_more_than_its_gradients() -> None:
    """1.94 times the bare step's once, as autograd imported SymPy for gradients that were given to it."""
    peaks = {name: statistics.median(measured(name)[0] for _ in range(3)) for name in ("bare", "PGD")}
    assert peaks["PGD"] < 1.5 * peaks["bare"], peaks


@pytest.mark.parametrize("contender", ["PGD", "DIFGSM"])
def test_an_attack_imports_nothing_large(contender: str) -> None:
    assert not measured(contender)[1] & {"sympy", "mpmath", "networkx"}


def tensors(run: Callable[[], object]) -> int:
    """Bytes of tensors at the peak of a run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("random_start", [False, True])
def test_no_more_tensors_than_a_loop_written_by_hand(random_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the step itself: the iterate and the limits of its pixels."""
    monkeypatch.setattr("firstorder.attacks.base.keep_heap", lambda: None)
    images, model = packaged.mnist(), packaged.mnist_cnn()
    x, y = images.x[:128], images.y[:128]

    def by_hand() -> None:
        lower, upper = (x - 0.3).clamp_(0, 1), (x + 0.3).clamp_(0, 1)
        a = x.clone()
        for _ in range(4):
            point = a.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
            a.add_(g.sign_(), alpha=0.1).clamp_(lower, upper)
            del g

    attack = PGD(eps=0.3, alpha=0.1, steps=4, random_start=random_start)
    attack(model, x, y)
    ours, theirs = tensors(lambda: attack(model, x, y)), tensors(by_hand)
    assert ours <= 1.01 * theirs, (ours, theirs)
