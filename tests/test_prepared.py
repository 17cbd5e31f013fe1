"""Prepared models: what is folded and taken, and that the module itself decides whatever the copy says."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cases import Net, images, predicted
from firstorder.attacks import (
    ANU,
    BLOBQG,
    DDN,
    MIFGSM,
    NIFGSM,
    PGD,
    PQGD,
    SINIFGSM,
    VMIFGSM,
    Attack,
    Batched,
    BoundedAttack,
    CrossEntropy,
    Evaluation,
    Loss,
    Margin,
    MinimumNormResult,
    Model,
    ScaleCopies,
    TorchModel,
)
from firstorder.attacks import prepared as preparation
from firstorder.attacks.arbitration import Arbitrated, confirm
from firstorder.attacks.core import Problem
from firstorder.attacks.folding import fold
from firstorder.attacks.models import preserved
from firstorder.attacks.oracles import Oracle
from firstorder.attacks.prepared import Prepared, prepare
from firstorder.attacks.projections import LinfBall

MODES = pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])


def lively(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, its weights and statistics random and far from their defaults."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for part in module.modules():
        if isinstance(part, _BatchNorm):
            uniform_(part.running_mean, -1, 1)
            uniform_(part.running_var, 0.3, 3)
            uniform_(part.weight, 0.5, 2)
            uniform_(part.bias, -1, 1)
        elif isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)):
            uniform_(part.weight, -0.5, 0.5)
            uniform_(part.bias, -1, 1)
    return module.eval()


def assert_same_values(found: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> None:
    x = images(3, shape=shape)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double())
        assert expected.std() > 0.01
        assert torch.allclose(found(x).double(), expected, rtol=1e-5, atol=1e-5)


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, _BatchNorm) for part in module.modules())


# --- folding

LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), (4, 6, 5)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (4, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (4, 4, 3)),
    "transposed, as many channels": (nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), (4, 4, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 6, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=(2, 1)), nn.BatchNorm2d(6), (4, 6, 5)),
    "dilated": (nn.Conv2d(4, 6, 2, dilation=2), nn.BatchNorm2d(6), (4, 6, 5)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (4, 6, 5)),
    "without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 6, 5)),
    "without affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (4, 6, 5)),
    "large eps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5), (4, 6, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_folded_layers(kind: str) -> None:
    layer, norm, shape = LAYERS[kind]
    module = lively(nn.Sequential(layer, norm, nn.Softplus()))
    found, count = fold(copy.deepcopy(module))
    assert (count, norms(found)) == (1, 0)
    assert not any(p.requires_grad for p in found.parameters())
    assert_same_values(found, module, shape)


def test_linear_and_norm_without_affine() -> None:
    module = lively(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)))
    found, count = fold(copy.deepcopy(module))
    assert count == 0
    assert_same_values(found, module, (4,))


@pytest.mark.parametrize("features", [5, 6], ids=["as many features", "other number"])
def test_norm_over_the_tokens_of_a_linear_layer(features: int) -> None:
    module = lively(nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(5)))
    assert_same_values(fold(copy.deepcopy(module))[0], module, (5, 4))


class Graph(nn.Module):
    """Two convolutions and two norms of three channels, put together by `how`."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def twice_used(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def two_norms(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + m.second(y)


UNFOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "output used twice": twice_used,
    "output in two norms": two_norms,
    "shared convolution": lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1),
    "shared convolution, two norms": lambda m, x: m.second(m.conv(m.norm(m.conv(x)))),
    "shared norm": lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
    "norm before": lambda m, x: m.conv(m.norm(x)),
    "after ReLU": lambda m, x: m.norm(m.conv(x).relu()),
    "after another layer": lambda m, x: m.norm(x + m.conv(x)),
}


@pytest.mark.parametrize("kind", UNFOLDED)
def test_graphs_that_cannot_be_folded(kind: str) -> None:
    module = lively(Graph(UNFOLDED[kind]))
    before = copy.deepcopy(module)
    found, count = fold(module)
    assert count == 0
    assert found is module
    assert_same_values(found, before, (3, 6, 5))


class OwnPadding(nn.Conv2d):
    """A convolution that pads by itself, so that torch.fx sees a function of its parameters."""

    def __init__(self, *arguments: Any, pad: nn.Module, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, groups=self.groups)


class Standardised(nn.Conv2d):
    """A convolution whose kernel is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


OWN: dict[str, tuple[nn.Module, int]] = {
    "more at one side": (OwnPadding(4, 6, 2, pad=nn.ZeroPad2d((1, 0, 1, 0))), 1),
    "alike": (OwnPadding(4, 6, 3, pad=nn.ZeroPad2d((1, 1, 2, 2)), stride=(2, 1)), 0),
    "alike, and the convolution pads too": (OwnPadding(4, 6, 3, pad=nn.ZeroPad2d((2, 2, 0, 0)), padding=(1, 2)), 0),
    "alike, grouped, dilated": (OwnPadding(4, 6, 2, pad=nn.ZeroPad2d(1), groups=2, dilation=2), 0),
    "by ones": (OwnPadding(4, 6, 3, pad=nn.ConstantPad2d(1, 1.0)), 0),
    "reflecting": (OwnPadding(4, 6, 3, pad=nn.ReflectionPad2d(1), bias=False), 0),
    "by name": (OwnPadding(4, 6, 3, pad=nn.ZeroPad2d(1), padding="same"), 1),
}
"""Convolutions that pad by themselves, and how many layers that pad by zeros are left of them."""


@pytest.mark.parametrize("kind", OWN)
def test_convolutions_that_pad_by_themselves(kind: str) -> None:
    layer, pads = OWN[kind]
    module = lively(nn.Sequential(layer, nn.BatchNorm2d(6), nn.Softplus()))
    before = copy.deepcopy(module)
    found, count = fold(module)
    assert (count, norms(found)) == (1, 0)
    assert sum(isinstance(part, nn.ZeroPad2d) for part in found.modules()) == pads
    assert_same_values(found, before, (4, 6, 5))


def test_padding_that_is_used_twice() -> None:
    def how(m: Any, x: Tensor) -> Tensor:
        wide = m.pad(x)
        return m.norm(F.conv2d(wide, m.conv.weight, padding=1)) + m.second(m.conv(wide))

    module = lively(Graph(how))
    module.pad = nn.ZeroPad2d(1)
    found, count = fold(copy.deepcopy(module))
    assert (count, norms(found)) == (2, 0)
    assert_same_values(found, module, (3, 6, 5))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
        nn.Sequential(Standardised(4, 6, 2), nn.BatchNorm2d(6)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()),
    ],
    ids=["no statistics", "grouped transposed", "computed kernel", "instance norm", "no norm"],
)
def test_layers_that_cannot_be_folded(module: nn.Module) -> None:
    before = copy.deepcopy(lively(module))
    found, count = fold(module)
    assert count == 0
    assert found is module
    assert_same_values(found, before, (4, 6, 5))


def test_a_norm_in_training_mode_is_not_folded() -> None:
    module = lively(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    module[1].train()
    expected = copy.deepcopy(module)(images(3, shape=(4, 6, 5)))
    found, count = fold(module)
    assert count == 0
    assert torch.equal(found(images(3, shape=(4, 6, 5))), expected)


def test_only_what_can_be_folded_is() -> None:
    module = lively(Graph(lambda m, x: m.second(m.other(m.norm(m.conv(x)).relu())) + m.norm(x)))
    found, count = fold(copy.deepcopy(module))
    assert (count, norms(found)) == (1, 1)
    assert_same_values(found, module, (3, 6, 5))


class Steered(nn.Module):
    """Control flow that depends on the data: torch.fx cannot follow, but can its two children."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.odd = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.even(x) if bool(x.sum() > 100) else self.odd(x))


