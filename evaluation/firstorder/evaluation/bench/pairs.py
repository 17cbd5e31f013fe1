"""What a step of an attack costs beyond the forward and backward that it cannot avoid.

The bare step is one forward, the cross-entropy and one backward by the input. Every run of a contender
is divided by the mean of the bare runs right before and after it, and the median over rounds is reported,
so that a machine whose speed drifts does not decide the comparison. The bare step competes with itself:
its row is the noise. The family "translation" is divided by MI-FGSM instead.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import ANU, MIFGSM, PGD, TIFGSM, Model, prepare, validation

Run = Callable[[], object]

FAMILIES = ("bounded", "minimum-norm", "transfer", "translation", "population", "prepared")
"""What can be compared: attacks within a ball, those that search for the smallest perturbation, those on transformed
gradients, the smoothed gradient alone, those whose examples interact, and attacks on prepared models.
"""

BARE, UNSMOOTHED = "bare step", "firstorder MIFGSM"


def baseline(family: str) -> str:
    """The contender that a family's times are divided by."""
    return UNSMOOTHED if family == "translation" else BARE


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time per step of a contender over the bare step's: median, lowest and highest round."""

    name: str
    median: float
    low: float
    high: float


def per_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    family: str = "bounded",
    steps: int = 20,
    rounds: int = 15,
    threads: int = 1,
    seed: int = 0,
) -> list[Cost]:
    """Time the attacks of `family` through every host on x (N, C, H, W) in [0, 1] with labels y (N,).

    Sets torch's thread count for the measurement and restores it.

    Raises:
        ValueError: no such family.
    """
    validation.choice("family", family, FAMILIES)
    runs = contenders(model, x, y, family=family, steps=steps)
    return paired(runs, baseline(family), rounds=rounds, threads=threads, seed=seed)


def paired(runs: Mapping[str, Run], baseline: str, *, rounds: int, threads: int, seed: int = 0) -> list[Cost]:
    """Time `runs` against the one called `baseline`, which runs before and after every other."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        order, shuffle = list(runs), random.Random(seed)
        for run in runs.values():
            run()
        for _ in range(rounds):
            shuffle.shuffle(order)
            bare = _seconds(runs[baseline])
            for name in order:
                own, after = _seconds(runs[name]), _seconds(runs[baseline])
                ratios[name].append(2 * own / (bare + after))
                bare = after
    finally:
        torch.set_num_threads(before)
    return [Cost(name=n, median=statistics.median(r), low=min(r), high=max(r)) for n, r in ratios.items()]


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def contenders(model: nn.Module, x: Tensor, y: Tensor, *, family: str, steps: int) -> dict[str, Run]:
    """Runs of `steps` steps by name, the family's baseline among them."""
    model.eval()

    def bare() -> None:
        for _ in range(steps):
            point = x.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(point), y), point)

    families = {
        "bounded": _bounded,
        "minimum-norm": _minimum_norm,
        "transfer": _transfer,
        "translation": _translation,
        "population": _population,
        "prepared": _prepared,
    }
    return {BARE: bare, **families[family](model, x, y, steps)}


def _bounded(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """PGD, NI-FGSM and PQGD at eps 0.3, alpha 0.01 without random start."""
    import art.attacks.evasion
    import torchattacks
    from art.estimators.classification import PyTorchClassifier

    import firstorder.art
    import firstorder.torchattacks

    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), model(x[:1]).shape[1], clip_values=(0, 1), device_type="cpu"
    )
    words = {"eps": 0.3, "alpha": 0.01, "steps": steps}
    art_words = {"eps": 0.3, "eps_step": 0.01, "max_iter": steps, "batch_size": len(x), "verbose": False}
    images, labels = x.numpy(), np.eye(estimator.nb_classes, dtype=np.float32)[y.numpy()]
    torch_attacks = {
        "firstorder.torchattacks PGD": firstorder.torchattacks.PGD(model, **words, random_start=False),
        "firstorder.torchattacks NIFGSM": firstorder.torchattacks.NIFGSM(model, **words),
        "firstorder.torchattacks PQGD": firstorder.torchattacks.PQGD(model, **words, random_start=False),
        "torchattacks PGD": torchattacks.PGD(model, **words, random_start=False),
        "torchattacks NIFGSM": torchattacks.NIFGSM(model, **words),
    }
    art_attacks = {
        "firstorder.art PGD": firstorder.art.PGD(estimator, **art_words),
        "art ProjectedGradientDescent": art.attacks.evasion.ProjectedGradientDescent(estimator, **art_words),
    }
    return {name: partial(attack, x, y) for name, attack in torch_attacks.items()} | {
        name: partial(attack.generate, images, labels) for name, attack in art_attacks.items()
    }


