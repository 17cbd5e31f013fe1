"""APGD against a slow transcription, the installed AutoAttack and torchattacks, and what its parts promise."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import references
from cases import Net
from cases import images as pictures
from cases import predicted as classes
from firstorder.attacks import (
    APGD,
    DLR,
    PGD,
    Batched,
    CrossEntropy,
    Expectation,
    Halving,
    Margin,
    RobustnessWarning,
    ScaleCopies,
    TorchModel,
    Wrapper,
    prepare,
)
from firstorder.attacks.controls import checkpoints
from samples import sampled
from test_references import MODEL, MODES, POWER, TOLERANCE, images, labels

EPS = {"Linf": 0.1, "L2": 0.6}
LOSSES: dict[str, Any] = {"ce": references.cross_entropy, "dlr": references.dlr, "margin": references.margin}
N = 3


def path_of(attack: APGD, x: Tensor, y: Tensor, *, start: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The points (N, ...) at which the model was asked for x alone: x_0, ..., x_T."""
    seen: list[Tensor] = []

    def asked(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return MODEL(points)

    found = attack(asked, x, y, **options)
    assert found.shape == x.shape
    return seen


def far(path: list[Tensor], other: list[Tensor]) -> float:
    assert len(path) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(path, other, strict=True))


def transcribed(x: Tensor, y: Tensor, norm: str, loss: str, targeted: bool, steps: int, **options: Any) -> list[Tensor]:
    paths = []
    size, shape = x[0].numel(), tuple(x.shape[1:])
    for image, label in zip(x, y, strict=True):
        p = references.Problem(
            MODEL,
            shape,
            image.flatten().tolist(),
            int(label),
            [0.0] * size,
            [1.0] * size,
            EPS[norm],
            norm,
            targeted,
            LOSSES[loss],
        )
        paths.append(references.apgd(p, steps=steps, **options))
    return [torch.tensor(points, dtype=x.dtype).reshape(x.shape) for points in zip(*paths, strict=True)]


Row = tuple[str, str, bool, int]
ROWS: list[Row] = [
    (norm, loss, targeted, steps)
    for norm in EPS
    for loss in ("ce", "dlr")
    for targeted in (False, True)
    for steps in (50, 1, 2, 3, 8, 20, 100)
]


@functools.cache
def expected(row: Row) -> list[Tensor]:
    norm, loss, targeted, steps = row
    x = images(N)
    return transcribed(x, labels(x, targeted=targeted), norm, loss, targeted, steps)


@pytest.mark.parametrize(
    "row",
    [pytest.param(*r.values, marks=r.marks) for r in sampled([(row,) for row in ROWS], 2, lambda r: r[0][:2])],
    ids=str,
)
def test_iterates_equal_the_transcription(row: Row) -> None:
    norm, loss, targeted, steps = row
    x = images(N)
    attack = APGD(eps=EPS[norm], norm=norm, loss=loss, steps=steps, random_start=False)
    path = path_of(attack, x, labels(x, targeted=targeted), targeted=targeted)
    assert len(path) == steps + 1
    assert far(path, expected(row)) <= TOLERANCE


@functools.cache
def slow(case: tuple[str, str, float]) -> list[Tensor]:
    loss, norm, rho = case
    x = images(N)
    return transcribed(x, labels(x, targeted=False), norm, loss, False, 50, rho=rho)


MOVE, CHECKPOINTS = references.apgd_move, references.apgd_checkpoints
DELETIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "halving": ("apgd_checkpoints", lambda steps: [0]),
    "return": ("apgd_return", lambda path, values: len(path) - 1),
    "inertia": ("apgd_move", lambda p, here, before, z, k: z),
    "first step": (
        "apgd_move",
        lambda p, here, before, z, k: (
            references.project(p, [h + 0.75 * (c - h) for h, c in zip(here, z, strict=True)])
            if k == 0
            else MOVE(p, here, before, z, k)
        ),
    ),
    "condition 1": ("apgd_rises_rarely", lambda *_: False),
    "condition 2": ("apgd_rests", lambda *_: False),
    "rounding up": ("apgd_checkpoints", lambda steps: [mark + (mark > 0) for mark in CHECKPOINTS(steps)]),
}


