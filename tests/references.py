"""Slow reference transcriptions of the bounded attacks: one example, plain lists of floats, explicit loops.

Nothing is shared with the package. Only the gradient of J of a single example comes from torch. A rule
(update direction) may keep state, so every call of a reference takes a fresh one from its maker.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = list[float]
Rule = Callable[[Vector], Vector]
Loss = Callable[[Tensor, int], Tensor]


# Losses of one row of logits.


def cross_entropy(z: Tensor, y: int) -> Tensor:
    return torch.exp(z - z[y]).sum().log()


def margin(z: Tensor, y: int) -> Tensor:
    best = None
    for j in range(len(z)):
        if j != y and (best is None or z[j] > best):
            best = z[j]
    assert best is not None
    return best - z[y]


def dlr(z: Tensor, y: int) -> Tensor:
    order = sorted(range(len(z)), key=lambda j: -z[j].item())
    other = order[1] if order[0] == y else order[0]
    return (z[other] - z[y]) / (z[order[0]] - z[order[2]])


# One example and its ball.


@dataclass
class Problem:
    """One example, flattened: where it starts, where it may go, and what is climbed."""

    model: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    x: Vector
    y: int
    low: Vector
    high: Vector
    eps: float
    norm: str = "Linf"
    targeted: bool = False
    loss: Loss = cross_entropy

    def gradient(self, a: Vector) -> Vector:
        """The gradient of J at a, of -J if targeted."""
        point = torch.tensor(a, dtype=torch.float64).reshape(1, *self.shape).requires_grad_()
        value = self.loss(self.model(point)[0], self.y)
        (g,) = torch.autograd.grad(-value if self.targeted else value, point)
        return g.flatten().tolist()

    def value(self, a: Vector) -> float:
        """J at a, -J if targeted."""
        with torch.no_grad():
            found = float(
                self.loss(self.model(torch.tensor(a, dtype=torch.float64).reshape(1, *self.shape))[0], self.y)
            )
        return -found if self.targeted else found


# Small formulas.


def l2(v: Vector) -> float:
    return math.sqrt(sum(c * c for c in v))


def add(a: Vector, scale: float, v: Vector) -> Vector:
    return [a[j] + scale * v[j] for j in range(len(a))]


def onto_ball(p: Problem, a: Vector) -> Vector:
    """The projection onto the ball of radius eps around x."""
    delta = [a[j] - p.x[j] for j in range(len(a))]
    if p.norm == "Linf":
        delta = [min(max(c, -p.eps), p.eps) for c in delta]
    else:
        size = l2(delta)
        delta = [c * p.eps / size if size > p.eps else c for c in delta]
    return [p.x[j] + delta[j] for j in range(len(a))]


def onto_bounds(p: Problem, a: Vector) -> Vector:
    return [min(max(a[j], p.low[j]), p.high[j]) for j in range(len(a))]


def project(p: Problem, a: Vector) -> Vector:
    """P: onto the ball, then onto the bounds."""
    return onto_bounds(p, onto_ball(p, a))


def normalised(g: Vector, normaliser: str) -> Vector:
    """g / mean|g| or g / ||g||_1, zero for a zero gradient."""
    size = sum(abs(c) for c in g)
    if normaliser == "mean":
        size /= len(g)
    return [c / size if size > 0 else 0.0 for c in g]


def accumulate(momentum: Vector, g: Vector, decay: float, normaliser: str) -> Vector:
    """m = mu m + g / normaliser(g)."""
    unit = normalised(g, normaliser)
    return [decay * momentum[j] + unit[j] for j in range(len(g))]


def beta(beta1: float, lam: float, t: int) -> float:
    return beta1 * math.pow(lam, t - 1)


def average(momentum: Vector, g: Vector, beta_t: float, normaliser: str) -> Vector:
    """m = beta_t m + (1 - beta_t) g / normaliser(g)."""
    unit = normalised(g, normaliser)
    return [beta_t * momentum[j] + (1 - beta_t) * unit[j] for j in range(len(g))]


def look_ahead(p: Problem, a: Vector, step: float, momentum: Vector, rule: Rule, along_step: bool) -> Vector:
    """a + step m, or where the rule would carry a along m alone.

    The rule saw this m at the step before, so seeing it again leaves a clip's radius as it is.
    """
    return project(p, add(a, step, rule(momentum))) if along_step else add(a, step, momentum)


def copy_factor(i: int) -> float:
    """What the chain rule gives copy i, the derivative of a / 2^i."""
    return math.pow(2, -i)


def copies_gradient(p: Problem, a: Vector, m: int) -> Vector:
    """(1/m) sum_i of the gradient by a of J(a / 2^i)."""
    total = [0.0] * len(a)
    for i in range(m):
        g = p.gradient([c / 2**i for c in a])
        total = add(total, copy_factor(i) / m, g)
    return total


def decayed(alpha: float, t: int) -> float:
    return alpha / math.sqrt(t)


def shrink(radius: float, size: float, previous: float) -> float:
    """d_t = min(gamma / size, d_{t-1})."""
    return min(radius / size, previous) if size > 0 else previous


# Update rules.


def sign(g: Vector) -> Vector:
    return [float((c > 0) - (c < 0)) for c in g]


def unit_l2(g: Vector) -> Vector:
    size = l2(g)
    return [c / size if size > 0 else 0.0 for c in g]


def identity(g: Vector) -> Vector:
    return g


def quantise(g: Vector, b: int) -> Vector:
    """zeta(b g / max|g|), zeta(v) = sgn(v) below 1 in size and round(v) from there on."""
    largest = max(abs(c) for c in g)
    result = []
    for c in g:
        v = b * c / largest if largest > 0 else 0.0
        result.append(float(round(v)) if abs(v) >= 1 else sign([v])[0])
    return result


def sign_rule() -> Rule:
    return lambda g: sign(g)


def unit_rule() -> Rule:
    return lambda g: unit_l2(g)


def identity_rule() -> Rule:
    return lambda g: identity(g)


def steepest_rule(norm: str) -> Rule:
    """The rule of a sign attack: g / ||g||_2 under L2."""
    return sign_rule() if norm == "Linf" else unit_rule()


def quantised_rule(b: int) -> Rule:
    return lambda g: quantise(g, b)


def clip_rule(gamma: float, scope: str, d0: float = 1.0) -> Rule:
    """d_t m_t with one d_t for the example, or one for every element."""
    d: Vector = []

    def rule(momentum: Vector) -> Vector:
        nonlocal d
        d = d or [d0] * len(momentum)
        sizes = [abs(c) for c in momentum] if scope == "element" else [l2(momentum)] * len(momentum)
        d = [shrink(gamma, sizes[j], d[j]) for j in range(len(momentum))]
        return [d[j] * momentum[j] for j in range(len(momentum))]

    return rule


# The attacks.


def ngm_alpha(eps: float, norm: str, size: int) -> float:
    """18 (eps / (16/255)) sqrt(d / 268203), without sqrt(d) under L2."""
    return 18 * (eps / (16 / 255)) * math.sqrt((size if norm == "Linf" else 1) / 268203)


def clip_alpha(p: Problem, gamma: float, scope: str) -> float:
    """No component moves further than 0.45 eps, under L2 over sqrt(d); for the clip of an example, as `ngm_alpha`."""
    if scope == "example":
        return ngm_alpha(p.eps, p.norm, len(p.x))
    return 0.45 * p.eps / gamma / (math.sqrt(len(p.x)) if p.norm == "L2" else 1)


def fgsm(p: Problem, *, rule: Rule | None = None) -> Vector:
    rule = rule or steepest_rule(p.norm)
    return project(p, add(p.x, p.eps, rule(p.gradient(p.x))))


def bim(p: Problem, *, steps: int, alpha: float | None = None, rule: Rule | None = None) -> Vector:
    return pgd(p, start=p.x, steps=steps, alpha=p.eps / steps if alpha is None else alpha, rule=rule)


def pgd(
    p: Problem, *, steps: int, start: Vector | None = None, alpha: float | None = None, rule: Rule | None = None
) -> Vector:
    """Without a start, from x."""
    alpha = 2.5 * p.eps / steps if alpha is None else alpha
    rule = rule or steepest_rule(p.norm)
    a = p.x if start is None else start
    for _ in range(steps):
        a = project(p, add(a, alpha, rule(p.gradient(a))))
    return a


def pqgd(
    p: Problem,
    *,
    steps: int,
    start: Vector | None = None,
    alpha: float | None = None,
    b: int = 200,
    rule: Rule | None = None,
) -> Vector:
    return pgd(p, steps=steps, start=start, alpha=alpha, rule=rule or quantised_rule(b))


def mifgsm(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    decay: float = 1.0,
    normaliser: str = "mean",
    rule: Rule | None = None,
) -> Vector:
    alpha = p.eps / steps if alpha is None else alpha
    rule = rule or steepest_rule(p.norm)
    a, momentum = p.x, [0.0] * len(p.x)
    for _ in range(steps):
        g = p.gradient(a)
        momentum = accumulate(momentum, g, decay, normaliser)
        a = project(p, add(a, alpha, rule(momentum)))
    return a


def nifgsm(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    decay: float = 1.0,
    normaliser: str = "mean",
    rule: Rule | None = None,
    along_step: bool | None = None,
) -> Vector:
    """`along_step` for rules that move an L2 length, by default under L2, whose own rule does."""
    alpha = p.eps / steps if alpha is None else alpha
    rule = rule or steepest_rule(p.norm)
    along_step = p.norm == "L2" if along_step is None else along_step
    a, momentum = p.x, [0.0] * len(p.x)
    for _ in range(steps):
        g = p.gradient(look_ahead(p, a, alpha * decay, momentum, rule, along_step))
        momentum = accumulate(momentum, g, decay, normaliser)
        a = project(p, add(a, alpha, rule(momentum)))
    return a


def sinifgsm(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    decay: float = 1.0,
    normaliser: str = "mean",
    m: int = 5,
    rule: Rule | None = None,
    along_step: bool | None = None,
) -> Vector:
    """`along_step` for rules that move an L2 length, by default under L2, whose own rule does."""
    alpha = p.eps / steps if alpha is None else alpha
    rule = rule or steepest_rule(p.norm)
    along_step = p.norm == "L2" if along_step is None else along_step
    a, momentum = p.x, [0.0] * len(p.x)
    for _ in range(steps):
        g = copies_gradient(p, look_ahead(p, a, alpha * decay, momentum, rule, along_step), m)
        momentum = accumulate(momentum, g, decay, normaliser)
        a = project(p, add(a, alpha, rule(momentum)))
    return a


def ngm(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    beta1: float = 0.9,
    lam: float = 0.99,
    normaliser: str = "mean",
    rule: Rule | None = None,
) -> Vector:
    alpha = ngm_alpha(p.eps, p.norm, len(p.x)) if alpha is None else alpha
    rule = rule or identity_rule()
    a, momentum = p.x, [0.0] * len(p.x)
    for t in range(1, steps + 1):
        g = p.gradient(a)
        momentum = average(momentum, g, beta(beta1, lam, t), normaliser)
        a = project(p, add(a, decayed(alpha, t), rule(momentum)))
    return a


def clipped_ngm(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    beta1: float = 0.9,
    lam: float = 0.99,
    normaliser: str = "mean",
    gamma: float = 0.8,
    scope: str = "example",
    rule: Rule | None = None,
) -> Vector:
    alpha = clip_alpha(p, gamma, scope) if alpha is None and rule is None else alpha
    rule = rule or clip_rule(gamma, scope)
    return ngm(p, steps=steps, alpha=alpha, beta1=beta1, lam=lam, normaliser=normaliser, rule=rule)


def clipped_ng(
    p: Problem,
    *,
    steps: int,
    alpha: float | None = None,
    normaliser: str = "mean",
    gamma: float = 0.8,
    scope: str = "example",
    rule: Rule | None = None,
) -> Vector:
    """No momentum: the normalised gradient, clipped."""
    alpha = clip_alpha(p, gamma, scope) if alpha is None else alpha
    rule = rule or clip_rule(gamma, scope)
    a = p.x
    for t in range(1, steps + 1):
        unit = normalised(p.gradient(a), normaliser)
        a = project(p, add(a, decayed(alpha, t), rule(unit)))
    return a


# A batch, one example at a time.


def limits(bound: float | Sequence[float], shape: tuple[int, ...]) -> Vector:
    """A bound for every element of an example (C, H, W): one number, or one per channel."""
    result = []
    for channel in range(shape[0]):
        value = bound[channel] if isinstance(bound, Sequence) else bound
        result += [float(value)] * math.prod(shape[1:])
    return result


def apgd_checkpoints(steps: int) -> list[int]:
    """w_0 = 0, w_1 = 0.22 T, the periods then shrinking by 0.03 T to 0.06 T; rounded down, to 1 at least."""
    first, less, least = (max(math.floor(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, period = [0], first
    while marks[-1] + period <= steps:
        marks.append(marks[-1] + period)
        period = max(period - less, least)
    return marks


def apgd_rises_rarely(values: Vector, w0: int, w1: int, rho: float) -> bool:
    """Condition 1 between two checkpoints, of the values at x_0, x_1, ...; the first is compared with 0, not f(x_0)."""
    before = [0.0, *values[1:]]
    return sum(values[i] > before[i - 1] for i in range(w0 + 1, w1 + 1)) <= rho * (w1 - w0)


def apgd_rests(values: Vector, w0: int, w1: int, halved_before: bool) -> bool:
    """Condition 2: neither the step nor the largest value has changed since the checkpoint before."""
    return w0 > 0 and not halved_before and max(values[: w0 + 1]) == max(values[: w1 + 1])


def apgd_return(path: list[Vector], values: Vector) -> int:
    """Where the run goes on after a halving: at the iterate of the largest value, the first of several."""
    return values.index(max(values))


def apgd_move(p: Problem, here: Vector, before: Vector, z: Vector, k: int) -> Vector:
    """a z + (1 - a) times the move before, a = 0.75; 1 at the first step."""
    a = 0.75 if k > 0 else 1.0
    return project(p, [here[j] + a * (z[j] - here[j]) + (1 - a) * (here[j] - before[j]) for j in range(len(here))])


def apgd(
    p: Problem,
    *,
    steps: int,
    start: Vector | None = None,
    alpha: float | None = None,
    rho: float = 0.75,
    rule: Rule | None = None,
) -> list[Vector]:
    """The iterates x_0, ..., x_T of Croce & Hein 2020, Alg. 1, in the reading of their code."""
    eta, rule = 2 * p.eps if alpha is None else alpha, rule or steepest_rule(p.norm)
    path = [project(p, p.x if start is None else start)]
    values, gradients = [p.value(path[0])], [p.gradient(path[0])]
    marks, halved, here, began = apgd_checkpoints(steps), True, 0, 0
    for k in range(steps):
        z = project(p, add(path[here], eta, rule(gradients[here])))
        path.append(apgd_move(p, path[here], path[began], z, k))
        values.append(p.value(path[-1]))
        gradients.append(p.gradient(path[-1]))
        began, here = here, k + 1
        if here in marks:
            w0 = marks[marks.index(here) - 1]
            halved = apgd_rises_rarely(values, w0, here, rho) or apgd_rests(values, w0, here, halved)
            if halved:
                eta, here = eta / 2, apgd_return(path, values)
    return path


def attack_batch(
    attack: Callable[[Problem, int], Vector],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    targeted: bool = False,
    bounds: tuple[float | Sequence[float], float | Sequence[float]] = (0.0, 1.0),
    loss: Loss = cross_entropy,
) -> Tensor:
    """`attack(problem, index)` for every example of (N, C, H, W)."""
    shape = tuple(x.shape[1:])
    low, high = limits(bounds[0], shape), limits(bounds[1], shape)
    rows = []
    for i in range(len(x)):
        p = Problem(model, shape, x[i].flatten().tolist(), int(y[i]), low, high, eps, norm, targeted, loss)
        rows.append(torch.tensor(attack(p, i), dtype=x.dtype).reshape(shape))
    return torch.stack(rows)
