"""Adversarial training through Lightning Fabric: devices, processes, mixed precision, exact resumption.

    recipe = Recipe(
        objective=Vanilla(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)),
        method=ENGM,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        judge=PGD(eps=8 / 255, alpha=0.8 / 255, steps=20, loss=Margin(), early_stop=True),
        epochs=100,
        batch_size=128,
    )
    fabric = make(accelerator="gpu", devices=2, precision="bf16-mixed")
    Trainer(fabric, recipe, "runs/engm").fit(model, train, validation)

A training that was stopped goes on, and ends with the weights of one that was not.
"""

from __future__ import annotations

from firstorder.attacks.distribution import pip_install

try:
    from firstorder.fabric.launch import Autocast, make
except ModuleNotFoundError as error:
    if error.name != "lightning_fabric":
        raise
    raise ModuleNotFoundError(
        f"firstorder.fabric needs lightning-fabric: {pip_install('train')}", name=error.name
    ) from error
from firstorder.fabric.batches import Order
from firstorder.fabric.contents import fingerprint
from firstorder.fabric.recipe import Recipe, constant, cosine, drops, one_cycle
from firstorder.fabric.robustness import Robustness, evaluate
from firstorder.fabric.trainer import Trainer

__all__ = [
    "Autocast",
    "Order",
    "Recipe",
    "Robustness",
    "Trainer",
    "constant",
    "cosine",
    "drops",
    "evaluate",
    "fingerprint",
    "make",
    "one_cycle",
]
