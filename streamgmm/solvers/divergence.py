"""A surrogate of the likelihood for mixtures of many parameters: what all rows tell, and the sample's KL.

For any two parameters theta and u, with S the statistics per row of all rows at theta, eta the natural parameters of
the components (log weight included) and r the responsibilities,

    L(u) = L(theta) + <S, eta(u) - eta(theta)> + KL,    KL = mean over the rows of KL(r(theta) || r(u)) >= 0.

One read at theta gives the first two terms exactly at every u: the gain that EM maximises. KL is a plain mean over
rows, which the sample estimates at any u. The two together are a surrogate of the likelihood, and EM steps on it,

    u <- M(S + s(u) - s(theta)),    s: the statistics per row of the sample,

raise it from step to step (it is majorised as in EM); with one step they are EM. KL is overstated where u was fitted to
the sample's own rows, so the walk goes only as far as a lower confidence bound of the gain rises.

Every other read tells what KL is at its own parameters for all rows, so those KL serve as control variates: the
sample's estimate is corrected by regression on them, over its groups, and its error is what they leave unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint, regularisation, regularised_gain
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Booleans, Floats
from streamgmm.sample import Sample, total
from streamgmm.solvers.gain import Gain, Point, Walk, exact_gain, gained
from streamgmm.stats import SufficientStats

#: Steps that may pass without a higher bound, once it has fallen by SLACK of itself.
PATIENCE = 4
SLACK = 0.2
#: The walk has arrived where a step changes the gain by less than this part of it.
ARRIVED = 1e-4
#: A component keeps its mean and covariance where they would leave this factor in weight or variance, or this many
#: deviations, around those of the last read; STRIDE and SHRINK are the same for one step.
TRUST = 3.0
STRIDE = 5.0
SHRINK = 0.2
#: The variance of a control below which it tells the same as others.
COLLINEAR = 1e-6


@dataclass(frozen=True, eq=False)
class Controls:
    """KL at points that were read, where that of all rows is known as well: control variates for KL elsewhere.

    deviations: (c, groups) of the groups' KL from their mean, in units that make their covariance one.  error: (c,)
    mean of the groups less the truth, in these units.
    """

    deviations: Floats
    error: Floats

    @classmethod
    def of(cls, divergence: Floats, truth: Floats, shares: Floats) -> Controls:
        """divergence: (c, groups) KL in each group.  truth: (c,) that of all rows.  shares: of the groups, sum one."""
        mean = divergence @ shares
        spread = np.sqrt((divergence - mean[:, None]) ** 2 @ shares)
        apart = spread > 0.0
        deviations, error = divergence[apart] - mean[apart, None], (mean - truth)[apart]
        deviations, error = deviations / spread[apart, None], error / spread[apart]
        variances, axes = np.linalg.eigh((deviations * shares) @ deviations.T)
        axes = (axes / np.sqrt(np.maximum(variances, COLLINEAR)))[:, variances > COLLINEAR]
        return cls(axes.T @ deviations, axes.T @ error)


def _mean_and_variance(values: Floats, shares: Floats, controls: Controls | None) -> tuple[float, float]:
    """The mean over all rows of what is known in the groups, not below zero, and the variance of that estimate.

    With controls that of linear regression on them, taken at their true values (Cochran 1977, ch. 7).
    """
    mean = float(shares @ values)
    rest, leverage, used = values - mean, 1.0, 0
    if controls is not None:
        slopes = controls.deviations @ (shares * values)
        mean -= float(slopes @ controls.error)
        rest = rest - slopes @ controls.deviations
        leverage, used = 1.0 + float(controls.error @ controls.error), len(slopes)
    return max(mean, 0.0), leverage * float(shares @ rest**2) / (len(shares) - 1 - used)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The likelihood around a point, as all rows and the sample tell it together.

    groups: statistics of the sample's groups at the point, about its means.  expected: Q at the point.  taken: what
    ``reg_covar`` takes there.  caution: standard errors that a bound lies below.  left_out: share of the rows that the
    sample does not hold.  controls: what other reads tell.
    """

    point: Point
    groups: tuple[SufficientStats, ...]
    expected: ExpectedLogJoint
    taken: Floats
    reg_covar: float
    caution: float
    left_out: float
    controls: Controls | None = None

    @classmethod
    def at(
        cls, point: Point, sample: Sample, caution: float, others: Sequence[Point] = (), reg_covar: float = 0.0
    ) -> Surrogate:
        """others: further points that were read, where KL is known."""
        groups, expected = (
            _about(sample.groups(point.params), point),
            ExpectedLogJoint.of(point.params, point.stats.scale),
        )
        made = cls(
            point, groups, expected, regularisation(point.params, reg_covar), reg_covar, caution, sample.left_out
        )
        if not others or made.left_out == 0.0:
            return made
        parts = [made._parts(other.params, sample.groups(other.params)) for other in others]
        known = [gained(point, other, reg_covar) for other in others]
        truth = np.array([rise - exact for rise, (exact, _) in zip(known, parts, strict=True)])
        return replace(made, controls=Controls.of(np.array([kl for _, kl in parts]), truth, made._shares()))

    def gain(self, params: MixtureParams, groups: Sequence[SufficientStats], step: int) -> Gain:
        """groups: the statistics of the sample's groups at ``params``."""
        exact, divergence = self._parts(params, groups)
        mean, variance = _mean_and_variance(divergence, self._shares(), self.controls)
        error = sqrt(self.left_out * variance)
        # in logs, for a KL is not below zero; the same as mean - caution * error where the error is small
        surely = mean * exp(-self.caution * error / mean) if mean > 0.0 else 0.0
        return Gain(exact, exact + mean, exact + surely, step, error)

    def _parts(self, params: MixtureParams, groups: Sequence[SufficientStats]) -> tuple[float, Floats]:
        """The gain that all rows tell, and KL in each group of the sample."""
        old = self.expected
        new = ExpectedLogJoint.of(params, old.scale, old.origin)
        taken = np.array([self.taken, regularisation(params, self.reg_covar)])

        def told(stats: SufficientStats) -> float:
            return regularised_gain(new(stats) - old(stats), np.array([stats.mass, stats.mass]), taken)

        rest = []
        for after, before in zip(groups, self.groups, strict=True):
            shares = np.array([before.mass, after.mass])
            rise = regularised_gain(after.log_likelihood - before.log_likelihood, shares, taken)
            rest.append((rise - told(before)) / before.weight)
        return told(self.point.stats), np.array(rest)

    def _shares(self) -> Floats:
        weights = np.array([group.weight for group in self.groups])
        return np.asarray(weights / weights.sum())

    def corrected(self, groups: Sequence[SufficientStats]) -> SufficientStats:
        """S + s(u) - s(theta), from the statistics of the groups at u."""
        change = total(_about(groups, self.point)).per_weight() - total(self.groups).per_weight()
        return replace(
            self.point.stats,
            moments=self.point.stats.moments + change.moments,
            common=self.point.stats.common + change.common,
        )


