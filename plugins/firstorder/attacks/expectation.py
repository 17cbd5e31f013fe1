"""Randomised models, attacked in expectation over their draws.

    model = Expectation(defended, samples=20)
    adversarial = PGD(eps=8 / 255)(model, x, y)
    shares = model.success(adversarial, y, draws=100)         of the draws, how many each example breaks

[EoT] Athalye et al. 2018, Synthesizing robust adversarial examples; Athalye, Carlini & Wagner 2018, Obfuscated
gradients give a false sense of security, Sec. 4.3.2; [SA] Salman et al. 2019, Provably robust deep learning via
adversarially trained smoothed classifiers, Sec. 2.2.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.inspection import doubt
from firstorder.attacks.modes import preserved
from firstorder.attacks.outputs import logits_of, require_logits
from firstorder.attacks.verdicts import broken, predicted

Average = Literal["loss", "logits", "probabilities"]


class Expectation(nn.Module):
    """A randomised model by the mean over several draws of its randomness, a module like any other.

    Its logits are those of the mean prediction, and an attack reports as broken what that misclassifies. They are the
    same at every call without gradients: such calls always take the same `samples` draws. Where the input requires a
    gradient every call makes new draws, independent of those, as an attack would otherwise fit the draws themselves.
    `success` counts in how many of further draws single predictions are broken, which is what a randomised model does.

    Draws are seeded: an attack repeated on the same images is the same attack. For the time of a draw torch's global
    generators, of the CPU and of the images' device, and Python's `random` are seeded, and then put back as they were.
    A model with generators of its own, or of NumPy, draws on from those, which nothing here can repeat.
    Draws are for a batch as it is: who else is in it decides which noise an example gets, not how much.

    The model must be random in evaluation mode, in which attacks run it; dropout is not.

    Args:
        model: a callable from images (N, ...) to logits (N, K), random from call to call.
        samples: number of draws S for a gradient and for a mean prediction, at least 1. 20 is that of AutoAttack's
            version for randomised models.
        average: of what the gradient is taken. "loss" is the gradient of the expected loss, E[grad J(x, y; draw)], of
            any loss ([EoT], the literature's default): where an attack of this package asks for gradients each draw
            has a loss of its own, and its graph is freed before the next. Who only calls the module, as other
            packages' attacks do, differentiates through the mean prediction, log E[softmax]. "probabilities" is that
            for every attack ([SA]). "logits" predicts by the mean logits and differentiates through these.
        seed: of the draws, at least 0.
        stacked: how many copies of the batch go through the model in one forward, each a draw. More than 1 is for
            models that draw anew for every row (noise), not for those that draw once for a whole batch (the size to
            which all images are resized): the copies would share it.

    Raises:
        ValueError: parameters out of range.

    Warns:
        RobustnessWarning: the draws are all the same.
    """

    drawn: Tensor
    """How many forwards for gradients were made, a scalar. A buffer, which attacks put back as all others."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        samples: int = 20,
        average: Average = "loss",
        seed: int = 0,
        stacked: int = 1,
    ) -> None:
        super().__init__()
        validation.count("samples", samples)
        validation.choice("average", average, ("loss", "logits", "probabilities"))
        validation.count("seed", seed, low=0)
        validation.count("stacked", stacked)
        self.model, self.samples, self.average, self.seed, self.stacked = model, samples, average, seed, stacked
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long), persistent=False)
        self._single = self._compared = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of the mean prediction for images x (N, ...)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.averaged(self._draws(x, "prediction", range(len(self.sizes()))))
        if self._single:
            return self._draw(x, "gradient", self._next(1)[0])
        return self.averaged(self._draws(x, "gradient", self._next(len(self.sizes()))))

    def success(self, x: Tensor, y: Tensor, *, draws: int = 100, targeted: bool = False) -> Tensor:
        """In what share of draws each example is misclassified, or classified as its target; (N,), in [0, 1].

        One minus its mean over examples is the accuracy that the model is expected to have on them. More than 0.5
        is broken by a majority. The draws are others than those of attacks and of mean predictions, the same at every
        call. Logits that are NaN or infinite are no success. The model is left as it was.

        Args:
            x: images (N, ...).
            y: labels, or targets, as for attacks.
            draws: their number, at least 1. The standard error of a share p is sqrt(p (1 - p) / draws).
            targeted: whether y are targets.
        """
        validation.count("draws", draws)
        x = validation.tensor(x)
        labels = validation.labels(y, len(x), x.device).indices
        count = torch.zeros(len(x), device=x.device)
        with preserved(self), torch.no_grad():
            for number, copies in enumerate(self.sizes(draws)):
                scores = self._draw(torch.cat([x] * copies), "success", number)
                found = broken(predicted(scores), labels.repeat(copies), targeted=targeted)
                count += found.reshape(copies, len(x)).sum(0)
        return count / draws

    def sizes(self, draws: int | None = None) -> list[int]:
        """How many copies of a batch every forward takes for so many draws, `samples` by default."""
        draws = self.samples if draws is None else draws
        whole, rest = divmod(draws, self.stacked)
        return [self.stacked] * whole + [rest] * (rest > 0)

    def averaged(self, scores: Tensor) -> Tensor:
        """The logits (N, K) of the mean prediction of draws (S, N, K)."""
        self._compare(scores)
        if self.average == "logits":
            return scores.mean(0)
        return scores.log_softmax(2).logsumexp(0) - math.log(len(scores))

    @contextmanager
    def single(self) -> Iterator[None]:
        """A context in which a call whose input requires a gradient is a single draw, for whoever averages itself."""
        before, self._single = self._single, True
        try:
            yield
        finally:
            self._single = before

    def _next(self, forwards: int) -> range:
        first = int(self.drawn)
        self.drawn += forwards
        return range(first, first + forwards)

    def _draws(self, x: Tensor, purpose: str, numbers: Sequence[int]) -> Tensor:
        """Logits (S, N, K)."""
        found = [
            self._draw(torch.cat([x] * copies), purpose, number).unflatten(0, (copies, len(x)))
            for number, copies in zip(numbers, self.sizes(), strict=True)
        ]
        return torch.cat(found)

    def _draw(self, x: Tensor, purpose: str, number: int) -> Tensor:
        """Logits (M, K) of images x (M, ...) in the draw of this number."""
        text = f"{self.seed} {purpose} {number}".encode()
        with _seeded(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big"), x.device):
            scores = logits_of(self.model(x))
        require_logits(scores, len(x))
        return scores

    def _compare(self, scores: Tensor) -> None:
        """Warn, once, where draws (S, N, K) that went through the model together, or all, are the same."""
        if self._compared or not scores.numel() or self.samples == 1:
            return
        self._compared = True
        together = scores.detach().split(self.stacked if self.stacked > 1 else len(scores))
        if all(torch.equal(group, group[:1].expand_as(group)) for group in together):
            remedy = "; a model that draws once for a whole batch needs stacked=1" if self.stacked > 1 else ""
            doubt(
                f"the model's {self.samples} draws are all the same: it is not random in this mode (evaluation mode "
                f"switches dropout off), and the attack costs {self.samples} times as much for nothing{remedy}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Expectation:
        """As the base class, with the counter kept on the CPU, where reading it waits for nothing."""
        drawn = self.drawn
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.drawn = drawn
        return self


def randomised(module: nn.Module | None) -> tuple[Expectation, ...]:
    """The parts of a module whose loss is to be averaged over draws."""
    parts = () if module is None else module.modules()
    return tuple(part for part in parts if isinstance(part, Expectation) and part.average == "loss")


@contextmanager
def one_draw(parts: Sequence[Expectation]) -> Iterator[int]:
    """A context in which a forward is a single draw of these parts.

    Yields:
        how many copies of a batch go into one forward.
    """
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.single())
        yield max((min(part.stacked, part.samples) for part in parts), default=1)


def expected(
    parts: Sequence[Expectation],
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]],
    x: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean gradient (N, ...) of the loss over draws, the logits (N, K) of the mean prediction, and the mean loss
    (N,) where each forward has one per example.

    Args:
        parts: the randomised parts of a model; that with the most samples says how many there are.
        evaluate: from points (M, ...) and labels to gradients, logits and losses, in one forward.
        x: points (N, ...).
        labels: indices (N,) or rows (N, K).
    """
    lead = max(parts, key=lambda part: part.samples)
    gradient, found, losses = torch.zeros_like(x), [], []
    with one_draw(parts):
        for copies in lead.sizes():
            each, scores, values = evaluate(torch.cat([x] * copies), torch.cat([labels] * copies))
            assert scores is not None
            gradient.add_(each.unflatten(0, (copies, len(x))).sum(0), alpha=1 / lead.samples)
            found.append(scores.unflatten(0, (copies, len(x))))
            if values is not None and values.ndim == 1:
                losses.append(values.unflatten(0, (copies, len(x))))
    mean = torch.cat(losses).mean(0) if len(losses) == len(found) else None
    return gradient, lead.averaged(torch.cat(found)), mean


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of `device`, and Python's, seeded and afterwards as they were."""
    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        if backend is None:
            yield
            return
        other = backend.get_rng_state(device)
        try:
            with backend.device(device):
                backend.manual_seed(seed)
            yield
        finally:
            backend.set_rng_state(other, device)
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
