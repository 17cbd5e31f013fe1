"""Oracles that transform images block by block, every block of every copy by draws of its own.

[SIA] Wang et al. 2023, Structure invariant transformation for better adversarial transferability; [BSR] Wang et al.
2024, Boosting adversarial transferability by block shuffle and rotation. Constants were read in the authors' code,
xiaosen-wang/SIT and Trustworthy-AI-Group/BSR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.copies import Copies, one_of

KINDS = (
    "shift rows",
    "shift columns",
    "flip rows",
    "flip columns",
    "half turn",
    "scale",
    "noise",
    "blur",
    "low pass",
    "drop",
)
"""The transforms of `StructureInvariant`."""

DROP = 0.1
"""With which probability "drop" drops a channel."""


class _Strips(NamedTuple):
    """For every place p along a side, of every image (M, side): the strip that it is in, and where that lies."""

    strip: Tensor
    start: Tensor
    length: Tensor

    @property
    def place(self) -> Tensor:
        """p within its strip."""
        return torch.arange(self.strip.shape[1], device=self.strip.device) - self.start

    @property
    def together(self) -> Tensor:
        """Which places are in one strip, (M, side, side)."""
        return self.strip[:, :, None] == self.strip[:, None]


def _strips(ends: Tensor, side: int) -> _Strips:
    """Strips that end before `ends` (M, s), in order, the last of them `side`."""
    places = torch.arange(side, device=ends.device)
    strip = (places[:, None] >= ends[:, None]).sum(2)
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    return _Strips(strip, starts.gather(1, strip), (ends - starts).gather(1, strip))


@dataclass(frozen=True, kw_only=True)
class StructureInvariant(Copies):
    """The mean gradient of J(S(a)) over m copies; S transforms s x s blocks, each in its own way ([SIA], Sec. 3.3).

    The cuts are distinct random places. The transform of a block is one of `KINDS`, with equal probability: a circular
    shift along either side by a random number of pixels, a flip along either, a half turn, all values scaled by
    U[0, 1), uniform noise added, blurred by resizing (bilinear) to int(0.8 side) + 1 and back, the highest
    int(0.4 side) frequencies of a cosine transform along either side removed, or channels dropped with probability 0.1
    and the others divided by 0.9. The released code clips noisy blocks to [0, 1]; here they are left as they are.

    Args:
        m: number of copies, at least 1.
        blocks: the paper's s, at least 1; not more than an image has pixels along a side.
        noise: largest absolute value of the noise, in the units of the images, at least 0.
        kinds: the transforms that a block may get.
    """

    blocks: int = 3
    noise: float = 16 / 255
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.count("blocks", self.blocks)
        validation.number("noise", self.noise, low=0)
        if not isinstance(self.kinds, tuple) or not self.kinds:
            raise ValueError(f"kinds={self.kinds!r} must be a tuple of at least one of {', '.join(KINDS)}")
        for kind in self.kinds:
            validation.choice("kinds", kind, KINDS)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.numel() and min(x.shape[2:]) < self.blocks:
            raise ValueError(f"blocks={self.blocks} are more than images of shape {tuple(x.shape[1:])} can be cut into")

    def draws(self, x: Tensor) -> int:
        channels, height, width = x.shape[1:]
        return (height - 1) + (width - 1) + self.blocks**2 * (2 + channels) + x[0].numel()

    def constants(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.tensor([KINDS.index(kind) for kind in self.kinds], device=x.device),)

    def transform(self, x: Tensor, draws: Tensor, *constants: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        cells = self.blocks**2
        parts = draws.split([height - 1, width - 1, cells, cells, cells * channels, x[0].numel()], 1)
        down, across = self._cut(parts[0], height), self._cut(parts[1], width)
        block = down.strip[:, :, None] * self.blocks + across.strip[:, None]

        def of_block(values: Tensor) -> Tensor:
            """Values (M, s * s) of blocks as those of pixels (M, H, W)."""
            return values.gather(1, block.flatten(1)).view_as(block)

        kinds = constants[0][one_of(parts[2], len(self.kinds))]
        kind, amount = of_block(kinds), of_block(parts[3])
        found = _moved(x, kind, amount, down, across)
        if x.is_cuda:
            found = _filtered(found, kind, down, across)
        else:
            found = _filtered_blocks(found, kinds.unflatten(1, (self.blocks, self.blocks)), down, across)
        kept = (parts[4] >= DROP).to(x.dtype).div(1 - DROP).unflatten(1, (channels, cells))
        kept = torch.stack([of_block(one) for one in kept.unbind(1)], 1)
        factor = torch.where(_is(kind, "drop"), kept, torch.where(_is(kind, "scale"), amount[:, None], 1.0))
        added = self.noise * (2 * parts[5].view_as(x) - 1)
        return found * factor + torch.where(_is(kind, "noise"), added, 0.0)

    def _cut(self, draws: Tensor, side: int) -> _Strips:
        """Strips between distinct cuts, from a draw (M, side - 1) for each place where a cut may be."""
        cuts = draws.argsort(1)[:, : self.blocks - 1].add(1).sort(1).values
        return _strips(torch.cat([cuts, cuts.new_full((len(cuts), 1), side)], 1), side)


def _is(kind: Tensor, name: str) -> Tensor:
    """Which pixels (M, 1, H, W) are in blocks of a kind, of the numbers `kind` (M, H, W)."""
    return (kind == KINDS.index(name))[:, None]


def _moved(x: Tensor, kind: Tensor, amount: Tensor, down: _Strips, across: _Strips) -> Tensor:
    """x (M, C, H, W) with blocks shifted, flipped and turned."""
    places = []
    for strips, shape, shift, turns in (
        (down, (-1, x.shape[2], 1), "shift rows", ("flip rows", "half turn")),
        (across, (-1, 1, x.shape[3]), "shift columns", ("flip columns", "half turn")),
    ):
        place, start, length = (part.reshape(shape) for part in (strips.place, strips.start, strips.length))
        turned = _is(kind, turns[0])[:, 0] | _is(kind, turns[1])[:, 0]
        shifted = (place - (amount * length).floor().long()) % length
        inside = torch.where(turned, length - 1 - place, torch.where(_is(kind, shift)[:, 0], shifted, place))
        places.append(start + inside)
    source = (places[0] * x.shape[3] + places[1]).flatten(1)
    return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def _taps(place: Tensor, source: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two places, with weights, from which a bilinear resize from length `source` to `target` takes `place`."""
    at = ((place + 0.5) * source / target - 0.5).clamp_min(0).minimum(source - 1.0)
    first = at.floor()
    rest = at - first
    return [(first.long(), 1 - rest), ((first.long() + 1).minimum(source - 1), rest)]


