"""Defences that transform the input: what each does to images, and how error rates are taken."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from math import erf, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.defences import (
    DEFENCES,
    JPEG,
    BitDepth,
    Defence,
    ResizePad,
    Smoothing,
    Squeezing,
    Transformation,
    defence,
    error_rate,
)
from firstorder.evaluation.runs.measure import predictions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def applied(spec: str, x: Tensor, seed: int = 0) -> Tensor:
    found = defence(spec)
    assert isinstance(found, Transformation)
    result = found.transform(x, generator(seed))
    assert result.shape == x.shape
    assert result.dtype == torch.float32
    return result


def threshold(t: float) -> Callable[[Tensor], Tensor]:
    """Class 1 iff the first value of an image exceeds t."""
    return lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1)[:, 0] - t], 1)


def share_above(t: float, mean: float, sigma: float) -> float:
    return (1 + erf((mean - t) / sigma / sqrt(2))) / 2


@pytest.fixture(scope="module", params=["mnist", "cifar10"])
def x(request: pytest.FixtureRequest) -> Tensor:
    """Eight images of one channel, or of three, off the 8-bit grid as adversarial examples are."""
    images: Tensor = getattr(packaged, request.param)().x[:8]
    noise = torch.rand(images.shape, generator=generator()) - 0.5
    return (images + 0.1 * noise).clamp(0, 1)


# --- what each does to images


def test_jpeg_is_the_codec_at_its_quality(x: Tensor) -> None:
    for quality in (10, 75):
        expected = []
        for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "jpeg", quality=quality)
            expected.append(np.asarray(Image.open(file), dtype=np.float32).reshape(image.shape) / 255)
        found = applied(f"jpeg:quality={quality}", x)
        torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert torch.equal(applied("jpeg", x), found)
    far, near = ((applied(f"jpeg:quality={q}", x) - x).abs().mean() for q in (10, 95))
    assert 0 < near < far / 2


def test_jpeg_rounds_to_the_nearest_byte() -> None:
    grey = torch.full((1, 1, 8, 8), 100.6 / 255)
    torch.testing.assert_close(applied("jpeg:quality=100", grey), torch.full_like(grey, 101 / 255))
    assert torch.equal(applied("jpeg", torch.full_like(grey, 1.01)), torch.ones_like(grey))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bits_leave_that_many_levels(x: Tensor, bits: int) -> None:
    found, top = applied(f"bits:bits={bits}", x), 2**bits - 1
    assert set((found * top).round().unique().tolist()) <= set(range(top + 1))
    assert len(found.unique()) == (x * top).round().unique().numel() > 1
    torch.testing.assert_close(found, (x * top).round() / top)


def test_squeezing_takes_the_median_of_the_levels(x: Tensor) -> None:
    found = applied("squeeze:bits=4,window=3", x)
    rounded = ((x * 15).round() / 15)[..., None]
    height, width = x.shape[2:]
    window = [rounded[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], torch.cat(window, -1).median(-1).values)


def test_squeezing_removes_a_spike_and_keeps_an_edge() -> None:
    clean = torch.cat([torch.full((1, 3, 6, 4), 0.2), torch.full((1, 3, 6, 5), 0.8)], 3)
    clean[:, 1] /= 2
    for spike in (0.0, 1.0):
        x = clean.clone()
        x[0, :, 3, 2] = spike
        found = applied("squeeze:bits=8,window=2", x)
        torch.testing.assert_close(found[..., :4], clean[..., :4], rtol=0, atol=1 / 255)
        torch.testing.assert_close(found[..., 5:], clean[..., 5:], rtol=0, atol=1 / 255)


def placement(image: Tensor) -> tuple[int, int]:
    """Side and start, along the height, of a white image that was put into a black one of twice its side.

    Resizing back halves the side and averages pairs of rows.
    """
    rows = (2 * image[0].amax(1)).round().int().tolist()
    first = next(i for i, covered in enumerate(rows) if covered)
    return sum(rows), 2 * first + 2 - rows[first]


def test_resize_pad_draws_every_side_and_place() -> None:
    white = torch.ones(2000, 1, 8, 8)
    found = applied("resize-pad:rate=2", white)
    down = [placement(image) for image in found]
    across = [placement(image.mT) for image in found]
    assert [side for side, _ in down] == [side for side, _ in across]
    assert {side for side, _ in down} == set(range(8, 16))
    for places in (down, across):
        assert set(places) == {(side, start) for side in range(8, 16) for start in range(16 - side + 1)}
    assert len({*zip(down, across, strict=True)}) > len({*down})


def test_resize_pad_keeps_the_content() -> None:
    white, x = torch.ones(20, 3, 6, 8), torch.rand(20, 3, 6, 8, generator=generator())
    where, found = applied("resize-pad:rate=2", white, 5), applied("resize-pad:rate=2", x, 5)
    for image, mask, result in zip(x, where, found, strict=True):
        (h, top), (w, left) = placement(mask), placement(mask.mT)
        canvas = torch.zeros(3, 12, 16)
        for i in range(h):
            for j in range(w):
                canvas[:, top + i, left + j] = image[:, i * 6 // h, j * 8 // w]
        torch.testing.assert_close(result, F.avg_pool2d(canvas, 2))


def test_resize_pad_draws_by_example_and_by_seed(x: Tensor) -> None:
    same = x[:1].expand(8, -1, -1, -1)
    found = applied("resize-pad", same)
    assert len({image.numpy().tobytes() for image in found}) > 2
    assert torch.equal(found, applied("resize-pad", same))
    assert not torch.equal(found, applied("resize-pad", same, seed=1))
    source = generator()
    assert not torch.equal(ResizePad().transform(same, source), ResizePad().transform(same, source))


@pytest.mark.parametrize(("votes", "t"), [(1, 0.1), (3, 0.1), (3, -0.25)])
def test_the_majority_of_a_linear_model_is_known(votes: int, t: float) -> None:
    """One pixel of value 0 against a threshold: every vote is a Bernoulli draw; the last needs unclamped noise."""
    x, y = torch.zeros(500, 1, 1, 1), torch.ones(500, dtype=torch.long)
    rate = error_rate(Smoothing(sigma=0.25, votes=votes), threshold(t), x, y, draws=20, batch_size=500)
    p = share_above(t, 0, 0.25)
    correct = p if votes == 1 else p**3 + 3 * p**2 * (1 - p)
    assert float(rate.mean()) == pytest.approx(1 - correct, abs=0.02)


def test_many_votes_find_the_likelier_class() -> None:
    x, y = torch.full((40, 1, 1, 1), 0.5), torch.ones(40, dtype=torch.long)
    many, one = (error_rate(Smoothing(votes=votes), threshold(0.45), x, y, draws=3) for votes in (1001, 1))
    assert float(many.mean()) == 0
    assert float(one.mean()) == pytest.approx(1 - share_above(0.45, 0.5, 0.25), abs=0.15)


def test_votes_count_however_sure() -> None:
    """Class 1 is rare but sure of itself: the mean of the logits would choose it. A tie goes to the lowest class."""

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), torch.where(x.flatten(1)[:, 0] > 0.6, 1e6, -1.0)], 1)

    x = torch.full((30, 1, 1, 1), 0.5)
    assert not Smoothing(sigma=0.1, votes=301).predict(model, x, generator()).any()
    ballots = iter([2, 1, 0, 1, 2])
    votes = Smoothing(votes=5).predict(lambda x: torch.eye(4)[[next(ballots)]].expand(len(x), -1), x, generator())
    assert votes.tolist() == [1] * 30


def test_smoothing_needs_one_noisy_batch_per_vote() -> None:
    x, seen = torch.full((6, 3, 4, 4), 0.5), []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :2]

    error_rate(Smoothing(sigma=0.1, votes=7), model, x, torch.zeros(6, dtype=torch.long), draws=2, batch_size=4)
    assert [len(batch) for batch in seen] == [4, 2] * 14
    noise = torch.cat(seen) - 0.5
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert len(noise.unique()) > 0.9 * noise.numel()


# --- predictions and error rates


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", DEFENCES)
def test_a_good_network_survives(name: str) -> None:
    """Predictions stay those of a network that is robust, and are made without gradients or global draws."""
    images, network = packaged.mnist(), packaged.mnist_cnn()
    x, y = images.x[:40].clone().requires_grad_(), images.y[:40]
    found = defence("smoothing:votes=5" if name == "smoothing" else name)
    found.predict(network, x[:1], generator())  # imports come first: they may draw
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def model(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return network(x)

    rate = error_rate(found, model, x, y, draws=2)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert rate.shape == (40,)
    assert float(rate.mean()) < 0.2
    wrong = (predictions(network, x) != y).float()
    assert abs(float(rate.mean() - wrong.mean())) < 0.15


def test_the_model_sees_the_transformed_images(x: Tensor) -> None:
    for found in (JPEG(quality=20), BitDepth(bits=2), Squeezing(bits=3, window=3), ResizePad(rate=1.3)):
        seen = []

        def model(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x.flatten(1)

        classes = found.predict(model, x, generator())
        assert torch.equal(seen[0], found.transform(x, generator()))
        assert not torch.allclose(seen[0], x, atol=0.01)
        assert torch.equal(classes, seen[0].flatten(1).argmax(1))


def test_random_defences_average_over_draws() -> None:
    x, y = torch.full((10, 1, 2, 2), 0.5), torch.tensor([0, 1] * 5)
    smoothing = Smoothing(votes=1)
    rate = error_rate(smoothing, threshold(0.5), x, y, draws=4, seed=3, batch_size=10)
    source = generator(3)
    draws = [smoothing.predict(threshold(0.5), x, source) != y for _ in range(4)]
    torch.testing.assert_close(rate, torch.stack(draws).float().mean(0))
    assert len(rate.unique()) > 2
    assert torch.equal(rate, error_rate(smoothing, threshold(0.5), x, y, draws=4, seed=3, batch_size=3))
    assert not torch.equal(rate, error_rate(smoothing, threshold(0.5), x, y, draws=4, seed=4))
    assert set(error_rate(smoothing, threshold(0.5), x, y, draws=1).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", [name for name, cls in DEFENCES.items() if not cls.random])
def test_others_make_one_prediction(name: str) -> None:
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return threshold(0.5)(x)

    x = torch.linspace(0, 1, 10)[:, None, None, None].expand(-1, 1, 8, 8)
    rate = error_rate(defence(name), model, x, torch.zeros(10, dtype=torch.long), draws=7, batch_size=4)
    assert sizes == [4, 4, 2]
    assert rate.tolist() == [0.0] * 5 + [1.0] * 5


def test_which_are_random() -> None:
    assert {name for name, cls in DEFENCES.items() if cls.random} == {"resize-pad", "smoothing"}


# --- names and mistakes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("jpeg", JPEG(quality=75)),
        ("jpeg:quality=50", JPEG(quality=50)),
        ("bits:bits=4", BitDepth(bits=4)),
        ("resize-pad:rate=1.25", ResizePad(rate=1.25)),
        ("smoothing:sigma=0.5,votes=10", Smoothing(sigma=0.5, votes=10)),
        ("squeeze:bits=4,window=3", Squeezing(bits=4, window=3)),
    ],
)
def test_defences_by_name(spec: str, expected: Defence) -> None:
    assert defence(spec) == expected
    assert DEFENCES[expected.name] is type(expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpg", "unknown defence 'jpg'; there are jpeg, bits, resize-pad, smoothing, squeeze"),
        ("jpeg:q=5", "'jpeg:q=5': jpeg has no parameter 'q'; it has quality"),
        ("jpeg:name=5", "no parameter 'name'"),
        ("jpeg:quality", "quality= is not JSON"),
        ("jpeg:quality=high", "quality=high is not JSON"),
        ("jpeg:quality=101", "quality=101"),
        ("jpeg:quality=75.5", "quality=75.5"),
        ("bits:bits=0", "bits=0"),
        ("bits:bits=9", "bits=9"),
        ("squeeze:bits=9", "bits=9"),
        ("squeeze:window=1", "window=1"),
        ("resize-pad:rate=1", "rate=1 must be"),
        ("smoothing:sigma=0", "sigma=0"),
        ("smoothing:sigma=NaN", "sigma=nan"),
        ("smoothing:votes=0", "votes=0"),
    ],
)
def test_bad_specs_name_the_value(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        defence(spec)


def test_bad_images_and_counts_name_the_value() -> None:
    x, y = torch.rand(4, 2, 8, 8, generator=generator()), torch.zeros(4, dtype=torch.long)
    for words, message in (
        ({"draws": 0}, "draws=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"x": x[0]}, r"shape \(2, 8, 8\)"),
        ({"x": x[:0]}, r"shape \(0, 2, 8, 8\)"),
        ({"x": 255 * x}, "outside the bounds"),
        ({"y": y[:3]}, "4 images but 3 labels"),
        ({}, "these have 2 channels"),
        ({"defence": ResizePad(rate=1.1)}, "rate=1.1 leaves images of 8 x 8 as they are; raise it above 9/8"),
    ):
        arguments = {"defence": JPEG(), "model": threshold(0.5), "x": x, "y": y, **words}
        with pytest.raises(ValueError, match=message):
            error_rate(**arguments)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [("bits", "art", "art"), ("squeeze", "art", "art"), ("jpeg", "torchvision", "report")],
)
def test_a_missing_package_names_its_extra(
    spec: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"firstorder-attacks\[{extra}\]") as caught:
        applied(spec, torch.zeros(1, 1, 8, 8))
    assert caught.value.name == package