@pytest.mark.parametrize("deletion", DELETIONS)
def test_comparison_has_power(deletion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an ingredient the transcription takes another path, which the comparison above would notice."""
    moved = 0.0
    for norm, rho in (("Linf", 0.75), ("L2", 0.75), ("Linf", 0.25)):
        whole, x = slow(("ce", norm, rho)), images(N)
        with monkeypatch.context() as patch:
            patch.setattr(references, *DELETIONS[deletion])
            part = transcribed(x, labels(x, targeted=False), norm, "ce", False, 50, rho=rho)
        moved = max(moved, far(part, whole))
        if moved > POWER:
            return
    assert moved > POWER


def test_the_first_loss_is_compared_with_zero() -> None:
    """As in the code, not with the start's as in the text: seen where the first loss of DLR is negative and rising."""
    a = torch.zeros(2, 3, dtype=torch.float64)
    control = Halving(rho=0.0)
    state, *_ = control(control.init(a), a, a, torch.tensor([-2.0, -2.0]), 1, 2)
    state, *_ = control(state, a, a, torch.tensor([-1.0, 1.0]), 2, 2)
    assert state.factor.flatten().tolist() == [0.5, 1.0]


def test_checkpoints_are_those_of_the_paper() -> None:
    assert dict(checkpoints(100)) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert dict(checkpoints(4)) == dict.fromkeys((1, 2, 3, 4), 1)
    assert dict(checkpoints(1)) == {1: 1}
    for steps in range(1, 120):
        assert [0, *checkpoints(steps)] == references.apgd_checkpoints(steps)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("rho", [0.0, 0.25, 1.0])
def test_rho_and_the_first_step_are_parameters(norm: str, rho: float) -> None:
    x = images(N)
    y = labels(x, targeted=False)
    attack = APGD(eps=EPS[norm], norm=norm, steps=50, rho=rho, random_start=False)
    wide = dataclasses.replace(attack, alpha=0.7 * EPS[norm])
    assert far(path_of(attack, x, y), slow(("ce", norm, rho))) <= TOLERANCE
    assert far(path_of(wide, x, y), transcribed(x, y, norm, "ce", False, 50, rho=rho, alpha=wide.alpha)) <= TOLERANCE


@pytest.fixture
def _double() -> Any:
    """AutoAttack keeps losses in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("drawn", [False, True])
def test_iterates_equal_autoattacks(norm: str, loss: str, drawn: bool) -> None:
    """The released code's own run: every point asked for, which examples break, and the examples returned for them."""
    package = pytest.importorskip("pyautoattack.autopgd_base", exc_type=ImportError)
    x = images(8)
    y = labels(x, targeted=False)
    broken = 0
    for steps in (1, 2, 5, 7, 10, 20, 33, 50, 100):
        theirs: list[Tensor] = []

        def asked(points: Tensor) -> Tensor:
            theirs.append(points.detach().clone())  # noqa: B023
            return MODEL(points)

        run = package.APGDAttack(asked, n_iter=steps, norm=norm, eps=EPS[norm], loss=loss, device="cpu")
        run.init_hyperparam(x)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            _, robust, _, adversarial = run.attack_single_run(x, y, x_init=None if drawn else x)
        attack = APGD(eps=EPS[norm], norm=norm, loss=loss, steps=steps, random_start=drawn)
        generator = torch.Generator().manual_seed(3)
        assert far(path_of(attack, x, y, generator=generator), theirs) <= TOLERANCE
        result = attack.run(MODEL, x, y, generator=generator.manual_seed(3))
        assert result.success is not None
        assert torch.equal(result.success, ~robust)
        assert float((result.adversarial - adversarial.detach())[~robust].abs().sum()) <= TOLERANCE
        broken += int(result.success.sum())
    assert broken > 9


@MODES
@pytest.mark.parametrize("norm", EPS)
def test_the_last_broken_iterate_is_returned_or_the_nearest(norm: str, targeted: bool) -> None:
    x = images(12)
    with torch.no_grad():
        y = MODEL(x).topk(2).indices[:, int(targeted)]
    attack = APGD(eps=1.5 * EPS[norm], norm=norm, steps=15, random_start=False)
    path = torch.stack(path_of(attack, x, y, targeted=targeted))
    result = attack.run(MODEL, x, y, targeted=targeted)
    assert result.success is not None
    assert 0 < int(result.success.sum()) < len(x)
    assert (result.gradients == 15).all()
    with torch.no_grad():
        gaps = torch.stack([Margin()(MODEL(points), y) for points in path]) * (-1 if targeted else 1)
    for i in range(len(x)):
        hits = (gaps[:, i] > 0).nonzero()[:, 0]
        chosen = int(hits[-1]) if len(hits) else int(gaps[:, i].argmax())
        assert torch.equal(result.adversarial[i], path[chosen, i])
        assert bool(result.success[i]) == (len(hits) > 0)


def test_stopping_early_breaks_the_same_for_fewer_gradients() -> None:
    x = images(12)
    y = labels(x, targeted=False)
    full, early = (APGD(eps=0.15, steps=30, random_start=False, early_stop=e).run(MODEL, x, y) for e in (False, True))
    assert full.success is not None
    assert early.success is not None
    assert torch.equal(full.success, early.success)
    assert 0 < int(full.success.sum()) < len(x)
    assert (early.gradients[early.success] < 30).any()
    assert (early.gradients[~early.success] == 30).all()
    left = ~full.success
    assert torch.equal(early.adversarial[left], full.adversarial[left])


def test_random_starts_lie_on_the_surface() -> None:
    x = torch.full((4, 3, 5, 4), 0.5, dtype=torch.float64)
    y = torch.arange(4)
    for norm, order in (("Linf", torch.inf), ("L2", 2)):
        starts = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            starts.append(path_of(APGD(eps=0.1, norm=norm, steps=1), x, y, generator=generator)[0])
        sizes = torch.linalg.vector_norm((starts[0] - x).flatten(1), order, 1)
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.1), rtol=0, atol=1e-12)
        assert not torch.equal(*starts)


