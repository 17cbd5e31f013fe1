"""The table of attacks, and the hosts through which every promise is tested on every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from firstorder.attacks import Attack, BoundedAttack, get

EPS = {"Linf": 0.06, "L2": 0.5}
TOLERANCE = 1e-6
"""How far rounding in float32 may carry an example beyond the ball; bounds are exact."""


@dataclass(frozen=True)
class Case:
    """A row: a registered attack, small parameters, and those that make it deterministic.

    `of_images` marks attacks that take (N, C, H, W) only, `population` those whose examples interact, `early` those
    that are done with an example once it is broken; `price` is how many gradients a step takes, where neither the
    number of copies nor that of neighbours says so.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    of_images: bool = False
    population: bool = False
    early: bool = False
    price: int = 0

    @property
    def per_step(self) -> int:
        """Gradients in a step: scale copies, or the iterate and its neighbours."""
        copies = self.parameters.get("m", 1) if "N" not in self.parameters else 1 + self.parameters["N"]
        return self.price or int(copies)

    @property
    def stacked(self) -> bool:
        """Whether several copies of an example go through the model at once."""
        return self.per_step > 1 and self.name != "svre"

    @property
    def cls(self) -> type[Attack]:
        return get(self.name)

    @property
    def fields(self) -> set[str]:
        """The names of its parameters."""
        return {field.name for field in dataclasses.fields(self.cls)}

    @property
    def bounded(self) -> bool:
        """Whether the attack stays within a given ball; the others search for the smallest norm."""
        return issubclass(self.cls, BoundedAttack)

    @property
    def small(self) -> dict[str, Any]:
        """A small radius in every host's words, nothing for an attack that has none; and what is required."""
        return {"eps": 0.05, **self.required()} if self.bounded else {}

    def required(self, shape: tuple[int, ...] = (3, 6, 5)) -> dict[str, Any]:
        """Parameters without which the attack does not run on images of a shape."""
        return {"pool": pool(shape)} if "pool" in self.cls.needs else {}

    def build(self, norm: str | None = None, **more: Any) -> Attack:
        norm = norm or self.cls.norms[0]
        ball = {"norm": norm, "eps": EPS[norm]} if self.bounded else {}
        return self.cls(**{**ball, **self.parameters, **more})


def pool(shape: tuple[int, ...] = (3, 6, 5)) -> Tensor:
    """Images to mix into others."""
    return torch.rand(5, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


DIVERSE: dict[str, Any] = {"steps": 6, "resize_rate": 0.85, "diversity_prob": 0.3}
PLAIN: dict[str, Any] = {"diversity_prob": 0.0}


CASES = [
    Case("fgsm"),
    Case("i-fgsm", {"steps": 4}),
    Case("pgd", {"steps": 4}, {"random_start": False}),
    Case("pqgd", {"steps": 4}, {"random_start": False}),
    Case("apgd", {"steps": 6}, {"random_start": False}),
    Case("mi-fgsm", {"steps": 4}),
    Case("ni-fgsm", {"steps": 4}),
    Case("si-ni-fgsm", {"steps": 4, "m": 3}),
    Case("ngm", {"steps": 4}),
    Case("clipped-ng", {"steps": 4}),
    Case("clipped-ngm", {"steps": 4}),
    Case("di-fgsm", DIVERSE, PLAIN, of_images=True),
    Case("ti-fgsm", {"steps": 4, "len_kernel": 3}, of_images=True),
    Case("ti-dim", {**DIVERSE, "len_kernel": 3}, PLAIN, of_images=True),
    Case("si-ni-dim", {**DIVERSE, "m": 3}, PLAIN, of_images=True),
    Case("si-ni-tim", {"steps": 4, "m": 3, "len_kernel": 3}, of_images=True),
    Case("si-ni-ti-dim", {**DIVERSE, "m": 3, "len_kernel": 3}, PLAIN, of_images=True),
    Case("vmi-fgsm", {"steps": 4, "N": 3}, {"beta": 0.0}),
    Case("vni-fgsm", {"steps": 4, "N": 3}, {"beta": 0.0}),
    Case("clipped-vmi-fgsm", {"steps": 4, "N": 3}, {"beta": 0.0}),
    Case("clipped-di-fgsm", DIVERSE, PLAIN, of_images=True),
    Case("clipped-ti-dim", {**DIVERSE, "len_kernel": 3}, PLAIN, of_images=True),
    Case("clipped-si-dim", {**DIVERSE, "m": 3}, PLAIN, of_images=True),
    Case("clipped-si-ti-dim", {**DIVERSE, "m": 3, "len_kernel": 3}, PLAIN, of_images=True),
    Case(
        "clipped-sia-dim",
        {**DIVERSE, "m": 3, "blocks": 2},
        {**PLAIN, "blocks": 1, "kinds": ("half turn",)},
        of_images=True,
    ),
    Case("clipped-vmi-dim", {**DIVERSE, "N": 3}, {**PLAIN, "beta": 0.0}, of_images=True),
    Case("sia", {"steps": 4, "m": 4, "blocks": 2}, {"blocks": 1, "kinds": ("half turn",)}, of_images=True),
    Case("bsr", {"steps": 6, "m": 12, "max_angle": 8.0}, {"blocks": 1, "max_angle": 0.0}, of_images=True),
    Case("ssa", {"steps": 4, "m": 4}, {"sigma": 0.0, "rho": 0.0}, of_images=True),
    Case("pgn", {"steps": 4, "m": 3}, {"zeta": 0.0}, price=6),
    Case("emi", {"steps": 4, "m": 3}),
    Case("admix", {"steps": 4, "m1": 2, "m2": 2, "pool": pool()}, {"eta": 0.0}, of_images=True, price=4),
    Case("dem", {"steps": 4, "rates": (1.0, 1.4)}, {"rates": (1.0,)}, of_images=True, price=2),
    Case("svre", {"steps": 4}, price=5),
    Case("daa-blob", {"steps": 4, "c": 0.2}, {"random_start": False}, population=True),
    Case("blob-qg", {"steps": 4, "c": 0.2}, {"random_start": False}, population=True),
    Case("ddn", {"steps": 30}),
    Case("anu", {"steps": 30}),
    Case("verdict", {"restarts": 2}, {"random_start": False, "restarts": 1}, early=True),
]
BOUNDED = [case for case in CASES if case.bounded]

ROWS = [(case, norm) for case in CASES for norm in case.cls.norms]
ROW_IDS = [f"{case.name}-{norm}" for case, norm in ROWS]


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a linear head, for non-square images (N, 3, 6, 5), ten classes."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(beta=4))
            self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(240, 10))
            self.features[1].running_mean.uniform_(-0.1, 0.1)
            for parameter in self.parameters():
                parameter.data.mul_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def images(n: int = 6, *, seed: int = 0, shape: tuple[int, ...] = (3, 6, 5)) -> Tensor:
    """Random images in [0, 1], a few pixels at the bounds."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    return (1.2 * x - 0.1).clamp(0, 1)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own classes in evaluation mode: every example starts unbroken."""
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        labels = model(x).argmax(1)
    for module, mode in training:
        module.training = mode
    return labels


