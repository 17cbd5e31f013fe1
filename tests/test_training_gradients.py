"""Per-example gradients against one float64 backward per example."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from firstorder.attacks import PGD
from firstorder.evaluation.names import packaged
from firstorder.training import TRADES, PerExample
from firstorder.training import contributions as parts
from firstorder.training import convolutions as ways_of
from firstorder.training.contributions import Convolution
from firstorder.training.convolutions import Settings
from firstorder.training.layouts import Layout
from firstorder.training.per_example import Coupling
from firstorder.training.rules import RULES, Site

Losses = Callable[..., Tensor]


def entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def flat(gradients: Any, parameters: Any) -> Tensor:
    """One float64 vector; zeros where there is no gradient."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().double().flatten() for g, p in pairs])


def doubled(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def reference(model: nn.Module, losses_of: Losses, *args: Any) -> Tensor:
    """The gradients (N, P), by one backward per example in float64."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = losses_of(model, *map(doubled, args))
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in losses]
    return torch.stack([flat(row, parameters) for row in rows])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(
    model: nn.Module, losses_of: Losses, *args: Any, differentiate: PerExample | None = None, tolerance: float = 1e-5
) -> None:
    """Norms and a weighted gradient are those of the reference."""
    each = reference(model, losses_of, *args)
    losses = losses_of(model, *args)
    gradients = (differentiate or PerExample(model))(losses)
    norms = each.norm(dim=1)
    assert gradients.norms is not None
    assert gradients.norms.shape == losses.shape
    assert float(((gradients.norms.detach().double() - norms) / norms).abs().max()) <= tolerance
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(1)) * 2
    found = flat(gradients.weighted(weights), gradients.parameters)
    assert error(found, weights.double() @ each / len(losses)) <= tolerance


def batch(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def small(shape: tuple[int, ...] = (2, 6, 6)) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * shape[1] * shape[2], 3)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1), groups=4),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, (5, 3), stride=(2, 3), groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.LayerNorm([4, 4, 4]),
        nn.SiLU(),
        nn.Flatten(2),
        nn.LayerNorm(16),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def vision() -> nn.Module:
    model = VisionTransformer(12, 4, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model


class Twice(nn.Module):
    """A convolution and a scalar that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain, self.head = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Parameter(torch.tensor(0.7)),
            nn.Linear(3, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * torch.tanh(self.conv(x))
        x = torch.tanh(self.conv(F.avg_pool2d(x, 2)) * self.gain)
        return self.head(x.mean((2, 3)))


class SequenceFirst(nn.Module):
    """An encoder layer and cross attention whose batch is in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
        self.same = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        h = self.encoder(x)
        h = h + self.cross(h, x[:3, :, :6].sin(), x[:3, :, :5])[0]
        h = h + self.same(h, x[:2].tanh(), x[:2].tanh())[0]
        return self.head(h.square().mean(0))


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(1))


class Offsets(nn.Module):
    """Vectors and scalars added, multiplied, expanded and repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plane = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(1, 3, 4, 4))
        self.token, self.lead = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.randn(1, 1, 5))
        self.shift, self.linear = nn.Parameter(torch.randn(())), nn.Linear(16, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.first + self.plane).tanh() + self.shift
        x = self.linear(x.flatten(2))
        x = torch.cat([self.token.expand(len(x), -1, -1), self.lead.repeat(len(x), 1, 1), x], 1)
        return self.head(x.tanh().prod(1) + x.sin().mean(1))


