"""Keskar's measure of sharpness: how far the loss can rise in a small box around a solution.

Keskar et al. 2017, "On large-batch training for deep learning: generalization gap and sharp minima", Metric 2.1. Of
any function of a vector; needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are used: those who only read results need none of them
from numpy.typing import NDArray

Vector = NDArray[np.float64]
ValueAndGradient = Callable[[Vector], tuple[float, Vector]]

TURNS = 2  # steps of a climb that stay near the centre and turn towards the steepest curvature
CORNERS = 2  # then, from corner to corner
JITTER = 0.1  # how near the centre, as a fraction of the box
ITERATIONS = 10  # of L-BFGS-B, as published; so many losses, too


class _Enough(Exception):
    """L-BFGS-B has had its losses."""


class KeskarSharpness(NamedTuple):
    """phi, in percent of 1 + f(x)."""

    best: float  # over all points tried
    published: float  # over those tried from x itself


def keskar(
    loss: ValueAndGradient,
    x: Vector,
    epsilon: float,
    draw: np.random.Generator,
    subspace: NDArray[np.float32] | None = None,
    climbs: int = 2,
    at_x: tuple[float, Vector] | None = None,
) -> KeskarSharpness:
    """100 (max f(x + A y) - f(x)) / (1 + f(x)) over |y_i| <= eps (|(A^+ x)_i| + 1).

    As published, the maximum is sought by ten iterations of L-BFGS-B from y = 0. They get ten losses beyond f(x), one
    each: where single precision hides a rise, a line search would go on for dozens. At a minimum the gradient is nearly
    zero there, and the search may stall. So it is helped by climbs: from a random point near 0, turned towards the
    steepest curvature by the gradient there, to the corner of the box that the gradient's signs point to, and on to
    the next corner, which never descends where the loss is convex. `best` is the largest loss that any search met.
    Every result is a lower bound of the maximum, and at least 0: the box holds x. Not invariant to rescaling the
    weights.

    Args:
        loss: f and its gradient.
        x: the solution, n.
        epsilon: size of the box, 1e-3 or 5e-4 in the paper.
        draw: draws where climbs begin.
        subspace: A, n x p; None for the full space, A = I.
        climbs: each from another random point near the centre of the box.
        at_x: f and its gradient at x, where they are known.
    """
    value_at_x, gradient_at_x = at_x or loss(x)
    if subspace is None:
        half = epsilon * (np.abs(x) + 1)
    else:
        gram = (subspace.T @ subspace).astype(np.float64)
        pseudo_inverse_x = np.linalg.solve(gram, subspace.T @ x.astype(subspace.dtype))  # A has full column rank
        half = epsilon * (np.abs(pseudo_inverse_x) + 1)
    best = value_at_x

    def rise(y: Vector) -> tuple[float, Vector]:
        nonlocal best
        move = y if subspace is None else subspace @ y.astype(subspace.dtype)
        value, gradient = loss(x + move) if y.any() else (value_at_x, gradient_at_x)
        best = max(best, value)  # a NaN loses every comparison
        if subspace is not None:
            gradient = (subspace.T @ gradient.astype(subspace.dtype)).astype(np.float64)
        return value, gradient

    evaluations = 0

    def fall(y: Vector) -> tuple[float, Vector]:
        nonlocal evaluations
        if evaluations > ITERATIONS:
            raise _Enough
        evaluations += 1
        value, gradient = rise(y)
        return -value, -gradient

    with suppress(_Enough):
        scipy.optimize.minimize(
            fall, np.zeros_like(half), jac=True, method="L-BFGS-B", bounds=scipy.optimize.Bounds(-half, half),
            options={"maxiter": ITERATIONS},
        )  # fmt: skip
    published = best
    for _ in range(climbs):
        y = JITTER * half * draw.uniform(-1, 1, size=len(half))
        for _ in range(TURNS):  # power iteration, in units of the box
            slope = half * rise(y)[1]
            y = JITTER * half * slope / (np.abs(slope).max() or 1.0)
        for _ in range(CORNERS):
            y = half * np.sign(rise(y)[1])
        rise(y)
    scale = 100 / (1 + value_at_x)
    return KeskarSharpness(scale * (best - value_at_x), scale * (published - value_at_x))


def random_subspace(size: int, dimension: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """Keskar's random A, n x p, float32: independent normal entries of variance 1/p.

    The paper does not say how A is drawn. With these entries A y at a corner of the box moves a weight by about eps, as
    a corner of the full box does (eps (|x_i| + 1)), so that values are the smaller for the fewer directions alone. In
    the paper they are 2 to 37 times smaller (tables 3 and 4: C1, C2, C4). Entries of variance 1 would move a weight
    sqrt(p) times farther; columns of unit length, as in SmoothOut's code, sqrt(n / p) times less far.
    """
    dimension = min(dimension, size)
    entries = draw.standard_normal((size, dimension), dtype=np.float32)
    entries /= np.float32(np.sqrt(dimension))  # in place: VGG9's take 1.1 GB
    return entries