def test_children_of_a_root_that_cannot_be_traced() -> None:
    module = lively(nn.Sequential(Steered(), nn.Softplus()))
    found, count = fold(copy.deepcopy(module))
    assert (count, norms(found)) == (2, 1)
    assert_same_values(found, module, (3, 6, 5))
    x = images(2) + 10.0
    assert torch.allclose(found(x), module(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found(x), Steered.forward(module[0], x - 10.0), atol=1e-2)


# --- what a preparation is made of


def deep() -> Net:
    """A network as it comes from training: in training mode, statistics and classes those of its images."""
    net, x = Net(), images(64, seed=9)
    norm, head = net.features[1], net.head[2]
    lively(norm)
    norm.momentum = 1.0
    with torch.no_grad():
        net.train().features(x)
        head.bias.sub_(net.eval()(x).mean(0))
    return net.train()


def dense() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 16), nn.Softplus(), nn.Linear(16, 5))


def probe(model: Model, x: Tensor, labels: Tensor) -> Evaluation:
    with model.preserved():
        return model.gradient(x, labels, None)


def assert_agree(model: Prepared, x: Tensor, labels: Tensor, *, error: float = 1e-3, cosine: float = 0.999) -> None:
    """That copy and module agree on images."""
    found, expected = probe(model, x, labels), probe(model.exact, x, labels)
    assert found.logits is not None
    assert expected.logits is not None
    assert found.gradient.dtype == found.logits.dtype == x.dtype
    assert (found.logits - expected.logits).abs().max() <= error * expected.logits.abs().max()
    assert (torch.cosine_similarity(found.gradient.flatten(1), expected.gradient.flatten(1)) > cosine).all()


class Calls:
    """How often a function was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **options)


def test_gradients_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    net = deep()
    model = prepare(net, images(4))
    assert model.parts == ("folded BatchNorm", "channels_last")
    x = images(9, seed=5)
    assert_agree(model, x, predicted(net, x))
    assert_agree(model, x, (predicted(net, x) + 1) % 10)
    calls = Calls(F.batch_norm)
    monkeypatch.setattr(F, "batch_norm", calls)
    probe(model, x, predicted(net, x))
    before = calls.count
    model.gradient(x, torch.zeros(9, dtype=torch.long), Margin(), logits=False)
    assert calls.count == before
    with model.preserved():
        assert torch.equal(model.logits(x), model.exact.logits(x))
    assert calls.count == before + 2


def test_the_loss_of_the_attack_is_the_copys() -> None:
    net = deep()
    model, x = prepare(net, images(4)), images(5, seed=5)
    y = predicted(net, x)
    with model.preserved():
        found, expected = (each_one.gradient(x, y, Margin()).gradient for each_one in (model, model.exact))
        other = model.gradient(x, y, CrossEntropy()).gradient
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, other, rtol=1e-2, atol=1e-3)


def test_the_module_is_untouched() -> None:
    net = deep()
    net.head.eval()
    net.features[0].bias.requires_grad_(False)
    net.features[0].weight.grad = torch.ones_like(net.features[0].weight)
    heard: list[int] = []
    net.head[2].register_forward_hook(lambda *_: heard.append(0))
    random = torch.get_rng_state()

    def state() -> list[Any]:
        return [
            [(part, part.training, type(part), list(part._forward_hooks)) for part in net.modules()],
            [(name, id(p), p.requires_grad, p.grad is None, p.stride()) for name, p in net.named_parameters()],
            [(name, id(b)) for name, b in net.named_buffers()],
        ]

    before, values = state(), copy.deepcopy(net.state_dict())
    model = prepare(net, images(4), precision="bfloat16")
    x = images(4, seed=3)
    PGD(eps=0.05, steps=2, early_stop=True).run(model, x, predicted(net, x))
    assert model.parts == ("folded BatchNorm", "channels_last", "bfloat16")
    assert state() == before
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.features[0].weight.grad, torch.ones_like(net.features[0].weight))
    assert heard
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for name, p in net.named_parameters() if name != "features.0.weight")


def test_the_module_is_restored_where_the_preparation_is_refused() -> None:
    net = deep()
    with pytest.raises(RuntimeError, match="expected input"):
        prepare(net, images(4, shape=(2, 6, 5)))
    assert all(part.training for part in net.modules())


def test_later_changes_of_the_module() -> None:
    net = deep()
    model, x = prepare(net, images(4)), images(6, seed=4)
    y = predicted(net, x)
    copied, exact = probe(model, x, y), probe(model.exact, x, y)
    with torch.no_grad():
        net.head[2].weight.mul_(-1)
        net.features[1].running_mean.add_(1)
    assert torch.equal(probe(model, x, y).gradient, copied.gradient)
    assert not torch.allclose(probe(model.exact, x, y).gradient, exact.gradient, rtol=0.1, atol=0.01)
    result = PGD(eps=0.01, steps=2).run(model, x, y)
    assert torch.equal(result.success, predicted(net, result.adversarial) != y)
    assert result.success.any()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_refreshed(precision: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As prepared anew, after weights and statistics have changed."""
    monkeypatch.setattr(torch, "compile", lambda module: Wrapped(module, lambda z: z * 1.0))
    net, x = deep(), images(6, seed=4)
    y = predicted(net, x)
    model = prepare(net, images(4), precision=precision, compile=compiled)
    before = probe(model, x, y)
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear, _BatchNorm)):
                part.weight.add_(0.03 * torch.rand(part.weight.shape, generator=torch.Generator().manual_seed(1)))
                part.bias.add_(0.02)
        net.features[1].running_mean.add_(0.1)
        net.features[1].running_var.mul_(1.2)
    state, training = copy.deepcopy(net.state_dict()), net.training
    model.refresh()
    found = probe(model, x, y)
    anew = prepare(net, images(4), precision=precision, compile=compiled)
    assert anew.parts == model.parts
    expected = probe(anew, x, y)
    assert torch.equal(found.gradient, expected.gradient)
    assert found.logits is not None
    assert expected.logits is not None
    assert torch.equal(found.logits, expected.logits)
    assert not torch.allclose(found.gradient, before.gradient, rtol=0.05)
    assert net.training == training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert model.module is net


