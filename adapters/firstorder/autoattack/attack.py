"""AutoAttack whose list of attacks may name any registered attack."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import Attack, BoundedAttack, TorchModel, broken, get, predicted, registry, validation
from firstorder.attacks.inspection import doubt
from firstorder.attacks.outputs import logits_of, require_logits
from firstorder.attacks.verdicts import UNDECIDED
from firstorder.autoattack.classic import NAMES, VERSIONS, ClassicAutoAttack
from firstorder.autoattack.conditions import asked_in, evaluated, fitted
from firstorder.autoattack.counting import counting
from firstorder.autoattack.record import CLEAN, Owner, Record, fingerprint
from firstorder.hosts.identity import identify

AUTOATTACK = "autoattack"
"""In a list of attacks, the standard four with the budgets of version="standard"."""

TOLERANCE = 1e-6
"""How far rounding may carry an example beyond the ball, in half precision one unit of it."""

FIRST: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "Linf": {"pqgd": {}, "pgd": {}},
    "L2": {"anu": {"annealed": False}, "pgd": {}},
}
"""The registered attacks that version="firstorder" runs before AutoAttack's four, with the recommended options."""

BUDGETS = ("n_iter", "n_queries", "n_target_classes", "eot_iter")
"""Settings of AutoAttack's own attacks that a user may change and that a run leaves alone."""

PROBED = 8
"""How many images tell whether a model is the one that a state is of."""

STEPS = 40
"""Steps of a registered attack where none are given."""

logger = logging.getLogger("auto-attack")


class _Attacked(NamedTuple):
    """An attack's examples (N, ...), the classes (N,) it saw for them, which it broke and which are doubtful, (N,)."""

    adversarial: Tensor
    classes: Tensor
    broken: Tensor
    doubtful: Tensor


