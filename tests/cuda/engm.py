"""Where a step of ENGM goes on a GPU: ways of the per-example norm of a convolution, budgets, kernels, waiting.

python tests/cuda/engm.py [--batch 256] [--seconds 55]    prints tables and stops at the time
"""

# ruff: noqa: B023, T201 - closures are called where they are made; a script prints

from __future__ import annotations

import argparse
import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.evaluation.bench.device import milliseconds
from firstorder.evaluation.names.networks import ResNet18
from firstorder.training import ENGM, convolutions
from firstorder.training.convolutions import Settings

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [  # inputs, outputs, side, kernel, stride, how many in ResNet-18
    (3, 64, 32, 3, 1, 1), (64, 64, 32, 3, 1, 4), (64, 128, 32, 3, 2, 1), (64, 128, 32, 1, 2, 1),
    (128, 128, 16, 3, 1, 3), (128, 256, 16, 3, 2, 1), (256, 256, 8, 3, 1, 3), (512, 512, 4, 3, 1, 3),
]  # fmt: skip

KINDS = ("float32", "TF32", "bfloat16")


def kind_of(kind: str) -> torch.dtype:
    """Set TF32 as a kind of number wants it; the type of the tensors."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind != "float32"
    return torch.bfloat16 if kind == "bfloat16" else torch.float32


def best(run: Callable[[], Any], times: int = 3) -> float:
    """The least of some timings after a first call that does not count."""
    run()
    return min(milliseconds(run, DEVICE) for _ in range(times))


def squares(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).square().sum(1, dtype=torch.float64)


def unfolded(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """F.unfold and a batched product."""
    rows = F.unfold(a[:, 0], tuple(weight[2:]), settings.dilation, settings.padding, settings.stride)
    return torch.bmm(g[:, 0].flatten(2), rows.transpose(1, 2))


def wide_products(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """Patches in bfloat16, products in float32."""
    rows = convolutions.patches(a[:, 0], weight[2:], settings)[:, 0]
    return torch.bmm(g[:, 0].flatten(2), rows, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]


def ghost(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """The ghost norm from patches."""
    rows, outputs = convolutions.patches(a[:, 0], weight[2:], settings)[:, 0], g[:, 0].flatten(2)
    products = (rows @ rows.transpose(1, 2)).mul_(outputs.transpose(1, 2) @ outputs)
    return products.sum((1, 2), dtype=torch.float64)


def gram(a: Tensor, g: Tensor, weight: torch.Size, settings: Settings) -> Tensor:
    """The ghost norm without patches."""
    outputs = g[:, 0].flatten(2)
    products = convolutions.gram(a, weight[2:], settings, g.shape[3:])
    return products.mul_(outputs.transpose(1, 2) @ outputs).sum((1, 2), dtype=torch.float64)


DENSE = {
    "vmap": convolutions.mapped, "F.unfold": unfolded, "patches": convolutions.multiplied, "bf16>f32": wide_products,
}  # fmt: skip
GHOSTS = {"ghost": ghost, "gram": gram}
LOW = ("F.unfold", "patches", "bf16>f32", "ghost", "gram")
"""What is tried in bfloat16 itself; the library widens first, as the other ways do."""


def convolution(batch: int, until: float) -> None:
    """A row per layer, a column per way: milliseconds for the norms of a batch, by the best cut into parts of 64 MiB up
    to one part; and the largest error of a norm against float64, where it is more than 1 in 10000.
    """
    ways = {**DENSE, **GHOSTS}
    print(f"\nnorms of {batch} examples, ms (channels_last)\n{'layer':>22} {'kind':>9}", *(f"{w:>9}" for w in ways))
    totals: dict[tuple[str, str], float] = {}
    for given, width, side, kernel, stride, count in SHAPES:
        settings = Settings([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
        weight, out = torch.Size((width, given, kernel, kernel)), side // stride
        exact = None
        for kind in KINDS:
            dtype = kind_of(kind)
            torch.manual_seed(0)
            a, g = (
                torch.randn(batch, c, s, s, device=DEVICE).to(dtype, memory_format=torch.channels_last)[:, None]
                for c, s in ((given, side), (width, out))
            )
            if exact is None:
                some = (t[:8].double() for t in (a, g))
                exact = squares(convolutions.looped(*some, weight, settings)).sqrt()
            found: dict[str, float] = {}
            wrong = []
            for name, way in ways.items():
                skip = (name == "bf16>f32" and kind != "bfloat16") or (name in GHOSTS and out > 16)
                if skip or time.perf_counter() > until:
                    continue
                low = kind == "bfloat16" and name in LOW

                def norms(x: Tensor, y: Tensor) -> Tensor:
                    x, y = (x, y) if low else (x.float(), y.float())
                    result = way(x, y, weight, settings)
                    return result if name in GHOSTS else squares(result)

                try:
                    error = float((norms(a[:8], g[:8]).sqrt() / exact - 1).abs().max())
                    found[name] = best(lambda: norms(a, g))
                except Exception as failure:
                    wrong.append(f"{name} fails: {type(failure).__name__}: {str(failure)[:60]}")
                    continue
                totals[kind, name] = totals.get((kind, name), 0.0) + count * found[name]
                if error > 1e-4:
                    wrong.append(f"{name} {error:.0e}")
            cells = (f"{found[name]:9.3f}" if name in found else f"{'-':>9}" for name in ways)
            print(
                f"{given:4}>{width:<4}{side:3}/{stride} k{kernel} x{count:<3} {kind:>9}", *cells, "", ", ".join(wrong)
            )
            if CUDA:
                torch.cuda.empty_cache()
    for kind in KINDS:
        least = sum(1 for one in totals if one[0] == kind)
        if least:
            print(f"{'all that were timed':>22} {kind:>9}", *(f"{totals.get((kind, name), 0):9.2f}" for name in ways))


class Tokens(nn.Module):
    """A block of a vision transformer on 65 tokens, and a linear head."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.block(x)[:, 0])
        return scores


