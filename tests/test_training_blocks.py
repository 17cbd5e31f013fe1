"""Random networks of many kinds of blocks: ENGM against one float64 backward per example, or a refusal by name."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from firstorder.attacks import PGD
from firstorder.training import ENGM, PerExample, Vanilla, gradient_statistics, per_example

TOLERANCE = 1e-5


class Block(nn.Module):
    """A function of itself, with its parameters p, and of the activations x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass
class Draw:
    """What a block is drawn for: N examples of a shape."""

    rng: random.Random
    n: int
    shape: tuple[int, ...]

    @property
    def d(self) -> int:
        """The number of features: the last dimension, or the channels of an image."""
        return self.shape[0] if len(self.shape) > 2 else self.shape[-1]

    @property
    def t(self) -> int:
        return self.shape[0]

    def size(self, low: int = 2, high: int = 6) -> int:
        return self.rng.randint(low, high)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape) * 0.6

    def complex(self, *shape: int) -> Tensor:
        return torch.complex(self.values(*shape), self.values(*shape))


class Doubled(torch.autograd.Function):
    """A function of a user's own, with a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * g * w, (2 * g * x).sum(0)


def written(x: Tensor, w: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = w
    return x


def heads(x: Tensor, packed: Tensor, n_heads: int = 1) -> Tensor:
    q, k, v = (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in F.linear(x, packed).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)


def recurrent(kind: type[nn.Module], d: Draw, **options: Any) -> nn.Module:
    return Block(lambda p, x: p.net(x)[0], net=kind(d.d, d.size(), batch_first=True, **options))


def convolution(d: Draw) -> nn.Module:
    groups = d.d if d.rng.random() < 0.3 else 1
    return nn.Conv2d(
        d.d,
        groups * d.size(1, 3),
        d.rng.choice([1, 2, 3, (3, 2)]),
        stride=d.rng.choice([1, 1, 2, (1, 2)]),
        padding=d.rng.choice([1, 1, (2, 1)]),
        dilation=d.rng.choice([1, 1, 2]) if min(d.shape[1:]) > 2 else 1,
        groups=groups,
        bias=d.rng.random() < 0.6,
        padding_mode=d.rng.choice(["zeros", "zeros", "circular", "replicate"]),
    )


def frozen(norm: nn.Module) -> nn.Module:
    """A batch norm whose statistics are constants, even in training mode."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign, assignment]
    return norm


def per_example_convolution(p: Any, x: Tensor) -> Tensor:
    """Every example as a group of one convolution."""
    n = len(x)
    return F.conv2d(x.flatten(0, 1)[None], p.w.repeat(n, 1, 1, 1), groups=n).unflatten(1, (n, -1))[0]


Make = Callable[[Draw], nn.Module]

