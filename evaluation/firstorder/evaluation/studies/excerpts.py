"""Cut the packaged excerpts out of the real test sets.

    python -m firstorder.evaluation.studies.excerpts --mnist DIR --cifar10 FILE

DIR is the root of torchvision's MNIST layout; FILE an .npz of the CIFAR-10 test set with x, uint8 of
shape (N, 32, 32, 3), and y. The first images are taken, in the order of the sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torchvision.datasets import MNIST

from firstorder.evaluation.names.packaged import ASSETS
from firstorder.files import replacing


def main(
    mnist: Annotated[Path, typer.Option(help="Root of torchvision's MNIST layout.")],
    cifar10: Annotated[Path, typer.Option(help="CIFAR-10 test set as .npz with x and y.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = ASSETS,
) -> None:
    """Write 500 MNIST and 200 CIFAR-10 test images as compressed .npz files."""
    digits = MNIST(root=mnist, train=False, download=False)
    _write(out / "mnist_test_500.npz", digits.data[:500, None].numpy(), digits.targets[:500].numpy())
    with np.load(cifar10, allow_pickle=False) as data:
        _write(out / "cifar10_test_200.npz", data["x"][:200].transpose(0, 3, 1, 2), data["y"][:200])


def _write(path: Path, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> None:
    with replacing(path) as temporary:
        np.savez_compressed(temporary, x=np.ascontiguousarray(x), y=y.astype(np.uint8))


if __name__ == "__main__":
    typer.run(main)
