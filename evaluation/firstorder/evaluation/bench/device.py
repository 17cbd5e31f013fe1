"""What a step costs on a device: ResNet-18 for CIFAR and the small MNIST network, PGD and training, by CUDA events.

On the CPU the same is timed by the clock, to try it. Contenders run in turns, so that a change of the device's clock
touches all of them; a figure is the median of the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import PGD, prepare
from firstorder.evaluation.names.networks import ResNet18, SmallCNN
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.files import write_text
from firstorder.training import ENGM, MSGD

EPS, ALPHA = 8 / 255, 2 / 255
BARE = "bare step"
SHAPES = {ResNet18: (3, 32, 32), SmallCNN: (1, 28, 28)}

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender on one model.

    Attributes:
        model: with precision and batch.
        contender: its name.
        ratio: the time of a step over the bare step's (training: over the plain mean gradient's).
        milliseconds: of a step.
        images_per_second: images that take a step each second.
        memory: the peak of allocated memory over the bare step's, None on the CPU.
    """

    model: str
    contender: str
    ratio: float
    milliseconds: float
    images_per_second: float
    memory: float | None = None


def rows(device: torch.device, *, batch: int, steps: int, rounds: int) -> Iterator[list[Row]]:
    """The tables one after the other: attacks on ResNet-18 in float32 and TF32, on the small network, training.

    Args:
        device: where it all runs.
        batch: examples; half as many in training, and the small network also gets 32.
        steps: of an attack.
        rounds: of which medians are taken.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        cudnn.benchmark = True
        for tf32 in (False, True) if device.type == "cuda" else (False,):
            matmul.allow_tf32 = cudnn.allow_tf32 = tf32
            name = f"ResNet-18, {'TF32' if tf32 else 'float32'}, batch {batch}"
            yield attacks(name, ResNet18, device, batch=batch, steps=steps, rounds=rounds)
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        for size in dict.fromkeys((batch, min(batch, 32))):
            yield attacks(f"small CNN, batch {size}", SmallCNN, device, batch=size, steps=steps, rounds=rounds)
        for low in (False, True):
            yield training(device, batch=max(batch // 2, 2), rounds=rounds, bfloat16=low)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def attacks(
    title: str, network: type[nn.Module], device: torch.device, *, batch: int, steps: int, rounds: int
) -> list[Row]:
    """PGD without a random start by this package and by others, on a network of random weights."""
    model, x, y = _case(network, device, batch)
    times, peaks = _measured(_contenders(model, x, y, steps), device, rounds)
    return _rows(title, times, peaks, steps, batch)


def training(device: torch.device, *, batch: int, rounds: int, bfloat16: bool) -> list[Row]:
    """A training step of ResNet-18, channels last, without the inner attack: plain, by MSGD and by ENGM.

    Args:
        bfloat16: under autocast.
    """
    network, x, y = _case(ResNet18, device, batch)
    model = network.train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(method: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward() if method is None else method.backward(losses, x)
        optimizer.step()

    methods = {"plain": None, "MSGD": MSGD(model), "ENGM": ENGM(model, alpha=5.0, coupling="ignore")}
    times, peaks = _measured({name: partial(step, method) for name, method in methods.items()}, device, rounds)
    return _rows(f"training, {'bfloat16' if bfloat16 else 'float32'}, batch {batch}", times, peaks, 1, batch)


def share(device: torch.device, *, batch: int, steps: int) -> float:
    """Of the busy time of a CUDA device in a float32 attack on ResNet-18, the share of the model's own kernels."""
    from torch.profiler import ProfilerActivity, profile

    model, x, y = _case(ResNet18, device, batch)
    totals = []
    for run in (_bare(model, x, y, steps), partial(_attack(steps), model, x, y)):
        run()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize(device)
        totals.append(sum(event.self_device_time_total for event in seen.key_averages()))
    return float(totals[0] / totals[1])


def _case(network: type[nn.Module], device: torch.device, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose BatchNorm has seen the images, the images, and labels; drawn on the CPU from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().to(device)
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *SHAPES[network], generator=draws).to(device)
    y = torch.randint(10, (batch,), generator=draws).to(device)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval(), x, y


def _attack(steps: int) -> PGD:
    return PGD(eps=EPS, alpha=ALPHA, steps=steps, random_start=False)