def tokens(n: int = 5, length: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(11, (n, length), generator=generator), torch.randint(3, (n,), generator=generator)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "linear": (lambda: nn.Linear(7, 3), lambda: batch(5, 7)),
    "convolutions": (convolutions, lambda: batch(5, 3, 12, 12)),
    "normalised": (normalised, lambda: batch(5, 3, 8, 8)),
    "vision": (vision, lambda: batch(4, 3, 12, 12)),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv1d(4, 4, 2), nn.Flatten(), nn.LazyLinear(3)
        ),
        lambda: batch(5, 3, 11),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        lambda: batch(4, 2, 4, 5, 3),
    ),
    "sequence first, T = N": (SequenceFirst, lambda: batch(5, 5, 8)),
    "sequence first, T = 2 N": (SequenceFirst, lambda: batch(3, 6, 8)),
    "words": (Words, tokens),
    "words, padding": (lambda: Words(padding_idx=3), tokens),
    "twice": (Twice, lambda: batch(5, 3, 8, 8)),
    "offsets": (Offsets, lambda: batch(4, 3, 4, 4)),
    "one example": (small, lambda: batch(1, 2, 6, 6)),
}


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, data = NETS[name]
    torch.manual_seed(0)
    model, (x, y) = make(), data()
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.2)
    return model, x, y


