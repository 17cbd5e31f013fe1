"""The one torchattacks class of every registered attack."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any, ClassVar

import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attack import Attack as HostAttack

from firstorder.attacks import Attack, Model, Prepared, TorchModel, preserved, validation
from firstorder.hosts import Host, signature

HOST = Host(
    first="model",
    order=("eps", "alpha", "steps", "*"),
    extras={"seed": None},
)
"""torchattacks' words are ours."""

HOSTS = {
    "APGD": dataclasses.replace(
        HOST, renames={"restarts": "n_restarts"}, extras={**HOST.extras, "eot_iter": 1, "verbose": False}
    )
}
"""Attacks whose torchattacks class has other words."""

FIXED = {
    "eot_iter": (1, "average a random model's forwards in the model itself"),
    "verbose": (False, "there is nothing to print"),
}
"""torchattacks' parameters that have one value here, and what to do instead of another."""


class TorchattacksAttack(HostAttack):  # type: ignore[misc]
    """An attack with torchattacks' interface.

    Hyper-parameters are attributes and may be changed between calls. The random draws come from a
    generator of the attack's own, seeded with `seed`, or with `torch.initial_seed()` for None;
    it advances from call to call, and global random state is not touched.

    The model may be one that `firstorder.attacks.prepare` returns: its module is then the attack's `model`, which
    decides on success, and its copy gives the gradients, in evaluation mode and for images as they come.

    Raises:
        ValueError: bad parameters, or a model that is no module, when made or given to `set_model`; images or labels
            that are no tensors, and images outside [0, 1], when called. The message names the remedy.
    """

    attack_class: ClassVar[type[Attack]]

    def __init__(self, model: nn.Module | Prepared, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(type(self)).bind(model, *args, **kwargs)
        call.apply_defaults()
        super().__init__(type(self).__name__, model.module if isinstance(model, Prepared) else model)
        self._prepared = model if isinstance(model, Prepared) else None
        self.supported_mode = ["default", "targeted"]
        host = HOSTS.get(self.attack_class.__name__, HOST)
        words = [(field.name, host.word(field.name)) for field in dataclasses.fields(self.attack_class)]
        self._parameters = tuple((name, word) for name, word in words if word is not None)
        for name, value in call.arguments.items():
            if name != host.first:
                setattr(self, name, value)
        self._generator: torch.Generator | None = None
        self._core()

    def set_model(self, model: nn.Module) -> None:
        """As the base class, for modules, whose device and modes it asks for."""
        if not callable(model) or not all(hasattr(model, name) for name in ("training", "train", "eval", "modules")):
            if isinstance(model, Prepared):
                remedy = "make a new attack of it"
            elif isinstance(model, Model):
                remedy = "pass the module it is made of, or an nn.Module whose forward returns logits"
            else:
                remedy = "pass the nn.Module behind it, or one whose forward calls it and returns logits"
            raise ValueError(f"the model is a {type(model).__name__}, and torchattacks needs a module; {remedy}")
        super().set_model(model)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial examples for inputs (N, C, H, W) in [0, 1] and label indices or one-hot rows."""
        images = inputs.detach().clone().to(self.device)
        if self.targeted:
            labels = self.get_target_label(images, labels)
        if labels is None:
            kind, which = ("a targeted", "target") if self.targeted else ("an untargeted", "true")
            raise ValueError(f"labels=None: {kind} attack needs the {which} labels; pass them")
        model = self._attacked()
        generator = self._source(images.device)
        core = self._core()
        try:
            return core(model, images, labels, targeted=self.targeted, generator=generator)
        except ValueError:
            self._require_unit(images)
            raise

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As the base class; modes, buffers and the normalisation flag come back also after an exception."""
        validation.tensor(inputs)
        if labels is not None and not isinstance(labels, Tensor):
            raise ValueError(
                f"the labels are a {type(labels).__name__}; pass a tensor of indices (N,) or one-hot rows (N, K), "
                "for example torch.as_tensor(labels)"
            )
        applied = self._normalization_applied
        with preserved(self.model, evaluate=False):
            try:
                adversarial: Tensor = super().__call__(inputs, labels, *args, **kwargs)
            finally:
                self._set_normalization_applied(applied)
        return adversarial

    def __setattr__(self, name: str, value: object) -> None:
        """As the base class, which looks for nested attacks in every value and keeps it in a list for good.

        Only values that can hold an attack are shown to it: models are not kept alive, and the cost
        of setting an attribute does not grow with the age of the process.
        """
        if isinstance(value, HostAttack | list | dict):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; the mode of every submodule comes back."""
        with preserved(self.model, evaluate=False):
            return super().save(*args, **kwargs)

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Logits in evaluation mode; every submodule's mode comes back, not only the model's."""
        with preserved(self.model), torch.no_grad():
            logits: Tensor = self.get_logits(inputs)
        return logits

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """A uniformly drawn class other than the label (or, without labels, the prediction), shape (N,)."""
        outputs = self.get_output_with_eval_nograd(inputs)
        labels = outputs.argmax(1) if labels is None else validation.indices(labels, len(outputs), outputs.device)
        classes, generator = outputs.shape[1], self._source(outputs.device)
        shift = torch.randint(1, classes, labels.shape, generator=generator, device=outputs.device)
        targets: Tensor = (labels + shift) % classes
        return targets

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """As the base class, for one-hot rows (N, K) too."""
        if labels is not None:
            labels = validation.indices(labels, len(inputs), inputs.device)
        targets: Tensor = super().get_least_likely_label(inputs, labels)
        return targets

    def _require_unit(self, images: Tensor) -> None:
        """Require images in [0, 1], in the words of this host's remedy."""
        low, high = images.amin(), images.amax()
        slack = validation.BOUNDS_TOLERANCE
        if low >= -slack and high <= 1 + slack:
            return
        if self._normalization_applied is None:
            said, remedy = "", "rescale them, or for normalised images call attack.set_normalization_used(mean, std)"
        else:
            said, remedy = ", their normalisation undone,", "give set_normalization_used the mean and std they have"
        raise ValueError(f"the images{said} span [{low:g}, {high:g}], outside the bounds [0, 1]; {remedy}") from None

    def _attacked(self) -> Model:
        """What is attacked: the host's logits, or the prepared model."""
        if self._prepared is None:
            return TorchModel(self.get_logits, module=self.model, mode="keep")
        if self.model is not self._prepared.module:
            raise ValueError(
                "the attack's model was replaced after it was prepared; make a new attack of the new model"
            )
        if self._normalization_applied is False:
            raise ValueError("a prepared model takes images in [0, 1]; prepare a module that normalises them itself")
        if self._model_training:
            raise ValueError("a prepared model is in evaluation mode; attack the module itself in training mode")
        return self._prepared

    def _core(self) -> Attack:
        """The attack with the current hyper-parameters."""
        host = HOSTS.get(self.attack_class.__name__, HOST)
        for name, (only, remedy) in FIXED.items():
            if name in host.extras and getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; leave it {only}: {remedy}")
        return self.attack_class(**{name: getattr(self, word) for name, word in self._parameters})

    def _source(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = validation.seeded(self.seed, device)
        return self._generator


@cache
def host_class(attack: type[Attack]) -> type[TorchattacksAttack]:
    """The torchattacks class of a registered attack; the same class at every call."""
    peer = getattr(torchattacks, attack.__name__, None)
    host = HOSTS.get(attack.__name__, HOST)
    parameters = signature(host, attack, peer if isinstance(peer, type) else None)
    return type(
        attack.__name__,
        (TorchattacksAttack,),
        {
            "__module__": "firstorder.torchattacks",
            "__doc__": f"{inspect.getdoc(attack)}\n\n{inspect.getdoc(TorchattacksAttack)}",
            "__signature__": parameters,
            "attack_class": attack,
        },
    )