def test_radii_may_differ_between_examples() -> None:
    x = images(N)
    y = labels(x, targeted=False)
    eps = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
    together = APGD(eps=eps.reshape(-1, 1, 1, 1), steps=20, random_start=False)(MODEL, x, y)
    for i in range(N):
        alone = APGD(eps=float(eps[i]), steps=20, random_start=False)(MODEL, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=TOLERANCE)


def test_losses_come_through_batches_copies_and_the_exact_model() -> None:
    x = images(12)
    y = labels(x, targeted=False)
    attack = APGD(eps=0.15, steps=20, random_start=False, early_stop=True, loss="dlr")
    whole = attack.run(MODEL, x, y)
    assert len(whole.gradients.unique()) > 3
    for model in (Batched(TorchModel(MODEL), 5), prepare(MODEL, x)):
        found = attack.run(model, x, y)
        torch.testing.assert_close(found.adversarial, whole.adversarial, rtol=0, atol=1e-6)
        assert torch.equal(found.gradients, whole.gradients)


class Silent(Wrapper):
    """A model that does not give its losses."""

    def gradient(self, *arguments: Any, **options: Any) -> Any:
        return super().gradient(*arguments, **options)._replace(losses=None)


@MODES
def test_a_model_without_losses_is_followed_by_its_margins(targeted: bool) -> None:
    x = images(N)
    y = labels(x, targeted=targeted)
    attack = APGD(eps=0.08, steps=30, random_start=False, loss="margin")
    found = attack(Silent(TorchModel(MODEL)), x, y, targeted=targeted)
    assert torch.equal(found, attack(MODEL, x, y, targeted=targeted))


def test_a_loss_that_averages_is_refused() -> None:
    x = images(N)
    y = labels(x, targeted=False)
    average = torch.nn.CrossEntropyLoss()
    assert PGD(loss=average, steps=2)(MODEL, x, y).shape == x.shape
    with pytest.raises(ValueError, match=r"shape \(\), .* reduction='none'"):
        APGD(loss=average, steps=2)(MODEL, x, y)
    assert APGD(loss=torch.nn.CrossEntropyLoss(reduction="none"), steps=2)(MODEL, x, y).shape == x.shape


def test_bad_parameters_are_refused() -> None:
    for bad in ({"rho": -0.1}, {"rho": 1.1}, {"loss": "kl"}, {"norm": "L1"}, {"steps": 0}):
        (name,) = bad
        with pytest.raises(ValueError, match=f"{name}="):
            APGD(**bad)
    assert APGD(loss="dlr") == APGD(loss=DLR())
    assert PGD(loss="ce").loss == CrossEntropy()


def test_logits_that_become_nan_are_no_success() -> None:
    x = images(6)
    y = labels(x, targeted=False)
    calls: list[int] = []

    def breaking(points: Tensor) -> Tensor:
        calls.append(1)
        return MODEL(points) * (torch.nan if len(calls) > 3 else 1.0)

    with pytest.warns(RobustnessWarning, match="6 of 6 examples met NaN"):
        result = APGD(eps=0.01, steps=10, random_start=False).run(breaking, x, y)
    assert result.success is not None
    assert not result.success.any()
    assert result.doubtful is not None
    assert result.doubtful.all()
    assert result.adversarial.isfinite().all()


def test_iterates_that_meet_nan_do_not_pass_unseen() -> None:
    """Also where the run goes back to an iterate that is a number."""
    x = images(6)
    y = labels(x, targeted=False)

    weak = torch.arange(6) % 2 == 0

    def cracked(points: Tensor) -> Tensor:
        far = (points - x).flatten(1).abs().amax(1, keepdim=True) > 0.008
        return MODEL(points) + torch.where(far & weak[:, None], torch.nan, 0.0)

    with pytest.warns(RobustnessWarning, match="of 6 examples met NaN"):
        result = APGD(eps=0.01, steps=30, random_start=False).run(cracked, x, y)
    assert result.doubtful is not None
    assert torch.equal(result.doubtful, weak)
    assert torch.equal((result.adversarial != x).flatten(1).any(1), ~weak)


