"""EM in few reads: between two reads of all rows, EM in memory on what the sample and those reads tell together.

A read of all rows at some parameters tells their likelihood and their statistics. From these and the sample's rows the
likelihood at any parameters is estimated, with a standard error: see ``calibration``, and ``divergence`` where the
parameters are too many for that. A walk of EM steps in memory goes as far as the lower confidence bound of the gain
rises, and the next read is taken where it ends. A read that finds a lower likelihood is taken back. The first step of a
walk is EM's own, so that fixed points are those of EM on all rows, and EM's own step is never taken back.

Where reads gain little for long, or where a read says that the sample is none of these rows, the sequence of reads is
extrapolated as in ``anderson``.

The parts are known, the combination is ours: a surrogate likelihood from a sample corrected by a gradient of all rows
(Jordan, Lee & Yang 2019, eq. 6), statistics of a sample as control variates in EM (Chen et al. 2018), EM as recursion
on statistics (Cappé & Moulines 2009), and any step of higher expected log-likelihood is EM (Dempster et al. 1977).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, nan, sqrt

from streamgmm.history import PassRecord
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
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
from streamgmm.solvers.calibration import Calibrated, most_reads
from streamgmm.solvers.divergence import Surrogate, walk
from streamgmm.solvers.gain import Gain, Point, Walk, exact_gain, gained
from streamgmm.solvers.rounding import rounded
from streamgmm.solvers.stepwise import Running
from streamgmm.stats import SufficientStats

#: What the first read is to gain.
NOTHING = Gain(0.0, 0.0, 0.0, 0)
#: Steps in memory between two reads, at most.
MOST_STEPS = 128
#: Too few to see how much is left where EM creeps: the same before a fit ends.
LAST_STEPS = 512
#: What so many steps could gain at most where a walk ends before, as a part of the gap that ends the fit.
NEGLIGIBLE = 0.25
#: Standard errors that the bound lies below the estimate, beside what the parameters of the sample's own fit need.
CAUTION = 2.0
#: Rows of the sample for each parameter: fewer make the bound twice as careful.
AMPLE_ROWS = 50
#: Earlier reads that are kept.
MOST_OTHERS = 8
#: A read that raises the likelihood by more than this part of what the one before did makes the fit slow.
SLOW = 0.5
#: A read that is taken back and lies so many times the caution below the estimate says that the sample misleads.
MISLED = 3.0
#: A sample whose means are farther from those of all rows than chance makes them, in variance, is not calibrated.
MISFIT = 10.0
#: What the sample's optimum lacks may be so many times P/2 (1/m - 1/n) before the sample is called misleading. Rows
#: that no mixture fits, as flights are, come to 8.
FAR = 20.0


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

    def remaining(self, *, accelerated: bool) -> float:
        """What gains in a geometric series would still bring; 0 before there are two.

        The last one counts where reads are slow, or ``accelerated``, for then they are no such series.
        """
        if self.gains[0] == inf:
            return 0.0
        if accelerated:
            return ACCELERATED * remaining(*self.gains)
        return remaining(*self.gains) - (0.0 if self.slow else max(self.gains[1], 0.0))

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
    last walk's end was to gain.  gap: the predicted gap of ``best``.  bounds: mean log-likelihood of the best one after
    every read.  rejected: whether the last read was taken back.  rejections: walks in a row that were.  certain:
    whether the next read is at EM's own step.  trusted: whether the last one found what was promised with confidence.
    misled: whether the sample is none of these rows, so that only EM's own steps are taken, and extrapolated.  record:
    of the last read.  first_gap: the gap at the sample's optimum where that was suspiciously far from that of all rows,
    else NaN.  judged: whether there is no more to say of that.  weight: of all rows.
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
    certain: bool = False
    trusted: bool = False
    misled: bool = False
    promise: Gain = NOTHING
    trail: Trail = field(default_factory=Trail)
    converged: bool = False
    first_gap: float = nan
    judged: bool = False
    weight: float = 0.0
    record: PassRecord | None = None

    @property
    def running(self) -> Running | None:
        """What stepwise EM goes on from; None before the first read."""
        return None if self.best is None else Running.of_fit(self.published, self.best.stats * self.weight)

    @classmethod
    def at(cls, start: MixtureParams, sample: Sample, *, optimal: bool = True) -> Progress:
        """optimal: whether the start is an optimum of the sample."""
        size, p = sample.size, start.n_parameters
        ample = 1.0 if size >= AMPLE_ROWS * p else 2.0
        caution = CAUTION + ample * sqrt(sample.left_out) * p / sqrt(size)
        return cls(start, start, caution, judged=not optimal)

    def after(self, stats: SufficientStats, sample: Sample, tol: float, reg_covar: float) -> Progress:
        """After a read at ``next``. NumericalError where EM's own step degenerates."""
        point = Point.of(self.next, stats)
        if sample.any_order and tol > 0.0:
            point = rounded(point, tol, reg_covar)
        told = self._told(point, reg_covar)
        best = told.best
        assert best is not None
        enough = 0.5 * max(tol, ROUNDING * abs(best.log_likelihood)) if tol > 0.0 else -inf
        way = told.walk(sample, reg_covar, enough)
        slow = told.misled or told.trail.slow
        gap = self.gap if told.rejections > 1 else way.promised
        gap = max(gap, told.trail.remaining(accelerated=told.misled))  # a walk sees no farther than its own end
        if gap <= enough and way.n_steps == told.most_steps > 1:
            way = replace(told, most_steps=LAST_STEPS).walk(sample, reg_covar, enough)
            gap = max(gap, way.promised)
        converged = gap <= enough and not told.rejected
        coordinates = Coordinates(type(best.params.covariance), best.params.means.shape, sample.frame)
        trail = told.trail.with_walk(coordinates, best.params, way.params)
        ahead = trail.ahead(coordinates) if slow and not told.rejected else None
        published = way.published(trusted=told.trusted)
        if told.rejected:  # what was to be published is of the same read
            published = max(self.published, published, key=lambda params: exact_gain(best, params, reg_covar))
        lacking = 0.5 * best.params.n_parameters * (1.0 / sample.size - 1.0 / sample.n_rows)
        return replace(
            told,
            next=ahead or way.params,
            published=published,
            trail=replace(trail, strayed=ahead is not None),
            certain=ahead is None and way.params is way.em,
            promise=way.gain,
            gap=gap,
            converged=converged,
            first_gap=self.first_gap if told.judged or gap <= FAR * lacking else gap,
            judged=True,
            weight=stats.weight,
            record=PassRecord(
                iteration=len(told.bounds),
                restart=0,
                log_likelihood=point.stats.log_likelihood,
                change=point.stats.log_likelihood - self.bounds[-1] if self.bounds else nan,
                converged=converged,
                predicted_gap=gap,
                inner_steps=way.n_steps,
                rejected=told.rejected,
            ),
        )

    def walk(self, sample: Sample, reg_covar: float, enough: float) -> Walk:
        """In memory, from the best read, without steps that all together could not gain ``enough``, nats a row.

        NumericalError where EM's own step degenerates.
        """
        best = self.best
        assert best is not None
        reads = most_reads(len(sample), sample.size, best.params.n_parameters)
        if reads > 0 and not self.misled:
            others = self.others[max(0, len(self.others) - reads + 1) :]
            calibrated = Calibrated.at(best, sample, self.caution, others, reg_covar)
            if calibrated.misfit <= MISFIT:
                return calibrated.walk(self.most_steps, max(enough, 0.0) * NEGLIGIBLE / LAST_STEPS)
        return walk(Surrogate.at(best, sample, self.caution, self.others, reg_covar), sample, self.most_steps)

    def _told(self, point: Point, reg_covar: float) -> Progress:
        """What the read of ``point`` says of those before it, and of the sample."""
        bounds = (*self.bounds, point.stats.log_likelihood)
        if self.best is None:
            return replace(self, best=point, bounds=bounds)
        change = gained(self.best, point, reg_covar)
        sound = not self.trail.strayed or point.has_em_step(reg_covar)
        if self.certain or (sound and change >= -ROUNDING * abs(point.log_likelihood)):
            return replace(
                self,
                best=point,
                bounds=bounds,
                others=(*self.others, self.best)[-MOST_OTHERS:],
                most_steps=1 if self.misled else min(MOST_STEPS, 2 * self.most_steps),
                rejections=0,
                rejected=False,
                trusted=self.trail.strayed or change >= self.promise.bound,
                trail=self.trail.went_on(change),
            )
        bounds = (*self.bounds, self.bounds[-1])
        others = (*self.others, point)[-MOST_OTHERS:]
        taken_back = replace(
            self, bounds=bounds, others=others, rejected=True, trusted=False, trail=self.trail.taken_back()
        )
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
