"""What a model predicts at x' is known from the forwards of any objective, or from one of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.hosts.predictions import Predictions

N = 5
Forwards = Callable[[nn.Module, Tensor, Tensor], Any]


class Net(nn.Module):
    """A network that counts its forwards."""

    def __init__(self, *, norm: bool = False, dropout: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)
        self.drop = nn.Dropout(0.5 if dropout else 0.0)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.head(self.drop(self.norm(x.float())))
        return logits


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Clean and adversarial examples that are predicted differently."""
    x, adversarial = torch.rand(2, N, 6, generator=torch.Generator().manual_seed(seed)).unbind()
    return x, 5 - 10 * adversarial


def thrice(model: nn.Module, x: Tensor, a: Tensor) -> None:
    model(x), model(a), model((x + a) / 2)


def reused(model: nn.Module, x: Tensor, a: Tensor) -> None:
    """One buffer that holds x' and then something else."""
    buffer = a.detach().clone()
    model(buffer)
    buffer.copy_(x)
    model(buffer)


def overwritten(model: nn.Module, x: Tensor, a: Tensor) -> None:
    """A buffer that holds x' only after its forward."""
    buffer = x.detach().clone()
    model(buffer)
    buffer.copy_(a)


def rounds(model: nn.Module, x: Tensor, a: Tensor) -> None:
    """x' from a memory that belongs to other values afterwards."""
    model(a.clone())
    for _ in range(4):
        model(x.clone())


KNOWN: dict[str, Forwards] = {
    "last": lambda model, x, a: (model(x), model(a)),
    "first": lambda model, x, a: (model(a), model(x)),
    "thrice": thrice,
    "detached": lambda model, x, a: (model(a.detach()), model(x)),
    "a view": lambda model, x, a: (model(a.view_as(a)), model(x)),
    "cloned": lambda model, x, a: (model(a.clone()), model(x)),
    "rounds": rounds,
    "batch": lambda model, x, a: model(torch.cat([x, a])),
    "batch, other order": lambda model, x, a: model(torch.cat([a, x])),
    "batch of three": lambda model, x, a: model(torch.cat([x, a, x])),
    "after a shorter one": lambda model, x, a: model(torch.cat([x[:2], a])),
    "a chunk": lambda model, x, a: (model(x[:2]), model(a), model(x[:1])),
}
UNKNOWN: dict[str, Forwards] = {
    "none": lambda model, x, a: None,
    "only clean": lambda model, x, a: model(x),
    "with noise": lambda model, x, a: model(a + 0.1),
    "interleaved": lambda model, x, a: model(torch.stack([x, a], 1).flatten(0, 1)),
    "in another order": lambda model, x, a: model(a.flip(0)),
    "one by one": lambda model, x, a: [model(one[None]) for one in a],
    "in half precision": lambda model, x, a: model(a.double()),
    "another memory order": lambda model, x, a: model(x.t().contiguous().t()),
    "reused": reused,
    "overwritten": overwritten,
    "by name": lambda model, x, a: (model(x=a), model(x)),
    "inside": lambda model, x, a: model.head(a),
    "mapped": lambda model, x, a: torch.func.vmap(lambda one: model(one[None])[0])(a),
    "without gradients": lambda model, x, a: inference(model, a),
}


def inference(model: nn.Module, a: Tensor) -> None:
    with torch.inference_mode():
        model(a.clone())


def found(model: nn.Module, forwards: Forwards, x: Tensor, a: Tensor) -> Tensor:
    with Predictions(model, a) as predictions:
        forwards(model, x, a)
    assert not model._forward_hooks
    return predictions.classes()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_no_forward_is_added_where_one_was_done(name: str, gradient: bool) -> None:
    model, (x, a) = Net(), data()
    expected = model(a).argmax(1)
    assert not torch.equal(expected, model(x).argmax(1))
    a.requires_grad_(gradient)
    own = Net()
    KNOWN[name](own, x, a)
    model.calls = 0
    assert torch.equal(found(model, KNOWN[name], x, a), expected)
    assert model.calls == own.calls


@pytest.mark.parametrize("name", UNKNOWN)
def test_one_forward_is_added_where_none_is_known(name: str) -> None:
    model, (x, a), own = Net(), data(), Net()
    expected = model(a).argmax(1)
    UNKNOWN[name](own, x, a)
    model.calls = 0
    assert torch.equal(found(model, UNKNOWN[name], x, a), expected)
    assert model.calls == own.calls + 1


@pytest.mark.parametrize("frozen", [False, True])
def test_a_forward_of_its_own_leaves_no_trace(frozen: bool) -> None:
    model, (_, a) = Net(norm=True, dropout=True).train(), data()
    model.norm.train(not frozen)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with Predictions(model, a.requires_grad_()) as predictions:
        pass
    classes = predictions.classes()
    assert not classes.requires_grad
    assert classes.shape == (N,)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.norm.training) == (True, not frozen)
    assert all(p.grad is None for p in model.parameters())


def test_it_is_known_in_the_models_mode() -> None:
    """Batch statistics are those of x', as in a forward of training."""
    model, (x, a) = Net(norm=True).train(), data()
    with torch.no_grad():
        expected = copy.deepcopy(model)(a).argmax(1)
    assert torch.equal(found(model, lambda model, x, a: model(x), x, a), expected)
    assert not torch.equal(expected, model.eval()(a).argmax(1))


def test_the_hook_goes_with_an_exception() -> None:
    model, (_, a) = Net(), data()
    with pytest.raises(RuntimeError, match="stop"), Predictions(model, a):
        raise RuntimeError("stop")
    assert not model._forward_hooks


def test_the_last_of_several_forwards_counts() -> None:
    model, (x, a) = Net(), data()

    def moved(model: nn.Module, x: Tensor, a: Tensor) -> None:
        model(a)
        with torch.no_grad():
            model.head.weight.neg_()
        model(a)

    classes = found(model, moved, x, a)
    assert torch.equal(classes, F.linear(a, model.head.weight, model.head.bias).argmax(1))
