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
_BAND_POINTS: Final = 60


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


def fit_scaling(x: Sequence[float], y: Sequence[float]) -> ScalingFit | None:
    """The curve through points (x > 0, y), or None with fewer than ``MIN_POINTS`` distinct x.

    Confidence comes from a parametric bootstrap: curves are fitted to draws around the fitted values, whose spread is
    itself drawn, sigma^2 = residuals / chi-square, because few points tell it badly.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(np.unique(xs)) < MIN_POINTS:
        return None
    scale = float(np.exp(np.log(xs).mean()))
    scaled = xs / scale
    (beta,), (slope,), (level,) = _fit(scaled, ys[None, :], _BETAS)
    fine = np.linspace(beta - _STEP, beta + _STEP, 200) if abs(beta) > _STEP else np.array([beta])
    (beta,), (slope,), (level,) = _fit(scaled, ys[None, :], fine)
    fitted = slope * _basis(scaled, np.array([beta]))[0] + level
    residual, total = float(((ys - fitted) ** 2).sum()), float(((ys - ys.mean()) ** 2).sum())

    random = np.random.default_rng(0)
    sigmas = np.sqrt(residual / random.chisquare(len(xs) - 3, _REPLICATES))
    draws = fitted + sigmas[:, None] * random.standard_normal((_REPLICATES, len(xs)))
    band = np.geomspace(xs.min(), xs.max(), _BAND_POINTS)
    betas, slopes, levels = _fit(scaled, draws, _BETAS)
    curves = slopes[:, None] * _basis(band / scale, betas) + levels[:, None]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    curve = slope * _basis(band / scale, np.array([beta]))[0] + level
    return ScalingFit(alpha=float(slope / beta * scale**-beta), beta=float(beta), gamma=float(level - slope / beta),
                      r2=1 - residual / total if total else float("nan"), band_x=band.tolist(), curve=curve.tolist(),
                      low=low.tolist(), high=high.tolist())


def _basis(xs: Floats, betas: Floats) -> Floats:
    """(x^beta - 1) / beta, a row for each beta: x^beta itself is all but constant near beta = 0."""
    basis: Floats = np.expm1(np.outer(betas, np.log(xs))) / betas[:, None]
    return basis


def _fit(xs: Floats, rows: Floats, grid: Floats) -> tuple[Floats, Floats, Floats]:
    """Best exponent of ``grid``, slope and level of each row of ``rows``."""
    basis = _basis(xs, grid)
    centred = basis - basis.mean(axis=1, keepdims=True)
    slope = (rows @ centred.T) / (centred**2).sum(axis=1)
    gain = slope**2 * (centred**2).sum(axis=1)
    best = gain.argmax(axis=1)
    slopes = np.take_along_axis(slope, best[:, None], axis=1)[:, 0]
    return grid[best], slopes, rows.mean(axis=1) - slopes * basis[best].mean(axis=1)
