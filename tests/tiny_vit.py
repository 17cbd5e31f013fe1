"""A tiny ViT with random weights in the hub's folder layout, and images for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def vit(*, classes: int = 10, seed: int = 0, **options: object) -> ViTForImageClassification:
    """Two layers of width 16 for images of 32 x 32."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.3, **options,
        )  # fmt: skip
        return ViTForImageClassification(config).eval()


def processor() -> ViTImageProcessor:
    """Of those images."""
    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)


def folder(path: Path, **options: object) -> Path:
    """The checkpoint in a folder."""
    vit(**options).save_pretrained(path)
    processor().save_pretrained(path)
    return path


def normalised(x: Tensor) -> Tensor:
    """Pixel values of images (N, 3, 32, 32) in [0, 1]."""
    return (x - x.new_tensor(MEAN).reshape(3, 1, 1)) / x.new_tensor(STD).reshape(3, 1, 1)
