"""What an attack adds to its process: each measurement is a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from firstorder.attacks import DIFGSM, PGD
from firstorder.evaluation import packaged
from firstorder.evaluation.memory import resident

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
