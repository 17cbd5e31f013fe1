"""Surrogates: the same logits, and the gradient of the papers' equations, from a slow transcription in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import MIFGSM, VMIFGSM, Ensemble, TorchModel, prepare, surrogates
from firstorder.attacks.residual import blocks, traced
from firstorder.attacks.surrogates import linbp, sgm
from firstorder.evaluation.names import models
from firstorder.evaluation.names.networks import ResNet18


class Block(nn.Module):
    """A block as CIFAR's ResNets have them, with functions and sums in place."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or given != width:
            self.shortcut = nn.Sequential(nn.Conv2d(given, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu(out)


class Net(nn.Module):
    """A stem, an identity and a projection block, and a head with a hidden layer: (N, 3, 4, 6) to (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.body = nn.Sequential(Block(4, 4, 1), Block(4, 5, 2))
        self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))
        return logits


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net().double()
    made.train()
    for _ in range(3):  # statistics that are not 0 and 1
        made(torch.rand(16, 3, 4, 6, dtype=torch.float64))
    return made.eval()


def images(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 4, 6, dtype=torch.float64, generator=generator), torch.arange(count) % 4


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    return found


def matrix(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Jacobian of a function from one point (1, ...) as a matrix."""
    found: Any = torch.autograd.functional.jacobian(function, at)
    return found.reshape(-1, at.numel())  # type: ignore[no-any-return]


def transcribed(
    model: Net, x: Tensor, y: Tensor, branch: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The gradient of one image (1, ...), block by block in matrices.

    Args:
        branch: from the block's number, the Jacobians of its two layers, the slope of the ReLU between them and the
            gradient above, the gradient that comes back through its branch.
    """
    points = [F.relu(model.stem(x))]
    for block in model.body:
        points.append(block(points[-1]))
    above = gradient(lambda z: model.head(z.mean((2, 3))), points[-1], y).flatten()
    for i in (1, 0):
        block, z = model.body[i], points[i]
        assert isinstance(block, Block)
        inner = block.bn1(block.conv1(z))
        first = matrix(lambda z, block=block: block.bn1(block.conv1(z)), z)
        second = matrix(lambda z, block=block: block.bn2(block.conv2(z)), F.relu(inner))
        skip = matrix(block.shortcut, z) if len(block.shortcut) else torch.eye(z.numel(), dtype=z.dtype)
        above = above * (points[i + 1] > 0).flatten()
        slope = (inner > 0).to(z.dtype).flatten()
        above = branch(i, first, second, slope, above) + skip.T @ above
    return (matrix(lambda x: F.relu(model.stem(x)), x).T @ above).reshape(x.shape)


def by_hand(model: Net, x: Tensor, y: Tensor, branch: Callable[..., Tensor]) -> Tensor:
    return torch.cat([transcribed(model, x[i : i + 1], y[i : i + 1], branch) for i in range(len(x))])


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.2])
def test_skip_gradients_are_the_equation(gamma: float) -> None:
    model, (x, y) = net(), images()
    found = gradient(sgm(model, gamma=gamma), x, y)
    expected = by_hand(model, x, y, lambda i, first, second, slope, g: gamma * first.T @ (slope * (second.T @ g)))
    torch.testing.assert_close(found, expected)
    assert torch.allclose(found, gradient(model, x, y)) == (gamma == 1)


@pytest.mark.parametrize("start", [None, "body.0", "body.1"])
def test_linear_backpropagation_is_the_equation(start: str | None) -> None:
    model, (x, y) = net(), images()
    made = linbp(model, start=start)
    found = gradient(made, x, y)
    begin = {None: 1, "body.0": 0, "body.1": 1}[start]

    def branch(i: int, first: Tensor, second: Tensor, slope: Tensor, g: Tensor) -> Tensor:
        usual, linear = first.T @ (slope * (second.T @ g)), first.T @ (second.T @ g)
        return linear * usual.norm() / linear.norm() if i >= begin else usual

    straight = copy.deepcopy(model)
    straight.head[1] = Linear()
    torch.testing.assert_close(found, by_hand(straight, x, y, branch))
    assert F.cosine_similarity(found.flatten(1), gradient(model, x, y).flatten(1)).max() < 0.99


class Linear(nn.Module):
    """max(x, 0) with the gradient of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.relu() - x).detach()


def test_relus_outside_of_blocks_pass_gradients_as_they_are() -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(72, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
    model, (x, y) = nn.Sequential(*layers).double(), images()
    for start, straight in (("2", (2, 4)), ("3", (4,)), ("4", (4,))):
        expected = nn.Sequential(*(Linear() if i in straight else layer for i, layer in enumerate(layers)))
        torch.testing.assert_close(gradient(linbp(model, start=start), x, y), gradient(expected, x, y))


Made = tuple[nn.Module, Tensor]


def real() -> Iterator[tuple[str, Callable[[], Made]]]:
    def ours() -> Made:
        torch.manual_seed(0)
        return ResNet18().eval(), torch.rand(2, 3, 32, 32)

    def theirs() -> Made:
        return models.load("cifar10-resnet18"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def torchvision(name: str) -> Callable[[], Made]:
        def make() -> Made:
            torch.manual_seed(0)
            get_model = pytest.importorskip("torchvision.models").get_model
            return get_model(name, weights=None, num_classes=10).eval(), torch.rand(2, 3, 48, 40)

        return make

    yield "resnet18", ours
    yield "cifar10-resnet18", theirs
    yield "torchvision:resnet18", torchvision("resnet18")
    yield "torchvision:resnet50", torchvision("resnet50")


REAL = dict(real())
HOW: dict[str, Callable[..., nn.Module]] = {"sgm": sgm, "linbp": linbp}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", REAL)
def test_logits_are_the_models_and_the_model_is_as_it_was(name: str, how: str) -> None:
    model, x = REAL[name]()
    before = copy.deepcopy(model.state_dict())
    inplace = [getattr(part, "inplace", None) for part in model.modules()]
    made = HOW[how](model)
    y = torch.tensor([1, 2])
    point = x.clone().requires_grad_()
    assert torch.equal(made(point), model(x))
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    found, usual = (gradient(one, x, y).flatten(1) for one in (made, model))
    assert F.cosine_similarity(found, usual).max() < 0.95
    assert found.isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [getattr(part, "inplace", None) for part in model.modules()] == inplace
    singles = torch.cat([gradient(made, x[i : i + 1], y[i : i + 1]) for i in range(2)]).flatten(1)
    assert F.cosine_similarity(found, singles).min() > 0.9999
    assert len(blocks(traced(model))) == {"torchvision:resnet50": 16}.get(name, 8)


@pytest.mark.parametrize("how", HOW)
def test_copies_files_and_prepared_copies_keep_the_gradient(how: str) -> None:
    """Folding changes what is around the new functions, never them."""
    model, x = REAL["cifar10-resnet18"]()
    made, y = HOW[how](model), torch.tensor([1, 2])
    expected = gradient(made, x, y)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(gradient(again, x, y), expected)
    ready = prepare(made, x)
    assert "folded BatchNorm" in ready.parts
    torch.testing.assert_close(
        ready.gradient(x, y, None).gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    near = sgm(model, gamma=0.97)  # from which the comparison would not distinguish a lost function on examples
    direct, plain = gradient(near, x, y), gradient(model, x, y)
    kept = prepare(near, x).gradient(x, y, None).gradient
    assert (kept - direct).norm() < 0.01 * (plain - direct).norm()


def test_surrogates_compose() -> None:
    model, (x, y) = net(), images()
    one = gradient(sgm(linbp(model, start="body.0"), gamma=0.5), x, y)
    two = gradient(linbp(sgm(model, gamma=0.5), start="body.0"), x, y)
    torch.testing.assert_close(one, two)
    twice = gradient(sgm(sgm(model, gamma=0.5), gamma=0.5), x, y)
    torch.testing.assert_close(twice, gradient(sgm(model, gamma=0.25), x, y))


def test_attacks_and_ensembles_take_them() -> None:
    model, (x, y) = net(), images()
    made = sgm(model)
    adversarial = MIFGSM(eps=0.1, steps=3)(made, x, y)
    assert not torch.equal(adversarial, MIFGSM(eps=0.1, steps=3)(model, x, y))
    both = Ensemble([made, linbp(model, start="body.0")])
    torch.testing.assert_close(both(x), model(x))
    evaluated = TorchModel(both).gradient(x, y, None)
    torch.testing.assert_close(
        evaluated.gradient, (gradient(made, x, y) + gradient(linbp(model, start="body.0"), x, y)) / 2
    )
    assert TorchModel(linbp(model)).footprint(x) > TorchModel(model).footprint(x) / 2  # what it holds is seen
    assert VMIFGSM(eps=0.1, steps=2)(made, x, y).shape == x.shape


class Free(nn.Module):
    """What `body` says."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.one, self.two = body, nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).mean((2, 3))


def hooked() -> nn.Module:
    model = net()
    model.body[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no block": (lambda: sgm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), "Sequential has no residual block.*ReLU"),
    "a sum without layers": (lambda: sgm(Free(lambda m, x: m.one(x.relu() + x))), "Free has no residual block"),
    "two branches": (lambda: sgm(Free(lambda m, x: m.one(x) + m.two(x))), "two branches of the same kind"),
    "overlap": (
        lambda: sgm(Free(lambda m, x: x + m.two((x + m.one(x).relu()).relu()))),
        "overlap",
    ),
    "control flow": (lambda: sgm(Free(lambda m, x: m.one(x) if x.sum() > 0 else x)), "Free cannot be followed"),
    "hooks": (lambda: sgm(hooked()), "body.0 has hooks"),
    "no module": (lambda: sgm(lambda x: x), "the model is a function"),  # type: ignore[arg-type]
    "gamma 0": (lambda: sgm(net(), gamma=0.0), "gamma=0.0"),
    "gamma above 1": (lambda: sgm(net(), gamma=1.5), "gamma=1.5"),
    "no relu": (lambda: linbp(Free(lambda m, x: x + m.two(F.silu(m.one(x))))), "Free has no ReLU.*silu"),
    "twice": (lambda: linbp(linbp(net(), start="body.0")), "Net has no ReLU from its middle block on"),
    "no start": (lambda: linbp(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), "no residual block.*start="),
    "start of another": (lambda: linbp(net(), start="layer3.1"), "start='layer3.1' is no module.*stem, body, head"),
    "start inside": (lambda: linbp(net(), start="body.0.conv2"), "inside the residual block 'body.0'"),
    "a branch with another input": (
        lambda: linbp(Free(lambda m, x: (lambda z: z + m.two(F.relu(m.one(z))) * x.tanh())(F.relu(x)))),
        "exchanges tanh",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(case: str) -> None:
    run, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_the_remedy_works() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 100:
                raise ValueError("too many")
            logits: Tensor = self.body(x)
            return logits

    model, (x, y) = Wrapped(), images()
    with pytest.raises(ValueError, match=r"model.body = sgm\(model.body\)"):
        sgm(model)
    expected = gradient(sgm(model.body), x, y)
    model.body = sgm(model.body)  # type: ignore[assignment]
    torch.testing.assert_close(gradient(model, x, y), expected)


def test_the_module_is_public() -> None:
    assert surrogates.__all__ == ["linbp", "sgm"]


def test_normalised_models_are_followed() -> None:
    """Models by name resize and normalise in a module of ours, whose forward looks at sizes."""
    torch.manual_seed(0)
    model = models.Normalised(ResNet18().eval(), mean=(0.5,) * 3, std=(0.2,) * 3, side=32)
    x = torch.rand(2, 3, 24, 40)
    made = sgm(model)
    assert torch.equal(made(x), model(x))
    assert torch.equal(made(x[:, :, :20]), model(x[:, :, :20]))
    y = torch.tensor([0, 1])
    assert F.cosine_similarity(gradient(made, x, y).flatten(1), gradient(model, x, y).flatten(1)).max() < 0.99