@contextlib.contextmanager
def taken(way: Callable[..., Tensor] | None) -> Iterator[None]:
    """The library's convolutions go this way."""
    before = convolutions.gradients
    convolutions.gradients = before if way is None else way  # type: ignore[assignment]
    try:
        yield
    finally:
        convolutions.gradients = before  # type: ignore[assignment]


def stepper(model: nn.Module, x: Tensor, y: Tensor, low: bool) -> Callable[[ENGM | None], None]:
    def step(method: ENGM | None) -> None:
        model.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=low):
            losses = F.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward() if method is None else method.backward(losses)

    return step


def whole(batch: int, until: float) -> None:
    """A forward and a backward: plain, by ENGM as it is, with other ways and budgets."""
    print(f"\nforward and backward of {batch} examples, ms: on the device, and until the host is done with it")
    for kind in KINDS:
        dtype = kind_of(kind)
        low = dtype == torch.bfloat16
        models = {
            "ResNet-18": (ResNet18().to(DEVICE).train().to(memory_format=torch.channels_last),
                          torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)),
            "ViT block": (Tokens().to(DEVICE).train(), torch.randn(batch, 65, 384, device=DEVICE)),
        }  # fmt: skip
        for title, (model, x) in models.items():
            y = torch.randint(10, (batch,), device=DEVICE)
            step = stepper(model, x, y, low)
            base = report(f"{title} {kind}", "plain", lambda: step(None), None)
            runs: dict[str, tuple[Any, int]] = {"ENGM": (None, 2**28), "all at once": (None, 2**33)}
            if title == "ResNet-18":
                runs |= {f"vmap 2^{power}": (DENSE["vmap"], 2**power) for power in (28, 33)}
            for name, (way, budget) in runs.items():
                if time.perf_counter() > until:
                    return
                method = ENGM(model, alpha=5.0, memory_budget=budget)
                with taken(way):
                    step(method)
                    report(f"{title} {kind}", name, lambda: step(method), base)
        if CUDA and kind != "float32":
            model, x = models["ResNet-18"]
            profiled(stepper(model, x, torch.randint(10, (batch,), device=DEVICE), low), model, kind)


def report(title: str, name: str, run: Callable[[], None], base: float | None) -> float:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        spent = best(run)
    except RuntimeError as failure:
        print(f"{title:>20} {name:16} fails: {str(failure)[:80]}")
        return float("nan")
    began = time.perf_counter()
    run()
    host = (time.perf_counter() - began) * 1e3
    peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else 0
    ratio = spent / (base or spent)
    print(f"{title:>20} {name:16} {spent:9.2f} {host:9.2f}  x{ratio:5.2f}  {peak:7.0f} MiB", flush=True)
    return spent


def profiled(step: Callable[[ENGM | None], None], model: nn.Module, kind: str) -> None:
    """The ten kernels that take longest in a step of ENGM as it is, and where the host waits."""
    from torch.profiler import ProfilerActivity, profile

    method = ENGM(model, alpha=5.0)
    for _ in range(3):
        step(method)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(method)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in waits if "synchron" in str(w.message).lower()}
    print(f"ENGM {kind}: the host waits {len(waits)} times: {' '.join(sorted(places)) or 'nowhere'}")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(method)
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda one: -one.self_device_time_total)
    busy = sum(one.self_device_time_total for one in kernels) / 1e3
    print(f"ENGM {kind}: kernels {busy:.2f} ms, {sum(one.count for one in kernels)} of them; the longest:")
    for one in kernels[:10]:
        print(f"{one.self_device_time_total / 1e3:9.3f} ms {one.count:5} x  {one.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=55)
    given = parser.parse_args()
    began = time.perf_counter()
    logging.disable()
    torch.backends.cudnn.benchmark = False
    print(torch.cuda.get_device_name() if CUDA else "CPU", "torch", torch.__version__)
    whole(given.batch, began + 0.6 * given.seconds)
    if CUDA:
        torch.cuda.empty_cache()
    with torch.no_grad():
        convolution(given.batch, began + 0.95 * given.seconds)
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