def test_the_models_own_loss() -> None:
    net, x = deep(), images(5, seed=5)
    y = predicted(net, x)
    model, usual = (prepare(net, images(4), loss=loss) for loss in (Margin(), None))
    for each_one in (model, model.exact):
        with model.preserved():
            found, named, other = (
                each.gradient(x, y, loss).gradient
                for each, loss in ((each_one, None), (each_one, Margin()), (usual, None))
            )
        assert torch.equal(found, named)
        assert not torch.allclose(found, other, rtol=0.1)


PARTS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[str, ...]]] = {
    "convolution without norm": (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(24, 4)),
        (3, 6, 5),
        ("channels_last",),
    ),
    "signals": (
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 4)),
        (3, 6),
        ("folded BatchNorm",),
    ),
    "volumes": (nn.Sequential(nn.Conv3d(2, 4, 2), nn.Flatten(), nn.Linear(32, 4)), (2, 3, 3, 3), ()),
    "images without convolution": (nn.Sequential(nn.Flatten(), nn.Linear(90, 4)), (3, 6, 5), ()),
    "vectors": (nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 4)), (7,), ()),
    "vectors with norm": (
        nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)),
        (7,),
        (),
    ),
    "vectors to images": (
        nn.Sequential(nn.Linear(7, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)),
        (7,),
        (),
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    module, shape, parts = PARTS[kind]
    lively(module)
    model = prepare(module, images(4, shape=shape))
    assert model.parts == parts
    assert not caplog.records
    x = images(5, seed=2, shape=shape)
    assert_agree(model, x, predicted(module, x))
    result = PGD(eps=0.3, steps=3).run(model, x, predicted(module, x))
    assert torch.equal(result.success, predicted(module, result.adversarial) != predicted(module, x))


class Witness(nn.Module):
    """Notes of what goes through it: dtype, whether channels_last, and whether gradients are wanted of weights."""

    seen: ClassVar[list[tuple[torch.dtype, bool]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return x


def watched() -> nn.Module:
    Witness.seen.clear()
    layers = Witness(), nn.Conv2d(3, 4, 3, padding=1), Witness(), nn.Flatten(), nn.Linear(120, 4)
    return lively(nn.Sequential(*layers))


def test_the_layout_of_the_copy() -> None:
    module = watched()
    model, x = prepare(module, images(4)), images(5, seed=1)
    Witness.seen.clear()
    found = probe(model, x, predicted(module, x))
    assert Witness.seen[-2:] == [(torch.float32, True)] * 2
    assert found.gradient.is_contiguous()
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(probe(model, turned, predicted(module, x)).gradient, found.gradient)
    Witness.seen.clear()
    model.logits(x)
    assert Witness.seen == [(torch.float32, False)] * 2


def test_bfloat16() -> None:
    module = watched()
    model, x = prepare(module, images(4), precision="bfloat16"), images(5, seed=1)
    assert model.parts == ("channels_last", "bfloat16")
    y = predicted(module, x)
    Witness.seen.clear()
    found = probe(model, x, y)
    assert Witness.seen == [(torch.float32, True), (torch.bfloat16, True)]
    assert found.gradient.is_contiguous()
    assert_agree(model, x, y, error=0.05, cosine=0.99)
    expected = probe(model.exact, x, y)
    assert found.logits is not None
    assert expected.logits is not None
    assert not torch.allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(x), module(x))


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_only_where_it_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(self: Any, interface: Model) -> float:
        Witness.seen.clear()
        interface.logits(images(1))
        low = any(dtype == torch.bfloat16 for dtype, _ in Witness.seen)
        return 1.0 if low == faster else 2.0

    monkeypatch.setattr(preparation._Preparation, "_seconds", seconds)
    caplog.set_level(logging.INFO, preparation.__name__)
    model = prepare(watched(), images(4), precision="auto")
    assert model.parts == (("channels_last", "bfloat16") if faster else ("channels_last",))
    assert ("bfloat16 is left out: it was not faster" in caplog.text) != faster


def test_times_are_taken() -> None:
    example, module = images(2), watched()
    each_one = TorchModel(module)
    again = preparation._Preparation(
        example, torch.tensor([0, 1]), preparation.probe(each_one, example, torch.zeros(2).long())
    )
    Witness.seen.clear()
    seconds = again._seconds(each_one, rounds=2)
    assert 0 < seconds < 1
    assert len(Witness.seen) == 2 * 3


class Wrapped(nn.Module):
    """A module whose result `wrong` changes."""

    def __init__(self, module: nn.Module, wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.wrong = module, wrong

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self.module(x))


def backwards(z: Tensor) -> Tensor:
    """The same values with the opposite gradient."""
    return 2 * z.detach() - z


def failing(z: Tensor) -> Tensor:
    raise NotImplementedError("no such kernel")


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z * 1.01,
    "one logit": lambda z: (
        z + 0.02 * z.abs().max() * F.one_hot(torch.tensor(3), 10) * (torch.arange(len(z)) == 1)[:, None]
    ),
    "gradients": backwards,
    "one gradient": lambda z: torch.cat([z[:-1], backwards(z[-1:])]),
    "non-finite": lambda z: z / (z - z),
    "an error": failing,
}


NAMES = ["folded BatchNorm", "channels_last", "bfloat16", "torch.compile"]
TOLERATED = {("bfloat16", "logits"), ("bfloat16", "one logit")}


@pytest.mark.parametrize(("part", "kind"), [(n, k) for n in NAMES for k in WRONG if (n, k) not in TOLERATED])
def test_a_part_that_disagrees_is_left_out(
    part: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    precision: Any = "bfloat16" if part == "bfloat16" else "float32"
    functions = {"channels_last": "_turned", "bfloat16": "_halved"}
    if part == "folded BatchNorm":
        monkeypatch.setattr(preparation, "fold", lambda module: (Wrapped(fold(module)[0], WRONG[kind]), 1))
    elif part == "torch.compile":
        monkeypatch.setattr(torch, "compile", lambda module: Wrapped(module, WRONG[kind]))
    else:
        right = getattr(preparation, functions[part])
        monkeypatch.setattr(
            preparation, functions[part], lambda module, **options: Wrapped(right(module, **options), WRONG[kind])
        )
    net = deep()
    model = prepare(net, images(4), precision=precision, compile=part == "torch.compile")
    expected = {"folded BatchNorm", "channels_last", part} - {part}
    assert set(model.parts) == expected
    assert [record.getMessage().split(" is left out: ")[0] for record in caplog.records] == [part]
    assert ("NotImplementedError: no such kernel" in caplog.text) == (kind == "an error")
    assert_agree(model, images(5, seed=1), predicted(net, images(5, seed=1)))


@pytest.mark.parametrize("function", ["fold", "_turned", "_halved"])
def test_a_part_that_is_left_out_leaves_nothing_behind(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(module: nn.Module, **options: Any) -> Any:
        for parameter in module.parameters():
            parameter.data.mul_(-2)
        return (module, 1) if function == "fold" else module

    monkeypatch.setattr(preparation, function, ruin)
    net = deep()
    model = prepare(net, images(4), precision="bfloat16" if function == "_halved" else "float32")
    assert len(model.parts) == (2 if function == "_halved" else 1)
    assert_agree(model, images(5, seed=1), predicted(net, images(5, seed=1)))


def test_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compiling(module: nn.Module) -> nn.Module:
        compiled.append(module)
        return Wrapped(module, lambda z: z * 1.0001)

    monkeypatch.setattr(torch, "compile", compiling)
    net = deep()
    assert prepare(net, images(4)).parts == ("folded BatchNorm", "channels_last")
    assert not compiled
    model = prepare(net, images(4), compile=True)
    assert model.parts == ("folded BatchNorm", "channels_last", "torch.compile")
    assert [norms(module) for module in compiled] == [0]
    x = images(2, seed=1)
    found, expected = (probe(each, x, predicted(net, x)).logits for each in (model, prepare(net, images(4))))
    assert found is not None
    assert expected is not None
    assert torch.allclose(found, expected * 1.0001, rtol=1e-6)


class Untrue(Wrapped):
    """As compiled modules of torch are: neither true nor false."""

    def __len__(self) -> int:
        raise TypeError("no length")


def test_a_compiled_module_has_no_truth_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: Untrue(module, lambda z: z))
    assert prepare(deep(), images(4), compile=True).parts == ("folded BatchNorm", "channels_last", "torch.compile")


def test_a_compiler_that_refuses_at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(module: nn.Module) -> nn.Module:
        raise RuntimeError("Dynamo is not supported here")

    monkeypatch.setattr(torch, "compile", refuse)
    assert prepare(dense(), images(4, shape=(7,)), compile=True).parts == ()
    assert "torch.compile is left out: RuntimeError: Dynamo is not supported here" in caplog.text


def test_bfloat16_that_fails_while_it_is_timed() -> None:
    module = dense().double()  # autocast leaves float64 as it is
    assert prepare(module, images(4, shape=(7,)).double(), precision="auto").parts == ()


def test_a_layer_whose_weight_is_computed() -> None:
    module = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(48, 3)))
    nn.utils.parametrizations.spectral_norm(module[0])
    assert prepare(module.eval(), images(4)).parts == ("channels_last",)