# Norms and weighted gradients


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_one_backward_per_example_and_nothing_goes_the_slow_way(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = network(name)
    differentiate = PerExample(model)
    check(model, entropy, x, y, differentiate=differentiate)
    check(model, entropy, x.flip(0), y, differentiate=differentiate)
    assert not caplog.records


def test_resnet18(caplog: pytest.LogCaptureFixture) -> None:
    model = packaged.get("cifar10-resnet18").model().eval().requires_grad_()
    x, y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.arange(4)
    check(model, entropy, x, y)
    assert not caplog.records


def test_channels_last(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = network("convolutions")
    model = model.to(memory_format=torch.channels_last)
    check(model, entropy, x.contiguous(memory_format=torch.channels_last), y)
    assert not caplog.records


def test_several_forwards_in_one_loss(caplog: pytest.LogCaptureFixture) -> None:
    objective = TRADES(attack=PGD(eps=0.1, alpha=0.05, steps=1, random_start=True))
    for name in ("convolutions", "normalised", "vision"):
        model, x, y = network(name)
        check(model, objective.losses, x, x + 0.1 * x.flip(0).sign(), y)
    assert not caplog.records


def test_frozen_and_unused_parameters() -> None:
    model, x, y = network("convolutions")
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model.add_module("spare", nn.Identity())
    model.spare.register_parameter("weight", nn.Parameter(torch.ones(3)))
    check(model, entropy, x, y)
    gradients = PerExample(model)(entropy(model, x, y))
    assert [g is None for g in gradients.weighted(torch.ones(len(x)))] == [False] * 8 + [True]


def test_float64() -> None:
    model, x, y = network("normalised")
    check(model.double(), entropy, x.double(), y, tolerance=1e-12)


def test_batches_of_other_sizes() -> None:
    model, x, y = network("sequence first, T = N")
    differentiate = PerExample(model)
    for n in (5, 2, 1, 5):
        check(model, entropy, x[:n], y[:n], differentiate=differentiate)


def test_norms_by_the_inputs() -> None:
    model, x, y = network("convolutions")
    x.requires_grad_()
    copied, there = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(entropy(copied, there, y).sum(), there)
    each = reference(model, entropy, x, y)
    gradients = PerExample(model)(entropy(model, x, y), [x])
    assert error(gradients.input_norms, expected.flatten(1).norm(dim=1)) <= 1e-5
    assert error(gradients.norms, each.norm(dim=1)) <= 1e-5
    assert error(flat(gradients.weighted(torch.ones(len(x))), gradients.parameters), each.mean(0)) <= 1e-5
    assert x.grad is None


def test_norms_are_optional_and_the_graph_may_be_kept() -> None:
    model, x, y = network("convolutions")
    losses = entropy(model, x, y)
    kept = PerExample(model)(losses, keep=False)
    again = PerExample(model)(losses, scale=1024.0)
    torch.testing.assert_close(kept.norms, again.norms)
    gradients = PerExample(model)(entropy(model, x, y), norms=False)
    assert gradients.norms is None
    ones = torch.ones(len(x))
    big, plain = (flat(g.weighted(ones), g.parameters) for g in (again, gradients))
    assert error(big, plain * 1024) <= 1e-5
    assert all(p.grad is None for p in model.parameters())


# Every path


@pytest.mark.parametrize("name", [*(name for name in NETS if name != "twice"), "trades"])
@pytest.mark.parametrize("ghost", [False, True])
def test_the_ghost_norm_and_the_dense_form_agree(name: str, ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def cheaper(group: list[Any]) -> bool:
        return ghost and all(one.work is not None for one in group)

    monkeypatch.setattr(parts, "_ghost_is_cheaper", cheaper)
    if name == "trades":
        objective = TRADES(attack=PGD(eps=0.1, alpha=0.05, steps=1, random_start=True))
        model, x, y = network("convolutions")
        check(model, objective.losses, x, x + 0.1 * x.flip(0).sign(), y)
    else:
        check(network(name)[0], entropy, *network(name)[1:])


def test_the_flop_rule_has_layers_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, bool]] = []
    rule = parts._ghost_is_cheaper

    def spy(group: list[Any]) -> bool:
        cheaper = rule(group)
        if group[0].work is not None:
            taken.append((group[0].numel, cheaper))
        return cheaper

    monkeypatch.setattr(parts, "_ghost_is_cheaper", spy)
    torch.manual_seed(0)
    # T (D + O) <= D O: 6 * 48 < 560, 6 * 31 > 84; 36 positions of the convolution: 36 * 22 > 72.
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Unflatten(2, (6, 1)),
        nn.Flatten(2, 4),
        nn.Linear(36, 30),
        nn.Tanh(),
        nn.Linear(30, 3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    check(model, entropy, *batch(3, 2, 6, 6))
    assert sorted(taken) == [(36, True), (72, False), (90, False), (1080, True)]


@pytest.mark.parametrize("name", ["convolutions", "vision", "twice", "words", "conv3d", "sequence first, T = 2 N"])
def test_a_tiny_memory_budget_changes_nothing(name: str) -> None:
    model, x, y = network(name)
    default, tiny = (PerExample(model, **options)(entropy(model, x, y)) for options in ({}, {"memory_budget": 1}))
    torch.testing.assert_close(tiny.norms, default.norms, rtol=1e-6, atol=0)
    weights = torch.rand(len(x))
    found, expected = (flat(g.weighted(weights), g.parameters) for g in (tiny, default))
    assert error(found, expected) <= 1e-6
    check(model, entropy, x, y, differentiate=PerExample(model, memory_budget=1))


@pytest.mark.parametrize("layout", [Layout(), Layout(inner=True)])
@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (9,)),
        (nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2), (6, 5)),
        (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(1, 2)), (6, 5)),
        (nn.Conv2d(4, 3, 1, stride=2), (5, 4)),
        (nn.Conv3d(4, 2, 2), (3, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3)),
    ],
)
def test_every_way_of_a_convolution_is_the_loop(
    layer: Any, size: tuple[int, ...], positions: int, layout: Layout
) -> None:
    n = 3
    x = torch.randn(n * positions, 4, *size)
    y = layer(x).detach()
    g = torch.randn_like(y)
    settings = Settings(
        *map(list, (layer.stride, layer.padding, layer.dilation)),
        layer.transposed,
        list(layer.output_padding),
        layer.groups,
    )
    contribution = Convolution(x, g, layer.weight, settings, layout, n)
    found = contribution.gradients(slice(None))
    rows = contribution.images(slice(None))
    ways = [ways_of.mapped]
    if not layer.transposed:
        ways.append(ways_of.multiplied)
    for way in ways:
        torch.testing.assert_close(way(*rows, layer.weight.shape, settings), found, rtol=1e-4, atol=1e-5)
    if not layer.transposed:
        for one, factor in zip(contribution.products(slice(None)), contribution.factors(slice(None)), strict=True):
            torch.testing.assert_close(one, factor @ factor.mT, rtol=1e-4, atol=1e-4)
    if not layer.transposed and layer.groups == 1:
        products = ways_of.gram(rows[0], layer.weight.shape[2:], settings, y.shape[2:])
        outputs = ways_of.outputs(rows[1], settings)[:, 0]
        squares = (products * (outputs @ outputs.transpose(1, 2))).sum((1, 2))
        torch.testing.assert_close(squares, found.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
    for i in range(n):
        own = torch.arange(n * positions).view(positions, n)[:, i] if layout.inner else slice(i * positions, None)
        own = own if layout.inner else slice(i * positions, (i + 1) * positions)
        (expected,) = torch.autograd.grad(layer(x[own]), layer.weight, g[own])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(contribution.gradients(slice(1, 2)), found[1:2])


# Layouts that are hard to tell


class BothWays(nn.Module):
    """A layer that sees the batch in the first and in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.linear(x.transpose(0, 1).contiguous().sin()).transpose(0, 1)
        return self.head((self.linear(x).tanh() + turned).tanh().mean(1))


class Turned(nn.Module):
    """Layers whose batch is in the second dimension."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.head = nn.LayerNorm(4) if norm else nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1).contiguous()).tanh()
        return self.head(h[0] * 2 + h[1:].sum(0) if isinstance(self.first, nn.LayerNorm) else h[0])


def test_one_layer_may_have_two_layouts() -> None:
    torch.manual_seed(0)
    check(BothWays(), entropy, *batch(3, 5, 4))


def test_a_first_batch_without_gradients_teaches_nothing() -> None:
    torch.manual_seed(0)
    model, (x, y) = Turned(True), batch(5, 5, 4)
    nn.init.zeros_(model.head.weight)
    differentiate = PerExample(model)
    differentiate(entropy(model, x, y))
    nn.init.normal_(model.head.weight)
    check(model, entropy, x, y, differentiate=differentiate)


def test_a_first_batch_with_one_loss_teaches_no_wrong_layout() -> None:
    torch.manual_seed(0)
    model, (x, y) = Turned(False), batch(3, 5, 4)
    differentiate = PerExample(model)
    differentiate(entropy(model, x, y) * torch.tensor([1.0, 0.0, 0.0]))
    check(model, entropy, x, y, differentiate=differentiate)


def test_nothing_that_is_returned_has_a_graph() -> None:
    model, x, y = network("convolutions")
    x.requires_grad_()
    gradients = PerExample(model)(entropy(model, x, y), [x])
    assert not gradients.norms.requires_grad
    assert not gradients.input_norms.requires_grad
    assert not any(g.requires_grad for g in gradients.weighted(torch.ones(len(x))))


# The slow path


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """The embedding is also the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(self.embedding(x)).tanh().mean(1), self.embedding.weight)


class Positions(nn.Module):
    """Embeddings of positions, which all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embedding(torch.arange(x.shape[1]))
        return self.head(self.middle(x).tanh().mean(1))


class Centred(nn.Module):
    """Examples that are mixed behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h - h.mean(0).square())


def parametrised() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
    )


SLOW: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], set[str]]] = {
    "lstm": (
        Recurrent,
        lambda: batch(4, 6, 4),
        {f"lstm.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")},
    ),
    "weight norm": (
        parametrised,
        lambda: batch(4, 6),
        {f"{i}.parametrizations.weight.original{k}" for i in (0, 2) for k in (0, 1)},
    ),
    "tied": (Tied, tokens, {"embedding.weight"}),
    "positions": (Positions, lambda: batch(3, 5, 4), {"embedding.weight"}),
    "positions, T = N": (Positions, lambda: batch(5, 5, 4), {"embedding.weight"}),
    "centred": (Centred, lambda: batch(5, 6), {"first.weight", "first.bias"}),
}


@pytest.mark.parametrize("name", SLOW)
def test_unknown_parameters_take_one_backward_per_example_and_are_reported_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, data, slow = SLOW[name]
    torch.manual_seed(0)
    model, (x, y) = make(), data()
    differentiate = PerExample(model)
    with caplog.at_level(logging.WARNING, logger="firstorder.training"):
        check(model, entropy, x, y, differentiate=differentiate)
        check(model, entropy, x, y.flip(0), differentiate=differentiate)
    assert all("one backward per example" in record.message for record in caplog.records)
    assert Counter(str(record.args[0]) for record in caplog.records) == Counter(slow)


# BatchNorm


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().mean((2, 3)))


def batched() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Batched().train(), *batch(6, 2, 7, 7)


def own_copies(model: Batched, x: Tensor, y: Tensor) -> Tensor:
    """Gradients (N, P) of the summed losses where every example has its own copy of the parameters, in float64."""
    weight, gain, bias, head, offset = copies = [
        p.detach().double().expand(len(x), *p.shape).clone().requires_grad_() for p in model.parameters()
    ]
    h = torch.cat([F.conv2d(one[None], w) for one, w in zip(x.double(), weight, strict=True)])
    h = (h - h.mean((0, 2, 3), keepdim=True)) * (h.var((0, 2, 3), correction=0, keepdim=True) + model.norm.eps).rsqrt()
    h = (h * gain[..., None, None] + bias[..., None, None]).tanh().mean((2, 3))
    scores = torch.einsum("nkc,nc->nk", head, h) + offset
    gradients = torch.autograd.grad(F.cross_entropy(scores, y, reduction="sum"), copies)
    return torch.cat([g.flatten(1) for g in gradients], 1)


def test_ignored_coupling_takes_norms_of_own_copies_of_the_parameters() -> None:
    model, x, y = batched()
    gradients = PerExample(model)(entropy(model, x, y))
    assert error(gradients.norms, own_copies(model, x, y).norm(dim=1)) <= 1e-5


@pytest.mark.parametrize("coupling", ["ignore", "exact"])
def test_the_step_is_the_gradient_of_the_weighted_losses(coupling: Coupling) -> None:
    """Weighted contributions of the examples are another: they have a part along the weight before BatchNorm."""
    model, x, y = batched()
    weights = torch.rand(len(x))
    gradients = PerExample(model, coupling=coupling)(entropy(model, x, y))
    found = flat(gradients.weighted(weights), gradients.parameters)
    whole = (weights * entropy(model, x, y)).mean()
    expected = flat(torch.autograd.grad(whole, list(model.parameters())), gradients.parameters)
    assert error(found, expected) <= 1e-5
    contributed = weights.double() @ own_copies(model, x, y) / len(x)
    assert error(found, contributed) > 0.1
    weight = next(model.parameters()).detach().double().flatten()
    size = len(weight)
    along = [float(weight @ g[:size] / weight.norm() / g[:size].norm()) for g in (found.double(), contributed)]
    assert abs(along[0]) < 1e-3 < 0.05 < abs(along[1])


def test_exact_coupling_is_one_backward_per_example_and_differs() -> None:
    model, x, y = batched()
    check(model, entropy, x, y, differentiate=PerExample(model, coupling="exact"))
    exact, ignored = (PerExample(model, coupling=c)(entropy(model, x, y)).norms for c in ("exact", "ignore"))
    assert error(ignored, exact.double()) > 1e-2


def test_couplings_agree_in_evaluation_mode(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = batched()
    model.eval()
    for coupling in ("exact", "ignore"):
        check(model, entropy, x, y, differentiate=PerExample(model, coupling=coupling))
    assert not caplog.records


def test_the_nodes_of_a_gpu_have_other_attributes() -> None:
    """cuDNN's BatchNorm with running statistics, and the fused RMSNorm, whose nodes no CPU has."""
    g, x, y = (torch.randn(6, 4, 5, 5, dtype=torch.float64) for _ in range(3))
    saved = {"_saved_input": x, "_saved_training": False, "_saved_epsilon": 0.1}
    running = {"_saved_running_mean": y[0, :, 0, 0], "_saved_running_var": y[1, :, 0, 0].exp()}
    node = SimpleNamespace(name=lambda: "CudnnBatchNormBackward0", **saved, **running)
    rule = RULES["CudnnBatchNormBackward0", 1]
    found = rule.contribution(Site(node, g, Layout(), 6, torch.Size([4]))).gradients(slice(6))
    layer = nn.BatchNorm2d(4, eps=0.1, affine=False).eval().double()
    layer.running_mean, layer.running_var = running.values()
    torch.testing.assert_close(found, (layer(x) * g).sum((2, 3)))
    scale = (x.square().mean((2, 3), keepdim=True) + 0.1).rsqrt()
    for stored in (scale, scale.flatten()):
        node = SimpleNamespace(name=lambda: "FusedRmsNormBackward0", _saved_input=x, _saved_result1=stored)
        site = Site(node, g, Layout(), 6, torch.Size([5, 5]))
        found = RULES["FusedRmsNormBackward0", 1].contribution(site).gradients(slice(6))
        torch.testing.assert_close(found, (F.rms_norm(x, (5, 5), eps=0.1) * g).sum(1))


def test_frozen_batch_norm_in_training_mode_is_served() -> None:
    model, x, y = batched()
    model.norm.requires_grad_(False)
    gradients = PerExample(model)(entropy(model, x, y))
    expected = torch.autograd.grad(entropy(model, x, y).mean(), gradients.parameters)
    found = flat(gradients.weighted(torch.ones(len(x))), gradients.parameters)
    assert error(found, flat(expected, gradients.parameters)) <= 1e-5


# Refusals


def test_a_compiled_model_is_refused() -> None:
    model, x, y = network("linear")
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match="_orig_mod"):
        PerExample(compiled)(entropy(compiled, x, y))
    check(compiled._orig_mod, entropy, x, y)


