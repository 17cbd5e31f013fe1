"""What a step costs on the device: ResNet-18 for CIFAR and the small MNIST network, PGD, by CUDA events.

python tests/cuda/measure.py [--batch 512] [--steps 10] [--out FILE]    a line of JSON for each figure, then a table
"""

# ruff: noqa: B023, T201 - closures are called where they are made; a script prints

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import PGD, prepare
from firstorder.training import ENGM, MSGD

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(given, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.short = nn.Sequential()
        if stride != 1 or given != width:
            self.short = nn.Sequential(nn.Conv2d(given, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.one(x)))
        return F.relu(self.norms[1](self.two(h)) + self.short(x))


def resnet18() -> tuple[nn.Module, tuple[int, ...]]:
    """ResNet-18 with 64 channels for images (3, 32, 32)."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [(one, two, 1 + (one != two)) for one, two in itertools.pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *(Block(*b) for b in blocks),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    ), (3, 32, 32)  # fmt: skip


def small() -> tuple[nn.Module, tuple[int, ...]]:
    """Two convolutions and two linear layers for images (1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    ), (1, 28, 28)  # fmt: skip


def milliseconds(run: Callable[[], Any]) -> float:
    """The time of one call on the device's own clock."""
    if not CUDA:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Callable[[], None]:
    """Nothing but the forwards and backwards of a step, by the input alone."""

    def run() -> None:
        for _ in range(steps):
            point = x.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)

    return run


def plain_torch(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Callable[[], None]:
    """PGD in ten lines, as one writes it by hand."""

    def run() -> None:
        a = x.clone()
        for _ in range(steps):
            point = a.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
            a = torch.min(torch.max(a + 2 / 255 * g.sign(), x - 8 / 255), x + 8 / 255).clamp_(0, 1)

    return run


def graphed(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Callable[[], None]:
    """The forwards and backwards of a step in a CUDA graph: what is left without launching kernels one by one."""
    point = x.detach().clone().requires_grad_(True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)

    def run() -> None:
        for _ in range(steps):
            graph.replay()

    return run


def contenders(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """What is compared; every one does `steps` steps of PGD without a random start."""
    attack = PGD(eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)
    found: dict[str, Callable[[], Any]] = {"bare": bare(model, x, y, steps), "by hand": plain_torch(model, x, y, steps)}
    found["firstorder"] = lambda: attack(model, x, y)
    for name, options in {"prepared": {}, "prepared bfloat16": {"precision": "bfloat16"}}.items():
        made = prepare(model, x[:16], **options)  # type: ignore[arg-type]
        print(f"{name}: {', '.join(made.parts)}")
        found[name] = lambda made=made: attack(made, x, y)
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)
        found["torchattacks"] = lambda: theirs(x, y)
    if importlib.util.find_spec("art") and CUDA:
        found["ART"] = _art(model, x, y, steps)
    if CUDA:
        found["bare in a CUDA graph"] = graphed(model, x, y, steps)
    return found


def _art(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Callable[[], Any]:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    whole = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="gpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        whole, eps=8 / 255, eps_step=2 / 255, max_iter=steps, batch_size=len(x), verbose=False
    )
    images, labels = x.cpu().numpy(), y.cpu().numpy()
    return lambda: attack.generate(images, labels)


def attacks(
    title: str, made: tuple[nn.Module, tuple[int, ...]], batch: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per contender: milliseconds per step, the ratio to the bare step, and the peak of the memory."""
    model, shape = made
    model = model.to(DEVICE).eval()
    x, y = torch.rand(batch, *shape, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(x)
        model.eval()
    runs = contenders(model, x, y, steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for round_ in range(rounds + 1):  # in turns, so that a change of the clock touches all
        for name, run in runs.items():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            spent = milliseconds(run)
            if round_:
                times[name].append(spent / steps)
            if CUDA and round_:  # the first round tries kernels
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
    base = statistics.median(times["bare"])
    return [
        {
            "model": title,
            "contender": name,
            "ms_per_step": round(statistics.median(spent), 4),
            "to_bare": round(statistics.median(spent) / base, 3),
            "images_per_second_and_step": round(batch / statistics.median(spent) * 1e3),
            "peak_MiB": round(peaks[name] / 2**20, 1),
            "peak_to_bare": round(peaks[name] / max(peaks["bare"], 1), 2),
        }
        for name, spent in times.items()
    ]


def training(batch: int, rounds: int) -> list[dict[str, Any]]:
    """A training step of ResNet-18: plain, by MSGD and by ENGM, in float32 and under bfloat16 autocast."""
    rows = []
    for low in (False, True):
        torch.manual_seed(0)
        model = resnet18()[0].to(DEVICE).train().to(memory_format=torch.channels_last)
        x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        y = torch.randint(10, (batch,), device=DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        methods: dict[str, Any] = {"plain": None, "MSGD": MSGD(model), "ENGM": ENGM(model, alpha=5.0)}
        times: dict[str, list[float]] = {name: [] for name in methods}

        def step(method: Any) -> None:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=low):
                losses = F.cross_entropy(model(x), y, reduction="none")
            losses.mean().backward() if method is None else method.backward(losses, x)
            optimizer.step()

        for round_ in range(rounds + 2):
            for name, method in methods.items():
                spent = milliseconds(lambda method=method: step(method))
                if round_ > 1:
                    times[name].append(spent)
        base = statistics.median(times["plain"])
        rows += [
            {"model": f"training {'bfloat16' if low else 'float32'}", "contender": name,
             "ms_per_step": round(statistics.median(spent), 3), "to_bare": round(statistics.median(spent) / base, 3)}
            for name, spent in times.items()
        ]  # fmt: skip
    return rows


def share(batch: int, steps: int) -> float:
    """Of the device's busy time in a float32 attack on ResNet-18, the share of kernels that the model itself runs."""
    from torch.profiler import ProfilerActivity, profile

    model, shape = resnet18()
    model = model.to(DEVICE).eval()
    x, y = torch.rand(batch, *shape, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    attack = PGD(eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)
    totals = []
    for run in (bare(model, x, y, steps), lambda: attack(model, x, y)):
        run()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        totals.append(sum(event.self_device_time_total for event in seen.key_averages()))
    return totals[0] / totals[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []

    def keep(found: Callable[[], list[dict[str, Any]]]) -> None:
        """Show and keep what is measured, also where a later part fails."""
        try:
            new = found()
        except Exception as error:
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
            return
        rows.extend(new)
        for row in new:
            print(json.dumps(row), flush=True)
        if given.out is not None:
            given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, batch {given.batch}, {given.steps} steps, median of {given.rounds}")
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        kind = "TF32" if tf32 else "float32"
        keep(lambda: attacks(f"ResNet-18 {kind}", resnet18(), given.batch, given.steps, given.rounds))
    for size in (given.batch, 32):
        keep(lambda: attacks(f"small CNN, batch {size}", small(), size, given.steps, given.rounds))
    keep(lambda: training(given.batch // 2, given.rounds))
    if CUDA:
        keep(lambda: [{"model": "ResNet-18", "share_of_the_models_kernels": round(share(given.batch, given.steps), 4)}])
    for row in rows:
        if "contender" in row:
            row = {"peak_to_bare": float("nan"), **row}
            print("{model:26} {contender:22} {ms_per_step:10.3f} ms {to_bare:7.3f} {peak_to_bare:6.2f}".format(**row))


if __name__ == "__main__":
    main()