@pytest.mark.parametrize("kind", ["all logits equal", "confident", "one example of which no unit is active"])
def test_models_whose_gradient_is_zero(kind: str) -> None:
    module = lively(nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = images(4, shape=(7,))
    with torch.no_grad():
        if kind == "one example of which no unit is active":
            x[0] = 0
            module[0].bias.fill_(-0.01)
        else:
            for parameter in module[2].parameters():
                parameter.mul_(1e4 if kind == "confident" else 0)
    prepare(module, x)


def test_a_model_that_is_confident_of_one_image() -> None:
    """By 25, as trained models often are: gradients are small, not random."""
    net, x = deep(), images(8)
    with torch.no_grad(), preserved(net):
        largest = (net(x).topk(2).values * torch.tensor([1.0, -1.0])).sum(1).max()
        for parameter in net.head[2].parameters():
            parameter.mul_(25 / largest)
    assert prepare(net, x).parts == ("folded BatchNorm", "channels_last")


class Noisy(nn.Module):
    """Logits with noise, in evaluation mode too."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.inner, self.noise = dense(), noise

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        return z + self.noise * torch.randn_like(z)


def test_refused() -> None:
    x = images(4, shape=(7,))
    with pytest.raises(ValueError, match="a random model cannot be prepared"):
        prepare(Noisy(0.5), x)
    assert prepare(Noisy(0.0), x).parts == ()
    module = dense()
    for model, name in ((lambda x: module(x), "function"), (TorchModel(module), "TorchModel"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"the model is a {name}; only a torch module can be prepared"):
            prepare(model, x)
    with pytest.raises(ValueError, match="precision='float8' is not supported here; choose 'float32' or"):
        prepare(module, x, precision="float8")
    with pytest.raises(ValueError, match=r"the images are torch\.int64; convert them"):
        prepare(module, x.long())
    with pytest.raises(ValueError, match="the images are a list"):
        prepare(module, x.tolist())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prepare(module, images(4, shape=(6,)))


def test_every_model_but_a_prepared_one_is_exact() -> None:
    model = TorchModel(dense())
    assert model.exact is model
    prepared = prepare(dense(), images(4, shape=(7,)))
    assert prepared.exact is prepared.exact is not prepared
    assert prepared.exact.exact is prepared.exact
    assert prepared.footprint(images(2, shape=(7,))) > 1


def test_mistakes_in_a_call_are_reported() -> None:
    model, x, y = prepare(deep(), images(4)), images(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels span 0\.\.10, but the model has classes 0\.\.9"):
        PGD()(model, x, torch.tensor([0, 1, 10]))
    with pytest.raises(RuntimeError, match="expected input"):
        DDN()(model, images(3, shape=(1, 6, 5)), y)


# --- attacks on a prepared model

ATTACKS: dict[str, Attack[Any]] = {
    "pgd": PGD(eps=0.015, steps=5, random_start=False),
    "pgd, early_stop": PGD(eps=0.015, steps=5, random_start=False, early_stop=True),
    "pgd, restarts": PGD(eps=0.015, steps=4, restarts=2),
    "pgd, restarts, early_stop": PGD(eps=0.015, steps=4, restarts=2, early_stop=True),
    "pgd, L2": PGD(eps=0.1, norm="L2", steps=5, random_start=False),
    "pgd, L2, restarts, early_stop": PGD(eps=0.1, norm="L2", steps=5, restarts=2, early_stop=True),
    "mi-fgsm": MIFGSM(eps=0.015, steps=4, early_stop=True),
    "ni-fgsm": NIFGSM(eps=0.015, steps=4),
    "si-ni-fgsm": SINIFGSM(eps=0.02, steps=4, m=3),
    "pqgd": PQGD(eps=0.015, steps=4, early_stop=True, random_start=False),
    "vmi-fgsm": VMIFGSM(eps=0.015, steps=3, N=2, early_stop=True),
    "ddn": DDN(steps=15, max_norm=0.1),
    "anu": ANU(steps=15, max_norm=0.1),
}


def verdicts(net: nn.Module, x: Tensor, y: Tensor, targeted: bool) -> Tensor:
    return (predicted(net, x) == y) == targeted


@MODES
@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks(kind: str, targeted: bool) -> None:
    attack, net, x = ATTACKS[kind], deep(), images(16, seed=7)
    y = predicted(net, x)
    if targeted:
        with torch.no_grad(), preserved(net):
            y = net(x).topk(2).indices[:, 1]
    mask = torch.ones(16, 3, 6, 5, dtype=torch.bool)
    mask[:, 1, 2:4, :2] = False
    model = prepare(net, x[:4])
    assert len(model.parts) == 2
    options: dict[str, Any] = {"targeted": targeted, "mask": mask}
    result, expected = (attack.run(each_one, x, y, **options) for each_one in (model, net))
    assert torch.equal(result.success, expected.success)
    assert 0 < int(result.success.sum()) < 16
    assert torch.equal(result.success, verdicts(net, result.adversarial, y, targeted))
    assert torch.equal(result.gradients, expected.gradients)
    assert torch.equal(attack(model, x, y, **options), result.adversarial)
    assert torch.allclose(result.adversarial, expected.adversarial, atol=5e-3)
    delta = result.adversarial - x
    assert torch.equal(delta[~mask], torch.zeros_like(delta[~mask]))
    assert (result.adversarial >= 0).all()
    assert (result.adversarial <= 1).all()
    if isinstance(attack, BoundedAttack):
        length = delta.abs().amax() if attack.norm == "Linf" else delta.flatten(1).norm(dim=1).amax()
        assert length <= attack.eps + 1e-6
    else:
        assert torch.allclose(result.norm, expected.norm, rtol=1e-2)
        assert (result.norm[result.success] <= attack.max_norm + 1e-6).all()


@pytest.mark.parametrize("attack", [PGD(eps=0.015, steps=6, early_stop=True), DDN(steps=12, max_norm=0.1)])
def test_attacks_in_bfloat16(attack: Attack[Any]) -> None:
    net, x = deep(), images(16, seed=7)
    y = predicted(net, x)
    model = prepare(net, x[:4], precision="bfloat16")
    assert "bfloat16" in model.parts
    result = attack.run(model, x, y)
    assert torch.equal(result.success, verdicts(net, result.adversarial, y, False))
    assert int(result.success.sum()) >= int(attack.run(net, x, y).success.sum()) - 1 > 0


# --- disputes: what the copy takes for broken and the exact model does not

Shift = Callable[[Tensor], Tensor]
"""What a copy adds to the margin of its verdicts at points (M, d), shape (M,)."""


def marks(x: Tensor) -> list[int]:
    """Which examples points (M, d) are: their first element, which no model here reads and no attack may change."""
    return [round(mark) for mark in x[:, 0].tolist()]


class Noted(TorchModel):
    """A model that notes of which examples it is asked the gradient and the logits.

    Its gradients are scaled by `sign`, and its logits moved towards success by `shift`.
    """

    def __init__(
        self, module: nn.Module, *, shift: Shift | None = None, sign: float = 1.0, targeted: bool = False
    ) -> None:
        super().__init__(module)
        self.asked: list[list[int]] = []
        self.viewed: list[list[int]] = []
        self.shift, self.sign, self.targeted = shift, sign, targeted

    def logits(self, x: Tensor) -> Tensor:
        self.viewed.append(marks(x))
        return super().logits(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        self.asked.append(marks(x))
        gradient, scores, losses = super().gradient(x, labels, loss, logits=logits)
        assert scores is not None
        if self.shift is not None:
            move = self.shift(x) * (1.0 if self.targeted else -1.0)
            first = labels if labels.ndim == 1 else aims(self.targeted)[torch.tensor(marks(x))]
            scores = scores + F.one_hot(first, scores.shape[1]) * move[:, None]
        return Evaluation(gradient * self.sign, scores, losses)


class Approximated(Model):
    """Gradients and their logits from `copied`, verdicts from `arbiter`."""

    def __init__(self, copied: Noted, arbiter: Noted) -> None:
        self.copied, self.arbiter = copied, arbiter

    @property
    def exact(self) -> Model:
        return self.arbiter

    def logits(self, x: Tensor) -> Tensor:
        return self.arbiter.logits(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        return self.copied.gradient(x, labels, loss, logits=logits)

    def check(self, x: Tensor, labels: Tensor, loss: Loss | None) -> None:
        return

    def preserved(self) -> AbstractContextManager[None]:
        return self.arbiter.preserved()


class Unmarked(nn.Module):
    """A smooth classifier of five classes that does not read the first of seven elements."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5)).double()
        with torch.no_grad():
            self.layers[0].weight.mul_(4.0)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x[:, 1:])
        return scores


