"""Width and mean rise of curves whose valleys are known."""

import numpy as np
import pytest

from lbstudy.analysis.minima.curves import mean_rise, spread, width

ALPHA = np.linspace(-1, 1, 51)


def test_width_and_mean_rise_of_parabolas():
    curvatures = np.array([1.5, 8.0, 50.0])
    alpha = np.linspace(-1, 1, 501)
    loss = 0.3 + curvatures[:, None] / 2 * alpha**2
    for rise in (0.1, 1.0):
        values, censored = width(alpha, loss, rise)
        exact = 2 * np.sqrt(2 * rise / curvatures)
        assert values == pytest.approx(np.minimum(exact, 2), rel=1e-3)
        assert censored.tolist() == (exact > 2).tolist()
    assert mean_rise(alpha, loss) == pytest.approx(curvatures * 0.25 / 6, rel=1e-3)


def test_piecewise_linear_curves_are_exact():
    loss = np.abs(ALPHA) * np.where(ALPHA < 0, 4, 1) + 2
    assert width(ALPHA, loss, 0.5).values == pytest.approx([0.125 + 0.5], rel=1e-12)
    assert mean_rise(ALPHA, loss, radius=0.33) == pytest.approx([0.33 * (4 + 1) / 4], rel=1e-12)
    off_grid = np.array([-0.9, -0.4, 0.1, 0.6, 1.1])  # 0 lies between points
    assert width(off_grid, 3 * off_grid, 1.5).values == pytest.approx([0.9 + 0.5], rel=1e-12)
    assert mean_rise(off_grid, 3 * off_grid + 1) == pytest.approx([0], abs=1e-12)


def test_only_the_valley_around_the_solution_counts():
    loss = 1 - np.cos(4 * np.pi * ALPHA)  # valleys at -1, -0.5, 0, 0.5 and 1
    values, censored = width(ALPHA, loss, 1.0)
    assert values == pytest.approx([0.25], rel=0.01)
    assert not censored[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_above(bad: float):
    loss = np.where(np.abs(ALPHA) > 0.41, bad, 0.5)
    values, censored = width(ALPHA, loss, 1.0)
    assert values == pytest.approx([0.8])
    assert not censored[0]
    assert mean_rise(ALPHA, loss) == np.inf
    assert mean_rise(ALPHA, loss, radius=0.4) == 0
    at_solution = np.where(np.abs(ALPHA) < 0.01, bad, 0.5)
    assert np.isnan(width(ALPHA, at_solution, 1.0).values[0])
    assert np.isnan(mean_rise(ALPHA, at_solution)[0])


def test_spread_over_directions():
    assert spread([5, 1, 2, 4, 3]) == (3, 2, 4)
    assert spread([1, 2, np.inf, np.inf, np.inf]) == (np.inf, 2, np.inf)
    assert spread([1, 2, 3, np.inf]).median == 2.5
    assert np.isnan(spread([1, np.nan]).median)


def test_curves_that_do_not_reach_are_refused():
    with pytest.raises(ValueError, match="increase and enclose 0"):
        width([0.1, 0.2], [[1, 2]], 1)
    with pytest.raises(ValueError, match="increase and enclose 0"):
        width([1, 0, -1], [[1, 2, 3]], 1)
    with pytest.raises(ValueError, match="from -0.2 to 1"):
        mean_rise([-0.2, 0, 1], [[1, 0, 1]])
