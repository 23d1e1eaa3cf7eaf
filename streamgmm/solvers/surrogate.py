"""EM in few reads: between two reads of all rows, EM on a surrogate that the sample in memory makes of them.

For any two parameters theta and u, with S the statistics per row of all rows at theta, eta the natural parameters of
the components (log weight included) and r the responsibilities,

    L(u) = L(theta) + <S, eta(u) - eta(theta)> + KL,    KL = mean over the rows of KL(r(theta) || r(u)) >= 0.

One read at theta gives the first two terms exactly at every u: the gain that EM maximises. KL is a plain mean over
rows, which the sample estimates at any u. The two together are a surrogate of the likelihood, and EM steps on it,

    u <- M(S + s(u) - s(theta)),    s: the statistics per row of the sample,

raise it from step to step (it is majorised as in EM); with one step they are EM. KL is overstated where u was fitted to
the sample's own rows, so the walk goes only as far as a lower confidence bound of the gain rises, and a read that finds
a lower likelihood is taken back. Fixed points are those of EM on all rows.

The parts are known, the combination is ours: a surrogate likelihood from a sample corrected by a gradient of all rows
(Jordan, Lee & Yang 2019, eq. 6), statistics of a sample as control variates in EM (Chen et al. 2018), EM as recursion
on statistics (Cappé & Moulines 2009), and any step of higher expected log-likelihood is EM (Dempster et al. 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, nan, sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint
from streamgmm.history import PassRecord
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Booleans, Floats
from streamgmm.sample import Sample, total
from streamgmm.solvers.anderson import ROUNDING, ReadOne
from streamgmm.stats import SufficientStats

#: Steps on the surrogate between two reads, at most.
MOST_STEPS = 64
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
#: Standard errors that the bound lies below the estimate, beside what the parameters of the sample's own fit need.
CAUTION = 2.0
#: Rows of the sample for each parameter: fewer make the bound twice as careful.
AMPLE_ROWS = 50
#: A walk that ends within so few steps though the surrogate promises so much more is made bolder.
STALLED_STEPS = 3
STALLED_GAIN = 1.5
LEAST_CAUTION = 0.25
#: What the sample's optimum lacks may be so many times P/2 (1/m - 1/n) before the sample is called misleading.
FAR = 5.0


@dataclass(frozen=True, eq=False)
class Point:
    """What a read of all rows told of ``params``: their statistics per row, about their means."""

    params: MixtureParams
    stats: SufficientStats

    @classmethod
    def of(cls, params: MixtureParams, stats: SufficientStats) -> Point:
        return cls(params, stats.per_weight().about(params.means, stats.scale))

    @property
    def log_likelihood(self) -> float:
        return self.stats.log_likelihood

    def em_step(self, reg_covar: float) -> MixtureParams:
        """NumericalError where it degenerates."""
        params, _ = m_step(self.stats, self.params, reg_covar)
        params.covariance.root(*params.means.shape)
        return params


@dataclass(frozen=True)
class Gain:
    """What parameters gain over those of the last read, nats a row.

    exact: the part that all rows tell.  estimate: with the sample's KL.  bound: its lower confidence bound.  step: how
    many steps on the surrogate led there.
    """

    exact: float
    estimate: float
    bound: float
    step: int


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The likelihood around a point, as all rows and the sample tell it together.

    groups: statistics of the sample's groups at the point, about its means.  expected: Q at the point.  caution:
    standard errors that a bound lies below.  left_out: share of the rows that the sample does not hold.
    """

    point: Point
    groups: tuple[SufficientStats, ...]
    expected: ExpectedLogJoint
    caution: float
    left_out: float

    @classmethod
    def at(cls, point: Point, sample: Sample, caution: float) -> Surrogate:
        expected = ExpectedLogJoint.of(point.params, point.stats.scale)
        return cls(point, _about(sample.groups(point.params), point), expected, caution, sample.left_out)

    def gain(self, params: MixtureParams, groups: Sequence[SufficientStats], step: int) -> Gain:
        """groups: the statistics of the sample's groups at ``params``."""
        old = self.expected
        new = ExpectedLogJoint.of(params, old.scale, old.origin)
        exact = new(self.point.stats) - old(self.point.stats)
        weights = np.array([group.weight for group in self.groups])
        pairs = zip(groups, self.groups, strict=True)
        rise = np.array([after.log_likelihood - before.log_likelihood for after, before in pairs])
        told = np.array([new(group) - old(group) for group in self.groups])
        divergence = (rise - told) / weights
        shares = weights / weights.sum()
        mean = max(float(shares @ divergence), 0.0)
        variance = float(shares @ (divergence - mean) ** 2) / (len(shares) - 1)
        error = sqrt(self.left_out * variance)
        # in logs, for a KL is not below zero; the same as mean - caution * error where the error is small
        surely = mean * exp(-self.caution * error / mean) if mean > 0.0 else 0.0
        return Gain(exact, exact + mean, exact + surely, step)

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


