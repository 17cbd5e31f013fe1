"""Slow reference transcriptions of the transfer attacks and of the interacting ones, on top of `references`.

Random numbers are arguments: `draws[t][i]` holds the four of copy i at step t + 1 for a diverse input (whether, side,
place in height, place in width), `offsets[t][i]` those of neighbour i, one for every element, all from [0, 1).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from references import (
    Problem,
    Rule,
    Vector,
    accumulate,
    add,
    average,
    clip_alpha,
    clip_rule,
    copy_factor,
    decayed,
    look_ahead,
    project,
    quantised_rule,
    steepest_rule,
)
from references import beta as momentum_weight

Matrix = list[Vector]
Draws = Sequence[Sequence[Vector]]
Find = Callable[[int, Vector, Vector], Vector]

# Diverse inputs: linear in the image, rows and columns each by a matrix.


def bilinear(size: int, side: int) -> Matrix:
    """The weights (side, size) of a resize of `size` pixels to `side`: half-pixel centres, clamped at the border."""
    weights = []
    for i in range(side):
        place = min(max((i + 0.5) * size / side - 0.5, 0.0), size - 1.0)
        first = int(place)
        row = [0.0] * size
        row[first] += 1 - (place - first)
        row[min(first + 1, size - 1)] += place - first
        weights.append(row)
    return weights


def product(a: Matrix, b: Matrix) -> Matrix:
    return [[sum(row[k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for row in a]


def transpose(a: Matrix) -> Matrix:
    return [[a[i][j] for i in range(len(a))] for j in range(len(a[0]))]


def along_axis(size: int, rate: float, u_side: float, u_place: float) -> Matrix:
    """Resize to a random side, zeros around it up to the larger side, and back where that exceeds the original."""
    low, high = sorted((size, int(size * rate)))
    chosen = low + math.floor(u_side * (high - low))
    place = math.floor(u_place * (high - chosen))
    resized = bilinear(size, chosen)
    padded = [resized[i - place] if 0 <= i - place < chosen else [0.0] * size for i in range(high)]
    return resized_back(padded, size) if rate > 1 else padded


def resized_back(padded: Matrix, size: int) -> Matrix:
    return product(bilinear(len(padded), size), padded)


def axis_draws(draw: Vector) -> tuple[tuple[float, float], tuple[float, float]]:
    """(side, place) in height and in width: one draw for both sides, each place its own."""
    return (draw[1], draw[2]), (draw[1], draw[3])


def is_diverse(draw: Vector, probability: float) -> bool:
    return draw[0] < probability


def warp(image: Vector, channels: int, rows: Matrix, columns: Matrix) -> Vector:
    """out[c, p, q] = sum_ij rows[p, i] columns[q, j] image[c, i, j]."""
    height, width = len(rows[0]), len(columns[0])
    across = [[(j, w) for j, w in enumerate(column) if w] for column in columns]
    result = []
    for c in range(channels):
        for row in rows:
            seen = [(i, w) for i, w in enumerate(row) if w]
            for column in across:
                total = 0.0
                for i, down in seen:
                    for j, along in column:
                        total += down * along * image[(c * height + i) * width + j]
                result.append(total)
    return result


def pull_back(g: Vector, channels: int, rows: Matrix, columns: Matrix) -> Vector:
    """The adjoint of `warp`."""
    return warp(g, channels, transpose(rows), transpose(columns))


def diverse_gradient(p: Problem, a: Vector, draw: Vector, rate: float, probability: float) -> Vector:
    """The gradient by a of J(T(a))."""
    if not is_diverse(draw, probability):
        return p.gradient(a)
    in_height, in_width = axis_draws(draw)
    rows, columns = along_axis(p.shape[1], rate, *in_height), along_axis(p.shape[2], rate, *in_width)
    return pull_back(p.gradient(warp(a, p.shape[0], rows, columns)), p.shape[0], rows, columns)


def copy_draw(draws: Sequence[Vector], i: int) -> Vector:
    return draws[i]


def scaled(a: Vector, m: int, find: Callable[[int, Vector], Vector]) -> Vector:
    """(1/m) sum_i of the gradient by a of J_i(a / 2^i), J_i with gradient find(i, point)."""
    total = [0.0] * len(a)
    for i in range(m):
        total = add(total, copy_factor(i) / m, find(i, [c / 2**i for c in a]))
    return total


def diverse_copies(p: Problem, a: Vector, draws: Sequence[Vector], m: int, rate: float, probability: float) -> Vector:
    """The mean gradient by a of J(T_i(a / 2^i)), every copy with its own draws."""
    return scaled(a, m, lambda i, small: diverse_gradient(p, small, copy_draw(draws, i), rate, probability))


# Translation invariance.


def kernel(name: str, side: int, nsig: float) -> Matrix:
    half = side // 2
    weights = []
    for u in range(-half, half + 1):
        row = []
        for v in range(-half, half + 1):
            if name == "gaussian":
                row.append(math.exp(-((u * nsig / max(half, 1)) ** 2 + (v * nsig / max(half, 1)) ** 2) / 2))
            elif name == "linear":
                row.append((1 - abs(u) / (half + 1)) * (1 - abs(v) / (half + 1)))
            else:
                row.append(1.0)
        weights.append(row)
    return unit_mass(weights)


def unit_mass(weights: Matrix) -> Matrix:
    total = sum(sum(row) for row in weights)
    return [[w / total for w in row] for row in weights]


def convolve(g: Vector, shape: tuple[int, ...], weights: Matrix) -> Vector:
    """Channel by channel, zeros beyond the border, (c, i, j) from the pixels around it."""
    channels, height, width = shape
    half = len(weights) // 2
    result = []
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                total = 0.0
                for u in range(-half, half + 1):
                    for v in range(-half, half + 1):
                        if 0 <= i - u < height and 0 <= j - v < width:
                            total += weights[u + half][v + half] * g[(c * height + i - u) * width + j - v]
                result.append(total)
    return result


# Variance tuning.


def neighbour(centre: Vector, u: Vector, radius: float) -> Vector:
    return [centre[j] + radius * (2 * u[j] - 1) for j in range(len(centre))]


def centre_of_neighbours(a: Vector, point: Vector) -> Vector:
    """The iterate, wherever the gradient was taken."""
    return a


def variance(near: Matrix, here: Vector) -> Vector:
    """(1/N) sum_i near_i - here."""
    return [sum(g[j] for g in near) / len(near) - here[j] for j in range(len(here))]


def tuned(here: Vector, before: Vector, now: Vector) -> Vector:
    """The gradient and the variance of the step before."""
    return add(here, 1.0, before)


def tuning(p: Problem, offsets: Draws, radius: float) -> Find:
    before = [0.0] * len(p.x)

    def find(t: int, a: Vector, point: Vector) -> Vector:
        nonlocal before
        here = p.gradient(point)
        centre = centre_of_neighbours(a, point)
        now = variance([p.gradient(neighbour(centre, u, radius)) for u in offsets[t]], here)
        result, before = tuned(here, before, now), now
        return result

    return find


# The transfer attacks: MI-FGSM along find(t, iterate, point), the point being the iterate or Nesterov's.


def climb(
    p: Problem,
    find: Find,
    *,
    nesterov: bool = False,
    steps: int,
    alpha: float | None = None,
    decay: float = 1.0,
    normaliser: str = "mean",
    rule: Rule | None = None,
    along_step: bool | None = None,
) -> Vector:
    alpha = p.eps / steps if alpha is None else alpha
    rule = rule or steepest_rule(p.norm)
    along_step = p.norm == "L2" if along_step is None else along_step
    a, momentum = p.x, [0.0] * len(p.x)
    for t in range(steps):
        point = look_ahead(p, a, alpha * decay, momentum, rule, along_step) if nesterov else a
        momentum = accumulate(momentum, find(t, a, point), decay, normaliser)
        a = project(p, add(a, alpha, rule(momentum)))
    return a


def difgsm(
    p: Problem, *, draws: Draws, resize_rate: float = 1.1, diversity_prob: float = 0.5, **options: Any
) -> Vector:
    def find(t: int, a: Vector, point: Vector) -> Vector:
        return diverse_gradient(p, point, draws[t][0], resize_rate, diversity_prob)

    return climb(p, find, **options)


def tifgsm(
    p: Problem, *, kernel_name: str = "gaussian", len_kernel: int = 7, nsig: float = 3.0, **options: Any
) -> Vector:
    weights = kernel(kernel_name, len_kernel, nsig)
    return climb(p, lambda t, a, point: convolve(p.gradient(point), p.shape, weights), **options)


def tidim(
    p: Problem,
    *,
    draws: Draws,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.5,
    kernel_name: str = "gaussian",
    len_kernel: int = 7,
    nsig: float = 3.0,
    **options: Any,
) -> Vector:
    weights = kernel(kernel_name, len_kernel, nsig)

    def find(t: int, a: Vector, point: Vector) -> Vector:
        return convolve(diverse_gradient(p, point, draws[t][0], resize_rate, diversity_prob), p.shape, weights)

    return climb(p, find, **options)


def sinidim(
    p: Problem, *, draws: Draws, m: int = 5, resize_rate: float = 1.1, diversity_prob: float = 0.5, **options: Any
) -> Vector:
    def find(t: int, a: Vector, point: Vector) -> Vector:
        return diverse_copies(p, point, draws[t], m, resize_rate, diversity_prob)

    return climb(p, find, nesterov=True, **options)


def sinitim(
    p: Problem, *, m: int = 5, kernel_name: str = "gaussian", len_kernel: int = 7, nsig: float = 3.0, **options: Any
) -> Vector:
    weights = kernel(kernel_name, len_kernel, nsig)

    def find(t: int, a: Vector, point: Vector) -> Vector:
        return convolve(scaled(point, m, lambda i, small: p.gradient(small)), p.shape, weights)

    return climb(p, find, nesterov=True, **options)


def sinitidim(
    p: Problem,
    *,
    draws: Draws,
    m: int = 5,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.5,
    kernel_name: str = "gaussian",
    len_kernel: int = 7,
    nsig: float = 3.0,
    **options: Any,
) -> Vector:
    weights = kernel(kernel_name, len_kernel, nsig)

    def find(t: int, a: Vector, point: Vector) -> Vector:
        return convolve(diverse_copies(p, point, draws[t], m, resize_rate, diversity_prob), p.shape, weights)

    return climb(p, find, nesterov=True, **options)


def vmifgsm(p: Problem, *, offsets: Draws, beta: float = 1.5, **options: Any) -> Vector:
    return climb(p, tuning(p, offsets, beta * p.eps), **options)


def vnifgsm(p: Problem, *, offsets: Draws, beta: float = 1.5, **options: Any) -> Vector:
    return climb(p, tuning(p, offsets, beta * p.eps), nesterov=True, **options)


def clipped_vmifgsm(
    p: Problem,
    *,
    offsets: Draws,
    steps: int,
    alpha: float | None = None,
    beta1: float = 0.9,
    lam: float = 0.99,
    normaliser: str = "mean",
    gamma: float = 0.8,
    scope: str = "example",
    beta: float = 1.5,
    rule: Rule | None = None,
) -> Vector:
    find = tuning(p, offsets, beta * p.eps)
    alpha = clip_alpha(p, gamma, scope) if alpha is None else alpha
    rule = rule or clip_rule(gamma, scope)
    a, momentum = p.x, [0.0] * len(p.x)
    for t in range(1, steps + 1):
        momentum = average(momentum, find(t - 1, a, a), momentum_weight(beta1, lam, t), normaliser)
        a = project(p, add(a, decayed(alpha, t), rule(momentum)))
    return a


def averaged(models: Sequence[Callable[[Tensor], Tensor]], weights: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The model whose logits are the weighted means of those of `models`."""

    def model(x: Tensor) -> Tensor:
        logits = [one(x)[0] for one in models]
        means = [sum(w * z[k] for w, z in zip(weights, logits, strict=True)) for k in range(len(logits[0]))]
        return torch.stack([torch.as_tensor(mean) / sum(weights) for mean in means])[None]

    return model


