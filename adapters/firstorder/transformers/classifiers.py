"""Image classifiers of transformers as attacks want them: from images in [0, 1] to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from firstorder.attacks.ensemble import resized


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What an image processor does to images in [0, 1]: (x - mean) / std, at a size.

    Attributes:
        mean, std: per channel.
        size: height and width; None takes images as they are.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, processor: Any) -> Pixels:
        """What `processor` does: its rescaling, mean, std, and the size that its images end with.

        The images are brought to that size without the crop that processors of photographs make.

        Raises:
            ValueError: a processor without these facts.
        """
        factor = 255 * float(processor.rescale_factor) if processor.do_rescale else 255.0
        offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
        own = bool(processor.do_normalize)
        mean: Sequence[float] = _channels(processor.image_mean) if own else (0.0,)
        std: Sequence[float] = _channels(processor.image_std) if own else (1.0,)
        return cls(
            mean=tuple((m + offset) / factor for m in mean), std=tuple(s / factor for s in std), size=_size(processor)
        )


class PixelClassifier(nn.Module):
    """An image classifier of transformers, for images in [0, 1].

    Args:
        model: takes `pixel_values` and returns an output with `logits`.
        pixels: what its processor does.
        resize: whether images of another size are brought to the model's; a trainer's are already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, pixels: Pixels, *, resize: bool = True) -> None:
        super().__init__()
        self.model = model
        self.size = pixels.size if resize else None
        self.register_buffer("mean", torch.tensor(pixels.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).reshape(-1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """What is neither a part nor a weight."""
        return f"size={self.size}"

    def pixels(self, values: Tensor) -> Tensor:
        """Images in [0, 1] from the `pixel_values` (N, C, H, W) that the processor makes of them, up to rounding."""
        return values * self.std.to(values.dtype) + self.mean.to(values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        x = x if self.size is None else resized(x, self.size)
        logits: Tensor = self.model(pixel_values=(x - self.mean.to(x.dtype)) / self.std.to(x.dtype)).logits
        return logits


def classifier(name: str | Path, *, classes: int | None = None) -> PixelClassifier:
    """The image classifier in a folder, or of that name in the local cache or on the hub.

    Nothing that comes with it is run: no code of its own (`trust_remote_code`), no pickle.

    Args:
        name: a folder as `save_pretrained` writes it, or a name on the hub.
        classes: K; where the checkpoint has another number, its last layer is made anew, with random weights. None
            keeps the checkpoint's.

    Raises:
        OSError: no such checkpoint, here or there; the library's own message.
        ValueError: a checkpoint that needs code of its own, or none of an image classifier.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    other = {} if classes in (None, config.num_labels) else {"num_labels": classes, "ignore_mismatched_sizes": True}
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False, dtype=torch.float32, **other)
    return PixelClassifier(model, Pixels.of(processor))


def _channels(value: float | Sequence[float]) -> Sequence[float]:
    return (value,) if isinstance(value, (int, float)) else value


def _size(processor: Any) -> tuple[int, int] | None:
    """Height and width of the images that the processor makes."""
    size: Any = None
    if getattr(processor, "do_resize", False):
        size = processor.size
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    if size is None:
        return None
    found = {key: value for key, value in dict(size).items() if value is not None}
    if {"height", "width"} <= found.keys():
        return int(found["height"]), int(found["width"])
    if "shortest_edge" in found:
        return (int(found["shortest_edge"]),) * 2
    raise ValueError(
        f"the image processor makes images of size {found}, not of one height and width; give it size="
        '{"height": ..., "width": ...}'
    )