N = 20
SMOOTH = Unmarked()
POINTS = torch.cat([torch.arange(N)[:, None].double(), images(N, seed=3, shape=(6,)).double()], 1)
OPEN = torch.ones(N, 7, dtype=torch.bool)
OPEN[:, 0] = False
OPEN[::3, 2] = False


def aims(targeted: bool) -> Tensor:
    with torch.no_grad():
        return SMOOTH(POINTS).topk(2).indices[:, int(targeted)]


def broken(x: Tensor, targeted: bool) -> Tensor:
    with torch.no_grad():
        return (SMOOTH(x).argmax(1) == aims(targeted)) == targeted


def every(x: Tensor) -> Tensor:
    return torch.full_like(x[:, 0], 1e3)


def odd(x: Tensor) -> Tensor:
    return 1e3 * (x[:, 0].round() % 2)


def near(x: Tensor) -> Tensor:
    """Too early at odd examples, by a little."""
    return 0.15 * (x[:, 0].round() % 2)


def never(x: Tensor) -> Tensor:
    return torch.full_like(x[:, 0], -1e3)


class Scaled(PGD):
    """PGD along the mean gradient of scaled copies, in one stack."""

    def oracle(self) -> Oracle:
        return ScaleCopies(m=3)


EARLY: dict[str, BoundedAttack] = {
    "pgd": PGD(eps=0.15, steps=8, random_start=False, early_stop=True),
    "pgd, restarts": PGD(eps=0.15, steps=4, restarts=3, early_stop=True),
    "pgd, L2": PGD(eps=0.3, norm="L2", steps=6, random_start=False, early_stop=True),
    "mi-fgsm": MIFGSM(eps=0.15, steps=6, early_stop=True),
    "pqgd": PQGD(eps=0.15, steps=6, random_start=False, early_stop=True),
    "vmi-fgsm": VMIFGSM(eps=0.15, steps=5, N=3, early_stop=True),
    "vmi-fgsm, pieces": VMIFGSM(eps=0.15, steps=5, N=5, early_stop=True, memory_budget=2),
    "scaled copies": Scaled(eps=0.15, steps=6, random_start=False, early_stop=True),
    "scaled copies, restarts": Scaled(eps=0.15, steps=3, restarts=2, early_stop=True),
    "blob-qg": BLOBQG(eps=0.15, steps=5, c=0.2, random_start=False, early_stop=True),
}


