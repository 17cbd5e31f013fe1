"""What ART's users pass: sizes as arrays, other dtypes, clip values per feature, keywords of other attacks."""

from __future__ import annotations

from typing import Any

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.expectation_over_transformation import EoTGaussianNoisePyTorch
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
    with pytest.warns(UserWarning, match="ignores msk, reset_patch") as message:
        found = attack("PGD", classifier(model)).generate(x, Y, reset_patch=True, msk=1)
    assert any(one.filename == __file__ for one in message)
    np.testing.assert_array_equal(found, attack("PGD", classifier(model)).generate(x, Y))


def test_inputs_and_masks_that_are_none(model: Net) -> None:
    x = images(12).numpy()
    for value, words, message in (
        (x.tolist(), {}, r"x is a list; pass an array, np\.asarray\(x\)"),
        (torch.from_numpy(x), {}, "x is a Tensor; pass an array"),
        (x, {"mask": np.ones(6)}, r"mask of shape \(6,\) does not broadcast to the inputs' \(12, "),
        (x, {"mask": np.full_like(x, np.nan)}, "mask contains NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            attack("PGD", classifier(model)).generate(value, Y, **words)
    with pytest.raises(ValueError, match=r"seed=0\.5 must be an integer"):
        attack("PGD", classifier(model), seed=0.5, num_random_init=1).generate(x, Y)


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


class EachClass(nn.Module):
    """A loss on every class by itself, which notes its targets."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        self.seen.append(target)
        return nn.functional.binary_cross_entropy_with_logits(scores, target.to(scores.dtype))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["several classes", "soft", "tied", "none"])
def test_rows_reach_the_loss_as_in_art(kind: str, targeted: bool, model: Net) -> None:
    x = images(12).numpy()
    rng = np.random.default_rng(0)
    y = {
        "several classes": (rng.random((12, 10)) < 0.4).astype(np.float32),
        "soft": rng.dirichlet(np.ones(10), 12).astype(np.float32),
        "tied": np.tile(np.float32([0.5, 0.5] + [0] * 8), (12, 1)),
        "none": np.zeros((12, 10), np.float32),
    }[kind]
    seen: list[Tensor] = []
    estimator = PyTorchClassifier(model, EachClass(seen), (3, 6, 5), 10, clip_values=(0, 1), device_type="cpu")
    words = {"eps": 0.05, "eps_step": 0.02, "targeted": targeted}
    found = attack("PGD", estimator, **words).generate(x, y)
    torch.testing.assert_close(torch.cat([seen[0], seen[4], seen[8]]), torch.tensor(y))
    theirs = art.attacks.evasion.ProjectedGradientDescent(estimator, **{**WORDS, **words})
    np.testing.assert_allclose(found, theirs.generate(x, y), atol=1e-6)
    restarted = attack("PGD", estimator, num_random_init=2, early_stop=True, **words).generate(x, y)
    assert 0 < np.abs(restarted - x).max() <= 0.05 + 1e-6
    seen.clear()
    copies = attack("SINIFGSM", estimator, eps=0.05, targeted=targeted, batch_size=12, max_iter=1).generate(x, y)
    assert 0 < np.abs(copies - x).max() <= 0.05 + 1e-6
    assert all(torch.equal(part, torch.tensor(y)) for part in torch.cat(seen).split(12))


def test_rows_that_do_not_fit(model: Net) -> None:
    x = images(12).numpy()
    with pytest.raises(ValueError, match="rows of labels have 7 classes"):
        attack("PGD", classifier(model)).generate(x, np.full((12, 7), 0.5, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        attack("PGD", classifier(model)).generate(x, np.full((12, 10), np.nan, np.float32))


@pytest.mark.parametrize("predicted", [False, True])
def test_several_samples_of_every_example(predicted: bool) -> None:
    """Without noise the samples are copies, so that the result is that of one."""
    estimators = []
    for samples in (3, None):
        noise = []
        if samples is not None:
            noise = [EoTGaussianNoisePyTorch(nb_samples=samples, std=1e-9, clip_values=(0.0, 1.0))]
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
        estimators.append(
            PyTorchClassifier(
                net,
                nn.CrossEntropyLoss(),
                (3, 4, 4),
                4,
                clip_values=(0.0, 1.0),
                device_type="cpu",
                preprocessing_defences=noise,
            )
        )
    x = np.random.default_rng(0).uniform(0.2, 0.8, (12, 3, 4, 4)).astype(np.float32)  # noise is clipped at the bounds
    y = None if predicted else np.arange(12) % 4
    for name, words in (("PGD", {"num_random_init": 2, "early_stop": True}), ("ClippedNGM", {}), ("FGSM", {})):
        words = {"eps": 0.05, "batch_size": 5, "seed": 0} | words
        many, one = (getattr(firstorder.art, name)(e, **words).generate(x, y) for e in estimators)
        assert 0.02 < np.abs(many - x).max() <= 0.05 + 1e-6
        np.testing.assert_allclose(many, one, atol=1e-5)
