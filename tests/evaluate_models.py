"""Classifiers of images (N, 1, 4, 4) for `module:function` in the tests of `firstorder evaluate`, and their data.

An example whose first pixel is 1 is marked: some of the models misbehave on it, where the file does not exist that the
variable `FIRSTORDER_TEST_MARKER` names.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MARKER = "FIRSTORDER_TEST_MARKER"
SHAPE = (1, 4, 4)
CLASSES = 3
LIMIT = 8


def process(folder: Path, *words: str, **environment: str) -> Any:
    """A process that runs `firstorder` with `words` in `folder` and writes to `folder`/log; it is about to be started.

    It is a child, in a session of its own, of a process that has imported all but has done nothing, so that many of
    them are cheap. Its highest resident memory in KiB is left in the file that the variable `peak` names.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["firstorder.evaluation.commands.evaluate", "firstorder.evaluation.cli"])
    return context.Process(target=_main, args=(folder, words, environment))


def _main(folder: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["firstorder", *words]
    torch.set_num_threads(1)
    from firstorder.evaluation.__main__ import main

    try:
        main()
    finally:
        if "peak" in environment:
            (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            Path(environment["peak"]).write_text(line.split()[1])


class Linear(nn.Module):
    """Logits w x, with what is to happen before every forward."""

    def __init__(self, seed: int = 0, before: Callable[[Tensor], None] | None = None, *, numel: int = 16) -> None:
        super().__init__()
        self.head = nn.Linear(numel, CLASSES, bias=False)
        self.head.weight.data = torch.randn(CLASSES, numel, generator=torch.Generator().manual_seed(seed))
        self.requires_grad_(False)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            self.before(x)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def arrays(count: int, *, marked: tuple[int, ...] = (), seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Examples as an .npz file holds them; most of them are classified correctly by `linear`."""
    random = np.random.default_rng(seed)
    x = random.uniform(0.1, 0.9, (count, *SHAPE)).astype(np.float32)
    x[:, 0, 0, 0] = 0
    x[list(marked), 0, 0, 0] = 1
    with torch.no_grad():
        y = linear()(torch.from_numpy(x)).argmax(1).numpy()
    wrong = random.random(count) < 0.15
    return {"x": x, "y": np.where(wrong, (y + 1) % CLASSES, y)}


def linear() -> nn.Module:
    return Linear()


class Rough(nn.Module):
    """Logits with many maxima near each other, which one attack alone does not find; the same in every batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner, self.outer = nn.Linear(16, 24, bias=False), nn.Linear(24, CLASSES, bias=False)
        for layer, scale in ((self.inner, 4.0), (self.outer, 1.0)):
            layer.weight.data = scale * torch.randn(layer.weight.shape, generator=generator)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x.flatten(1).double())
        logits: Tensor = self.outer(hidden.sin() ** 5) + 0.3 * hidden[:, :CLASSES]
        return logits.float()


def rough() -> nn.Module:
    return Rough()


def other() -> nn.Module:
    return Linear(1)


def wide() -> nn.Module:
    """Of colour images of 32 x 32."""
    return Linear(2, numel=3 * 32 * 32)


def slow() -> nn.Module:
    return Linear(0, lambda x: time.sleep(0.002))


def raises_on_marked() -> nn.Module:
    """Fails on a marked example."""
    return Linear(0, _fails)


def dies_on_marked() -> nn.Module:
    """Kills its process on a marked example, once: it leaves the marker."""
    return Linear(0, _dies)


def little_memory() -> nn.Module:
    return Linear(0, _exhausted)


def little_memory_on_a_gpu() -> nn.Module:
    return Linear(0, _exhausted_gpu)


def broken() -> nn.Module:
    return Linear(0, _always)


def not_a_number() -> nn.Module:
    model = Linear()
    model.head.weight.data[1, 3] = float("nan")
    return model


def a_tuple() -> nn.Module:
    class Pair(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x), x)  # type: ignore[return-value]

    return Pair()


def one_class() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))


class Overflowing(nn.Module):
    """Linear; NaN if `overflows`, for marked images with a pixel off the grid of 1/64, which are perturbed."""

    def __init__(self, *, overflows: bool = True) -> None:
        super().__init__()
        self.body, self.overflows = Linear(8), overflows

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x - 0.5)
        if not self.overflows:
            return logits
        pixels = x.detach().flatten(1)
        perturbed = ((pixels * 64).frac() != 0).any(1)
        return logits + torch.where((perturbed & (pixels[:, 0] > 0.5))[:, None], torch.nan, 0.0)


def overflowing() -> nn.Module:
    return Overflowing()


def safe() -> nn.Module:
    """What `overflowing` would be."""
    return Overflowing(overflows=False)


def probabilities() -> nn.Module:
    return nn.Sequential(Linear(), nn.Softmax(1))


def not_a_number_on_marked() -> nn.Module:
    class Spoilt(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.flatten(1)[:, :1] > 0.5, torch.nan, super().forward(x))

    return Spoilt()


def colour() -> nn.Module:
    """Of colour images."""
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())


def no_module() -> str:
    return "a network"


def cannot_be_made() -> nn.Module:
    raise RuntimeError("the weights are lost")


def needs_an_argument(depth: int) -> nn.Module:
    return Linear(depth)


def _marked(x: Tensor) -> bool:
    return bool((x[:, 0, 0, 0] > 0.5).any())


def _fails(x: Tensor) -> None:
    if _marked(x) and not Path(os.environ[MARKER]).exists():
        raise KeyError("the model is moody")


def _dies(x: Tensor) -> None:
    if _marked(x):
        try:
            Path(os.environ[MARKER]).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def _exhausted(x: Tensor) -> None:
    if len(x) > LIMIT:
        raise RuntimeError(f"DefaultCPUAllocator: not enough memory: you tried to allocate {x.nbytes} bytes.")


def _exhausted_gpu(x: Tensor) -> None:
    if len(x) > LIMIT:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _always(x: Tensor) -> None:
    raise TypeError("forward() got something else")