@MODES
@pytest.mark.parametrize("shift", [every, odd, near, never])
@pytest.mark.parametrize("kind", EARLY)
def test_wrong_verdicts_of_the_copy_change_nothing(kind: str, shift: Shift, targeted: bool) -> None:
    """A copy with the right gradients whose verdicts are wrong: the attack goes on as on the exact model alone."""
    attack = EARLY[kind]
    arbiter = Noted(SMOOTH)
    copied = Noted(SMOOTH, shift=shift, targeted=targeted)
    options: dict[str, Any] = {"targeted": targeted, "mask": OPEN, "bounds": None}
    y = aims(targeted)
    result = attack.run(Approximated(copied, arbiter), POINTS, y, **options)
    expected = attack.run(SMOOTH, POINTS, y, **options)
    assert torch.equal(result.success, broken(result.adversarial, targeted))
    assert 2 < int(expected.success.sum()) < N - 2
    if shift is not never:
        assert torch.allclose(result.adversarial, expected.adversarial, rtol=0, atol=1e-9)
        assert torch.equal(result.success, expected.success)
        assert torch.equal(result.gradients, expected.gradients)
        assert arbiter.asked
    else:
        full = dataclasses.replace(attack, early_stop=False).run(SMOOTH, POINTS, y, **options)
        assert torch.equal(result.success, full.success)
        assert not arbiter.asked
        if attack.restarts == 1:
            assert torch.allclose(result.adversarial, full.adversarial, rtol=0, atol=1e-9)


@MODES
def test_a_copy_that_is_wrong_everywhere(targeted: bool) -> None:
    """Its gradients point backwards and its verdicts are all success: it costs the first step and no more."""
    attack = PGD(eps=0.15, alpha=0.04, steps=12, random_start=False, early_stop=True)
    y = aims(targeted)
    a, left = POINTS.clone(), torch.arange(N)
    for t in range(12):
        fooled = broken(a, targeted)[left]
        left = left[~fooled]
        gradient = TorchModel(SMOOTH).gradient(a[left], y[left], None).gradient * (-1 if targeted else 1)
        step = (-gradient if t == 0 else gradient).sign() * OPEN[left] * 0.04
        a[left] = (a[left] + step).clamp(POINTS[left] - 0.15, POINTS[left] + 0.15)
    model = Approximated(Noted(SMOOTH, shift=every, sign=-1.0, targeted=targeted), Noted(SMOOTH))
    options: dict[str, Any] = {"targeted": targeted, "mask": OPEN, "bounds": None}
    result = attack.run(model, POINTS, y, **options)
    alone = attack.run(SMOOTH, POINTS, y, **options)
    assert torch.allclose(result.adversarial, a, rtol=0, atol=1e-9)
    assert torch.equal(result.success, broken(a, targeted))
    assert int(result.success.sum()) >= int(alone.success.sum()) > 2
    assert model.copied.asked == [list(range(N))]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_prepared_model_with_another_copy(norm: str) -> None:
    """A copy of other classes, put into `Prepared` itself."""
    net, x = deep(), images(16, seed=7)
    y = predicted(net, x)
    other = copy.deepcopy(net).eval()
    model = Prepared(net, TorchModel(lambda points: other(points).roll(1, 1)), ())
    eps = {"Linf": 0.015, "L2": 0.1}[norm]
    attack = PGD(eps=eps, alpha=eps / 3, steps=12, norm=norm, random_start=False, early_stop=True)
    result, alone = (attack.run(each_one, x, y) for each_one in (model, net))
    assert torch.equal(result.success, verdicts(net, result.adversarial, y, False))
    assert int(result.success.sum()) >= int(alone.success.sum()) > 0
    assert not result.success.all()