# The interacting attacks: the whole batch at once.


def squared_distance(a: Vector, b: Vector) -> float:
    return sum((a[k] - b[k]) ** 2 for k in range(len(a)))


def median(values: Vector) -> float:
    """The mean of the two middle ones for an even number."""
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def bandwidth(points: Matrix) -> float:
    """h^2, from all pairs, those of a point with itself included; points in one place have no scale."""
    middle = median([squared_distance(a, b) for a in points for b in points])
    return middle / (2 * math.log(len(points))) or 1.0


def pull(kernel_value: float, g: Vector) -> Vector:
    """K(a_i, a_j) g_j."""
    return [kernel_value * c for c in g]


def push(kernel_value: float, a: Vector, b: Vector, h2: float) -> Vector:
    """The gradient by b of K(a, b) = exp(-||a - b||^2 / (2 h^2))."""
    return [kernel_value * (a[k] - b[k]) / h2 for k in range(len(a))]


def weight(c: float, m: int) -> float:
    return c / m


def interact(points: Matrix, gradients: Matrix, c: float, kernel_gradient: str) -> Matrix:
    """e_i = g_i + (c/M) sum_j [K(a_i, a_j) g_j + or - the gradient by a_j of K(a_i, a_j)]."""
    m, sign = len(points), 1 if kernel_gradient == "add" else -1
    if m == 1:
        return gradients
    h2 = bandwidth(points)
    result = []
    for i in range(m):
        e = gradients[i]
        for j in range(m):
            value = math.exp(-squared_distance(points[i], points[j]) / (2 * h2))
            e = add(e, weight(c, m), pull(value, gradients[j]))
            e = add(e, sign * weight(c, m), push(value, points[i], points[j], h2))
        result.append(e)
    return result


def daablob(
    population: Sequence[Problem],
    *,
    steps: int,
    starts: Matrix | None = None,
    alpha: float | None = None,
    c: float = 1.1,
    kernel_gradient: str = "subtract",
    make: Callable[[], Rule] | None = None,
) -> Matrix:
    """Without starts, from x. `make` makes the rule of an example."""
    p = population[0]
    alpha = 2.5 * p.eps / steps if alpha is None else alpha
    rules = [steepest_rule(p.norm) if make is None else make() for _ in population]
    points = [p.x for p in population] if starts is None else starts
    for _ in range(steps):
        gradients = [p.gradient(a) for p, a in zip(population, points, strict=True)]
        directions = interact(points, gradients, c, kernel_gradient)
        points = [project(p, add(points[i], alpha, rules[i](directions[i]))) for i, p in enumerate(population)]
    return points


def blobqg(
    population: Sequence[Problem], *, b: int = 200, make: Callable[[], Rule] | None = None, **options: Any
) -> Matrix:
    return daablob(population, make=make or (lambda: quantised_rule(b)), **options)