def _blur(strips: _Strips, like: Tensor) -> Tensor:
    """The matrices (M, side, side) that resize every strip to int(0.8 length) + 1 pixels and back."""
    side, length = strips.strip.shape[1], strips.length
    small = length * 4 // 5 + 1
    matrix = like.new_zeros(len(strips.strip), side, side)
    for middle, weight in _taps(strips.place.to(like.dtype), small, length):
        for place, share in _taps(middle.to(like.dtype), length, small):
            matrix.scatter_add_(2, (strips.start + place)[:, :, None], (weight * share)[:, :, None])
    return matrix


def _low_pass(strips: _Strips, like: Tensor) -> Tensor:
    """The matrices (M, side, side) that remove the highest int(0.4 length) frequencies of every strip."""
    place, length = strips.place.to(like.dtype), strips.length.to(like.dtype)
    angle = math.pi / length[:, :, None] * place[:, :, None] * (place[:, None] + 0.5)
    share = torch.where(place == 0, 1.0, 2.0).div(length).sqrt()
    kept = strips.place < strips.length - strips.length * 2 // 5
    cosines = torch.where(strips.together, (share * kept)[:, :, None] * torch.cos(angle), 0.0)
    return cosines.mT @ cosines


FILTERS = {"blur": _blur, "low pass": _low_pass}


def _filtered(x: Tensor, kind: Tensor, down: _Strips, across: _Strips) -> Tensor:
    """x (M, C, H, W) with blocks blurred and without their high frequencies, by the kinds (M, H, W) of pixels."""
    for name, make in FILTERS.items():
        x = torch.where(_is(kind, name), make(down, x)[:, None] @ x @ make(across, x)[:, None].mT, x)
    return x