FLAT: dict[str, Make] = {
    "linear": lambda d: nn.Linear(d.d, d.size()),
    "linear without bias": lambda d: nn.Linear(d.d, d.size(), bias=False),
    "product": lambda d: Block(lambda p, x: x @ p.w, w=d.values(d.d, d.size())),
    "product from the left": lambda d: Block(lambda p, x: (p.w @ x.t()).t(), w=d.values(d.size(), d.d)),
    "leading rows": lambda d: Block(lambda p, x: F.linear(x, p.w[:2]), w=d.values(d.size(3), d.d)),
    "leading columns": lambda d: Block(lambda p, x: F.linear(x, p.w[:, : x.shape[1]]), w=d.values(4, d.d + 2)),
    "two halves": lambda d: Block(lambda p, x: F.linear(x, p.w[:2]) * F.linear(x, p.w[2:]), w=d.values(4, d.d)),
    "chunks": lambda d: Block(
        lambda p, x: F.linear(x, p.w.chunk(2)[0]).tanh() + F.linear(x, p.w.chunk(2)[1]).sin(), w=d.values(6, d.d)
    ),
    "overlapping rows": lambda d: Block(
        lambda p, x: F.linear(x, p.w[:3]).tanh() + F.linear(x, p.w[1:]), w=d.values(4, d.d)
    ),
    "view": lambda d: Block(lambda p, x: F.linear(x, p.w.view(-1, x.shape[1])), w=d.values(d.size() * d.d)),
    "two views": lambda d: Block(
        lambda p, x: F.linear(x, p.w.view(-1, x.shape[1])).sum(1, keepdim=True) + x @ p.w.view(x.shape[1], -1),
        w=d.values(d.size() * d.d),
    ),
    "two shapes": lambda d: Block(
        lambda p, x: (x @ p.w.view(x.shape[1], -1)).tanh() @ p.w.view(-1, x.shape[1]), w=d.values((d.d + 1) * d.d)
    ),
    "stacked": lambda d: Block(lambda p, x: F.linear(x, torch.stack([p.a, p.b])), a=d.values(d.d), b=d.values(d.d)),
    "concatenated": lambda d: Block(
        lambda p, x: F.linear(x, torch.cat([p.a, p.b])), a=d.values(2, d.d), b=d.values(1, d.d)
    ),
    "weight norm": lambda d: weight_norm(nn.Linear(d.d, d.size())),
    "spectral norm": lambda d: spectral_norm(nn.Linear(d.d, d.size())),
    "cosine": lambda d: Block(lambda p, x: F.linear(F.normalize(x), F.normalize(p.w)), w=d.values(3, d.d)),
    "low rank weight": lambda d: Block(lambda p, x: F.linear(x, p.u @ p.v), u=d.values(4, 2), v=d.values(2, d.d)),
    "low rank": lambda d: Block(lambda p, x: F.linear(F.linear(x, p.v), p.u), u=d.values(4, 2), v=d.values(2, d.d)),
    "masked weight": lambda d: Block(lambda p, x: F.linear(x, p.w * (p.w > 0)), w=d.values(4, d.d)),
    "scaled weight": lambda d: Block(lambda p, x: F.linear(x, p.w * 0.5), w=d.values(4, d.d)),
    "exponential weight": lambda d: Block(lambda p, x: x @ torch.matrix_exp(p.w), w=d.values(d.d, d.d)),
    "twice": lambda d: Block(lambda p, x: p.w(p.w(x).tanh()), w=nn.Linear(d.d, d.d)),
    "autoencoder": lambda d: Block(lambda p, x: F.linear(F.linear(x, p.w).tanh(), p.w.t()), w=d.values(3, d.d)),
    "autoencoder by products": lambda d: Block(lambda p, x: (x @ p.w).tanh() @ p.w.t(), w=d.values(d.d, 3)),
    "weight and addend": lambda d: Block(lambda p, x: x @ p.w + p.w.sum(0), w=d.values(d.d, 3)),
    "weight as its own input": lambda d: Block(lambda p, x: x @ (p.w @ p.w), w=d.values(d.d, d.d)),
    "residual": lambda d: Block(lambda p, x: x + p.w(x).tanh(), w=nn.Linear(d.d, d.d)),
    "gate": lambda d: Block(lambda p, x: x * p.w.sigmoid(), w=d.values(d.d)),
    "gain": lambda d: Block(lambda p, x: x * p.w, w=d.values(d.d)),
    "gain on the left": lambda d: Block(lambda p, x: p.w * x, w=d.values(1, d.d)),
    "squared gain": lambda d: Block(lambda p, x: p.w * p.w * x, w=d.values(d.d)),
    "difference": lambda d: Block(lambda p, x: x - p.w, w=d.values(d.d)),
    "quotient": lambda d: Block(lambda p, x: x / p.w.exp(), w=d.values(d.d)),
    "weighted sum": lambda d: Block(lambda p, x: torch.add(x, p.w, alpha=0.3), w=d.values(d.d)),
    "bias": lambda d: Block(lambda p, x: x + p.w, w=d.values(d.d)),
    "scalars": lambda d: Block(lambda p, x: x * p.a + p.b, a=d.values(), b=d.values()),
    "scaled scalar": lambda d: Block(lambda p, x: x * (2 * p.a), a=d.values()),
    "addmm": lambda d: Block(
        lambda p, x: torch.addmm(p.b, x, p.w, beta=0.5, alpha=2), b=d.values(3), w=d.values(d.d, 3)
    ),
    "addmm of a matrix": lambda d: Block(lambda p, x: torch.addmm(p.b, x, p.w), b=d.values(1, 3), w=d.values(d.d, 3)),
    "addcmul": lambda d: Block(lambda p, x: torch.addcmul(x, x, p.w, value=0.7), w=d.values(d.d)),
    "bilinear": lambda d: Block(lambda p, x: p.w(x, x.sin()), w=nn.Bilinear(d.d, d.d, 3)),
    "einsum": lambda d: Block(lambda p, x: torch.einsum("nd,de->ne", x, p.w), w=d.values(d.d, 3)),
    "einsum of three": lambda d: Block(
        lambda p, x: torch.einsum("nd,de,ef->nf", x, p.v, p.w), v=d.values(d.d, 2), w=d.values(2, 3)
    ),
    "broadcast matmul": lambda d: Block(lambda p, x: (p.w @ x[:, None, :, None]).flatten(1), w=d.values(2, 3, d.d)),
    "batched matmul": lambda d: Block(
        lambda p, x: torch.baddbmm(p.b, x.expand(2, -1, -1), p.w).movedim(1, 0).flatten(1),
        b=d.values(2, 1, 3),
        w=d.values(2, d.d, 3),
    ),
    "layer norm": lambda d: nn.LayerNorm(d.d),
    "layer norm without bias": lambda d: nn.LayerNorm(d.d, bias=False),
    "RMS norm": lambda d: nn.RMSNorm(d.d),
    "RMS norm by hand": lambda d: Block(
        lambda p, x: x * (x.square().mean(1, keepdim=True) + 1e-3).rsqrt() * p.w, w=d.values(d.d)
    ),
    "batch norm of constants": lambda d: frozen(nn.BatchNorm1d(d.d)),
    "batch norm by hand": lambda d: Block(
        lambda p, x: (x - x.mean(0)) / (x.var(0, correction=0) + 0.1).sqrt() * p.w, w=d.values(d.d)
    ),
    "group norm": lambda d: nn.GroupNorm(1, d.d),
    "PReLU": lambda d: nn.PReLU(),
    "expanded": lambda d: Block(lambda p, x: x + p.w.expand_as(x), w=d.values(d.d)),
    "expanded column": lambda d: Block(lambda p, x: x * p.w.expand(len(x), 1), w=d.values(1, 1)),
    "repeated": lambda d: Block(lambda p, x: x + p.w.repeat(len(x), 1), w=d.values(d.d)),
    "repeated and reshaped": lambda d: Block(
        lambda p, x: x + p.w.repeat(len(x) * x.shape[1] // len(p.w)).view_as(x),
        w=d.values(d.d * d.rng.choice([1, d.n])),
    ),
    "repeated across examples": lambda d: Block(lambda p, x: x + p.w.repeat(x.shape[1]).view_as(x), w=d.values(d.n)),
    "repeated across, turned": lambda d: Block(
        lambda p, x: x + p.w.repeat(x.shape[1]).view(x.shape[1], -1).t(), w=d.values(d.n)
    ),
    "interleaved": lambda d: Block(lambda p, x: x + p.w.repeat_interleave(x.shape[1]).view_as(x), w=d.values(d.n)),
    "one row per example": lambda d: Block(lambda p, x: x * p.w, w=d.values(d.n, d.d)),
    "one number per example": lambda d: Block(lambda p, x: x + p.w, w=d.values(d.n, 1)),
    "indexed rows": lambda d: Block(lambda p, x: x * p.w[torch.arange(len(x)) % 2], w=d.values(2, d.d)),
    "chosen rows": lambda d: Block(lambda p, x: x + p.w.index_select(0, (x[:, 0] > 0).long()), w=d.values(2, d.d)),
    "selected row": lambda d: Block(lambda p, x: x * p.w[1], w=d.values(3, d.d)),
    "unbound rows": lambda d: Block(lambda p, x: x * p.w.unbind()[0] + p.w.unbind()[1], w=d.values(2, d.d)),
    "squeezed": lambda d: Block(lambda p, x: x * p.w.squeeze(0) + p.w[0, None], w=d.values(1, d.d)),
    "batch mean": lambda d: Block(lambda p, x: x - x.mean(0, keepdim=True)),
    "weak batch mean": lambda d: Block(lambda p, x: x + 0.01 * x.mean(0, keepdim=True)),
    "very weak batch mean": lambda d: Block(lambda p, x: x + 1e-4 * x.mean(0, keepdim=True)),
    "neighbours": lambda d: Block(lambda p, x: x + 0.01 * (x.roll(1, 0) + x.roll(-1, 0))),
    "flip": lambda d: Block(lambda p, x: x.flip(0)),
    "roll": lambda d: Block(lambda p, x: x.roll(1, 0)),
    "first example": lambda d: Block(lambda p, x: x + 0.1 * x[:1]),
    "sorted batch": lambda d: Block(lambda p, x: x.sort(0).values),
    "sorted and put back": lambda d: Block(
        lambda p, x: (x[x[:, 0].argsort()] * p.w)[x[:, 0].argsort().argsort()], w=d.values(d.d)
    ),
    "contrast": lambda d: Block(lambda p, x: x @ x.t()),
    "contrast with weights": lambda d: Block(lambda p, x: F.linear(x, p.w) @ x.t(), w=d.values(d.d, d.d)),
    "cumulated batch": lambda d: Block(lambda p, x: x.cumsum(0)),
    "softmax of the batch": lambda d: Block(lambda p, x: x * x.softmax(0)),
    "spectrum of the batch": lambda d: Block(lambda p, x: torch.fft.fft(x, dim=0).real),
    "there and back over the batch": lambda d: Block(lambda p, x: torch.fft.ifft(torch.fft.fft(x, dim=0), dim=0).real),
    "statistic without gradient": lambda d: Block(lambda p, x: x / (x.detach().std() + 1)),
    "Fourier gain": lambda d: Block(
        lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * p.w, n=x.shape[1]), w=d.values(d.d // 2 + 1)
    ),
    "Fourier bias": lambda d: Block(
        lambda p, x: torch.fft.irfft(torch.fft.rfft(x) + p.w, n=x.shape[1]), w=d.values(d.d // 2 + 1)
    ),
    "complex gain": lambda d: Block(
        lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * p.w, n=x.shape[1]), w=d.complex(d.d // 2 + 1)
    ),
    "Fourier magnitude": lambda d: Block(lambda p, x: torch.fft.fft(x).abs()),
    "complex linear": lambda d: Block(
        lambda p, x: (x.to(p.w.dtype) @ p.w + p.b).abs(), w=d.complex(d.d, 3), b=d.complex(3)
    ),
    "complex conjugate": lambda d: Block(lambda p, x: (x * 1j @ p.w.conj()).imag, w=d.complex(d.d, 3)),
    "complex square": lambda d: Block(lambda p, x: (p.w * p.w * x).real, w=d.complex(d.d)),
    "real weight, complex product": lambda d: Block(
        lambda p, x: (torch.complex(x, x.sin()) @ p.w.to(torch.cdouble)).abs(), w=d.values(d.d, 3)
    ),
    "real weight as complex": lambda d: Block(lambda p, x: (x * torch.view_as_complex(p.w)).abs(), w=d.values(d.d, 2)),
    "complex weight as real": lambda d: Block(lambda p, x: x @ torch.view_as_real(p.w).flatten(1), w=d.complex(d.d, 2)),
    "real part of a weight": lambda d: Block(lambda p, x: x @ p.w.real, w=d.complex(d.d, 2)),
    "phase": lambda d: Block(lambda p, x: torch.polar(x.exp(), x * p.w).real, w=d.values(d.d)),
    "expanded among complex": lambda d: Block(
        lambda p, x: (torch.complex(x, x.cos()) * p.w.expand(len(x), -1)).imag, w=d.values(1, d.d)
    ),
    "dropout": lambda d: nn.Dropout(0.4),
    "where": lambda d: Block(lambda p, x: torch.where(x > 0, x * p.a, p.b), a=d.values(d.d), b=d.values(d.d)),
    "maxout": lambda d: Block(lambda p, x: F.linear(x, p.w).unflatten(1, (2, -1)).amax(1), w=d.values(6, d.d)),
    "two largest": lambda d: Block(lambda p, x: x.topk(2, 1).values),
    "own function": lambda d: Block(lambda p, x: Doubled.apply(x, p.w), w=d.values(d.d)),
    "written in place": lambda d: Block(lambda p, x: written(x, p.w), w=d.values()),
    "added in place": lambda d: Block(lambda p, x: x.clone().add_(p.w), w=d.values(d.d)),
    "multiplied in place": lambda d: Block(lambda p, x: x.sin().mul_(p.w), w=d.values(d.d)),
    "checkpoint": lambda d: Block(
        lambda p, x: checkpoint(lambda z: p.w(z).tanh(), x, use_reentrant=False), w=nn.Linear(d.d, 3)
    ),
    "unused": lambda d: Block(lambda p, x: x, w=d.values(3)),
    "half of a split": lambda d: Block(lambda p, x: F.linear(x, p.w.split([1, 3])[1]), w=d.values(4, d.d)),
    "penalty": lambda d: Block(lambda p, x: x + p.w.square().sum(), w=d.values(3)),
    "single precision": lambda d: Block(lambda p, x: F.linear(x.float(), p.w.float()).double(), w=d.values(3, d.d)),
    "frozen weight": lambda d: Block(lambda p, x: F.linear(x, p.w.detach()) + p.b, w=d.values(3, d.d), b=d.values(3)),
    "outer product": lambda d: Block(lambda p, x: (x[:, :, None] * p.w).flatten(1), w=d.values(2)),
    "Kronecker": lambda d: Block(lambda p, x: x @ torch.kron(p.a, p.b), a=d.values(d.d, 1), b=d.values(1, 3)),
    "many losses at one row": lambda d: Block(lambda p, x: p.w(x.sum(0)).tanh() * x[:, :1], w=nn.Linear(d.d, 3)),
    "GRU cell": lambda d: Block(lambda p, x: p.net(x, x.sin()), net=nn.GRUCell(d.d, d.d)),
    "batch norm, training": lambda d: nn.BatchNorm1d(d.d),
}

SEQUENCE: dict[str, Make] = {
    "tokenwise linear": lambda d: nn.Linear(d.d, d.size()),
    "tokenwise linear without bias": lambda d: nn.Linear(d.d, d.size(), bias=False),
    "linear, sequence first": lambda d: Block(lambda p, x: p.w(x.transpose(0, 1)).transpose(0, 1), w=nn.Linear(d.d, 3)),
    "linear over both orders": lambda d: Block(
        lambda p, x: p.w(x) + p.w(x.transpose(0, 1).contiguous().sin()).transpose(0, 1), w=nn.Linear(d.d, d.d)
    ),
    "linear over time": lambda d: Block(lambda p, x: p.w(x.transpose(1, 2)).transpose(1, 2), w=nn.Linear(d.t, 3)),
    "conv1d": lambda d: Block(
        lambda p, x: p.w(x.transpose(1, 2)).transpose(1, 2),
        w=nn.Conv1d(d.d, 3, d.rng.choice([1, 3]), padding=1, padding_mode=d.rng.choice(["zeros", "reflect"])),
    ),
    "transposed conv1d": lambda d: Block(
        lambda p, x: p.w(x.transpose(1, 2)).transpose(1, 2), w=nn.ConvTranspose1d(d.d, 3, 2, stride=d.size(1, 2))
    ),
    "conv1d over the batch": lambda d: Block(
        lambda p, x: p.w(x.permute(1, 2, 0)).permute(2, 0, 1), w=nn.Conv1d(d.d, 3, 3, padding=1)
    ),
    "tokenwise layer norm": lambda d: nn.LayerNorm(d.d),
    "layer norm of the sequence": lambda d: nn.LayerNorm(d.shape),
    "layer norm, sequence first": lambda d: Block(
        lambda p, x: p.w(x.transpose(0, 1).contiguous()).transpose(0, 1), w=nn.LayerNorm(d.d)
    ),
    "positions": lambda d: Block(lambda p, x: x + p.w, w=d.values(d.t, d.d)),
    "expanded positions": lambda d: Block(lambda p, x: x + p.w.expand(len(x), -1, -1), w=d.values(1, d.t, d.d)),
    "repeated positions": lambda d: Block(lambda p, x: x + p.w.repeat(len(x), 1, 1), w=d.values(1, d.t, d.d)),
    "repeated flat positions": lambda d: Block(lambda p, x: x + p.w.repeat(len(x), 1).view_as(x), w=d.values(d.t, d.d)),
    "repeated positions, sequence first": lambda d: Block(
        lambda p, x: x + p.w.repeat(x.shape[1], 1).view(x.shape[1], len(x), -1).transpose(0, 1), w=d.values(d.n, d.d)
    ),
    "position table": lambda d: Block(lambda p, x: x + p.w(torch.arange(x.shape[1])), w=nn.Embedding(d.t, d.d)),
    "position table of every example": lambda d: Block(
        lambda p, x: x + p.w(torch.arange(x.shape[1]).expand(len(x), -1)), w=nn.Embedding(d.t, d.d)
    ),
    "gain over time": lambda d: Block(lambda p, x: x * p.w, w=d.values(d.t, 1)),
    "class token": lambda d: Block(lambda p, x: torch.cat([p.w.expand(len(x), 1, -1), x], 1), w=d.values(1, 1, d.d)),
    "attention": lambda d: Block(lambda p, x: heads(x, p.w), w=d.values(3 * d.d, d.d)),
    "attention by products": lambda d: Block(
        lambda p, x: ((x @ p.q) @ (x @ p.k).transpose(1, 2)).softmax(-1) @ (x @ p.v),
        q=d.values(d.d, 2),
        k=d.values(d.d, 2),
        v=d.values(d.d, d.d),
    ),
    "multi-head attention": lambda d: Block(
        lambda p, x: p.net(x, x, x)[0], net=nn.MultiheadAttention(d.d, 1, batch_first=True)
    ),
    "multi-head attention, sequence first": lambda d: Block(
        lambda p, x: p.net(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1),
        net=nn.MultiheadAttention(d.d, 1, add_bias_kv=d.rng.random() < 0.5),
    ),
    "cross attention": lambda d: Block(
        lambda p, x: p.net(x, x[:, :2].sin(), x[:, :2])[0], net=nn.MultiheadAttention(d.d, 1, batch_first=True)
    ),
    "attention over the batch": lambda d: Block(
        lambda p, x: p.net(x, x, x)[0], net=nn.MultiheadAttention(d.d, 1, batch_first=False)
    ),
    "encoder layer": lambda d: nn.TransformerEncoderLayer(d.d, 1, 5, dropout=0.2, batch_first=True),
    "LSTM": lambda d: recurrent(nn.LSTM, d),
    "LSTM in both directions": lambda d: recurrent(nn.LSTM, d, bidirectional=True, num_layers=2),
    "GRU": lambda d: recurrent(nn.GRU, d),
    "RNN": lambda d: recurrent(nn.RNN, d, bias=d.rng.random() < 0.5),
    "einsum of a sequence": lambda d: Block(lambda p, x: torch.einsum("ntd,de->nte", x, p.w), w=d.values(d.d, 3)),
    "one weight per token": lambda d: Block(lambda p, x: torch.einsum("ntd,tde->nte", x, p.w), w=d.values(d.t, d.d, 3)),
    "expanded matrix": lambda d: Block(lambda p, x: torch.bmm(x, p.w.expand(len(x), -1, -1)), w=d.values(d.d, 3)),
    "flat rows": lambda d: Block(lambda p, x: (x.flatten(0, 1) @ p.w).unflatten(0, x.shape[:2]), w=d.values(d.d, 3)),
    "flat rows, sequence first": lambda d: Block(
        lambda p, x: (x.transpose(0, 1).flatten(0, 1) @ p.w).view(x.shape[1], len(x), -1).transpose(0, 1),
        w=d.values(d.d, 3),
    ),
    "flat rows, flipped": lambda d: Block(
        lambda p, x: (x.flatten(0, 1).flip(0) @ p.w).flip(0).unflatten(0, x.shape[:2]), w=d.values(d.d, 3)
    ),
    "cumulated time": lambda d: Block(lambda p, x: x.cumsum(1) * p.w, w=d.values(d.d)),
    "channel norm": lambda d: Block(lambda p, x: p.w(x.transpose(1, 2)).transpose(1, 2), w=nn.GroupNorm(1, d.d)),
    "Fourier mixing": lambda d: Block(lambda p, x: torch.fft.fft2(x).real),
    "rotary": lambda d: Block(
        lambda p, x: x + torch.view_as_real(torch.complex(x, x.sin()) * torch.polar(torch.ones_like(p.w), p.w)).sum(-1),
        w=d.values(d.t, d.d),
    ),
    "padding mask": lambda d: Block(lambda p, x: p.w(x).masked_fill(x[..., :1] > 0.5, 0.0), w=nn.Linear(d.d, 3)),
    "mixture of experts": lambda d: Block(
        lambda p, x: sum(p.gate(x).softmax(-1)[..., i : i + 1] * (x @ w) for i, w in enumerate((p.a, p.b))),
        gate=nn.Linear(d.d, 2),
        a=d.values(d.d, 3),
        b=d.values(d.d, 3),
    ),
    "routed rows": lambda d: Block(
        lambda p, x: torch.zeros_like(x).masked_scatter(x[..., :1] > 0, p.w(x[x[..., 0] > 0])), w=nn.Linear(d.d, d.d)
    ),
}

IMAGE: dict[str, Make] = {
    "conv2d": convolution,
    "depthwise": lambda d: nn.Conv2d(d.d, 2 * d.d, 3, padding=1, groups=d.d),
    "transposed conv2d": lambda d: nn.ConvTranspose2d(
        d.d, 2 * d.d, 3, stride=2, padding=1, output_padding=1, groups=d.rng.choice([1, d.d]), bias=d.rng.random() < 0.5
    ),
    "conv2d twice": lambda d: Block(lambda p, x: p.w(p.w(x).tanh()), w=nn.Conv2d(d.d, d.d, 3, padding=1)),
    "conv2d and its transpose": lambda d: Block(
        lambda p, x: F.conv_transpose2d(F.conv2d(x, p.w, padding=1).tanh(), p.w, padding=1), w=d.values(2, d.d, 3, 3)
    ),
    "standardised conv2d": lambda d: Block(
        lambda p, x: F.conv2d(x, standardised(p.w), padding=1), w=d.values(2, d.d, 3, 3)
    ),
    "conv2d of a view": lambda d: Block(
        lambda p, x: F.conv2d(x, p.w.view(2, -1, 1, 1)) + F.conv2d(x.sin(), p.w.view(2, -1, 1, 1)), w=d.values(2, d.d)
    ),
    "conv2d and linear": lambda d: Block(
        lambda p, x: F.conv2d(x, p.w[:, :, None, None]) + F.linear(x.mean((2, 3)), p.w)[..., None, None],
        w=d.values(2, d.d),
    ),
    "one convolution per example": lambda d: Block(per_example_convolution, w=d.values(2, d.d, 1, 1)),
    "conv2d of single channels": lambda d: Block(
        lambda p, x: p.w(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2]).flatten(1, 2), w=nn.Conv2d(1, 2, 1)
    ),
    "spectral norm conv2d": lambda d: spectral_norm(nn.Conv2d(d.d, 2, 1)),
    "conv2d, channels last": lambda d: nn.Conv2d(d.d, 3, 3, padding=1).to(memory_format=torch.channels_last),
    "group norm of images": lambda d: nn.GroupNorm(d.rng.choice([1, d.d]), d.d),
    "instance norm": lambda d: nn.InstanceNorm2d(d.d, affine=True),
    "instance norm without weights": lambda d: nn.InstanceNorm2d(d.d),
    "batch norm of constants, images": lambda d: frozen(nn.BatchNorm2d(d.d)),
    "layer norm of images": lambda d: nn.LayerNorm(d.shape),
    "PReLU per channel": lambda d: nn.PReLU(d.d),
    "max pool": lambda d: nn.MaxPool2d(2, padding=1, stride=d.size(1, 2)),
    "average pool": lambda d: nn.AdaptiveAvgPool2d(2),
    "channel gain": lambda d: Block(lambda p, x: x * p.w, w=d.values(d.d, 1, 1)),
    "plane": lambda d: Block(lambda p, x: x + p.w, w=d.values(1, *d.shape)),
    "row gain": lambda d: Block(lambda p, x: x * p.w, w=d.values(d.shape[1], 1)),
    "upsampled": lambda d: nn.Upsample(scale_factor=2, mode=d.rng.choice(["nearest", "bilinear"])),
    "unfolded": lambda d: Block(
        lambda p, x: F.linear(F.unfold(x, 2, padding=1).transpose(1, 2), p.w), w=d.values(3, 4 * d.d)
    ),
    "squeeze and excitation": lambda d: Block(
        lambda p, x: x * p.w(x.mean((2, 3))).sigmoid()[..., None, None], w=nn.Linear(d.d, d.d)
    ),
    "spectral convolution": lambda d: Block(
        lambda p, x: torch.fft.irfft2(torch.einsum("nchw,co->nohw", torch.fft.rfft2(x), p.w), s=x.shape[2:]),
        w=d.complex(d.d, 2),
    ),
    "spectral gain": lambda d: Block(
        lambda p, x: torch.fft.irfft2(torch.fft.rfft2(x) * p.w, s=x.shape[2:]),
        w=d.values(d.d, d.shape[1], d.shape[2] // 2 + 1),
    ),
    "complex conv2d": lambda d: Block(
        lambda p, x: F.conv2d(torch.complex(x, x.sin()), p.w, padding=1).abs(), w=d.complex(2, d.d, 3, 3)
    ),
    "weakly shared images": lambda d: Block(lambda p, x: x + 0.003 * x.flip(0)),
    "batch norm of images, training": lambda d: nn.BatchNorm2d(d.d),
}

VOLUME: dict[str, Make] = {
    "conv3d": lambda d: nn.Conv3d(d.d, 2, d.rng.choice([1, (1, 3, 2)]), padding=1, stride=d.size(1, 2)),
    "transposed conv3d": lambda d: nn.ConvTranspose3d(d.d, 2, 2),
    "group norm of volumes": lambda d: nn.GroupNorm(1, d.d),
    "instance norm of volumes": lambda d: nn.InstanceNorm3d(d.d, affine=True),
    "max pool of volumes": lambda d: nn.MaxPool3d(2),
    "frames": lambda d: Block(
        lambda p, x: p.w(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2),
        w=nn.Conv2d(d.d, 2, 3, padding=1),
    ),
    "frames, first": lambda d: Block(
        lambda p, x: p.w(x.movedim(2, 0).flatten(0, 1)).unflatten(0, (-1, len(x))).movedim(0, 2),
        w=nn.Conv2d(d.d, 2, 3, padding=1),
    ),
}

WORDS: dict[str, Make] = {
    "embedding": lambda d: nn.Embedding(7, 4),
    "embedding, padding": lambda d: nn.Embedding(7, 4, padding_idx=d.size(0, 6)),
    "embedding, by frequency": lambda d: nn.Embedding(7, 4, scale_grad_by_freq=True),
    "sparse embedding": lambda d: nn.Embedding(7, 4, sparse=True),
    "embedding, sequence first": lambda d: Block(lambda p, x: p.w(x.t()).transpose(0, 1), w=nn.Embedding(7, 4)),
    "embedding twice": lambda d: Block(lambda p, x: p.w(x) * p.w(x.flip(1)), w=nn.Embedding(7, 4)),
    "embedding with its own gain": lambda d: Block(lambda p, x: F.embedding(x, p.w) * p.w[0], w=d.values(7, 4)),
    "embedding bag": lambda d: nn.EmbeddingBag(7, 4, mode=d.rng.choice(["sum", "mean", "max"])),
    "one hot": lambda d: Block(lambda p, x: F.one_hot(x, 7).double() @ p.w, w=d.values(7, 4)),
    "indexed": lambda d: Block(lambda p, x: p.w[x], w=d.values(7, 4)),
    "tied embedding": lambda d: Block(lambda p, x: F.linear(F.embedding(x, p.w).mean(1).tanh(), p.w), w=d.values(7, 4)),
    "tied embedding, by product": lambda d: Block(
        lambda p, x: F.one_hot(x, 7).double().mean(1) @ p.w + F.embedding(x, p.w).tanh().mean(1), w=d.values(7, 4)
    ),
    "shared words": lambda d: Block(lambda p, x: p.w(x) + p.w(x[:1]), w=nn.Embedding(7, 4)),
}

KINDS: dict[str, dict[str, Make]] = {
    "flat": FLAT,
    "sequence": SEQUENCE,
    "image": IMAGE,
    "volume": VOLUME,
    "words": WORDS,
}
BLOCKS = [(kind, name) for kind, makes in KINDS.items() for name in makes]
REFUSED = {"checkpoint": "checkpoint"}
COUPLED = {name for _, name in BLOCKS if name.endswith(", training")}
LONELY = "batch norm of constants, images"
"""torch 2.12 gives one image a wrong gradient here, where the gradient that arrives is channels_last."""

SERVED = {
    *("linear", "linear without bias", "product", "leading rows", "chunks", "view", "low rank", "twice", "residual"),
    *("gain", "bias", "scalars", "layer norm", "batch norm of constants", "expanded", "repeated", "dropout"),
    *(
        "tokenwise linear",
        "linear, sequence first",
        "conv1d",
        "tokenwise layer norm",
        "expanded positions",
        "attention",
    ),
    *("multi-head attention", "cross attention", "encoder layer", "flat rows", "flat rows, sequence first"),
    *(
        "depthwise",
        "transposed conv2d",
        "conv2d twice",
        "conv2d of a view",
        "group norm of images",
        "max pool",
        "plane",
    ),
    *("squeeze and excitation", "conv3d", "frames", "frames, first", "embedding", "embedding, padding"),
}
"""Blocks that take one backward for all examples."""


@dataclass
class Net:
    """A network drawn at random, with two batches."""

    model: nn.Module
    names: tuple[str, ...]
    batches: list[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda z, y: F.cross_entropy(z, y, reduction="none"),
    lambda z, y: F.cross_entropy(z, y, reduction="none"),
    lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double(), reduction="none").sum(1),
    lambda z, y: z.logsumexp(1) * (y + 0.5),
    lambda z, y: z.gather(1, y[:, None])[:, 0] * 10.0 ** (-2.0 * torch.arange(len(y))),
]


def kind_of(x: Tensor) -> str:
    return {2: "flat", 3: "sequence", 4: "image", 5: "volume"}[x.ndim]


def smaller(x: Tensor, rng: random.Random) -> nn.Module | None:
    """What takes activations to fewer dimensions."""
    return {
        "flat": lambda: None,
        "sequence": lambda: rng.choice([nn.Flatten(), Block(lambda p, x: x.mean(1)), Block(lambda p, x: x[:, -1])]),
        "image": lambda: rng.choice([nn.Flatten(), Block(lambda p, x: x.flatten(2).transpose(1, 2))]),
        "volume": lambda: nn.Flatten(1, 2),
    }[kind_of(x)]()


def draw(seed: int, first: tuple[str, str] | None = None) -> Net:
    """A network of two to four blocks, with `first` among them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind, name = first or rng.choice(BLOCKS)
    n = rng.choice([3, 4, 5] if name in COUPLED or name == LONELY else [1, 2, 3, 3, 4, 5, 6])
    length = rng.choice([n, n + 1, 3, 2 * n]) + (n == 1)
    shape = {
        "flat": (rng.randint(3, 6),),
        "sequence": (length, rng.randint(3, 5)),
        "image": (rng.randint(2, 3), rng.randint(4, 6), rng.randint(4, 5)),
        "volume": (2, rng.randint(2, 3), 3, 4),
        "words": (length,),
    }[kind]

    def batch() -> Tensor:
        return torch.randint(7, (n, *shape)) if kind == "words" else torch.randn(n, *shape)

    batches = [batch(), batch()]
    x, parts, names = batches[0], [], []

    def add(part: nn.Module) -> None:
        nonlocal x
        parts.append(part)
        x = part(x).detach()

    if kind != "words" and rng.random() < 0.5:  # a layer below
        add(nn.Conv2d(shape[0], shape[0], 3, padding=1) if kind == "image" else nn.Linear(shape[-1], shape[-1]))
    for _ in range(rng.choice([2, 2, 3, 4])):
        if names:
            kind = kind_of(x)
            unwanted = {*COUPLED, *REFUSED, *([LONELY] if n == 1 else [])}
            name = rng.choice([one for one in KINDS[kind] if one not in unwanted])
        names.append(name)
        add(KINDS[kind][name](Draw(rng, n, tuple(x.shape[1:]))))
        if rng.random() < 0.7:
            add(rng.choice([nn.Tanh(), nn.ReLU(), nn.SiLU()]))
        while x[0].numel() > 200 or (x.ndim > 2 and rng.random() < 0.4):
            add(smaller(x, rng) or Block(lambda p, x: x[:, :100]))
        if x.ndim > 2 and 1 in x.shape[1:] and (part := smaller(x, rng)) is not None:
            add(part)
        if x.ndim == 2 and x.shape[1] < 3:
            add(nn.Linear(x.shape[1], 4))
    if x.ndim > 2:
        add(nn.Flatten())
    add(nn.Linear(x.shape[1], 3))
    model = nn.Sequential(*parts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    labels = [torch.randint(3, (n,)) for _ in batches]
    return Net(model.train(), tuple(names), list(zip(batches, labels, strict=True)), rng.choice(LOSSES))


def flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A real vector, of real and imaginary parts where there are such."""
    gradient = torch.zeros_like(like) if gradient is None else gradient.detach()
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).flatten().double()


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """To a tolerance of every entry; what cancels to less than 1e-9 is rounding."""
    error = (found - expected).abs() / (expected.abs() + 1e-9)
    assert float(error.max()) <= tolerance, f"{what}: {found.tolist()}, right {expected.tolist()}"