def checkpointed(model: nn.Module, x: Tensor, y: Tensor, *, reentrant: bool) -> Tensor:
    return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y, reduction="none")


def test_reentrant_checkpoints_are_refused() -> None:
    model, x, y = network("convolutions")
    with pytest.raises(ValueError, match="train without checkpoints"):
        PerExample(model)(checkpointed(model, x.requires_grad_(), y, reentrant=True))


def test_other_checkpoints_are_refused() -> None:
    model, x, y = network("convolutions")
    with pytest.raises(ValueError, match="train without checkpoints"):
        PerExample(model)(checkpointed(model, x, y, reentrant=False))


@pytest.mark.parametrize("coupling", ["ignore", "exact"])
def test_losses_that_are_not_per_example_are_refused(coupling: Any) -> None:
    model, x, y = network("linear")
    differentiate = PerExample(model, coupling=coupling)
    with pytest.raises(ValueError, match="reduction='none'"):
        differentiate(entropy(model, x, y).mean())
    with pytest.raises(ValueError, match="reduction='none'"):
        differentiate(entropy(model, x, y)[:, None])
    with pytest.raises(ValueError, match="reduction='none'"):
        differentiate(entropy(model, x, y)[:0])


@pytest.mark.parametrize(
    "coupling",
    ["ignore", "exact"],
)
def test_losses_without_a_graph_are_refused(coupling: Any) -> None:
    model, x, y = network("linear")
    with torch.no_grad():
        losses = entropy(model, x, y)
    with pytest.raises(ValueError, match="no graph; compute them under enable_grad"):
        PerExample(model, coupling=coupling)(losses)


def test_inputs_that_cannot_be_differentiated_by_are_refused() -> None:
    model, x, y = network("linear")
    losses = entropy(model, x, y)
    with pytest.raises(ValueError, match=r"call inputs.requires_grad_\(\) before the forward"):
        PerExample(model)(losses, [x])
    there = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"call inputs.requires_grad_\(\) before the forward"):
        PerExample(model)(losses, [there * 1])
    with pytest.raises(ValueError, match="pass those that the forward was called with"):
        PerExample(model)(losses, [there])
    with pytest.raises(ValueError, match="5 losses but 2 inputs"):
        PerExample(model)(losses, [x[:2].clone().requires_grad_()])


def test_frozen_models_and_options_are_refused() -> None:
    model, x, y = network("linear")
    x.requires_grad_()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter; set requires_grad"):
        PerExample(model)(entropy(model, x, y))
    with pytest.raises(ValueError, match="coupling"):
        PerExample(model, coupling="none")
    with pytest.raises(ValueError, match="memory_budget"):
        PerExample(model, memory_budget=0)