class AutoAttack(ClassicAutoAttack):
    """AutoAttack with the attacks of the registry among its own (Croce & Hein 2020).

    Takes AutoAttack's classic arguments. `attacks_to_run` (with version="custom", which is implied by a list)
    mixes its names with registry names: ["pqgd", "apgd-ce", "si-ni-fgsm", "apgd-t"]; "autoattack" among them
    means the standard four at their standard budgets. version="standard",
    "plus" and "rand" are AutoAttack's own. Each attack gets the examples that no attack before it broke.

    version="firstorder" puts registered attacks before the standard four, and breaks whatever these break alone:
    as their random draws depend on the batch, they get the batches they would get without the others.

    Fewer than ten classes do for every version: there are no more targets than other classes, and where DLR lacks the
    logits it divides by (untargeted with two classes, targeted with two or three), its numerator is the loss.

    Args:
        device: where batches are moved to; the model's by default, and for a model without tensors a GPU if there is
            one.
        parameters: registry name to hyper-parameters of that attack other than eps and norm. Iterative attacks
            take 40 steps by default.

    Attributes:
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
    ) -> None:
        validation.choice("norm", norm, ("Linf", "L2", "L1"))
        validation.number("eps", eps, low=0, above=True)
        names = list(attacks_to_run)
        version = version or ("custom" if names else "standard")
        validation.choice("version", version, (*VERSIONS, "firstorder", "custom"))
        if names and version != "custom":
            raise ValueError(f"attacks_to_run={names} has no effect with version={version!r}; leave one of them out")
        standard = version == "firstorder" or AUTOATTACK in names
        own, rest = ("standard", ()) if standard else (version, names)
        super().__init__(model, norm, eps, seed, verbose, rest, own, is_tf_model, device, log_path)
        self.version = version
        if AUTOATTACK in names:
            self.attacks_to_run = [n for name in names for n in (self.attacks_to_run if name == AUTOATTACK else [name])]
        if version == "firstorder":
            if norm not in FIRST:
                raise ValueError(f"version='firstorder' has no attack for norm={norm!r}; use version='standard'")
            self.attacks_to_run = [*FIRST[norm], *self.attacks_to_run]
        self.parameters = {name: dict(words) for name, words in (parameters or {}).items()}
        for name in self.parameters.keys() - set(self.attacks_to_run):
            raise ValueError(f"parameters[{name!r}]: that attack is not run; the list is {self.attacks_to_run}")
        for name, words in self.parameters.items():
            if words.keys() & {"eps", "norm"}:
                raise ValueError(f"parameters[{name!r}] sets eps or norm, which are the evaluation's; leave them out")
        if version == "firstorder":
            chosen = FIRST[norm].items()
            self.parameters |= {name: {**words, **self.parameters.get(name, {})} for name, words in chosen}
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
                examples whose logits are NaN or infinite, or a state of another evaluation.

        Warns:
            RobustnessWarning: examples met NaN or infinite logits and are not broken, see `Record.doubtful`; or the
                model is in training mode, and evaluated in evaluation mode.
        """
        self._check_names()
        x = validation.tensor(x_orig).contiguous()
        validation.images(x, x.new_zeros(()), x.new_ones(()))
        y = validation.indices(y_orig, len(x), x.device)
        if not self.attacks_to_run:
            raise ValueError("attacks_to_run=[] runs nothing; name attacks")
        own = [name for name in self.attacks_to_run if name in NAMES]
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
        """The accuracy on examples (N, C, H, W) with labels (N,), as AutoAttack's; the model stays as it is."""
        with evaluated(self._module()):
            return float(super().clean_accuracy(x_orig, y_orig, bs))

    def get_logits(self, x: Tensor) -> Tensor:
        """The model's logits (N, K) at x (N, C, H, W)."""
        return logits_of(self.model(x))

    def _evaluate(self, x: Tensor, y: Tensor, bs: int, path: Path | None) -> Record:
        """Run what the record on disk, if there is one, lacks."""
        names = list(self.attacks_to_run)
        if path is None:
            record, owner = self._start(x, y, bs), None
        else:
            images = x[: min(bs, PROBED)].to(self.device)
            owner = Owner(self._key(x, y, bs), identify(self.model, images, logits=self.get_logits))
            record = Record.load(path, owner) or self._start(x, y, bs)
            record.save(path, owner, names)
        for name in names:
            if name not in record.run and bool(self._standing(name, record).any()):
                self._attack(name, x, y, bs, record)
                if path is not None and owner is not None:
                    record.save(path, owner, names)
        return record

    def _key(self, x: Tensor, y: Tensor, bs: int) -> str:
        """A digest of what decides the outcome beside the model."""
        parts = {"apgd": self.apgd, "apgd-t": self.apgd_targeted, "fab": self.fab, "square": self.square}
        budgets = [(name, word, getattr(part, word, None)) for name, part in parts.items() for word in BUDGETS]
        facts = (self.norm, self.epsilon, self.seed, self.version, self.attacks_to_run, bs, budgets)
        return fingerprint([x, y], *facts, sorted(self.parameters.items()))

    def _start(self, x: Tensor, y: Tensor, bs: int) -> Record:
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

    def _standing(self, name: str, record: Record) -> Tensor:
        """The examples that the attack is run on, shape (N,)."""
        if self.version != "firstorder" or name not in NAMES:
            return record.robust
        chosen = torch.tensor([by != CLEAN for by in record.broken_by])
        chosen[record.by_autoattack] = False
        return chosen

    def _attack(self, name: str, x: Tensor, y: Tensor, bs: int, record: Record) -> None:
        """Run one attack on the examples not yet broken and enter what it finds."""
        index = self._standing(name, record).nonzero()[:, 0]
        here, labels = x[index.to(x.device)], y[index.to(x.device)]
        own = name in NAMES
        with counting(self._module(), here.to(self.device), look=own) as counts:
            found = (self._original if own else self._registered)(name, here, labels, bs)
        adversarial, classes, hits, doubtful = found
        again = self._predict(adversarial, bs).cpu()
        verified = broken(again, labels.cpu()) & self._feasible(adversarial, here)
        doubtful = doubtful | counts.doubtful.cpu() | (again == UNDECIDED)
        hits &= again != UNDECIDED
        record.unverified[name] = int((hits & ~verified).sum())
        if record.unverified[name]:
            logger.warning("%s: %d examples could not be verified", name, record.unverified[name])
        if not own:
            hits &= verified
            classes = again
        else:
            record.by_autoattack.extend(index[hits].tolist())
        record.met_nan.extend(index[doubtful].tolist())
        hits &= record.robust[index]
        hit = index[hits]
        record.adversarial[hit] = adversarial[hits.to(adversarial.device)].cpu()
        record.labels[hit] = classes[hits]
        for i in hit.tolist():
            record.broken_by[i] = name
        record.run.append(name)
        record.forwards[name], record.gradients[name] = counts.forwards, counts.gradients
        record.accuracy[name] = float(record.robust.float().mean())
        logger.info("robust accuracy on all examples after %s: %.2f %%", name, 100 * record.accuracy[name])
        if name == "square" and len(hit):
            logger.warning("Square Attack lowered the robust accuracy: the model may mask its gradients")

    def _original(self, name: str, x: Tensor, y: Tensor, bs: int) -> _Attacked:
        """One of AutoAttack's attacks, in its own loop; its verdict is that of its own forward.

        An example that is misclassified without being changed is not broken: the loop begins with a clean pass,
        which a randomised model may fail.
        """
        names = self.attacks_to_run
        if "fab-t" in names[: names.index(name)] and name == "fab":
            self.fab.n_restarts = 1  # what fab-t leaves behind, also where it ran before an interruption
        try:
            self.attacks_to_run = [name]
            with asked_in(self, x.dtype):
                adversarial, labels = super().run_standard_evaluation(x.float(), y, bs, True)
        finally:
            self.attacks_to_run = names
        labels = labels.cpu()
        changed = (adversarial != x.float()).flatten(1).any(1)
        adversarial = torch.where(changed.reshape(-1, *[1] * (x.ndim - 1)), adversarial.to(x.dtype), x)
        changed = changed.cpu()
        return _Attacked(adversarial, labels, (labels != y.cpu()) & changed, torch.zeros_like(changed))

    def _registered(self, name: str, x: Tensor, y: Tensor, bs: int) -> _Attacked:
        attack = self._build(name)
        model = TorchModel(self.get_logits, module=self._module(), mode="keep")
        generator = torch.Generator(self.device).manual_seed(int(self.get_seed()))
        found, doubtful = [], []
        for part, labels in zip(x.split(bs), y.split(bs), strict=True):
            result = attack.run(model, part.to(self.device), labels.to(self.device), generator=generator)
            found.append(result.adversarial.to(x.device))
            assert result.doubtful is not None
            doubtful.append(result.doubtful.cpu())
        adversarial = torch.cat(found)
        if not isinstance(attack, BoundedAttack):  # a larger perturbation than eps is no failure, but none of ours
            inside = self._feasible(adversarial, x).to(x.device)
            adversarial = torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), adversarial, x)
        labels = self._predict(adversarial, bs).cpu()
        return _Attacked(adversarial, labels, broken(labels, y.cpu()), torch.cat(doubtful))

    def _build(self, name: str) -> Attack:
        cls = get(name)
        fields = {field.name for field in dataclasses.fields(cls)}
        if self.norm not in cls.norms:
            raise ValueError(f"{name} knows {' and '.join(cls.norms)}, not norm={self.norm!r}; leave it out")
        words: dict[str, Any] = {"steps": STEPS} if "steps" in fields else {}
        if issubclass(cls, BoundedAttack):
            words |= {"eps": self.epsilon, "norm": self.norm}
        return cls(**(words | self.parameters.get(name, {})))

    def _check_names(self) -> None:
        for name in self.attacks_to_run:
            if name in NAMES:
                continue
            try:
                self._build(name)
            except ValueError as error:
                if name in registry().attacks:
                    raise
                raise ValueError(f"{error}; AutoAttack's own are {', '.join(NAMES)}") from None

    def _feasible(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Whether each example is in the ball and the bounds, shape (N,), on the CPU."""
        wide = torch.promote_types(x.dtype, torch.float32)
        delta, flat = (adversarial.to(wide) - x.to(wide)).flatten(1), adversarial.flatten(1)
        rounding = max(TOLERANCE, torch.finfo(x.dtype).eps / 4)  # of numbers up to 1
        order = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[self.norm]
        near = torch.linalg.vector_norm(delta, order, dim=1) <= self.epsilon + rounding
        feasible: Tensor = near & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
        return feasible.cpu()

    def _predict(self, x: Tensor, bs: int) -> Tensor:
        """The predicted classes (N,), `UNDECIDED` where the logits are NaN or infinite."""
        with torch.no_grad():
            return torch.cat([predicted(self.get_logits(part.to(self.device))) for part in x.split(bs)])

    def _classes(self, x: Tensor) -> int:
        with torch.no_grad():
            scores = self.get_logits(x[:1].to(self.device))
        require_logits(scores, len(x[:1]))
        return scores.shape[1]

    def _module(self) -> nn.Module | None:
        return self.model if isinstance(self.model, nn.Module) else None