def _minimum_norm(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """DDN and ANU, and the DDN of foolbox and of adversarial-library where they are installed."""
    import firstorder.torchattacks

    runs: dict[str, Run] = {
        "firstorder.torchattacks DDN": partial(firstorder.torchattacks.DDN(model, steps=steps), x, y),
        "firstorder.torchattacks ANU": partial(firstorder.torchattacks.ANU(model, steps=steps), x, y),
    }
    if find_spec("foolbox") is not None:
        import foolbox

        interface = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        criterion = foolbox.criteria.Misclassification(y)
        runs["foolbox DDNAttack"] = partial(foolbox.attacks.DDNAttack(steps=steps).run, interface, x, criterion)
    if find_spec("adv_lib") is not None:
        from adv_lib.attacks import ddn

        runs["adversarial-library ddn"] = partial(ddn, model, x, y, steps=steps, levels=None)
    return runs


def _transfer(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """SI-NI-FGSM with 5 copies, TI-FGSM and VMI-FGSM with 5 neighbours, in both packages."""
    import torchattacks

    import firstorder.torchattacks

    words: dict[str, dict[str, object]] = {
        "SINIFGSM": {"m": 5},
        "TIFGSM": {"len_kernel": 7, "diversity_prob": 0.0},
        "VMIFGSM": {"N": 5},
    }
    if x.shape[1] != 3:
        del words["TIFGSM"]  # torchattacks' needs three channels
    hosts = {"firstorder.torchattacks": firstorder.torchattacks, "torchattacks": torchattacks}
    return {
        f"{host} {name}": partial(getattr(module, name)(model, eps=0.3, alpha=0.01, steps=steps, **own), x, y)
        for name, own in words.items()
        for host, module in hosts.items()
    }


def _translation(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """MI-FGSM, and TI-FGSM, whose step is the same but for the convolution of the gradient."""
    words = {"eps": 0.3, "alpha": 0.01, "steps": steps}
    return {
        UNSMOOTHED: partial(MIFGSM(**words), model, x, y),  # type: ignore[arg-type]
        "firstorder TIFGSM": partial(TIFGSM(**words), model, x, y),  # type: ignore[arg-type]
        "firstorder TIFGSM, len_kernel 15": partial(TIFGSM(**words, len_kernel=15), model, x, y),  # type: ignore[arg-type]
    }


def _population(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """PGD, and the same steps along an interacting population."""
    import firstorder.torchattacks

    words = {"eps": 0.3, "alpha": 0.01, "steps": steps, "random_start": False}
    return {
        f"firstorder.torchattacks {name}": partial(getattr(firstorder.torchattacks, name)(model, **words), x, y)
        for name in ("PGD", "PQGD", "DAABLOB", "BLOBQG")
    }


def _prepared(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Run]:
    """PGD and ANU on the model and on prepared copies of it."""
    interfaces: dict[str, nn.Module | Model] = {
        "": model,
        ", prepared": prepare(model, x[:8]),
        ", prepared, auto": prepare(model, x[:8], precision="auto"),
    }
    return {
        f"firstorder {attack.__class__.__name__}{name}": partial(attack, interface, x, y)
        for attack in (PGD(eps=0.3, alpha=0.01, steps=steps), ANU(steps=steps))
        for name, interface in interfaces.items()
    }
