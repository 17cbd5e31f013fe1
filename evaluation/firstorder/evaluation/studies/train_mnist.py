"""Train the packaged MNIST and Fashion-MNIST models adversarially (Madry et al. 2018: PGD, eps = 0.3 and 0.2).

    python -m firstorder.evaluation.studies.train_mnist --data DIR [--dataset mnist|fashion-mnist] [--natural] [--out F]

DIR is the root of torchvision's MNIST layout. Epsilon grows linearly from 0 over the first third of
the epochs, without which training at eps = 0.3 stays at chance. With --natural, MNIST without an adversary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST

from firstorder.attacks import FGSM, PGD, Attack
from firstorder.evaluation.names.networks import SmallCNN
from firstorder.evaluation.names.packaged import ASSETS
from firstorder.files import replacing

EPS = 0.3

logger = logging.getLogger(__name__)


SETS: dict[str, tuple[type[MNIST], float, str]] = {
    "mnist": (MNIST, EPS, "mnist_cnn.safetensors"),
    "fashion-mnist": (FashionMNIST, 0.2, "fashion_cnn.safetensors"),
}
"""Data set, radius and file of the weights by name."""


def load(root: Path, *, train: bool, dataset: str = "mnist") -> tuple[Tensor, Tensor]:
    """All images of a split (N, 1, 28, 28) in [0, 1] and their labels (N,)."""
    data = SETS[dataset][0](root=root, train=train, download=False)
    return data.data[:, None].float() / 255, data.targets


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of x (N, ...) that the model classifies as y (N,)."""
    with torch.no_grad():
        return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


def pgd(eps: float) -> Attack:
    """The inner attack of Madry et al.: ten steps within the L-infinity ball of radius eps."""
    return PGD(eps=eps, alpha=max(eps, 1e-3) / 4, steps=10)


def train(
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    radius: float = EPS,
    inner: Callable[[float], Attack] = pgd,
) -> nn.Module:
    """Train a SmallCNN on examples within `radius` of x (N, 1, 28, 28) in [0, 1], labels y (N,).

    Args:
        inner: the inner attack for a radius, which grows to `radius` over the first third of the epochs;
            a minimum-norm attack takes it as `max_norm`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = epochs * (len(x) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x), generator=generator).split(batch_size)[: len(x) // batch_size]:
            eps = radius * min(1.0, scheduler.last_epoch / (steps / 3))
            adversarial = inner(eps)(model, x[batch], y[batch], generator=generator)
            loss = F.cross_entropy(model(adversarial), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        logger.info("epoch %d of %d: eps %.3f, loss %.4f", epoch + 1, epochs, eps, total / (len(x) // batch_size))
    return model.eval()


def main(
    data: Annotated[Path, typer.Option(help="Root of torchvision's layouts.")],
    dataset: Annotated[str, typer.Option(help="mnist (eps = 0.3) or fashion-mnist (0.2).")] = "mnist",
    out: Annotated[Path | None, typer.Option(help="Where to write the weights; the package by default.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    natural: Annotated[bool, typer.Option("--natural", help="Train on the images as they are.")] = False,
    seed: int = 0,
) -> None:
    """Train, report clean and PGD-40 accuracy on the test set, and write the weights."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if dataset not in SETS:
        raise typer.BadParameter(f"{dataset!r} is unknown; choose {' or '.join(SETS)}", param_hint="--dataset")
    _, eps, file = SETS[dataset]
    words: dict[str, Any] = {"radius": 0.0, "inner": lambda eps: FGSM(eps=eps)} if natural else {"radius": eps}
    file = file.replace(".", "_natural.") if natural else file
    images, labels = load(data, train=True, dataset=dataset)
    model = train(images, labels, epochs=epochs, batch_size=batch_size, seed=seed, **words)
    x, y = load(data, train=False, dataset=dataset)
    attack = PGD(eps=eps, alpha=0.01, steps=40, early_stop=True)
    adversarial = torch.cat([attack(model, *part) for part in zip(x.split(500), y.split(500), strict=True)])
    logger.info("clean %.4f, PGD-40 %.4f", accuracy(model, x, y), accuracy(model, adversarial, y))
    with replacing(out or ASSETS / file) as temporary:
        save_file(model.state_dict(), temporary)


if __name__ == "__main__":
    typer.run(main)
