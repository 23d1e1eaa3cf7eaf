"""What a read of all rows tells, what is expected of the next one, and how far steps in memory led."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint, regularisation, regularised_gain
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.stats import SufficientStats


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