def compare(net: Net) -> None:
    """Both batches by ENGM and PerExample, against one backward per example."""
    coupling: Any = "exact" if COUPLED.intersection(net.names) else "ignore"
    tolerance = 1e-3 if "single precision" in net.names else TOLERANCE
    engm = ENGM(net.model, alpha=1.0, coupling=coupling)
    differentiate = PerExample(net.model, coupling=coupling)
    parameters = list(net.model.parameters())
    for data, y in net.batches:
        x = data.clone().requires_grad_(data.is_floating_point())
        losses = net.loss(net.model(x), y)
        leaves = [*parameters, x] if x.requires_grad else parameters
        rows = [torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True) for one in losses]
        each = torch.stack([torch.cat([flat(g, p) for g, p in zip(row, parameters, strict=False)]) for row in rows])
        norms = each.norm(dim=1)
        if x.requires_grad and all(row[-1] is not None for row in rows):
            by_input = torch.stack([sum(row[-1] for row in rows)[i].norm() for i in range(len(y))])
            found = differentiate(losses, [x], keep=False)
            close(found.input_norms, by_input, "norms by the inputs", tolerance)
        engm.alpha = float(norms.median()) + 1e-12
        weights = (engm.alpha / norms).clamp_max(1)
        net.model.zero_grad()
        outcome = engm.backward(losses)
        close(outcome.norms, norms, "norms", tolerance)
        mean = torch.cat([flat(p.grad, p) for p in parameters])
        right = weights @ each / len(y)
        assert float((mean - right).norm()) <= tolerance * float(right.norm()) + 1e-12


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Networks are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def served(net: Net) -> bool:
    """Whether the network was served, and rightly; its refusal must be one that a block of it is known for."""
    message = [REFUSED[name] for name in net.names if name in REFUSED]
    try:
        compare(net)
    except ValueError as error:
        assert any(word in str(error) for word in message), f"{net.names}: {error}"  # noqa: PT017
        return False
    except (AssertionError, RuntimeError) as error:
        raise AssertionError(f"{net.names}, N = {len(net.batches[0][0])}: {error}") from error
    return True


