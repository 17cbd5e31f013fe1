"""Slow reference transcriptions of the oracles that average over transformed copies, on top of `references_transfer`.

One example, plain floats, loops. Random numbers are arguments, from [0, 1): `u[i]` is what copy i draws, in the order
of the docstrings. All transforms are linear up to a constant, out = A in + b, so that the gradient by the input is
A^T g.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from references import Loss, Problem, Vector, add, normalised, project
from references_transfer import Find, along_axis, pull_back, warp

Image = list[list[list[float]]]
Transform = Callable[[Image], Image]


def shaped(a: Vector, shape: tuple[int, ...]) -> Image:
    channels, height, width = shape
    return [[[a[(c * height + i) * width + j] for j in range(width)] for i in range(height)] for c in range(channels)]


def flat(image: Image) -> Vector:
    return [v for channel in image for row in channel for v in row]


def adjoint(transform: Transform, shape: tuple[int, ...], g: Vector) -> Vector:
    """A^T g of transform(a) = A a + b, column by column."""
    size = math.prod(shape)
    zero = flat(transform(shaped([0.0] * size, shape)))
    result = []
    for k in range(size):
        unit = [0.0] * size
        unit[k] = 1.0
        column = flat(transform(shaped(unit, shape)))
        result.append(sum((column[j] - zero[j]) * g[j] for j in range(size)))
    return result


def mean(gradients: Sequence[Vector]) -> Vector:
    return [sum(g[j] for g in gradients) / len(gradients) for j in range(len(gradients[0]))]


def transformed_gradient(p: Problem, a: Vector, transform: Transform) -> Vector:
    """The gradient by a of J(transform(a))."""
    return adjoint(transform, p.shape, p.gradient(flat(transform(shaped(a, p.shape)))))


# Structure invariant attack.

KINDS = (
    "shift rows", "shift columns", "flip rows", "flip columns", "half turn",
    "scale", "noise", "blur", "low pass", "drop",
)  # fmt: skip


def places(u: Vector, count: int) -> list[int]:
    """The places of the `count` smallest draws, each a cut before the pixel after it."""
    return sorted(sorted(range(len(u)), key=lambda k: u[k])[:count][k] + 1 for k in range(count))


def resize(values: Vector, side: int) -> Vector:
    """Bilinear, half-pixel centres, clamped at the border."""
    found = []
    for k in range(side):
        at = min(max((k + 0.5) * len(values) / side - 0.5, 0.0), len(values) - 1.0)
        first = int(at)
        second = min(first + 1, len(values) - 1)
        found.append(values[first] * (1 - (at - first)) + values[second] * (at - first))
    return found


def blurred(values: Vector) -> Vector:
    return resize(resize(values, int(len(values) * 0.8) + 1), len(values))


def cosine(values: Vector) -> Vector:
    n = len(values)
    return [
        math.sqrt((1 if k == 0 else 2) / n)
        * sum(values[r] * math.cos(math.pi * (2 * r + 1) * k / (2 * n)) for r in range(n))
        for k in range(n)
    ]


def inverse_cosine(values: Vector) -> Vector:
    n = len(values)
    return [
        sum(
            math.sqrt((1 if k == 0 else 2) / n) * values[k] * math.cos(math.pi * (2 * r + 1) * k / (2 * n))
            for k in range(n)
        )
        for r in range(n)
    ]


def low_pass(values: Vector) -> Vector:
    """Without the highest int(0.4 n) frequencies."""
    spectrum = cosine(values)
    gone = int(0.4 * len(values))
    return inverse_cosine([v if k < len(values) - gone else 0.0 for k, v in enumerate(spectrum)])


def both_ways(block: list[list[float]], along: Callable[[Vector], Vector]) -> list[list[float]]:
    across = [along(row) for row in block]
    columns = [along([row[j] for row in across]) for j in range(len(across[0]))]
    return [[column[i] for column in columns] for i in range(len(across))]


def block_transform(
    kind: str, block: list[list[float]], amount: float, kept: bool, noise: list[list[float]]
) -> list[list[float]]:
    """One channel of a block."""
    height, width = len(block), len(block[0])
    if kind == "shift rows":
        k = int(amount * height)
        return [block[(i - k) % height] for i in range(height)]
    if kind == "shift columns":
        k = int(amount * width)
        return [[row[(j - k) % width] for j in range(width)] for row in block]
    if kind == "flip rows":
        return block[::-1]
    if kind == "flip columns":
        return [row[::-1] for row in block]
    if kind == "half turn":
        return [row[::-1] for row in block[::-1]]
    if kind == "scale":
        return [[amount * v for v in row] for row in block]
    if kind == "noise":
        return [[v + e for v, e in zip(*rows, strict=True)] for rows in zip(block, noise, strict=True)]
    if kind == "blur":
        return both_ways(block, blurred)
    if kind == "low pass":
        return both_ways(block, low_pass)
    return [[v / 0.9 if kept else 0.0 for v in row] for row in block]


def structure(u: Vector, shape: tuple[int, ...], blocks: int, noise: float, kinds: Sequence[str] = KINDS) -> Transform:
    """Draws: a chance for every cut along the height, along the width; for every block its kind, its amount; for every
    channel and block whether it is kept; noise for every element.
    """
    channels, height, width = shape
    cells, rest = blocks * blocks, iter(u)

    def take(n: int) -> Vector:
        return [next(rest) for _ in range(n)]

    rows = [0, *places(take(height - 1), blocks - 1), height]
    columns = [0, *places(take(width - 1), blocks - 1), width]
    chosen, amounts = take(cells), take(cells)
    kept = [take(cells) for _ in range(channels)]
    errors = shaped([noise * (2 * v - 1) for v in take(channels * height * width)], shape)

    def transform(image: Image) -> Image:
        found = [[list(row) for row in channel] for channel in image]
        for c in range(channels):
            for b in range(cells):
                top, bottom = rows[b // blocks], rows[b // blocks + 1]
                left, right = columns[b % blocks], columns[b % blocks + 1]
                block, error = ([row[left:right] for row in part[c][top:bottom]] for part in (image, errors))
                kind = kinds[int(chosen[b] * len(kinds))]
                changed = block_transform(kind, block, amounts[b], kept[c][b] >= 0.1, error)
                for i in range(bottom - top):
                    found[c][top + i][left:right] = changed[i]
        return found

    return transform


# Block shuffle and rotation.


def lengths(u: Vector, side: int) -> list[int]:
    """In proportion to the draws, between rounded places."""
    ends = [round(sum(u[: k + 1]) / sum(u) * side) for k in range(len(u) - 1)] + [side]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def order(u: Vector) -> list[int]:
    return sorted(range(len(u)), key=lambda k: u[k])


def rotated(block: list[list[float]], angle: float) -> list[list[float]]:
    """About the centre, bilinear, zero outside the block."""
    height, width = len(block), len(block[0]) if block else 0
    found = []
    for i in range(height):
        line = []
        for j in range(width):
            y, z = i - (height - 1) / 2, j - (width - 1) / 2
            row = math.cos(angle) * y - math.sin(angle) * z + (height - 1) / 2
            column = math.sin(angle) * y + math.cos(angle) * z + (width - 1) / 2
            total = 0.0
            for r in range(height):
                for c in range(width):
                    total += max(0.0, 1 - abs(row - r)) * max(0.0, 1 - abs(column - c)) * block[r][c]
            line.append(total)
        found.append(line)
    return found


def shuffled(u: Vector, shape: tuple[int, ...], blocks: int, max_angle: float) -> Transform:
    """Draws: shares of the height, of the width; the order of the strips down, across; angles of the blocks as they lie
    afterwards.
    """
    _, height, width = shape
    shares = [u[k * blocks : (k + 1) * blocks] for k in range(4)]
    angles = u[4 * blocks :]
    sizes = lengths(shares[0], height), lengths(shares[1], width)
    orders = order(shares[2]), order(shares[3])

    def transform(image: Image) -> Image:
        found = []
        for channel in image:
            rows: list[list[float]] = []
            for m, i in enumerate(orders[0]):
                top = sum(sizes[0][:i])
                strip: list[list[float]] = [[] for _ in range(sizes[0][i])]
                for n, j in enumerate(orders[1]):
                    left = sum(sizes[1][:j])
                    block = [row[left : left + sizes[1][j]] for row in channel[top : top + sizes[0][i]]]
                    turned = rotated(block, math.radians(max_angle) * (2 * angles[m * blocks + n] - 1))
                    strip = [row + more for row, more in zip(strip, turned, strict=True)]
                rows += strip
            found.append(rows)
        return found

    return transform


# Spectrum simulation.


def simulated(u: Vector, shape: tuple[int, ...], sigma: float, rho: float) -> Transform:
    """Draws: the noise of every element by the inverse of the normal distribution, then all factors."""
    size = math.prod(shape)
    noise = shaped([sigma * NormalDist().inv_cdf(v) for v in u[:size]], shape)
    factors = shaped([1 + rho * (2 * v - 1) for v in u[size:]], shape)

    def transform(image: Image) -> Image:
        found = []
        for c, channel in enumerate(image):
            noisy = [[v + e for v, e in zip(*rows, strict=True)] for rows in zip(channel, noise[c], strict=True)]
            spectrum = both_ways(noisy, cosine)
            changed = [[v * f for v, f in zip(*rows, strict=True)] for rows in zip(spectrum, factors[c], strict=True)]
            found.append(both_ways(changed, inverse_cosine))
        return found

    return transform


def straight_through(p: Problem, a: Vector, transform: Transform) -> Vector:
    """The gradient by the transformed image."""
    return p.gradient(flat(transform(shaped(a, p.shape))))


# Admix.


def mix(a: Vector, other: Vector, eta: float) -> Vector:
    return add(a, eta, other)


def admixed(p: Problem, a: Vector, pool: Sequence[Vector], u: Vector, eta: float, m1: int) -> Vector:
    """The mean over the images drawn and over i < m1 of the gradient by a of J((a + eta x') / 2^i)."""
    gradients = []
    for one in u:
        mixed = mix(a, pool[int(one * len(pool))], eta)
        for i in range(m1):
            g = p.gradient([v / 2**i for v in mixed])
            gradients.append([v / 2**i for v in g])
    return mean(gradients)


# Neighbours with a penalty on the gradient's norm.


def neighbour(a: Vector, u: Vector, radius: float) -> Vector:
    return [a[j] + radius * (2 * u[j] - 1) for j in range(len(a))]


def penalised(p: Problem, near: Vector, size: float, delta: float) -> Vector:
    first = p.gradient(near)
    second = p.gradient(add(near, -size, normalised(first, "mean")))
    return [(1 - delta) * first[j] + delta * second[j] for j in range(len(first))]


# Enhanced momentum.


def factors(eta: float, m: int) -> Vector:
    return [-eta + 2 * eta * i / (m - 1) for i in range(m)] if m > 1 else [0.0]


def enhanced(m: int, eta: float, size: float) -> Callable[[Problem], Find]:
    def maker(p: Problem) -> Find:
        along = [0.0] * len(p.x)

        def find(t: int, a: Vector, point: Vector) -> Vector:
            nonlocal along
            g = mean([p.gradient(add(point, c * size, along)) for c in factors(eta, m)])
            along = normalised(g, "mean")
            return g

        return find

    return maker


# Diversity ensemble.


def loss_of(logits: list[Tensor], loss: Loss, y: int) -> Tensor:
    """The loss of the mean logits."""
    return loss(torch.stack(logits).mean(0), y)


def diverse_ensemble(p: Problem, a: Vector, u: Sequence[Vector], rates: Sequence[float]) -> Vector:
    """The gradient of the loss of the mean logits of copies, resized and padded by their draws and rates."""
    ways = [
        (along_axis(p.shape[1], rate, one[1], one[2]), along_axis(p.shape[2], rate, one[1], one[3]))
        for rate, one in zip(rates, u, strict=True)
    ]
    copies = [torch.tensor(warp(a, p.shape[0], *way), dtype=torch.float64).requires_grad_() for way in ways]
    value = loss_of([p.model(copy.reshape(1, *p.shape))[0] for copy in copies], p.loss, p.y)
    gradients = torch.autograd.grad(-value if p.targeted else value, copies)
    total = [0.0] * len(a)
    for way, g in zip(ways, gradients, strict=True):
        total = add(total, 1.0, pull_back(g.tolist(), p.shape[0], *way))
    return total


# Variance reduced ensembles.


def reduced(inner: Vector, anchor: Vector, ensemble: Vector) -> Vector:
    """g_k(b) - g_k(a) + g(a)."""
    return [inner[j] - anchor[j] + ensemble[j] for j in range(len(inner))]


def svre(
    ensemble: Problem,
    singles: Sequence[Problem],
    drawn: Sequence[Sequence[int]],
    *,
    steps: int,
    alpha: float,
    decay: float,
    rule: Callable[[Vector], Vector],
) -> Vector:
    """`drawn[t]` are the members of the inner steps of step t + 1."""
    a, outer = ensemble.x, [0.0] * len(ensemble.x)
    for t in range(steps):
        g, b, inner = ensemble.gradient(a), a, [0.0] * len(a)
        for k in drawn[t]:
            found = reduced(singles[k].gradient(b), singles[k].gradient(a), g)
            inner = [decay * inner[j] + c for j, c in enumerate(normalised(found, "mean"))]
            b = project(ensemble, add(b, alpha, rule(inner)))
        outer = [decay * outer[j] + c for j, c in enumerate(normalised(inner, "mean"))]
        a = project(ensemble, add(a, alpha, rule(outer)))
    return a