def _contenders(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """What is compared, the bare step first. What is not installed is left out."""
    found: dict[str, Run] = {
        BARE: _bare(model, x, y, steps),
        "a loop written by hand": _by_hand(model, x, y, steps),
        "firstorder PGD": partial(_attack(steps), model, x, y),
        "firstorder PGD, prepared": partial(_attack(steps), prepare(model, x[:16]), x, y),
        "firstorder PGD, prepared, bfloat16": partial(
            _attack(steps), prepare(model, x[:16], precision="bfloat16"), x, y
        ),
    }
    if find_spec("torchattacks") is not None:
        import torchattacks

        theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps, random_start=False)
        found["torchattacks PGD"] = partial(theirs, x, y)
    if find_spec("art") is not None:
        found["ART ProjectedGradientDescent"] = _art(model, x, y, steps)
    if x.is_cuda:
        found["bare step in a CUDA graph"] = _graph(model, x, y, steps)
        for precision in ("float32", "bfloat16"):
            copied = prepare(model, x, precision=precision, graph=True)
            name = f"firstorder PGD, prepared{', bfloat16' * (precision != 'float32')}, CUDA graph"
            if "CUDA graph" in copied.parts:  # where that is faster
                found[name] = partial(_attack(steps), copied, x, y)
    return found


def _bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Run:
    """Nothing but the forwards and backwards of a step, by the input alone."""

    def run() -> None:
        for _ in range(steps):
            point = x.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)

    return run


def _by_hand(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Run:
    """PGD as one writes it."""

    def run() -> None:
        a = x.clone()
        for _ in range(steps):
            point = a.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
            a = torch.min(torch.max(a + ALPHA * g.sign(), x - EPS), x + EPS).clamp_(0, 1)

    return run


def _graph(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Run:
    """The bare step in a CUDA graph: what is left without launching kernels one by one."""
    point = x.detach().clone().requires_grad_(True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _bare(model, x, y, 3)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)

    def run() -> None:
        for _ in range(steps):
            graph.replay()

    return run


def _art(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Run:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    kind = "gpu" if x.is_cuda else "cpu"
    whole = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type=kind
    )
    attack = ProjectedGradientDescentPyTorch(
        whole, eps=EPS, eps_step=ALPHA, max_iter=steps, batch_size=len(x), verbose=False
    )
    return partial(attack.generate, x.cpu().numpy(), y.cpu().numpy())


def _measured(
    runs: Mapping[str, Run], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of every run, and the memory it took at its peak; a first round, in which kernels are chosen, is
    left out.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    cuda = device.type == "cuda"
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            before = 0
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            spent = milliseconds(run, device)
            if round_:
                times[name].append(spent)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before if cuda else 0)
    return times, peaks


def milliseconds(run: Run, device: torch.device) -> float:
    """The time of one call, on the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def _rows(title: str, times: Mapping[str, list[float]], peaks: Mapping[str, int], steps: int, batch: int) -> list[Row]:
    unit = next(iter(times))
    base = statistics.median(times[unit])
    return [
        Row(
            model=title,
            contender=name,
            ratio=statistics.median(spent) / base,
            milliseconds=statistics.median(spent) / steps,
            images_per_second=batch * steps / statistics.median(spent) * 1e3,
            memory=peaks[name] / peaks[unit] if peaks[unit] else None,
        )
        for name, spent in times.items()
    ]


HEADER = ("model", "contender", "time / bare step", "ms per step", "images per second", "peak memory / bare step")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `HEADER`."""
    memory = "" if row.memory is None else f"{row.memory:.2f}"
    return (
        row.model,
        row.contender,
        f"{row.ratio:.2f}",
        f"{row.milliseconds:.3f}",
        f"{row.images_per_second:.0f}",
        memory,
    )


def write(found: Sequence[Row], folder: Path, *, facts: Mapping[str, object]) -> list[Path]:
    """Write device.md and device.csv; their paths."""
    protocol = ", ".join(f"{name} {value}" for name, value in facts.items())
    write_text(folder / "device.md", f"{protocol}\n\n{markdown(HEADER, map(cells, found), words=2)}\n")
    columns = [field.name for field in fields(Row)]
    write_text(folder / "device.csv", csv_text(columns, (astuple(row) for row in found)))
    return [folder / "device.md", folder / "device.csv"]
