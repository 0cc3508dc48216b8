"""Scaling curves: known constants are found again, and the bands hold the truth as often as they say."""

import numpy as np
import pytest

from longer_rec.study.scaling import fit_scaling

LENGTHS = [50, 100, 200, 500, 1000, 2000, 4000]


def curve(x, alpha, beta, gamma):
    return alpha * np.asarray(x, float) ** beta + gamma


@pytest.mark.parametrize(("alpha", "beta", "gamma"), [
    (-0.5, -0.3, 0.85), (0.4, -0.5, 0.36), (1e-3, 0.4, 0.7), (2.0, -1.5, 0.0), (-3e-4, 0.7, 0.8)])
def test_exact_points_give_their_constants(alpha, beta, gamma):
    fit = fit_scaling(LENGTHS, curve(LENGTHS, alpha, beta, gamma))
    assert [fit.alpha, fit.beta, fit.gamma] == pytest.approx([alpha, beta, gamma], rel=0.02, abs=0.002)
    assert fit.r2 == pytest.approx(1, abs=1e-6)
    assert not fit.at_bound


def test_noisy_points_give_their_constants_on_average():
    random = np.random.default_rng(1)
    fits = [fit_scaling(LENGTHS, curve(LENGTHS, -0.5, -0.4, 0.8) + 0.001 * random.standard_normal(len(LENGTHS)))
            for _ in range(30)]
    assert np.median([fit.beta for fit in fits]) == pytest.approx(-0.4, abs=0.03)
    assert np.median([fit.gamma for fit in fits]) == pytest.approx(0.8, abs=0.003)
    assert all(fit.r2 > 0.99 for fit in fits)


def test_bands_cover_the_true_curve():
    random = np.random.default_rng(2)
    covered = []
    for _ in range(150):
        fit = fit_scaling(LENGTHS, curve(LENGTHS, -0.5, -0.4, 0.8) + 0.01 * random.standard_normal(len(LENGTHS)))
        truth = curve(fit.band_x, -0.5, -0.4, 0.8)
        covered.append((fit.low <= truth) & (truth <= fit.high))
    # 95 % are promised for each x; 150 draws tell a share to about 0.02.
    assert 0.88 <= np.mean(covered) < 1


def test_bands_are_narrow_for_clean_points_and_the_same_each_time():
    y = curve(LENGTHS, -0.5, -0.4, 0.8) + 1e-5 * np.array([1, -1, 1, -1, 1, -1, 1])
    first, second = fit_scaling(LENGTHS, y), fit_scaling(LENGTHS, y)
    assert first == second
    assert max(np.subtract(first.high, first.low)) < 5e-4


def test_a_logarithm_and_a_flat_line_are_fitted():
    logarithm = fit_scaling(LENGTHS, 0.02 * np.log(LENGTHS) + 0.6)
    assert abs(logarithm.beta) <= 0.02
    assert logarithm.r2 > 0.9999
    assert np.isnan(fit_scaling(LENGTHS, [0.5] * 7).r2)


def test_a_cliff_is_told_to_be_no_power_law():
    assert fit_scaling([1, 10, 100, 1000, 10000], [0.0, 1, 1, 1, 1]).at_bound


@pytest.mark.parametrize("x", [[1, 2, 3], [1, 2, 3, 3, 3], []])
def test_fewer_than_four_different_values_are_refused(x):
    assert fit_scaling(x, [float(value) for value in x]) is None
