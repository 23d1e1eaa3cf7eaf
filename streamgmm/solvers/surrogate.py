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

Every other read tells what KL is at its own parameters for all rows, so those KL serve as control variates: the
sample's estimate is corrected by regression on them, over its groups, and its error is what they leave unexplained.
Where reads gain little for long, or where a read says that the sample is none of these rows, the sequence of reads is
extrapolated as in ``anderson``.

The parts are known, the combination is ours: a surrogate likelihood from a sample corrected by a gradient of all rows
(Jordan, Lee & Yang 2019, eq. 6), statistics of a sample as control variates in EM (Chen et al. 2018), EM as recursion
on statistics (Cappé & Moulines 2009), and any step of higher expected log-likelihood is EM (Dempster et al. 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, nan, sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint
from streamgmm.history import PassRecord
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Booleans, Floats
from streamgmm.sample import Sample, total
from streamgmm.solvers.anderson import (
    ACCELERATED,
    DEPTH,
    LEAST_WEIGHT,
    ROUNDING,
    Coordinates,
    ReadOne,
    Secants,
    remaining,
)
from streamgmm.solvers.stepwise import Running
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
#: Earlier reads that are kept as controls, and the variance, of one, below which they tell the same.
MOST_CONTROLS = 8
COLLINEAR = 1e-6
#: A read that raises the likelihood by more than this part of what the one before did makes the fit slow.
SLOW = 0.5
#: A read that is taken back and lies so many times the caution below the estimate says that the sample misleads.
MISLED = 3.0
#: A walk that ends within so few steps though the surrogate promises so much more is made bolder.
STALLED_STEPS = 3
STALLED_GAIN = 1.5
LEAST_CAUTION = 0.25
#: What the sample's optimum lacks may be so many times P/2 (1/m - 1/n) before the sample is called misleading. Rows
#: that no mixture fits, as flights are, come to 8.
FAR = 20.0


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

    def has_em_step(self, reg_covar: float) -> bool:
        try:
            self.em_step(reg_covar)
        except NumericalError:
            return False
        return True


@dataclass(frozen=True)
class Gain:
    """What parameters gain over those of the last read, nats a row.

    exact: the part that all rows tell.  estimate: with the sample's KL.  bound: its lower confidence bound.  step: how
    many steps on the surrogate led there.  error: standard error of the estimate.
    """

    exact: float
    estimate: float
    bound: float
    step: int
    error: float = 0.0


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

    groups: statistics of the sample's groups at the point, about its means.  expected: Q at the point.  caution:
    standard errors that a bound lies below.  left_out: share of the rows that the sample does not hold.  controls: what
    other reads tell.
    """

    point: Point
    groups: tuple[SufficientStats, ...]
    expected: ExpectedLogJoint
    caution: float
    left_out: float
    controls: Controls | None = None

    @classmethod
    def at(cls, point: Point, sample: Sample, caution: float, others: Sequence[Point] = ()) -> Surrogate:
        """others: further points that were read, where KL is known."""
        expected = ExpectedLogJoint.of(point.params, point.stats.scale)
        made = cls(point, _about(sample.groups(point.params), point), expected, caution, sample.left_out)
        if not others or made.left_out == 0.0:
            return made
        parts = [made._parts(other.params, sample.groups(other.params)) for other in others]
        known = [other.log_likelihood - point.log_likelihood for other in others]
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
        pairs = zip(groups, self.groups, strict=True)
        rise = np.array([after.log_likelihood - before.log_likelihood for after, before in pairs])
        told = np.array([new(group) - old(group) for group in self.groups])
        weights = np.array([group.weight for group in self.groups])
        return new(self.point.stats) - old(self.point.stats), (rise - told) / weights

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
class Trail:
    """The reads as a sequence, which can be extrapolated where it is slow.

    secants: the points and where their walks led.  gains: of the last two that were not taken back.  setbacks:
    extrapolations in a row that were taken back.  strayed: whether the next read is at an extrapolated point.
    """

    secants: Secants = field(default_factory=Secants)
    gains: tuple[float, float] = (inf, inf)
    setbacks: int = 0
    strayed: bool = False

    @property
    def slow(self) -> bool:
        """Whether the last read gained much of what the one before did."""
        return SLOW * self.gains[0] < self.gains[1] < inf

    def with_walk(self, coordinates: Coordinates, point: MixtureParams, step: MixtureParams) -> Trail:
        """step: where the walk from ``point`` led."""
        if min(point.weights.min(), step.weights.min()) <= LEAST_WEIGHT:
            return replace(self, secants=Secants())
        return replace(self, secants=self.secants.with_next(coordinates.vector(point), coordinates.vector(step)))

    def ahead(self, coordinates: Coordinates) -> MixtureParams | None:
        """Where the sequence leads, as in ``anderson``."""
        return self.secants.mixture(coordinates) if len(self.secants.points) > min(2**self.setbacks, DEPTH) else None

    def went_on(self, gain: float) -> Trail:
        return replace(self, gains=(self.gains[1], gain), setbacks=0 if self.strayed else self.setbacks)

    def taken_back(self) -> Trail:
        return replace(self, secants=Secants(), setbacks=self.setbacks + 1 if self.strayed else self.setbacks)


@dataclass(frozen=True, eq=False)
class Progress:
    """Where the fit stands between two reads, and all that it goes on from.

    next: the parameters of the next read.  published: what the fit gives if there is none.  best: the read with the
    highest likelihood.  others: the last of the other reads.  caution, most_steps: of the next walk.  promise: what the
    last walk's end was to gain.  gap: the predicted gap of ``best``.  bounds: mean log-likelihood of every read.
    rejected: whether the last read was taken back.  rejections: walks in a row that were.  misled: whether the sample
    is none of these rows, so that only EM's own steps are taken, and extrapolated.  record: of the last read.
    first_gap: the gap at the sample's optimum where that was suspiciously far from that of all rows, else NaN.  weight:
    of all rows.
    """

    next: MixtureParams
    published: MixtureParams
    caution: float
    best: Point | None = None
    others: tuple[Point, ...] = ()
    most_steps: int = MOST_STEPS
    gap: float = nan
    bounds: tuple[float, ...] = ()
    rejections: int = 0
    rejected: bool = False
    misled: bool = False
    promise: Gain = Gain(0.0, 0.0, 0.0, 0)
    trail: Trail = field(default_factory=Trail)
    converged: bool = False
    first_gap: float = nan
    weight: float = 0.0
    record: PassRecord | None = None

    @property
    def running(self) -> Running | None:
        """What stepwise EM goes on from; None before the first read."""
        return None if self.best is None else Running.of_fit(self.published, self.best.stats * self.weight)

    @classmethod
    def at(cls, start: MixtureParams, sample: Sample) -> Progress:
        size, p = sample.size, start.n_parameters
        ample = 1.0 if size >= AMPLE_ROWS * p else 2.0
        return cls(start, start, CAUTION + ample * sqrt(sample.left_out) * p / sqrt(size))

    def after(self, stats: SufficientStats, sample: Sample, tol: float, reg_covar: float) -> Progress:
        """After a read at ``next``. NumericalError where EM's own step degenerates."""
        told = self._told(Point.of(self.next, stats), reg_covar)
        best = told.best
        assert best is not None
        way = walk(Surrogate.at(best, sample, told.caution, told.others), sample, told.most_steps, reg_covar)
        p = best.params.n_parameters
        stalled = way.gain.step <= STALLED_STEPS and way.promised > STALLED_GAIN * way.gain.estimate
        caution = told.caution
        if stalled and told.rejections == 0 and sample.size >= AMPLE_ROWS * p:
            caution = max(0.5 * caution, LEAST_CAUTION)
        coordinates = Coordinates(type(best.params.covariance), best.params.means.shape, sample.frame)
        trail = told.trail.with_walk(coordinates, best.params, way.params)
        slow = told.misled or trail.slow
        ahead = trail.ahead(coordinates) if slow and not told.rejected else None
        gap = self.gap if told.rejections > 1 else way.promised
        if slow and trail.gains[0] < inf:  # a walk sees no farther than its own end
            gap = max(gap, (ACCELERATED if told.misled else 1.0) * remaining(*trail.gains))
        converged = tol > 0.0 and 2.0 * gap <= max(tol, ROUNDING * abs(best.log_likelihood))
        lacking = 0.5 * p * (1.0 / sample.size - 1.0 / sample.n_rows)
        return replace(
            told,
            next=ahead or way.params,
            published=way.safe,
            caution=caution,
            trail=replace(trail, strayed=ahead is not None),
            promise=way.gain,
            gap=gap,
            converged=converged,
            first_gap=gap if self.best is None and gap > FAR * lacking else self.first_gap,
            weight=stats.weight,
            record=PassRecord(
                iteration=len(told.bounds),
                restart=0,
                log_likelihood=told.bounds[-1],
                change=nan if self.best is None else told.bounds[-1] - self.best.log_likelihood,
                converged=converged,
                predicted_gap=gap,
                inner_steps=way.n_steps,
                rejected=told.rejected,
            ),
        )

    def _told(self, point: Point, reg_covar: float) -> Progress:
        """What the read of ``point`` says of those before it, and of the sample."""
        bounds = (*self.bounds, point.log_likelihood)
        if self.best is None:
            return replace(self, best=point, bounds=bounds)
        change = point.log_likelihood - self.best.log_likelihood
        sound = not self.trail.strayed or point.has_em_step(reg_covar)
        if sound and change >= -ROUNDING * abs(point.log_likelihood):
            return replace(
                self,
                best=point,
                bounds=bounds,
                others=(*self.others, self.best)[-MOST_CONTROLS:],
                most_steps=1 if self.misled else min(MOST_STEPS, 2 * self.most_steps),
                rejections=0,
                rejected=False,
                trail=self.trail.went_on(change),
            )
        others = (*self.others, point)[-MOST_CONTROLS:]
        taken_back = replace(self, bounds=bounds, others=others, rejected=True, trail=self.trail.taken_back())
        if self.trail.strayed:  # that was not the sample's word
            return taken_back
        misled = self.misled or self.promise.estimate - change > MISLED * self.caution * self.promise.error
        rejections = self.rejections + 1
        # EM's own step cannot be rejected
        most_steps = 1 if misled or rejections > 1 else max(2, self.most_steps // 4)
        return replace(
            taken_back, caution=2.0 * self.caution, most_steps=most_steps, rejections=rejections, misled=misled
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
    keep: Callable[[Progress], None] = lambda state: None,
) -> Progress:
    """Reads until twice the predicted gap is at most ``tol`` nats a row, or ``max_iter`` reads are done.

    start: ``Progress.at`` the sample's optimum, or where a fit was interrupted. tol=0 goes on to the last read.
    keep: is given the state after each read.
    """
    progress = start
    while len(progress.bounds) < max_iter and not progress.converged:
        progress = progress.after(read(progress.next), sample, tol, reg_covar)
        if progress.record is not None:
            report(progress.record)
        keep(progress)
    return progress