def names(attack: Attack) -> list[str]:
    return [f.name for f in dataclasses.fields(attack)]


def through_core(case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    targeted, mask, seed = options.pop("targeted", False), options.pop("mask", None), options.pop("seed", 0)
    generator = torch.Generator(x.device).manual_seed(seed)
    return case.build(**options)(model, x, y, targeted=targeted, mask=mask, generator=generator)


def through_torchattacks(case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import firstorder.torchattacks

    targeted, seed = options.pop("targeted", False), options.pop("seed", 0)
    core = case.build(**options)
    renames = {"restarts": "n_restarts"} if case.name == "apgd" else {}
    words = {renames.get(name, name): getattr(core, name) for name in names(core)}
    attack: Any = getattr(firstorder.torchattacks, case.cls.__name__)(model, seed=seed, **words)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, y)


def classifier(model: nn.Module, **options: Any) -> Any:
    """An ART classifier on the model's device."""
    from art.estimators.classification import PyTorchClassifier

    device = next((p.device.type for p in model.parameters()), "cpu")
    settings = {"clip_values": (0.0, 1.0), "device_type": "cpu" if device == "cpu" else "gpu", **options}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 6, 5), 10, **settings)


def through_art(case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import firstorder.art

    targeted, seed, mask = options.pop("targeted", False), options.pop("seed", 0), options.pop("mask", None)
    core = case.build(**options)
    renames = {"alpha": "eps_step", "steps": "max_iter"}
    hidden = ("random_start", "restarts")
    words = {renames.get(n, n): getattr(core, n) for n in names(core) if n not in hidden}
    if isinstance(core, BoundedAttack):
        words |= {"num_random_init": core.restarts if core.random_start else 0}
    cls = getattr(firstorder.art, case.cls.__name__)
    attack = cls(classifier(model), targeted=targeted, seed=seed, verbose=False, batch_size=100, **words)
    extra = {} if mask is None else {"mask": mask.cpu().numpy()}
    found = attack.generate(x.cpu().numpy(), y.cpu().numpy(), **extra)
    return torch.from_numpy(np.asarray(found)).to(x.device)


def through_foolbox(case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import foolbox

    import firstorder.foolbox

    targeted, seed = options.pop("targeted", False), options.pop("seed", 0)
    core = case.build(**options)
    renames = {"alpha": "abs_stepsize", "decay": "momentum", "init_norm": "init_epsilon"}
    words = {renames.get(n, n): getattr(core, n) for n in names(core) if n != "eps"}
    words |= {"rel_stepsize": None} if "alpha" in names(core) else {}
    attack = getattr(firstorder.foolbox, case.cls.__name__)(seed=seed, **words)
    interface = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    criterion = foolbox.criteria.TargetedMisclassification(y) if targeted else y
    raw, clipped, success = attack(interface, x, criterion, epsilons=getattr(core, "eps", None))
    torch.testing.assert_close(clipped, raw, rtol=0, atol=TOLERANCE)
    assert success.shape == (len(x),)
    assert isinstance(clipped, Tensor)
    return clipped


def through_advlib(case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import firstorder.advlib

    targeted, mask, seed = options.pop("targeted", False), options.pop("mask", None), options.pop("seed", 0)
    core = case.build(**options)
    renames = {"alpha": "absolute_step_size", "random_start": "random_init", "loss": "loss_function"}
    words = {renames.get(n, n): getattr(core, n) for n in names(core)}
    words |= {"norm": {"Linf": float("inf"), "L2": 2}[core.norm]} if isinstance(core, BoundedAttack) else {}
    attack = getattr(firstorder.advlib, case.name.replace("-", "_"))
    generator = torch.Generator(x.device).manual_seed(seed)
    found: Tensor = attack(model, x, y, targeted=targeted, mask=mask, generator=generator, **words)
    return found


HOSTS: dict[str, Callable[..., Tensor]] = {
    "core": through_core,
    "torchattacks": through_torchattacks,
    "art": through_art,
    "foolbox": through_foolbox,
    "advlib": through_advlib,
}
