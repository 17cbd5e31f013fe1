"""What the oracles of the transfer and distributional attacks promise beyond their transcriptions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Net, images, predicted
from firstorder.attacks import (
    BLOBQG,
    DAABLOB,
    DIFGSM,
    MIFGSM,
    NIFGSM,
    PGD,
    SINITIDIM,
    TIFGSM,
    VMIFGSM,
    BlobInteraction,
    Clipped,
    DiverseInput,
    Identity,
    Margin,
    ScaleCopies,
    TranslationInvariant,
    VarianceTuning,
    chain,
)
from firstorder.attacks.models import Evaluation


def test_a_diverse_input_is_torchs_resize_and_padding() -> None:
    x = torch.rand(40, 3, 24, 31, dtype=torch.float64)
    oracle = DiverseInput(resize_rate=0.6, diversity_prob=0.7)
    draws = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = oracle.transform(x, draws)
    sizes = set()
    for image, (whether, side, top, left), result in zip(x, draws.tolist(), seen, strict=True):
        if whether >= 0.7:
            assert torch.equal(result, image)
            continue
        h, w = 14 + int(side * (24 - 14)), 18 + int(side * (31 - 18))
        sizes.add((h, w))
        up, before = int(top * (24 - h)), int(left * (31 - w))
        small = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False)[0]
        expected = F.pad(small, (before, 31 - w - before, up, 24 - h - up))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert len(sizes) > 5, "every example has a size of its own"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_diverse_input_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Places that are rounded too would be wrong by a part of a pixel: of 200, by a half in bfloat16."""
    x = torch.rand(4, 1, 200, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    oracle = DiverseInput(resize_rate=0.9, diversity_prob=1.0)
    draws = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    expected = oracle.transform(x.double(), draws.double())
    torch.testing.assert_close(oracle.transform(x, draws).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_enlarged_inputs_come_back_to_the_models_size() -> None:
    x = torch.rand(6, 1, 20, 20, dtype=torch.float64)
    draws = torch.tensor([[0.0, 0.5, 0.2, 0.9]], dtype=torch.float64).expand(6, 4)
    seen = DiverseInput(resize_rate=1.5, diversity_prob=1.0).transform(x, draws)
    grown = F.interpolate(x, size=(25, 25), mode="bilinear", align_corners=False)
    padded = F.pad(grown, (4, 1, 1, 4))
    torch.testing.assert_close(seen, F.interpolate(padded, size=(20, 20), mode="bilinear", align_corners=False))


@pytest.mark.parametrize("name", ["gaussian", "linear", "uniform"])
def test_kernels_are_normalised_symmetric_and_peak_in_the_middle(name: Any) -> None:
    profile = TranslationInvariant(kernel_name=name, len_kernel=9).profile()
    assert profile.sum() == pytest.approx(1)
    assert torch.equal(profile, profile.flip(0))
    assert (profile.diff()[:4] >= 0).all()
    assert TranslationInvariant(len_kernel=1, kernel_name=name).profile().tolist() == [1.0]


ERRORS: dict[str, tuple[Any, str]] = {
    "probability": (lambda: DIFGSM(diversity_prob=1.5), "diversity_prob=1.5"),
    "rate": (lambda: DIFGSM(resize_rate=0.0), "resize_rate=0"),
    "even kernel": (lambda: TIFGSM(len_kernel=4), "len_kernel=4 must be odd"),
    "kernel": (lambda: TIFGSM(kernel_name="box"), "kernel_name='box'"),  # type: ignore[arg-type]
    "sigmas": (lambda: TIFGSM(nsig=0), "nsig=0"),
    "neighbours": (lambda: VMIFGSM(N=0), "N=0"),
    "neighbourhood": (lambda: VMIFGSM(beta=-1), "beta=-1"),
    "weight": (lambda: DAABLOB(c=-1), "c=-1"),
    "sign": (lambda: BLOBQG(kernel_gradient="minus"), "kernel_gradient='minus'"),  # type: ignore[arg-type]
    "norm": (lambda: VMIFGSM(norm="L2"), "norm='L2'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_parameters_are_refused(case: str) -> None:
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_images_too_small_to_shrink_are_refused(model: Net) -> None:
    with pytest.raises(ValueError, match=r"resize_rate=0\.1 leaves nothing"):
        DIFGSM(resize_rate=0.1)(model, images(), torch.arange(6))


def test_variance_tuning_goes_before_stacked_copies(model: Net) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(MIFGSM):
        def oracle(self) -> Any:
            return chain(ScaleCopies(m=2), VarianceTuning(radius=0.1, N=2))

    with pytest.raises(ValueError, match="before the oracles that stack"):
        Wrong()(model, images(), torch.arange(6))


@pytest.mark.parametrize("direction", [Clipped(), Identity()])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_looking_ahead_helps_or_does_no_harm(direction: Any, norm: str) -> None:
    """Under rules that move a length, and in L2, the look-ahead stays near the ball."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 60), nn.Tanh(), nn.Linear(60, 10)).double().eval()
    x = images(64).double()
    y = predicted(model, x)
    eps = {"Linf": 0.03, "L2": 0.25}[norm]
    gains = []
    for cls in (NIFGSM, MIFGSM):
        adversarial = cls(eps=eps, norm=norm, direction=direction, steps=8)(model, x, y)
        with torch.no_grad():
            gains.append(float((Margin()(model(adversarial), y) - Margin()(model(x), y)).mean()))
    assert gains[0] > 0.97 * gains[1]


def test_draws_do_not_depend_on_who_is_still_attacked(model: Net) -> None:
    """With early_stop the survivors get the neighbours that they would have had."""
    x = images(24)
    y = predicted(model, x)
    words = {"eps": 0.04, "N": 3, "steps": 6}
    stopped, whole = (
        VMIFGSM(**words, early_stop=stop).run(model, x, y, generator=torch.Generator().manual_seed(2))
        for stop in (True, False)
    )
    survivors = ~stopped.success
    assert 0 < survivors.sum() < len(x)
    torch.testing.assert_close(stopped.adversarial[survivors], whole.adversarial[survivors], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", [VMIFGSM(N=5, steps=3), SINITIDIM(steps=3, resize_rate=0.8)])
def test_the_memory_budget_changes_the_batches_only(attack: Any, model: Net) -> None:
    x, y = images().double(), torch.arange(6)
    seen: list[int] = []

    def forward(z: Tensor) -> Tensor:
        seen.append(len(z))
        return model(z)

    model = model.double().eval()
    large, largest = attack(forward, x, y), max(seen)
    seen.clear()
    small = dataclasses.replace(attack, memory_budget=1)(forward, x, y)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)
    assert largest >= 5 * 6
    assert max(seen) == 6


def test_gradients_are_counted(model: Net) -> None:
    x, y = images(), torch.arange(6)
    assert VMIFGSM(N=4, steps=3).run(model, x, y).gradients.tolist() == [15] * 6
    assert SINITIDIM(m=3, steps=2).run(model, x, y).gradients.tolist() == [6] * 6


def test_a_population_may_be_one_example_and_examples_may_coincide(model: Net) -> None:
    x = images()[:1]
    y = torch.tensor([0])
    one = DAABLOB(c=50)(model, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one, PGD()(model, x, y, generator=torch.Generator().manual_seed(0)))
    same = DAABLOB(random_start=False, c=50)(model, x.expand(5, -1, -1, -1), y.expand(5))
    assert torch.isfinite(same).all()
    assert (same == same[:1]).all()


def test_populations_interact(model: Net) -> None:
    x, y = images(8), torch.arange(8)
    attack = DAABLOB(c=20, random_start=False, alpha=0.003)
    assert not torch.allclose(attack(model, x, y)[:4], attack(model, x[:4], y[:4]), atol=1e-4)


def test_the_blob_pushes_apart_or_together() -> None:
    """Without a gradient of the loss the sign of the kernel's gradient decides whether a population spreads."""
    a = torch.rand(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def moved(kernel_gradient: Any) -> float:
        def query(points: Tensor) -> Evaluation:
            return Evaluation(torch.zeros_like(points), None)

        oracle = BlobInteraction(c=1.0, kernel_gradient=kernel_gradient)
        step: Any = type("Here", (), {"iterate": a})
        evaluation, _ = oracle(query, a, None, step)
        return float(torch.pdist(a + 0.01 * evaluation.gradient).mean() - torch.pdist(a).mean())

    assert moved("add") > 0 > moved("subtract")


def test_the_weight_of_the_interaction_follows_the_loss() -> None:
    assert DAABLOB().oracle() == BlobInteraction(c=1.1)
    assert DAABLOB(loss=Margin()).oracle() == BlobInteraction(c=10.0)
    assert BLOBQG(loss=Margin(), c=2.0, kernel_gradient="subtract").oracle() == BlobInteraction(
        c=2.0, kernel_gradient="subtract"
    )
