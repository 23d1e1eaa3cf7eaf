"""What a read of all rows tells, what is expected of the next one, and how far steps in memory led."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint, regularisation, regularised_gain
from streamgmm.kernel import m_step
from streamgmm.linalg import inverse_choleskys, power_of_two
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.quadratic import OUTER
from streamgmm.stats import SufficientStats

#: The part of what ends a fit that the digits of a likelihood tell at least; and of its root, those of moments.
TOLD, TOLD_MOMENTS = 2.0**-6, 2.0**-12
#: Below this there are no digits that could be left out.
LEAST_TOL = 1e-100
#: The last digit of the means and deviations that moments are measured in.
COARSE = 2.0**-20


@dataclass(frozen=True, eq=False)
class Point:
    """What a read of all rows told of ``params``: their statistics per row, about their means.

    log_likelihood: nats a row, as steps in memory know it; that of ``stats`` has all its digits.
    """

    params: MixtureParams
    stats: SufficientStats
    log_likelihood: float

    @classmethod
    def of(cls, params: MixtureParams, stats: SufficientStats) -> Point:
        stats = stats.per_weight().about(params.means, stats.scale)
        return cls(params, stats, stats.log_likelihood)

    def rounded(self, tol: float, reg_covar: float) -> Point:
        """The same without the last digits, which the order in which rows are added up decides.

        On a plateau they would decide where a fit ends. What is left out could change the optimum by next to nothing
        beside ``tol``, nats a row: the likelihood by TOLD tol, and the moments, about the means and in the deviations
        that EM's step makes of them, by TOLD_MOMENTS sqrt(tol), for at an optimum the likelihood changes with their
        square. Where EM's step degenerates nothing is left out.
        """
        scale, means = self.stats.scale, self.params.means
        try:
            step = self.em_step(reg_covar)
            roots = _roots(step, scale)
        except (NumericalError, np.linalg.LinAlgError):
            return self
        whitening = np.asarray(np.linalg.inv(roots), dtype=np.float64)
        away = _rounded(_times(whitening, (step.means - means) * scale), COARSE)
        stats = self.stats.about(means + _times(roots, away) / scale, scale)
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
        return Point(self.params, stats.about(means, scale), float(_rounded(self.log_likelihood, TOLD * tol)))

    def em_step(self, reg_covar: float) -> MixtureParams:
        """NumericalError where it degenerates."""
        params, _ = m_step(self.stats, self.params, reg_covar)
        params.covariance.root(*params.means.shape)
        return params

    def has_em_step(self, reg_covar: float) -> bool:
        try:
            self.em_step(reg_covar)
        except NumericalError:
            return False
        return True


@dataclass(frozen=True)
class Gain:
    """What parameters gain over those of the last read, nats a row.

    exact: the part that all rows tell, which is certain.  estimate: with what the sample tells.  bound: its lower
    confidence bound.  step: how many steps on the sample led there.  error: standard error of the estimate.
    """

    exact: float
    estimate: float
    bound: float
    step: int
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class Walk:
    """Where steps on the sample led: ``params`` and what they gain.

    promised: the largest gain that was seen on the way, and at least what all rows tell of EM's own step.  n_steps:
    steps taken.  em: the first of them, which is EM's own.
    """

    params: MixtureParams
    gain: Gain
    promised: float
    n_steps: int
    em: MixtureParams

    def published(self, *, trusted: bool) -> MixtureParams:
        """The end of the walk where it is not worse than the point: for certain, or by far more than its error if that
        is ``trusted``; else EM's own step."""
        surely = trusted and self.gain.bound > 0.5 * self.gain.estimate
        return self.params if self.gain.exact >= 0.0 or surely else self.em


def exact_gain(point: Point, params: MixtureParams, reg_covar: float) -> float:
    """What ``params`` gain over the point at least, nats a row: the part that all rows tell."""
    stats = point.stats
    old = ExpectedLogJoint.of(point.params, stats.scale)
    new = ExpectedLogJoint.of(params, stats.scale, old.origin)
    taken = np.array([regularisation(of, reg_covar) for of in (point.params, params)])
    return regularised_gain(new(stats) - old(stats), np.array([stats.mass, stats.mass]), taken)


def gained(before: Point, after: Point, reg_covar: float) -> float:
    """What the second point gains over the first, nats a row; see ``regularised_gain``."""
    shares = np.array([of.stats.mass for of in (before, after)])
    taken = np.array([regularisation(of.params, reg_covar) for of in (before, after)])
    return regularised_gain(after.stats.log_likelihood - before.stats.log_likelihood, shares, taken)


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
