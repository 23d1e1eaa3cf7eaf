"""The expected complete log-likelihood, and the entropy of responsibilities: the two parts of EM's free energy.

With the statistics S of rows under any responsibilities r, and parameters theta,

    F = H + Q(S; theta)    H = -sum r log r    Q(S; theta) = sum r log(w_k N(x | k))

is a lower bound of the log-likelihood at theta, and equal to it where r are the responsibilities at theta (Neal &
Hinton 1998). Q is linear in the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from streamgmm.kernel import LOG_2PI
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.quadratic import pack
from streamgmm.stats import LEAST_MASS, SufficientStats


@dataclass(frozen=True, eq=False)
class ExpectedLogJoint:
    """Q(.; theta) as coefficients of statistics about ``origin`` (k, d) in the coordinates of ``scale`` (d,).

    These are the natural parameters of the components there, log weight included. constants: (k,) of the masses, nats
    in the data's units.  linear: (k, d) of the first moments.  second: (k, q) of the second moments.  common: of those
    that are not told apart, empty where there are none.
    """

    origin: Floats
    scale: Floats
    constants: Floats
    linear: Floats
    second: Floats
    common: Floats

    @classmethod
    def of(cls, params: MixtureParams, scale: Floats, origin: Floats | None = None) -> Self:
        """origin: near the means of ``params``, which are what it is by default.

        NumericalError, naming the component, where a covariance is not positive definite.
        """
        k, d = params.means.shape
        covariance = params.covariance.scaled(scale)
        root = covariance.root(k, d)
        with np.errstate(divide="ignore"):
            constants = np.log(params.weights) + root.log_det - 0.5 * d * LOG_2PI + np.log(scale).sum()
        linear = np.zeros((k, d))
        if origin is not None:
            offsets = (params.means - origin) * scale
            linear = root.precision_times(offsets)
            constants = constants - 0.5 * (linear * offsets).sum(axis=1)
        common = np.empty(0)
        if covariance.shared:
            inverse = root.whiten(0, np.eye(d))
            common = -0.5 * pack(inverse.T @ inverse * (2.0 - np.eye(d)))
        place = params.means if origin is None else origin
        return cls(place, scale, constants, linear, covariance.natural_quadratic(root), common)

    def __call__(self, stats: SufficientStats) -> float:
        """Q(stats; theta), nats. A component whose mass is nothing adds nothing, whatever its weight."""
        centred = stats.about(self.origin, self.scale)
        there = centred.mass > LEAST_MASS
        masses = centred.mass[there] @ self.constants[there]
        moments = (centred.first * self.linear)[there].sum() + (centred.second * self.second)[there].sum()
        return float(masses + moments + centred.common @ self.common)

    def entropy(self, stats: SufficientStats) -> float:
        """-sum r log r, nats, of the responsibilities in ``stats``, which were taken at theta."""
        return stats.log_likelihood - self(stats)


def expected_log_joint(stats: SufficientStats, params: MixtureParams) -> float:
    """Q(stats; params), nats: the log-likelihood that the rows would have if their components were known, expected."""
    return ExpectedLogJoint.of(params, stats.scale)(stats)


def regularisation(params: MixtureParams, reg_covar: float) -> Floats:
    """(k,) what ``reg_covar`` takes from the log density of a component's rows, nats: reg_covar tr(inv Sigma_k) / 2.

    With ``reg_covar`` on every variance the M-step maximises Q less the masses times these, not Q.
    """
    if reg_covar == 0.0:
        return np.zeros(len(params.weights))
    root = params.covariance.root(*params.means.shape)
    return np.asarray(0.5 * reg_covar * root.precision_diagonal.sum(axis=1))


def regularised_gain(gain: float, shares: Floats, taken: Floats) -> float:
    """What counts of ``gain``, nats a row, where fixed points of EM with ``reg_covar`` are sought.

    These do not maximise the likelihood: its slope there is that of the masses times ``regularisation``. The gain less
    what that grew, on a straight way between two mixtures, rises with EM's steps and has no slope at its fixed points.

    shares: (2, k) the components' shares of the rows before and after.  taken: (2, k) ``regularisation`` likewise.
    """
    return gain - float(shares.mean(axis=0) @ (taken[1] - taken[0]))