def test_the_loss_of_scale_copies_is_their_mean() -> None:
    x = images(N)
    y = labels(x, targeted=False)
    model = TorchModel(MODEL, loss=Margin())
    found, _ = ScaleCopies(m=3)(lambda points: model.gradient(points, y.repeat(3), None), x, None, None)  # type: ignore
    with torch.no_grad():
        mean = sum(Margin()(MODEL(x / 2**i), y) for i in range(3)) / 3
    assert found.losses is not None
    torch.testing.assert_close(found.losses, mean)


class Noisy(torch.nn.Module):
    """Random logits."""

    def forward(self, x: Tensor) -> Tensor:
        return MODEL(x + 0.02 * torch.randn_like(x))


def test_of_a_random_model_the_mean_loss_is_followed() -> None:
    x = images(N)
    y = labels(x, targeted=False)
    whole, parts = (TorchModel(Expectation(Noisy(), samples=6, stacked=k)).gradient(x, y, None) for k in (6, 3))
    assert whole.losses is not None
    assert whole.losses.shape == (N,)
    seen: list[Tensor] = []
    noisy = TorchModel(Expectation(Noisy(), samples=6), loss=lambda z, t: seen.append(CrossEntropy()(z, t)) or seen[-1])
    found = noisy.gradient(x, y, None)
    assert found.losses is not None
    assert len(seen) == 6
    torch.testing.assert_close(found.losses, torch.stack(seen).mean(0))
    assert parts.losses is not None


def test_on_levels_the_iterate_seen_is_returned() -> None:
    x = (images(8) * 255).round() / 255
    y = labels(x, targeted=False)
    attack = APGD(eps=40 / 255, steps=12, random_start=False, levels=256)
    result = attack.run(MODEL, x, y)
    assert result.success is not None
    assert 0 < int(result.success.sum()) < 8
    levels = result.adversarial * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    path = torch.stack(path_of(attack, x, y))
    assert (path == result.adversarial).flatten(2).all(2).any(0).all()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item")
        return func(*args, **(kwargs or {}))


def test_the_loop_does_not_wait_for_the_device() -> None:
    x = images(N)
    y = labels(x, targeted=False)
    counts = []
    for steps in (10, 60):
        with Waits() as waits:
            APGD(eps=0.05, steps=steps)(MODEL, x, y)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


# torchattacks


def host(name: str = "APGD") -> Any:
    pytest.importorskip("torchattacks", exc_type=ImportError)
    import firstorder.torchattacks

    return getattr(firstorder.torchattacks, name)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", EPS)
def test_equal_to_torchattacks_own_where_it_breaks(norm: str, loss: str, model: Net) -> None:
    """On images that the model gets right its first run draws what ours draws; it returns the others as they came."""
    ours = host()
    import torchattacks

    x = pictures(60)
    y = classes(model.eval(), x)
    words = (norm, {"Linf": 0.02, "L2": 0.08}[norm], 20, 1, 5, loss)
    found = ours(model, *words)(x, y)
    with torch.random.fork_rng():
        theirs = torchattacks.APGD(model, *words)(x, y)
    broken = classes(model, theirs) != y
    assert 5 < int(broken.sum()) < 55
    assert torch.equal(classes(model, found) != y, broken)
    torch.testing.assert_close(found[broken], theirs[broken], rtol=0, atol=1e-5)
    assert torch.equal(theirs[~broken], x[~broken])


def test_the_signature_is_torchattacks(model: Net) -> None:
    ours = host()
    import torchattacks

    own, peer = inspect.signature(ours), inspect.signature(torchattacks.APGD)
    assert list(own.parameters)[: len(peer.parameters)] == list(peer.parameters)
    for parameter in peer.parameters.values():
        assert own.parameters[parameter.name].default == parameter.default
    assert "restarts" not in own.parameters
    attack = ours(model, n_restarts=3, eot_iter=1, verbose=False, rho=0.5)
    assert (attack._core().restarts, attack._core().rho) == (3, 0.5)  # type: ignore[attr-defined]


def test_torchattacks_words_without_a_meaning_here_are_refused(model: Net) -> None:
    for name, bad in (("eot_iter", 2), ("verbose", True)):
        with pytest.raises(ValueError, match=f"{name}={bad}"):
            host()(model, **{name: bad})
        attack = host()(model)
        setattr(attack, name, bad)
        with pytest.raises(ValueError, match=f"{name}={bad}"):
            attack(pictures(), torch.arange(6))
    for name, bad in (("norm", "L1"), ("loss", "kl"), ("rho", 2.0)):
        with pytest.raises(ValueError, match=f"{name}="):
            host()(model, **{name: bad})
