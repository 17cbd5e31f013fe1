"""AutoAttack whose list of attacks may name any registered attack."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import broken, validation
from firstorder.attacks.inspection import doubt
from firstorder.attacks.outputs import require_logits
from firstorder.attacks.verdicts import UNDECIDED
from firstorder.autoattack import audit as audits
from firstorder.autoattack import versions
from firstorder.autoattack.classic import NAMES
from firstorder.autoattack.conditions import evaluated, fitted
from firstorder.autoattack.counting import counting
from firstorder.autoattack.population import Parts
from firstorder.autoattack.record import CLEAN, Owner, Record, fingerprint
from firstorder.autoattack.running import Running
from firstorder.hosts.identity import identify

BUDGETS = ("n_iter", "n_queries", "n_target_classes", "eot_iter")
"""Settings of AutoAttack's own attacks that a user may change and that a run leaves alone."""

PROBED = 8
"""How many images show whether a model is the one that a state is of."""

logger = logging.getLogger("auto-attack")


class AutoAttack(Running):
    """AutoAttack with the attacks of the registry among its own (Croce & Hein 2020).

    Takes AutoAttack's classic arguments. `attacks_to_run` (with version="custom", which is implied by a list)
    mixes its names with registry names: ["pqgd", "apgd-ce", "si-ni-fgsm", "apgd-t"]; "autoattack" among them
    means the standard four at their standard budgets. version="standard",
    "plus" and "rand" are AutoAttack's own. Each attack gets the examples that no attack before it broke.

    version="firstorder" puts registered attacks before the standard four, and breaks whatever these break alone:
    as their random draws depend on the batch, they get the batches they would get without the others.

    version="fast" runs `Verdict`: every batch by itself first, then its closing stages once over all that is left of
    the data set, nearest to success first, until 20 in a row stay robust. So does "verdict" in a list, and
    parameters={"verdict": {"population": False}} gives the closing stages to everyone that is left. See
    docs/verdict.md.

    Fewer than ten classes do for every version: there are no more targets than other classes, and where DLR lacks the
    logits it divides by (untargeted with two classes, targeted with two or three), its numerator is the loss.

    Args:
        device: where batches are moved to; the model's by default, and for a model without tensors a GPU if there is
            one.
        parameters: registry name to hyper-parameters of that attack other than eps and norm. Iterative attacks
            take 40 steps by default.
        effort: of the verdict, 0, 1 or 2; None leaves it at 1.
        audit: run AutoAttack's standard four on a random sample of so many examples that the verdict gave up. What
            they break counts as broken, and reopens the closing stages for all that were given up, after which a
            fresh sample is drawn. `Record.bound` says what AutoAttack would still find. None does without.

    Attributes:
        auditor: with `audit` the `AutoAttack` that is run on the sample.
        record: after an evaluation, the worst case per example, what broke it and at what price.
    """

    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str | None = None,
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
        *,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        effort: int | None = None,
        audit: int | None = None,
    ) -> None:
        validation.choice("norm", norm, ("Linf", "L2", "L1"))
        validation.number("eps", eps, low=0, above=True)
        names = list(attacks_to_run)
        version = versions.named(version, names, norm)
        own, rest = versions.base(version, names)
        super().__init__(model, norm, eps, seed, verbose, rest, own, is_tf_model, device, log_path)
        self.version = version
        self.parameters = versions.settled(version, norm, parameters, effort)
        self.attacks_to_run = versions.listed(version, names, norm, self.attacks_to_run)
        versions.check(self.parameters, self.attacks_to_run, audit)
        self.audit, self.auditor = audit, None
        if audit is not None:
            self.auditor = AutoAttack(model, norm, eps, seed, verbose, device=self.device, log_path=log_path)
        self.record: Record | None = None
        self._check_names()

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Adversarial examples (N, ...), x itself where none was found; with the predicted labels if asked for.

        Args:
            x_orig: clean examples in [0, 1], shape (N, C, H, W). AutoAttack's own attacks compute in float32, on
                float64 examples too; the model gets them in the dtype of x_orig.
            y_orig: labels (N,).
            bs: examples per batch.
            return_labels: return (adversarial, predicted labels).
            state_path: where the state is kept after every attack, in AutoAttack's own format, with the examples
                in a file beside it. An interrupted evaluation called again goes on from there.

        Raises:
            ValueError: bad examples or names, float16 or bfloat16 examples for AutoAttack's own attacks, clean
                examples whose logits are NaN or infinite, or a state of another evaluation or one that is damaged.

        Warns:
            RobustnessWarning: examples met NaN or infinite logits and are not broken, see `Record.doubtful`; or the
                model is in training mode, and evaluated in evaluation mode.
            UserWarning: what an interrupted verdict kept of a batch is damaged, and computed anew.
        """
        self._check_names()
        x = validation.tensor(x_orig).contiguous()
        validation.count("bs", bs)
        validation.images(x, x.new_zeros(()), x.new_ones(()), remedy=validation.RESCALE)
        y = validation.indices(y_orig, len(x), x.device)
        if not self.attacks_to_run:
            raise ValueError("attacks_to_run=[] runs nothing; name attacks")
        own = [name for name in self.attacks_to_run if name in NAMES]
        own += [] if self.auditor is None else self.auditor.attacks_to_run
        if own and x.dtype.itemsize < 4:
            raise ValueError(
                f"the images are {x.dtype}, in which the examples of {', '.join(own)} would leave the ball by "
                f"rounding; pass x.float(), and if the model needs {x.dtype} let its forward begin with "
                f"x = x.to({x.dtype})"
            )
        with evaluated(self._module()):
            classes = self._classes(x)
            validation.classes(y, classes)
            with fitted(self, classes), self._logging():
                self.record = record = self._evaluate(x, y, bs, None if state_path is None else Path(state_path))
        doubtful = int(record.doubtful.sum())
        if doubtful:
            doubt(
                f"{doubtful} of {len(x)} examples met NaN or infinite logits or gradients; they are neither broken nor "
                "robust for sure, and count as robust"
            )
        adversarial = record.adversarial.to(x.device)
        return (adversarial, record.labels.to(x.device)) if return_labels else adversarial

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The accuracy on examples (N, C, H, W) with labels (N,), as AutoAttack's; the model stays as it is.

        Raises:
            ValueError: no examples, examples outside [0, 1], labels that are none of the model's classes, or a batch
                size that is none.
        """
        validation.count("bs", bs)
        if not len(x_orig):
            raise ValueError("there are no images, so no accuracy; pass at least one")
        validation.images(x_orig, x_orig.new_zeros(()), x_orig.new_ones(()), remedy=validation.RESCALE)
        y = validation.indices(y_orig, len(x_orig), x_orig.device)
        with evaluated(self._module()):
            validation.classes(y, self._classes(x_orig))
            return float(super().clean_accuracy(x_orig, y, bs))

    def _evaluate(self, x: Tensor, y: Tensor, bs: int, path: Path | None) -> Record:
        """Run what the record on disk, if there is one, lacks."""
        names = list(self.attacks_to_run)
        if path is None:
            record, owner = self._start(x, y, bs), None
        else:
            images = x[: min(bs, PROBED)].to(self.device)
            owner = Owner(self._key(x, y, bs), identify(self.model, images, logits=self.get_logits))
            record = Record.load(path, owner) or self._start(x, y, bs, path)

        def save() -> None:
            if path is not None and owner is not None:
                record.save(path, owner, names)

        def attack(name: str) -> None:
            parts = self._parts(name, path)
            self._attack(name, x, y, bs, record, parts)
            save()
            parts.clear()

        save()
        for name in names:
            if name not in record.run and bool(self._unbroken(name, record).any()):
                attack(name)
        if self.audit is not None and record.verdict is not None:
            audits.rounds(record, self.audit, int(self.get_seed()), attack=attack, save=save)
        return record

    def _key(self, x: Tensor, y: Tensor, bs: int) -> str:
        """A digest of what decides the outcome beside the model."""
        parts = {"apgd": self.apgd, "apgd-t": self.apgd_targeted, "fab": self.fab, "square": self.square}
        budgets = [(name, word, getattr(part, word, None)) for name, part in parts.items() for word in BUDGETS]
        facts = (self.norm, self.epsilon, self.seed, self.version, self.attacks_to_run, bs, budgets)
        return fingerprint([x, y], *facts, sorted(self.parameters.items()))

    def _parts(self, name: str, path: Path | None) -> Parts:
        """Where an attack keeps what it has found so far."""
        return Parts(None if path is None else path.with_name(f"{path.name}.{name.replace(' ', '-')}"))

    def _start(self, x: Tensor, y: Tensor, bs: int, path: Path | None = None) -> Record:
        for name in (*self.attacks_to_run, *audits.NAMES, audits.REOPENED):
            self._parts(name, path).clear()  # of an evaluation whose state was deleted
        labels = self._predict(x, bs).cpu()
        undecided = int((labels == UNDECIDED).sum())
        if undecided:
            raise ValueError(
                f"the model's logits are NaN or infinite for {undecided} of {len(x)} clean examples; check its "
                "weights, or leave these examples out"
            )
        wrong = labels != y.cpu()
        record = Record(x.cpu().clone(), labels, [CLEAN if bad else None for bad in wrong.tolist()])
        record.accuracy[CLEAN] = float((~wrong).float().mean())
        return record

    def _unbroken(self, name: str, record: Record) -> Tensor:
        """The examples that the attack is run on, shape (N,)."""
        if name in audits.NAMES:
            return record.sampled
        if name == audits.REOPENED:
            return record.given_up
        if name not in NAMES:  # a verdict by itself is that of any host, which gets misclassified images too
            return torch.ones_like(record.robust) if self._is_verdict(name) and not record.run else record.robust
        if self.version != "firstorder":
            return record.robust
        chosen = torch.tensor([by != CLEAN for by in record.broken_by])
        chosen[record.by_autoattack] = False
        return chosen

    def _attack(self, name: str, x: Tensor, y: Tensor, bs: int, record: Record, parts: Parts) -> None:
        """Run one attack on the examples not yet broken and enter what it finds."""
        index = self._unbroken(name, record).nonzero()[:, 0]
        here, labels = x[index.to(x.device)], y[index.to(x.device)]
        own = name in (*NAMES, *audits.NAMES)
        with counting(self._module(), here.to(self.device), look=name in NAMES) as counts:
            found = self._found(name, index, here, labels, bs, record, parts)
        adversarial, classes, hits, doubtful = found.adversarial, found.classes, found.broken, found.doubtful
        again = self._predict(adversarial, bs).cpu()
        verified = broken(again, labels.cpu()) & self._feasible(adversarial, here)
        doubtful = doubtful | counts.doubtful.cpu() | (again == UNDECIDED)
        hits = hits & (again != UNDECIDED)
        record.unverified[name] = int((hits & ~verified).sum())
        if record.unverified[name]:
            logger.warning("%s: %d examples could not be verified", name, record.unverified[name])
        if not own:
            hits = hits & verified
            classes = again
        else:
            record.by_autoattack.extend(index[hits].tolist())
        record.met_nan.extend(index[doubtful].tolist())
        hits = hits & record.robust[index]
        record.enter(name, index[hits], adversarial[hits.to(adversarial.device)], classes[hits])
        record.forwards[name], record.gradients[name] = found.passes or (counts.forwards, counts.gradients)
        if found.verdict is not None:
            record.add(found.verdict, index)
        logger.info("robust accuracy on all examples after %s: %.2f %%", name, 100 * record.accuracy[name])
        if name == "square" and bool(hits.any()):
            logger.warning("Square Attack lowered the robust accuracy: the model may mask its gradients")

    def _classes(self, x: Tensor) -> int:
        with torch.no_grad():
            scores = self.get_logits(x[:1].to(self.device))
        require_logits(scores, len(x[:1]))
        return scores.shape[1]