class Line(nn.Module):
    """Class 1 where the second element exceeds 0.55, else class 0; a fifth of the third belongs to the copy's view."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x[:, 1]), x[:, 1] - 0.55 + (x[:, 2] if self.early else 0.0)], 1)


STARTS = [0.5, 0.45, 0.28, 0.05, 0.35, 0.16, 0.5]
EARLIER = [0.0, 0.15, 0.2, 0.35, 0.0, 0.2, 0.1]
"""Where each example starts on the line, and how much too early the copy takes it for broken."""


@MODES
@pytest.mark.parametrize("copies", [1, 3])
def test_which_face_is_asked_of_which_examples(copies: int, targeted: bool) -> None:
    """Examples that walk 0.1 a step: everything but the positions follows by counting."""
    n = len(STARTS)
    x = torch.tensor([[i, STARTS[i], EARLIER[i]] for i in range(n)], dtype=torch.float64)
    y = torch.full((n,), int(targeted))
    mask = torch.tensor([[False, True, False]]).expand(n, 3)
    # one more query of `copies` neighbours per step, which for radius 0 are the iterate itself
    attack: BoundedAttack = PGD(eps=0.4, alpha=0.1, steps=4, random_start=False, early_stop=True)
    if copies > 1:
        attack = VMIFGSM(eps=0.4, alpha=0.1, steps=4, N=copies, beta=0.0, decay=0.0, early_stop=True)
    copied, arbiter = Noted(Line(early=True)), Noted(Line(early=False))
    model = Approximated(copied, arbiter)
    result = attack.run(model, x, y, targeted=targeted, mask=mask, bounds=None)

    def asked(each_one: list[int]) -> list[list[int]]:
        return [each_one] + ([each_one * copies] if copies > 1 else []) if each_one else []

    alive, disputed = list(range(n)), set[int]()
    copys: list[list[int]] = []
    asked_of_it: list[list[int]] = []
    confirmed: list[list[int]] = []
    for t in range(4):
        where = {i: STARTS[i] + 0.1 * t for i in alive}
        copys += asked([i for i in alive if i not in disputed])
        asked_of_it += asked([i for i in alive if i in disputed])
        claimed = [i for i in alive if i not in disputed and where[i] + EARLIER[i] > 0.55]
        confirmed += [claimed] if claimed else []
        disputed |= {i for i in claimed if where[i] <= 0.55}
        alive = [i for i in alive if where[i] <= 0.55]
    assert len(disputed) == 5
    assert copied.asked == copys
    assert arbiter.asked == asked_of_it
    assert [each for each in arbiter.viewed if each] == [*confirmed, list(range(n))]
    assert not copied.viewed
    final = [min(s + 0.1 * next((t for t in range(4) if s + 0.1 * t > 0.55), 4), s + 0.4) for s in STARTS]
    assert torch.allclose(result.adversarial[:, 1], torch.tensor(final, dtype=torch.float64), rtol=0, atol=1e-9)
    assert result.success.tolist() == [s > 0.55 for s in final]
    assert not result.success.all()


@pytest.mark.parametrize("view", [False, True], ids=["counted", "a model that takes no empty batch"])
def test_nothing_is_asked_of_no_examples(view: bool) -> None:
    class View(Unmarked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(len(x), -1) if view else x)

    module = View()
    arbiter = Noted(module)
    attack = PGD(eps=0.15, steps=8, random_start=False, early_stop=True)
    attack.run(Approximated(Noted(module, shift=every), arbiter), POINTS, aims(False), mask=OPEN, bounds=None)
    assert [] not in arbiter.viewed


def problem(model: Model, *, targeted: bool = False, **more: Any) -> Problem:
    low, high = torch.tensor(-100.0).double(), torch.tensor(100.0).double()
    region = LinfBall.around(POINTS[:6], 0.1, low, high)
    words: dict[str, Any] = {"labels": torch.tensor([0, 1, 2, 3, 4, 0]), "targeted": targeted, **more}
    return Problem(model=model, region=region, **words)


@MODES
@pytest.mark.parametrize("budget", [None, 4, 8], ids=["at once", "in pieces", "in uneven pieces"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("doubtful", [[], [1], [0, 2, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_gradients_of_disputed_examples(doubtful: list[int], copies: int, budget: int | None, targeted: bool) -> None:
    disputed = torch.zeros(6, dtype=torch.bool)
    disputed[doubtful] = True
    copied, arbiter = Noted(SMOOTH, shift=every, sign=-3.0), Noted(SMOOTH)
    points = torch.cat([POINTS[:6] + 0.01 * i * OPEN[:6] for i in range(copies)])
    model = Arbitrated(Approximated(copied, arbiter), disputed)
    here = problem(model, targeted=targeted, memory_budget=budget)
    found = here.evaluate(points, logits=True)
    both = Noted(SMOOTH), Noted(SMOOTH, shift=every, sign=-3.0)
    alone = [problem(each_one, targeted=targeted).evaluate(points, logits=True) for each_one in both]
    rows = disputed.repeat(copies)[:, None]
    assert torch.allclose(found.gradient, torch.where(rows, alone[0].gradient, alone[1].gradient), rtol=0, atol=1e-12)
    assert not any(torch.allclose(found.gradient, each.gradient) for each in alone) or len(doubtful) in (0, 6)
    logits = [each.logits for each in alone]
    assert logits[0] is not None
    assert logits[1] is not None
    assert found.logits is not None
    assert torch.allclose(found.logits, torch.where(rows, logits[0], logits[1]), rtol=0, atol=1e-12)
    rest = [i for i in range(6) if i not in doubtful]
    for each_one, mine in ((arbiter, doubtful), (copied, rest)):
        assert [i for part in each_one.asked for i in part] == mine * copies
        assert all(part for part in each_one.asked)
        assert budget is None or all(len(part) <= max(budget, len(mine)) for part in each_one.asked)


def test_confirmation() -> None:
    arbiter = Noted(SMOOTH)
    model = Approximated(Noted(SMOOTH, shift=every), arbiter)
    truth = SMOOTH(POINTS[:6]).argmax(1).detach()
    labels = torch.where(torch.tensor([True, True, False, False, True, False]), truth, (truth + 1) % 5)
    # of the examples 2, 3 and 5 are broken in truth; 1 is known to be disputed, 3 too and broken since
    known = torch.tensor([False, True, False, True, False, False])
    claimed = torch.tensor([True, False, True, True, False, False])
    for before, asked, expected in (
        (model, [0, 2, 3], [True, False, False, False, False, False]),
        (Arbitrated(model, known), [0, 2], [True, True, False, True, False, False]),
    ):
        arbiter.viewed.clear()
        here = problem(before, labels=labels)
        confirmed, after = confirm(here.model, POINTS[:6], claimed, here.adversarial)
        assert confirmed.tolist() == [False, False, True, True, False, False]
        assert claimed.tolist() == [True, False, True, True, False, False]
        assert arbiter.viewed == [asked]
        assert isinstance(after, Arbitrated)
        assert after.disputed.tolist() == expected
    rest = dataclasses.replace(here, model=Batched(after, 3)).take(torch.tensor([4, 3, 0]))
    assert rest.model._model.disputed.tolist() == [False, True, True]
    assert rest.labels.tolist() == labels[[4, 3, 0]].tolist()
    assert here.take(torch.tensor([4, 3])).model.disputed.tolist() == [False, True]


def test_points_are_confirmed_where_they_are() -> None:
    """Not at the centre of the ball: the very points that the copy took for broken."""
    y = SMOOTH(POINTS[:6]).argmax(1).detach()
    moved = PGD(eps=3.0, steps=20, random_start=False)(SMOOTH, POINTS[:6], y, mask=OPEN[:6], bounds=None)
    here = problem(Approximated(Noted(SMOOTH), Noted(SMOOTH)), labels=y)
    claimed = torch.ones(6, dtype=torch.bool)
    expected = SMOOTH(moved).argmax(1) != y
    assert expected.any()
    assert torch.equal(confirm(here.model, moved, claimed, here.adversarial)[0], expected)
    assert not confirm(here.model, POINTS[:6], claimed, here.adversarial)[0].any()


def test_without_a_prepared_model_nothing_changes() -> None:
    model = Noted(SMOOTH)
    here = problem(model)
    claimed = torch.tensor([True, False, True, False, False, True])
    found, after = confirm(model, POINTS[:6], claimed, here.adversarial)
    assert found is claimed
    assert after is model
    assert not model.viewed
    attack = PGD(eps=0.15, steps=8, random_start=False, early_stop=True)
    result = attack.run(model, POINTS, aims(False), mask=OPEN, bounds=None)
    assert 2 < int(result.success.sum()) < N
    assert int(result.gradients.min()) < 8
    assert model.viewed == [list(range(N))]
    expected = [[i for i in range(N) if result.gradients[i] >= t] for t in range(1, 9)]
    assert model.asked == expected


# --- minimum norm


@MODES
@pytest.mark.parametrize(
    "attack", [DDN(steps=25), ANU(steps=25), DDN(steps=25, loss=Margin())], ids=["ddn", "anu", "margin"]
)
def test_points_that_the_exact_model_does_not_confirm_are_searched_again(attack: Attack[Any], targeted: bool) -> None:
    """The copy takes odd examples for broken a little before they are."""
    arbiter = Noted(SMOOTH)
    model = Approximated(Noted(SMOOTH, shift=near, targeted=targeted), arbiter)
    options: dict[str, Any] = {"targeted": targeted, "mask": OPEN, "bounds": None}
    y = aims(targeted)
    result = attack.run(model, POINTS, y, **options)
    expected = attack.run(SMOOTH, POINTS, y, **options)
    again = arbiter.asked[0]
    assert arbiter.asked == [again] * 25
    assert len(again) > 3
    assert all(i % 2 for i in again)
    assert torch.equal(result.success, expected.success)
    assert torch.equal(result.success, broken(result.adversarial, targeted))
    assert torch.allclose(result.adversarial, expected.adversarial, rtol=0, atol=1e-8)
    assert torch.equal(result.iterations, expected.iterations)
    assert torch.allclose(result.norm, expected.norm, rtol=0, atol=1e-8)
    assert torch.allclose(result.norm[result.success], (result.adversarial - POINTS).norm(dim=1)[result.success])
    assert torch.equal(attack(model, POINTS, y, **options), result.adversarial)


def test_what_the_copy_does_not_break_is_not_searched_again() -> None:
    """Examples that nothing may change, beside those whose points are not confirmed."""
    mask, arbiter = OPEN.clone(), Noted(SMOOTH)
    mask[1::4] = False
    result = DDN(steps=25).run(
        Approximated(Noted(SMOOTH, shift=near), arbiter), POINTS, aims(False), mask=mask, bounds=None
    )
    shut = set(range(1, N, 4))
    with torch.no_grad():
        early = SMOOTH(POINTS) - 0.15 * F.one_hot(aims(False), 5)
    claimed = {i for i in shut if early[i].argmax() != aims(False)[i]}
    assert arbiter.asked
    assert set(arbiter.asked[0]) & shut == claimed != shut
    assert set(arbiter.asked[0]) - shut
    assert not result.success[1::4].any()
    assert result.norm[1::4].isinf().all()


@pytest.mark.parametrize("shift", [None, never])
def test_no_search_again_without_need(shift: Shift | None) -> None:
    arbiter = Noted(SMOOTH)
    result = DDN(steps=20).run(
        Approximated(Noted(SMOOTH, shift=shift), arbiter), POINTS, aims(False), mask=OPEN, bounds=None
    )
    assert not arbiter.asked
    assert torch.equal(result.success, broken(result.adversarial, False))
    assert int(result.success.sum()) > N / 2


def test_minimum_norm_of_a_copy_that_takes_everything_for_broken() -> None:
    model = Approximated(Noted(SMOOTH, shift=every, sign=-1.0), Noted(SMOOTH))
    result = ANU(steps=20).run(model, POINTS, aims(False), mask=OPEN, bounds=None)
    expected = ANU(steps=20).run(SMOOTH, POINTS, aims(False), mask=OPEN, bounds=None)
    assert torch.allclose(result.norm, expected.norm)
    assert result.success.all()
    assert (result.norm > 0).all()
    assert broken(result.adversarial, False).all()


def test_gradients_of_both_searches_are_counted() -> None:
    model = Approximated(Noted(SMOOTH, shift=every), Noted(SMOOTH))
    result: MinimumNormResult = DDN(steps=5).run(model, POINTS, aims(False), mask=OPEN, bounds=None)
    assert result.gradients.tolist() == [10] * N


def test_minimum_norm_without_a_prepared_model() -> None:
    model = Noted(SMOOTH)
    DDN(steps=5).run(model, POINTS, aims(False), mask=OPEN, bounds=None)
    assert model.asked == [list(range(N))] * 5
    assert model.viewed == [list(range(N)), list(range(N))]
