"""A model that is given at most some examples at a time: the same results, from full forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Net, images
from firstorder.attacks import DDN, PGD, SINIFGSM, TorchModel
from firstorder.attacks.batched import Batched
from firstorder.attacks.losses import Margin
from test_prepared import OPEN, POINTS, SMOOTH, Approximated, N, Noted, aims, every

OPTIONS: dict[str, Any] = {"mask": OPEN, "bounds": None}


@pytest.mark.parametrize("size", [1, 3, 7, 20, 100])
def test_the_same_logits_and_gradients(size: int) -> None:
    model, whole = Batched(TorchModel(SMOOTH), size), TorchModel(SMOOTH)
    y = aims(False)
    assert torch.allclose(model.logits(POINTS), whole.logits(POINTS), rtol=0, atol=1e-12)
    for loss in (None, Margin()):
        found, expected = (each.gradient(POINTS, y, loss) for each in (model, whole))
        assert found.gradient.shape == POINTS.shape
        assert torch.allclose(found.gradient, expected.gradient, rtol=0, atol=1e-12)
        assert found.logits is not None
        assert expected.logits is not None
        assert torch.allclose(found.logits, expected.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 6, 64])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.15, steps=8, early_stop=True),
        PGD(eps=0.15, steps=5, restarts=2, early_stop=True),
        PGD(eps=0.15, alpha=0.1, steps=9, early_stop=True, patience=2),
        SINIFGSM(eps=0.15, steps=4, m=3),
        DDN(steps=12),
    ],
    ids=["early stop", "restarts", "patience", "copies", "minimum norm"],
)
def test_attacks_do_not_depend_on_the_size(attack: Any, size: int) -> None:
    found, expected = (
        attack.run(model, POINTS, aims(False), **OPTIONS) for model in (Batched(TorchModel(SMOOTH), size), SMOOTH)
    )
    assert torch.allclose(found.adversarial, expected.adversarial, rtol=0, atol=1e-9)
    assert torch.equal(found.success, expected.success)
    assert torch.equal(found.gradients, expected.gradients)


def test_those_that_stay_robust_move_up() -> None:
    """Every forward of a step but the last is full, however many examples have left."""
    noted = Noted(SMOOTH)
    result = PGD(eps=0.15, steps=8, random_start=False, early_stop=True).run(
        Batched(noted, 6), POINTS, aims(False), **OPTIONS
    )
    expected = []
    for t in range(1, 9):
        robust = [i for i in range(N) if result.gradients[i] >= t]
        expected += [robust[i : i + 6] for i in range(0, len(robust), 6)]
    assert noted.asked == expected
    assert 2 < int(result.success.sum()) < N
    assert {len(each) for each in noted.viewed} <= {6, 2}


def test_a_prepared_model_is_decided_in_batches_by_the_exact_one() -> None:
    arbiter = Noted(SMOOTH)
    model = Batched(Approximated(Noted(SMOOTH, shift=every), arbiter), 6)
    exact = model.exact
    assert exact is not model
    assert exact.exact is exact
    result = PGD(eps=0.15, steps=8, random_start=False, early_stop=True).run(model, POINTS, aims(False), **OPTIONS)
    expected = PGD(eps=0.15, steps=8, random_start=False, early_stop=True).run(SMOOTH, POINTS, aims(False), **OPTIONS)
    assert torch.equal(result.success, expected.success)
    assert max(len(each) for each in arbiter.viewed + arbiter.asked) == 6


def test_it_is_the_model_in_everything_else() -> None:
    net, x = Net(), images(5)
    inner = TorchModel(net)
    model = Batched(inner, 2)
    assert model.exact is model
    assert model.footprint(x) == inner.footprint(x) > 1
    with model.preserved():
        assert not net.training
    assert net.training
    with pytest.raises(ValueError, match=r"labels span 0\.\.10"):
        PGD()(model, x, torch.tensor([0, 1, 2, 3, 10]))


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"size={size} must be an integer of at least 1"):
        Batched(TorchModel(SMOOTH), size)


def test_no_logits_where_none_are_given() -> None:
    class Silent(TorchModel):
        def gradient(self, *arguments: Any, **options: Any) -> Any:
            return super().gradient(*arguments, **options)._replace(logits=None)

    points: Tensor = POINTS
    assert Batched(Silent(SMOOTH), 6).gradient(points, aims(False), None, logits=False).logits is None