# The sweep


@pytest.mark.parametrize("seed", range(len(BLOCKS)), ids=[f"{kind}, {name}" for kind, name in BLOCKS])
def test_random_networks_around_every_block(seed: int) -> None:
    assert served(draw(seed, BLOCKS[seed])) or BLOCKS[seed][1] in REFUSED


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 100))])
def test_many_random_networks(part: int) -> None:
    nets = [draw(seed, BLOCKS[seed % len(BLOCKS)]) for seed in range(1000 + 25 * part, 1025 + 25 * part)]
    assert sum(map(served, nets)) >= 23


def test_the_sweep_has_many_kinds_of_networks() -> None:
    assert len({name for _, name in BLOCKS}) == len(BLOCKS) >= 200
    assert len({draw(seed, first).names for seed, first in enumerate(BLOCKS)}) >= 200
    assert len(REFUSED) == 1


@pytest.mark.parametrize("name", sorted(SERVED))
@pytest.mark.parametrize("n", [3, 20])
def test_ordinary_blocks_take_one_backward(name: str, n: int, caplog: pytest.LogCaptureFixture) -> None:
    (kind,) = (kind for kind, makes in KINDS.items() if name in makes)
    shape = {"flat": (4,), "sequence": (5, 4), "image": (2, 5, 4), "volume": (2, 3, 3, 4), "words": (5,)}[kind]
    torch.manual_seed(0)
    block = KINDS[kind][name](Draw(random.Random(0), n, shape))
    x = torch.randint(7, (n, *shape)) if kind == "words" else torch.randn(n, *shape)
    model = nn.Sequential(block, nn.Tanh(), nn.Flatten(), nn.Linear(block(x)[0].numel(), 3))
    compare(Net(model, (name,), [(x, torch.arange(n) % 3)], LOSSES[0]))
    assert not caplog.records


