"""Train the packaged MNIST model adversarially (Madry et al. 2018: PGD, eps = 0.3).

    python -m firstorder.evaluation.train_mnist --data DIR [--out FILE]

DIR is the root of torchvision's MNIST layout. Epsilon grows linearly from 0 over the first third of
the epochs, without which training at eps = 0.3 stays at chance.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets import MNIST

from firstorder.attacks import PGD, Attack
from firstorder.evaluation.networks import SmallCNN

EPS = 0.3

logger = logging.getLogger(__name__)


def load(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """All images of a split (N, 1, 28, 28) in [0, 1] and their labels (N,)."""
    data = MNIST(root=root, train=train, download=False)
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
    data: Annotated[Path, typer.Option(help="Root of torchvision's MNIST layout.")],
    out: Annotated[Path, typer.Option(help="Where to write the weights.")] = Path(__file__).parent
    / "assets"
    / "mnist_cnn.safetensors",
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seed: int = 0,
) -> None:
    """Train, report clean and PGD-40 accuracy on the test set, and write the weights."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = train(*load(data, train=True), epochs=epochs, batch_size=batch_size, seed=seed)
    x, y = load(data, train=False)
    attack = PGD(eps=EPS, alpha=0.01, steps=40, early_stop=True)
    adversarial = torch.cat([attack(model, *part) for part in zip(x.split(500), y.split(500), strict=True)])
    logger.info("clean %.4f, PGD-40 %.4f", accuracy(model, x, y), accuracy(model, adversarial, y))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=out.parent, delete=False) as file:
        save_file(model.state_dict(), file.name)
    Path(file.name).replace(out)


if __name__ == "__main__":
    typer.run(main)
