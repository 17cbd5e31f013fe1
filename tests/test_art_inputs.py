"""What ART's users pass: sizes as arrays, other dtypes, clip values per feature, keywords of other attacks."""

from __future__ import annotations

from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import firstorder.art
from cases import Net, classifier, images

WORDS: dict[str, Any] = {"max_iter": 4, "batch_size": 5, "verbose": False}
Y = np.arange(12) % 10


def attack(name: str, estimator: Any, **words: Any) -> Any:
    return getattr(firstorder.art, name)(estimator, **{**WORDS, **words})


def linear(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 4, 4), clip: Any = (0.0, 1.0), cast: bool = True
) -> Any:
    """A linear classifier of four classes with weights of `dtype`, which casts its input itself if `cast`."""
    torch.manual_seed(0)

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 4)).to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x.to(dtype) if cast else x)
            return logits.float()

    return PyTorchClassifier(Casting().eval(), nn.CrossEntropyLoss(), shape, 4, clip_values=clip, device_type="cpu")


@pytest.mark.parametrize("shape", [(), (12, 1, 1, 1), (12, 3, 6, 5), (3, 6, 5), (1, 3, 6, 5), (3, 1, 1), (5,)], ids=str)
@pytest.mark.parametrize("name", ["PGD", "FGSM"])
def test_sizes_broadcast_as_in_art(name: str, shape: tuple[int, ...], model: Net) -> None:
    x = images(12).numpy()
    eps = np.random.default_rng(0).uniform(0.01, 0.1, shape).astype(np.float32)
    words = {"eps": np.asarray(eps), "batch_size": 5}
    words |= {"eps_step": np.asarray(eps / 3), "max_iter": 4, "verbose": False} if name == "PGD" else {}
    peer = {"PGD": "ProjectedGradientDescent", "FGSM": "FastGradientMethod"}[name]
    theirs = {**words, "eps_step": np.asarray(eps / 3)}
    expected = getattr(art.attacks.evasion, peer)(classifier(model), **theirs).generate(x, Y)
    found = getattr(firstorder.art, name)(classifier(model), **words).generate(x, Y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_one_radius_per_example_in_l2(model: Net) -> None:
    x = images(12).numpy()
    eps = np.linspace(0.1, 0.5, 12).reshape(-1, 1, 1, 1)
    found = attack("PGD", classifier(model), norm=2, eps=eps, eps_step=eps).generate(x, Y)
    single = [
        attack("PGD", classifier(model), norm=2, eps=float(e), eps_step=float(e)).generate(x[[i]], Y[[i]])
        for i, e in enumerate(eps.ravel())
    ]
    np.testing.assert_allclose(found, np.concatenate(single), atol=1e-6)
    with pytest.raises(ValueError, match="differs between features"):
        attack("PGD", classifier(model), norm=2, eps=np.linspace(0.1, 0.5, 5)).generate(x, Y)


def test_sizes_with_the_channels_last() -> None:
    x = np.random.default_rng(0).uniform(0.3, 0.7, (6, 4, 4, 3)).astype(np.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    estimator = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (4, 4, 3), 4, channels_first=False, clip_values=(0, 1), device_type="cpu"
    )
    eps = np.array([0.01, 0.02, 0.04], np.float32)
    found = attack("PGD", estimator, eps=eps, eps_step=eps).generate(x, np.arange(6) % 4)
    np.testing.assert_allclose(np.abs(found - x).max((0, 1, 2)), eps, atol=1e-6)


def test_infinite_sizes_leave_the_bounds_alone(model: Net) -> None:
    x = images(12).numpy()
    words = {"eps": np.inf, "eps_step": 0.3, "max_iter": 4, "verbose": False}
    expected = art.attacks.evasion.ProjectedGradientDescent(classifier(model), **words).generate(x, Y)
    np.testing.assert_allclose(attack("PGD", classifier(model), **words).generate(x, Y), expected, atol=1e-6)
    corner = attack("PGD", classifier(model), eps=np.inf, eps_step=np.inf, max_iter=1).generate(x, Y)
    assert set(np.unique(corner[corner != x])) <= {0.0, 1.0}
    assert (corner != x).mean() > 0.5
    reached = attack("PGD", classifier(model), eps=0.1, eps_step=np.inf, max_iter=1).generate(x, Y)
    np.testing.assert_allclose(reached, firstorder.art.FGSM(classifier(model), eps=0.1).generate(x, Y), atol=1e-6)
    with pytest.raises(ValueError, match="clip_values"):
        attack("PGD", classifier(model, clip_values=None), eps=np.inf).generate(x, Y)


def test_no_step_at_all(model: Net) -> None:
    x = images(12).numpy()
    for name in ("PGD", "BIM", "ANU"):
        found = attack(name, classifier(model), max_iter=0).generate(x, Y)
        np.testing.assert_array_equal(found, x)
        assert found is not x
    with pytest.raises(ValueError, match="max_iter=-1"):
        attack("PGD", classifier(model), max_iter=-1)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_hold_in_the_dtype_of_x(weights: torch.dtype, cast: bool, dtype: Any) -> None:
    x = np.random.default_rng(0).random((6, 3, 4, 4)).astype(dtype)
    y, slack = np.arange(6) % 4, 4 * np.finfo(dtype).eps
    mask = np.zeros((3, 4, 4))
    mask[:, :2] = 1
    estimator = linear(weights, cast=cast)
    for name in ("PGD", "ClippedNGM"):
        found = attack(name, estimator, eps=8 / 255).generate(x, y, mask=mask)
        assert found.dtype == dtype
        assert 0.02 < np.abs(found - x).max() <= 8 / 255 + slack
        assert found.min() >= 0
        assert found.max() <= 1
        np.testing.assert_array_equal(found[:, :, 2:], x[:, :, 2:])
        np.testing.assert_array_equal(attack(name, estimator, eps=0.0).generate(x, y), x)


def test_clip_values_belong_to_the_last_axis() -> None:
    high = np.float32([0.2, 0.5, 1.0])
    x = np.random.default_rng(0).random((4, 3, 3), dtype=np.float32) * high
    for shape in ((3,), (1, 3), (1, 1, 3)):
        estimator = linear(shape=(3, 3), clip=(np.zeros(shape, np.float32), high.reshape(shape)))
        found = attack("PGD", estimator, eps=0.5, eps_step=0.2).generate(x, np.arange(4))
        np.testing.assert_allclose(found.max((0, 1)), high)


def test_other_keywords_warn_and_are_ignored(model: Net) -> None:
    x = images(12).numpy()
    with pytest.warns(UserWarning, match="ignores msk, reset_patch") as told:
        found = attack("PGD", classifier(model)).generate(x, Y, reset_patch=True, msk=1)
    assert any(one.filename == __file__ for one in told)
    np.testing.assert_array_equal(found, attack("PGD", classifier(model)).generate(x, Y))


@pytest.mark.parametrize(
    ("clip", "expected"), [((0, 255), 255), ((0.0, 1.0), 1), ((-1.0, 1.0), 1), ((0, 127.5), 127.5), (None, 255)]
)
def test_the_remedy_for_bytes_fits_the_clip_values(clip: Any, expected: float) -> None:
    x = np.array([0, 255], np.uint8).reshape(2, 1).repeat(48, 1).reshape(2, 3, 4, 4)
    with pytest.raises(ValueError, match="uint8") as refused:
        attack("PGD", linear(clip=clip)).generate(x, np.arange(2))
    remedied = eval(str(refused.value).split("for example ")[1], {"np": np, "x": x})
    assert remedied.dtype == np.float32
    assert (remedied.min(), remedied.max()) == (0 if clip is None else clip[0], pytest.approx(expected))