# Examples that are tied weakly, or later


class Mixing(nn.Module):
    """A layer whose outputs get a part of the others', here of the batch's mean."""

    def __init__(self, strength: float, mix: Callable[[Tensor], Tensor] = lambda h: h.mean(0, keepdim=True)) -> None:
        super().__init__()
        self.first, self.last, self.strength, self.mix = nn.Linear(6, 16), nn.Linear(16, 3), strength, mix

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.strength * self.mix(h))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(0, keepdim=True),
    "first": lambda h: h[:1],
    "last": lambda h: h[-1:],
    "earlier": lambda h: h.cumsum(0) - h,
    "next": lambda h: h.roll(1, 0),
    "both neighbours": lambda h: h.roll(1, 0) + h.roll(-1, 0),
    "one feature": lambda h: F.pad(h[:, :1].mean(0, keepdim=True), (7, 8)),
}


def mixed(strength: float, n: int, mix: str = "mean", seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return Mixing(strength, MIXES[mix]), torch.randn(n, 6), torch.arange(n) % 3


def errors(model: nn.Module, x: Tensor, y: Tensor, differentiate: PerExample | None = None) -> Tensor:
    """The relative errors (N,) of the norms; the truth is in float64."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    found = (differentiate or PerExample(model))(losses).norms
    exact = copy.deepcopy(model).double()
    parameters = list(exact.parameters())
    losses = F.cross_entropy(exact(x.double()), y, reduction="none")
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    return (found.double() - norms).abs() / norms


def slow_ones(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {str(record.args[0]) for record in caplog.records}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", [2, 4, 5, 17, 40])
@pytest.mark.parametrize("strength", [0.5, 1e-2, 1e-5, 1e-8])
def test_weak_mixing_is_exact_in_float64(strength: float, n: int, mix: str, caplog: pytest.LogCaptureFixture) -> None:
    assert float(errors(*mixed(strength, n, mix)).max()) <= 1e-9
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("strength", [1e-2, 1e-3, 1e-4, 3e-5])
def test_weak_mixing_is_exact_in_float32(strength: float, n: int, mix: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = mixed(strength, n, mix)
    assert float(errors(model.float(), x.float(), y).max()) <= 1e-5
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("strength", [0.1, 1e-2, 1e-3])
def test_weak_mixing_is_noticed_in_bfloat16(
    strength: float, n: int, mix: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = mixed(strength, n, mix)
    errors(model.bfloat16(), x.bfloat16(), y)
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 33, 300])
def test_examples_of_very_different_sizes_are_not_taken_for_mixed(
    dtype: torch.dtype, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(n, 2, 6, 6) * 10.0 ** torch.linspace(-3, 3, n)[:, None, None, None]
    sizes = 10.0 ** torch.linspace(3, -30, n) if dtype != torch.float16 else 10.0 ** torch.linspace(1, -7, n)
    losses = F.cross_entropy(model.to(dtype)(x.to(dtype)), torch.arange(n) % 3, reduction="none") * sizes.to(dtype)
    PerExample(model)(losses)
    assert not caplog.records


def test_forgotten_layouts_are_recognised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = mixed(0.0, 3)
    differentiate = PerExample(model)
    monkeypatch.setattr(per_example, "REMEMBERED", 3)
    for n in (3, 2, 3, 3, 2):
        assert float(errors(model, x[:n], y[:n], differentiate).max()) <= 1e-9
        assert len(differentiate._layouts) <= 8


def test_a_small_example_beside_a_large_one_has_its_own_gradient(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = mixed(1e-7, 4)
    sizes = torch.tensor([1e6, 1.0, 1e-6, 1e6])
    parameters = list(model.parameters())
    losses = F.cross_entropy(model(x), y, reduction="none") * sizes
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    close(PerExample(model)(losses).norms, norms, "norms")
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


def test_mixing_in_another_graph_is_found_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = mixed(0.3, 5)
    differentiate, mix = PerExample(model), model.mix
    model.mix = torch.zeros_like
    for _ in range(5):
        assert float(errors(model, x, y, differentiate).max()) <= 1e-9
    assert not caplog.records
    model.mix = mix
    assert float(errors(model, x, y, differentiate).max()) <= 1e-9
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 13), (15, 0), (16, 111)])
def test_mixing_that_begins_in_the_same_graph_is_found_soon(
    before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = mixed(0.0, 3)
    differentiate = PerExample(model)
    for _ in range(before):
        errors(model, x, y, differentiate)
    assert not caplog.records
    model.strength = 0.3
    for _ in range(after):
        errors(model, x, y, differentiate)
    assert not caplog.records
    assert float(errors(model, x, y, differentiate).max()) <= 1e-9
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


def test_first_batches_without_gradients_do_not_hide_mixing(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = mixed(0.3, 3)
    differentiate, weight = PerExample(model), model.last.weight.detach().clone()
    nn.init.zeros_(model.last.weight)
    for _ in range(2):
        differentiate(F.cross_entropy(model(x), y, reduction="none"))
    assert not caplog.records
    model.last.weight.data.copy_(weight)
    assert float(errors(model, x, y, differentiate).max()) <= 1e-9
    assert slow_ones(caplog) == {"first.weight", "first.bias"}


def test_an_example_that_diverged_changes_nothing_for_the_others() -> None:
    torch.manual_seed(0)
    model = Block(lambda p, x: p.w(x.transpose(0, 1).contiguous())[0].tanh() * p.b, w=nn.Linear(4, 3), b=torch.rand(3))
    x, y = torch.randn(5, 5, 4), torch.arange(5) % 3
    right = PerExample(model)(F.cross_entropy(model(x), y, reduction="none")).norms
    x[2] = torch.nan
    found = PerExample(model)(F.cross_entropy(model(x), y, reduction="none")).norms
    keep = torch.tensor([0, 1, 3, 4])
    close(found[keep], right[keep], "norms")
    assert found[2].isnan()


# Hooks of parameters


def test_hooks_of_parameters_see_the_weighted_gradient_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), FLAT["cosine"](Draw(random.Random(0), 3, (4,))))
    x, y = torch.randn(3, 4), torch.arange(3)
    parameters = list(model.parameters())
    losses = LOSSES[0](model(x), y)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    calls: list[Tensor] = []
    handles = [p.register_hook(lambda g: calls.append(g) or 3 * g) for p in parameters]
    outcome = ENGM(model, alpha=1e9).backward(losses)
    close(outcome.norms, norms, "norms")
    assert len(calls) == len(parameters)
    for p, *own in zip(parameters, *rows, strict=True):
        torch.testing.assert_close(p.grad, sum(own))
        assert len(p._backward_hooks) == 1
    for handle in handles:
        handle.remove()
    assert not any(p._backward_hooks for p in parameters)


# Complex numbers


def test_complex_numbers_are_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FLAT["Fourier gain"](Draw(random.Random(0), 3, (5,))), nn.Linear(5, 3))
    PerExample(model)(F.cross_entropy(model(torch.randn(3, 5)), torch.arange(3), reduction="none"))
    assert [record.getMessage() for record in caplog.records] == [
        "parameter 0.w takes one backward per example: Mul computes with complex numbers"
    ]


def test_norms_by_complex_inputs() -> None:
    torch.manual_seed(0)
    w, x = nn.Linear(4, 3), torch.randn(3, 4, dtype=torch.cdouble, requires_grad=True)
    losses = w(x.real * x.imag + x.abs()).square().sum(1)
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    found = PerExample(w)(losses, [x])
    close(found.input_norms, torch.view_as_real(expected).flatten(1).norm(dim=1), "norms by the inputs")


def test_statistics_of_complex_parameters() -> None:
    torch.manual_seed(0)
    model, x, y = FLAT["complex linear"](Draw(random.Random(0), 4, (5,))), torch.randn(4, 5), torch.arange(4) % 3
    found = gradient_statistics(model, Vanilla(attack=PGD(eps=0.1, steps=1)), x, x, y)
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    each = torch.stack([torch.cat([flat(g, g) for g in row]) for row in rows])
    close(found.norms, each.norm(dim=1), "norms")
    assert found.variance == pytest.approx(float((each - each.mean(0)).square().sum(1).mean()))


def test_complex_losses_are_refused() -> None:
    model = nn.Linear(4, 3, dtype=torch.cdouble)
    losses = model(torch.randn(2, 4, dtype=torch.cdouble)).sum(1)
    with pytest.raises(ValueError, match=r"the losses are complex .* take .real"):
        PerExample(model)(losses)


# BatchNorm


def test_many_layers_of_a_wrapped_network_are_named_briefly(caplog: pytest.LogCaptureFixture) -> None:
    inner = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(5))).train()
    wrapped = nn.ModuleDict({"_forward_module": inner})  # as Fabric names it
    losses = inner(torch.randn(6, 4)).square().sum(1)
    PerExample(wrapped)(losses)
    (record,) = caplog.records
    assert record.getMessage().startswith("0, 1, 2 and 2 more: the statistics of the batch")


def test_ignored_coupling_is_said_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    differentiate = PerExample(model)
    for _ in range(3):
        differentiate(F.cross_entropy(model(x), y, reduction="none"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("1, 3: the statistics of the batch tie its examples together")
    assert "coupling='exact'" in record.getMessage()
    caplog.clear()
    PerExample(model, coupling="exact")(F.cross_entropy(model(x), y, reduction="none"))
    PerExample(model)(F.cross_entropy(model.eval()(x), y, reduction="none"))
    assert not caplog.records


def test_instance_norm_does_not_tie_examples(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(36, 3)).train()
    compare(Net(model, (), [(torch.randn(4, 2, 5, 5), torch.arange(4) % 3)], LOSSES[0]))
    assert not caplog.records
