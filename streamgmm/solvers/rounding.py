"""What a read tells, without the digits that depend on the order in which rows are added up.

On a plateau of the likelihood such a digit grows from read to read, until it decides where the fit ends.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.linalg import inverse_choleskys, power_of_two
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.quadratic import OUTER
from streamgmm.solvers.gain import Point

#: The part of what ends a fit that the digits of a likelihood tell at least; and of its root, those of moments.
TOLD, TOLD_MOMENTS = 2.0**-6, 2.0**-12
#: Below this there are no digits that could be left out.
LEAST_TOL = 1e-100
#: The last digit of the means and deviations that moments are measured in.
COARSE = 2.0**-20


def rounded(point: Point, tol: float, reg_covar: float) -> Point:
    """The point without the last digits, which the order in which rows are added up decides.

    What is left out could change the optimum by next to nothing beside ``tol``, nats a row: the likelihood by TOLD tol,
    and the moments, about the means and in the deviations that EM's step makes of them, by TOLD_MOMENTS sqrt(tol), for
    at an optimum the likelihood changes with their square. Where EM's step degenerates nothing is left out.
    """
    scale, means = point.stats.scale, point.params.means
    try:
        step = point.em_step(reg_covar)
        roots = _roots(step, scale)
    except (NumericalError, np.linalg.LinAlgError):
        return point
    whitening = np.asarray(np.linalg.inv(roots), dtype=np.float64)
    away = _rounded(_times(whitening, (step.means - means) * scale), COARSE)
    stats = point.stats.about(means + _times(roots, away) / scale, scale)
    tol = min(max(tol, LEAST_TOL), 1.0)
    grain = TOLD_MOMENTS * sqrt(tol) / power_of_two(stats.mass)[:, None]
    mass = _rounded(stats.mass[:, None], grain)
    first = _times(roots, _rounded(_times(whitening, stats.first), grain))
    second = stats.quadratic.mapped(_rounded(stats.quadratic.mapped(stats.second, whitening), grain), roots)
    common = stats.common
    if common.size:
        of_all = _rounded(OUTER.mapped(common[None], whitening[:1]), TOLD_MOMENTS * sqrt(tol))
        common = OUTER.mapped(of_all, roots[:1])[0]
    stats = replace(stats, moments=np.concatenate([mass, first, second], axis=1), common=common)
    return Point(point.params, stats.about(means, scale), float(_rounded(point.log_likelihood, TOLD * tol)))


def _roots(params: MixtureParams, scale: Floats) -> Floats:
    """Cholesky factors (k, d, d) of x * scale to so few digits that they are the same for rows in any order."""
    dense = params.covariance.dense(*params.means.shape)
    whitening = inverse_choleskys(dense, "covariance of component {}") / scale
    roots = np.asarray(np.linalg.inv(whitening), dtype=np.float64)
    unit = power_of_two(np.diagonal(roots, axis1=1, axis2=2))[:, :, None]  # of each row what only it adds
    return np.tril(_rounded(roots * unit, COARSE) / unit)


def _times(matrices: Floats, vectors: Floats) -> Floats:
    """(k, d) products of matrices (k, d, d) and vectors (k, d)."""
    return np.asarray((matrices @ vectors[:, :, None])[:, :, 0])


def _rounded(values: Floats | float, grain: Floats | float) -> Floats:
    return np.asarray(np.rint(values / grain) * grain)
