"""How wide the valley is that a 1-D loss curve shows: its width and its mean rise. Needs no torch.

A curve is the loss at theta* + alpha * direction, over points alpha with the solution at alpha = 0; there is a row per
direction. A wide valley (large width, small mean rise) is a FLAT minimum, a narrow one a SHARP minimum. Losses that
are not finite lie above every level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Spread(NamedTuple):
    """Median and quartiles over directions."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


class Widths(NamedTuple):
    """Width of the valley along each direction."""

    values: Array  # directions
    censored: NDArray[np.bool_]  # directions; the valley goes on beyond the curve: the width is a lower bound


def width(alpha: ArrayLike, loss: ArrayLike, rise: float) -> Widths:
    """Length of the connected interval around alpha = 0 on which L(alpha) <= L(0) + rise.

    Between points the loss is interpolated linearly; towards a loss that is not finite, the interval ends at the last
    point that is. Where L(0) is not finite, the width is NaN.

    Args:
        alpha: points, increasing, with 0 between the first and the last.
        loss: directions x points.
        rise: the level above L(0), for instance 0.1 or 1.

    Raises:
        ValueError: the points are not increasing or do not enclose 0.
    """
    alpha, loss = _curve(alpha, loss)
    results = [_width(alpha, row, rise) for row in loss]
    return Widths(np.array([value for value, _ in results]), np.array([censored for _, censored in results]))


def mean_rise(alpha: ArrayLike, loss: ArrayLike, radius: float = 0.5) -> Array:
    """Mean of L(alpha) - L(0) over |alpha| <= radius, per direction: the integral of the linearly interpolated curve.

    Infinite where the curve is not finite within the radius, NaN where L(0) is not.

    Args:
        alpha: points, increasing, from -radius or less to radius or more.
        loss: directions x points.
        radius: half the length of the interval.

    Raises:
        ValueError: the points are not increasing or do not reach so far.
    """
    alpha, loss = _curve(alpha, loss)
    if not alpha[0] <= -radius < radius <= alpha[-1]:
        raise ValueError(f"the curve reaches from {alpha[0]:g} to {alpha[-1]:g}: not over all of +-{radius:g}")
    inside = np.concatenate([[-radius], alpha[np.abs(alpha) < radius], [radius]])
    rises = []
    for row in loss:
        at_zero = _at(alpha, row, 0.0)
        values = np.array([_at(alpha, row, point) for point in inside])
        if not np.isfinite(at_zero):
            rises.append(np.nan)
        elif not np.isfinite(values).all():
            rises.append(np.inf)
        else:
            rises.append(np.trapezoid(values - at_zero, inside) / (2 * radius))
    return np.array(rises)


def spread(values: ArrayLike) -> Spread:
    """Median and quartiles of one number per direction, infinite ones among them; NaN if there is any NaN."""
    values = np.asarray(values, dtype=float)
    low, high = np.quantile(values, [0.25, 0.75], method="inverted_cdf")  # interpolation would give inf - inf
    return Spread(float(np.median(values)), float(low), float(high))


def _curve(alpha: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    alpha, loss = np.asarray(alpha, dtype=float), np.atleast_2d(np.asarray(loss, dtype=float))
    if not (np.diff(alpha) > 0).all() or not alpha[0] <= 0 <= alpha[-1]:
        raise ValueError(f"alpha from {alpha[0]:g} to {alpha[-1]:g}: must increase and enclose 0")
    return alpha, np.where(np.isfinite(loss), loss, np.inf)


def _at(alpha: Array, row: Array, point: float) -> float:
    """The curve at a point; infinite next to an infinite value unless the point is on the grid."""
    right = int(np.searchsorted(alpha, point))
    if alpha[right] == point:
        return float(row[right])
    if not np.isfinite(row[right - 1 : right + 1]).all():
        return np.inf
    return float(np.interp(point, alpha, row))


def _width(alpha: Array, row: Array, rise: float) -> tuple[float, bool]:
    at_zero = _at(alpha, row, 0.0)
    if not np.isfinite(at_zero):
        return np.nan, False
    right, beyond_right = _reach(alpha[alpha > 0], row[alpha > 0], at_zero, rise)
    left, beyond_left = _reach(-alpha[alpha < 0][::-1], row[alpha < 0][::-1], at_zero, rise)
    return left + right, beyond_left or beyond_right


def _reach(distance: Array, row: Array, at_zero: float, rise: float) -> tuple[float, bool]:
    """How far from 0 the curve first leaves the level, and whether it never does."""
    distance, rises = np.concatenate([[0.0], distance]), np.concatenate([[0.0], row - at_zero])
    above = np.flatnonzero(rises > rise)
    if not len(above):
        return float(distance[-1]), True
    last, first = above[0] - 1, above[0]
    fraction = (rise - rises[last]) / (rises[first] - rises[last])  # 0 where the curve becomes infinite
    return float(distance[last] + fraction * (distance[first] - distance[last])), False