def _about(groups: Sequence[SufficientStats], point: Point) -> tuple[SufficientStats, ...]:
    return tuple(group.about(point.params.means, point.stats.scale) for group in groups)


def restrained_step(stats: SufficientStats, last: MixtureParams, point: Point, reg_covar: float) -> MixtureParams:
    """The M-step of ``stats``, where each component stays near those of ``point`` and of ``last``, the step before.

    One that would not keeps the mean and covariance of ``last``, and its weight where that is what went astray: an
    M-step under a condition, which raises the surrogate as well. Without it one tiny component would stop all.
    """
    k, d = last.means.shape
    found, _ = m_step(stats, last, reg_covar)
    mass, lead = stats.mass, point.stats.mass
    weighed = (mass >= lead / TRUST) & (mass <= lead * TRUST) & (mass >= SHRINK * last.weights) & (mass > 0.0)
    near = weighed & _within(found, point.params, TRUST, k, d) & _within(found, last, STRIDE, k, d)
    near &= _distance(found.means, point.params, k, d) <= TRUST
    weights = np.where(weighed, mass, last.weights)
    means = np.where(near[:, None], found.means, last.means)
    covariance = type(found.covariance).chosen(near, found.covariance, last.covariance)
    return MixtureParams(weights / weights.sum(), means, covariance)


def _within(found: MixtureParams, around: MixtureParams, factor: float, k: int, d: int) -> Booleans:
    """(k,) whether variances in every direction are within a factor of those of ``around``."""
    stretch = found.covariance.stretch(around.covariance.root(k, d), k, d)
    return np.asarray((stretch[:, 0] >= 1.0 / factor) & (stretch[:, 1] <= factor))


def _distance(means: Floats, around: MixtureParams, k: int, d: int) -> Floats:
    """(k,) deviations between means and those of ``around``, by its covariances."""
    root = around.covariance.root(k, d)
    apart = means - around.means
    return np.array([np.sqrt((root.whiten(j, apart[j][:, None]) ** 2).sum()) for j in range(k)])


def walk(surrogate: Surrogate, sample: Sample, most_steps: int) -> Walk:
    """Steps on the surrogate as far as the lower confidence bound of the gain rises, at most ``most_steps``.

    NumericalError where EM's own step, the first one, degenerates.
    """
    reg_covar = surrogate.reg_covar
    em = params = surrogate.point.em_step(reg_covar)
    best, best_gain, before, fruitless = em, Gain(0.0, 0.0, -inf, 0), inf, 0
    promised = exact_gain(surrogate.point, em, reg_covar)
    step = 0
    for step in range(1, most_steps + 1):
        groups = sample.groups(params)
        gain = surrogate.gain(params, groups, step)
        promised = max(promised, gain.estimate)
        fruitless = 0 if gain.bound > best_gain.bound else fruitless + 1
        if gain.bound > best_gain.bound:
            best, best_gain = params, gain
        floor = best_gain.bound - SLACK * abs(best_gain.bound)
        if abs(gain.estimate - before) <= ARRIVED * gain.estimate:
            if gain.bound >= floor:
                best, best_gain = params, gain
            break
        if gain.bound < floor and fruitless >= PATIENCE:
            break
        before = gain.estimate
        try:
            params = restrained_step(surrogate.corrected(groups), params, surrogate.point, reg_covar)
        except (NumericalError, np.linalg.LinAlgError):
            break
    return Walk(best, best_gain, promised, step, em)
