"""Scaling curves y = alpha * x^beta + gamma (LONGER, section on scaling), by variable projection.

For a given beta the best alpha and gamma are a straight line's, so that one parameter is left to search: no start, no
gradient, nothing that fails to converge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_POINTS: Final = 4
_STEP: Final = 0.02
# Half a step beside 0, where the curve is a logarithm and alpha infinite.
_BETAS: Final = np.arange(-4 + _STEP / 2, 4, _STEP)
_REPLICATES: Final = 2000


@dataclass(frozen=True)
class ScalingFit:
    """``low`` and ``high`` bound the curve at ``band_x`` with 95 % confidence; ``r2`` is NaN where all y are equal."""

    alpha: float
    beta: float
    gamma: float
    r2: float
    band_x: list[float]
    curve: list[float]
    low: list[float]
    high: list[float]

    @property
    def at_bound(self) -> bool:
        """Whether the exponent left the range that is searched: the points do not tell it."""
        return not _BETAS[0] < self.beta < _BETAS[-1]


def fit_scaling(x: Sequence[float], y: Sequence[float], num_band: int = 60) -> ScalingFit | None:
    """The curve through points (x > 0, y), or None with fewer than ``MIN_POINTS`` distinct x.

    Confidence comes from a parametric bootstrap: curves are fitted to draws around the fitted values, whose spread is
    itself drawn, sigma^2 = residuals / chi-square, because few points tell it badly.
    """
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(np.unique(x_N)) < MIN_POINTS:
        return None
    scale = float(np.exp(np.log(x_N).mean()))
    scaled_N = x_N / scale
    (beta,), (slope,), (level,) = _fit(scaled_N, y_N[None, :], _BETAS)
    fine = np.linspace(beta - _STEP, beta + _STEP, 200) if abs(beta) > _STEP else np.array([beta])
    (beta,), (slope,), (level,) = _fit(scaled_N, y_N[None, :], fine)
    fitted_N = slope * _basis(scaled_N, np.array([beta]))[0] + level
    residual, total = float(((y_N - fitted_N) ** 2).sum()), float(((y_N - y_N.mean()) ** 2).sum())

    random = np.random.default_rng(0)
    sigma_R = np.sqrt(residual / random.chisquare(len(x_N) - 3, _REPLICATES))
    draw_RN = fitted_N + sigma_R[:, None] * random.standard_normal((_REPLICATES, len(x_N)))
    band = np.geomspace(x_N.min(), x_N.max(), num_band)
    beta_R, slope_R, level_R = _fit(scaled_N, draw_RN, _BETAS)
    curve_RN = slope_R[:, None] * _basis(band / scale, beta_R) + level_R[:, None]
    low, high = np.quantile(curve_RN, [0.025, 0.975], axis=0)
    curve = slope * _basis(band / scale, np.array([beta]))[0] + level
    return ScalingFit(alpha=float(slope / beta * scale**-beta), beta=float(beta), gamma=float(level - slope / beta),
                      r2=1 - residual / total if total else float("nan"), band_x=band.tolist(), curve=curve.tolist(),
                      low=low.tolist(), high=high.tolist())


def _basis(x_N: Floats, beta_R: Floats) -> Floats:
    """(x^beta - 1) / beta, a row for each beta: x^beta itself is all but constant near beta = 0."""
    basis: Floats = np.expm1(np.outer(beta_R, np.log(x_N))) / beta_R[:, None]
    return basis


def _fit(x_N: Floats, y_RN: Floats, beta_G: Floats) -> tuple[Floats, Floats, Floats]:
    """Best exponent of ``beta_G``, slope and level of each row of ``y_RN``."""
    basis_GN = _basis(x_N, beta_G)
    centred_GN = basis_GN - basis_GN.mean(axis=1, keepdims=True)
    slope_RG = (y_RN @ centred_GN.T) / (centred_GN**2).sum(axis=1)
    gain_RG = slope_RG**2 * (centred_GN**2).sum(axis=1)
    best_R = gain_RG.argmax(axis=1)
    slope_R = np.take_along_axis(slope_RG, best_R[:, None], axis=1)[:, 0]
    return beta_G[best_R], slope_R, y_RN.mean(axis=1) - slope_R * basis_GN[best_R].mean(axis=1)