@dataclass(frozen=True, eq=False)
class Walk:
    """Where steps on the surrogate led: ``params`` and what they gain. promised: the largest gain that was seen on the
    way.  n_steps: steps taken.  em: the first of them, which is EM's own."""

    params: MixtureParams
    gain: Gain
    promised: float
    n_steps: int
    em: MixtureParams

    @property
    def safe(self) -> MixtureParams:
        """Parameters whose likelihood is not below that of the point, for certain."""
        return self.params if self.gain.exact >= 0.0 else self.em


def walk(surrogate: Surrogate, sample: Sample, most_steps: int, reg_covar: float) -> Walk:
    """Steps on the surrogate as far as the lower confidence bound of the gain rises.

    NumericalError where EM's own step, the first one, degenerates.
    """
    em = params = surrogate.point.em_step(reg_covar)
    best, best_gain, promised, before, fruitless = em, Gain(0.0, 0.0, -inf, 0), 0.0, inf, 0
    step = 0
    for step in range(1, most_steps + 1):
        groups = sample.groups(params)
        gain = surrogate.gain(params, groups, step)
        promised = max(promised, gain.estimate)
        fruitless = 0 if gain.bound > best_gain.bound else fruitless + 1
        if gain.bound > best_gain.bound:
            best, best_gain = params, gain
        floor = best_gain.bound - SLACK * abs(best_gain.bound)
        if abs(gain.estimate - before) < ARRIVED * gain.estimate:
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


@dataclass(frozen=True, eq=False)
class Progress:
    """Where the fit stands between two reads, and all that it goes on from.

    next: the parameters of the next read.  published: what the fit gives if there is none.  best: the read with the
    highest likelihood.  caution, most_steps: of the next walk.  gap: the predicted gap of ``best``.  bounds: mean
    log-likelihood of every read.  rejections: reads in a row that were taken back.  record: of the last read.
    first_gap: the gap at the sample's optimum where that was suspiciously far from that of all rows, else NaN.
    """

    next: MixtureParams
    published: MixtureParams
    caution: float
    best: Point | None = None
    most_steps: int = MOST_STEPS
    gap: float = nan
    bounds: tuple[float, ...] = ()
    rejections: int = 0
    converged: bool = False
    first_gap: float = nan
    record: PassRecord | None = None

    @classmethod
    def at(cls, start: MixtureParams, sample: Sample) -> Progress:
        size, p = sample.size, start.n_parameters
        ample = 1.0 if size >= AMPLE_ROWS * p else 2.0
        return cls(start, start, CAUTION + ample * sqrt(sample.left_out) * p / sqrt(size))

    def after(self, stats: SufficientStats, sample: Sample, tol: float, reg_covar: float) -> Progress:
        """After a read at ``next``. NumericalError where EM's own step degenerates."""
        point = Point.of(self.next, stats)
        bound = point.log_likelihood
        best, first = self.best, self.best is None
        change = nan if best is None else bound - best.log_likelihood
        rejected = best is not None and change < -ROUNDING * abs(bound)
        if best is None or not rejected:
            best = point
            caution, most_steps, rejections = self.caution, min(MOST_STEPS, 2 * self.most_steps), 0
        else:
            caution, most_steps, rejections = 2.0 * self.caution, max(2, self.most_steps // 4), self.rejections + 1
        if rejections > 1:  # EM's own step cannot be rejected
            most_steps = 1
        way = walk(Surrogate.at(best, sample, caution), sample, most_steps, reg_covar)
        p = self.next.n_parameters
        stalled = way.gain.step <= STALLED_STEPS and way.promised > STALLED_GAIN * way.gain.estimate
        if stalled and rejections == 0 and sample.size >= AMPLE_ROWS * p:
            caution = max(0.5 * caution, LEAST_CAUTION)
        gap = self.gap if rejections > 1 else way.promised
        converged = tol > 0.0 and 2.0 * gap <= max(tol, ROUNDING * abs(best.log_likelihood))
        lacking = 0.5 * p * (1.0 / sample.size - 1.0 / sample.n_rows)
        record = PassRecord(
            iteration=len(self.bounds) + 1,
            restart=0,
            log_likelihood=bound,
            change=change,
            converged=converged,
            predicted_gap=gap,
            inner_steps=way.n_steps,
            rejected=rejected,
        )
        return Progress(
            next=way.params,
            published=way.safe,
            caution=caution,
            best=best,
            most_steps=most_steps,
            gap=gap,
            bounds=(*self.bounds, bound),
            rejections=rejections,
            converged=converged,
            first_gap=gap if first and gap > FAR * lacking else self.first_gap,
            record=record,
        )


def surrogate_em(
    read: ReadOne,
    sample: Sample,
    start: Progress,
    *,
    tol: float,
    max_iter: int,
    reg_covar: float,
    report: Callable[[PassRecord], None] = lambda record: None,
) -> Progress:
    """Reads until twice the predicted gap is at most ``tol`` nats a row, or ``max_iter`` reads are done.

    start: ``Progress.at`` the sample's optimum, or where a fit was interrupted. tol=0 goes on to the last read.
    """
    progress = start
    while len(progress.bounds) < max_iter and not progress.converged:
        progress = progress.after(read(progress.next), sample, tol, reg_covar)
        if progress.record is not None:
            report(progress.record)
    return progress