def _filtered_blocks(x: Tensor, kinds: Tensor, down: _Strips, across: _Strips) -> Tensor:
    """The same from the kinds (M, s, s) of blocks, one block after the other: few are filtered, and a product with a
    whole side is mostly with zeros.
    """
    images = []
    for image, own, *strips in zip(x.unbind(), kinds.tolist(), down.strip, across.strip, strict=True):
        heights, widths = (strip.bincount(minlength=len(own)).tolist() for strip in strips)
        bands = []
        for names, band in zip(own, image.split(heights, 1), strict=True):
            tiles = list(band.split(widths, 2))
            for i, (number, tile) in enumerate(zip(names, tiles, strict=True)):
                if (make := FILTERS.get(KINDS[number])) is not None:
                    rows, columns = (make(_one(side, tile), tile)[0] for side in tile.shape[1:])
                    tiles[i] = rows @ tile @ columns.mT
            bands.append(torch.cat(tiles, 2))
        images.append(torch.cat(bands, 1))
    return torch.stack(images) if images else x


def _one(side: int, like: Tensor) -> _Strips:
    """A single strip."""
    return _strips(torch.full((1, 1), side, device=like.device), side)


@dataclass(frozen=True, kw_only=True)
class BlockShuffle(Copies):
    """The mean gradient of J(B(a)) over m copies; B shuffles blocks and rotates each ([BSR], Sec. 3.3).

    Both sides are cut at random places into `blocks` strips, of lengths in proportion to draws from U[0, 1), rounded.
    The strips of either side are permuted, and every block is turned about its centre by an angle of its own, uniform
    on [-max_angle, max_angle] as in the paper (the released code has a truncated normal of 0.2 radians); bilinear, zero
    where nothing of the block is.

    Args:
        m: number of copies, at least 1.
        blocks: number of strips along each side, at least 1.
        max_angle: the paper's tau, in degrees, at least 0.
    """

    blocks: int = 2
    max_angle: float = 24.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.count("blocks", self.blocks)
        validation.number("max_angle", self.max_angle, low=0)

    def draws(self, x: Tensor) -> int:
        return 4 * self.blocks + self.blocks**2

    def transform(self, x: Tensor, draws: Tensor, *constants: Tensor) -> Tensor:
        s, sides = self.blocks, x.shape[2:]
        *orders, angles = draws.split([s, s, s, s, s * s], 1)
        (down, from_row), (across, from_column) = (
            _shuffled(orders[axis], orders[2 + axis], side) for axis, side in enumerate(sides)
        )
        block = down.strip[:, :, None] * s + across.strip[:, None]
        angle = math.radians(self.max_angle) * (2 * angles.gather(1, block.flatten(1)).view_as(block) - 1)
        y = (down.place - (down.length - 1) / 2).to(x.dtype)[:, :, None]
        z = (across.place - (across.length - 1) / 2).to(x.dtype)[:, None]
        row = angle.cos() * y - angle.sin() * z + (down.length[:, :, None] - 1) / 2
        column = angle.sin() * y + angle.cos() * z + (across.length[:, None] - 1) / 2
        found = torch.zeros_like(x)
        for i, down_weight in _corners(row, down.length[:, :, None]):
            for j, weight in _corners(column, across.length[:, None]):
                source = (from_row[:, :, None] + i) * sides[1] + from_column[:, None] + j
                taken = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1))
                found = found + taken.view_as(x) * (down_weight * weight)[:, None]
        return found


def _shuffled(shares: Tensor, order: Tensor, side: int) -> tuple[_Strips, Tensor]:
    """Permuted strips of a side, and for every place where its strip began before, (M, side).

    Args:
        shares: of the side, in proportion to draws (M, s).
        order: draws (M, s), whose order is the permutation.
        side: number of pixels.
    """
    shares = shares.clamp_min(torch.finfo(shares.dtype).eps)
    ends = (shares.cumsum(1) / shares.sum(1, keepdim=True) * side).round().long()
    ends[:, -1] = side
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    permuted = order.argsort(1)
    strips = _strips((ends - starts).gather(1, permuted).cumsum(1), side)
    return strips, starts.gather(1, permuted).gather(1, strips.strip)


def _corners(at: Tensor, length: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two whole places around `at`, moved into [0, length), with bilinear weights, zero where they were outside."""
    first = at.floor()
    found = []
    for place, weight in ((first, first + 1 - at), (first + 1, at - first)):
        inside = (place >= 0) & (place < length)
        found.append((torch.where(inside, place, 0).long(), torch.where(inside, weight, 0.0)))
    return found
