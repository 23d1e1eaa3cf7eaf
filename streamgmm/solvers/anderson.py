"""Anderson-accelerated EM (Anderson 1965; Walker & Ni 2011, eq. 2.2; for EM: Henderson & Varadhan 2019, DAAREM).

Every pass at parameters x gives their likelihood and the EM step g(x). With f = g(x) - x, and the differences of the
last few x and f as columns of DX and DF, the next parameters are

    x' = g(x) - (DX + DF) gamma,    gamma = argmin |f - DF gamma|^2 + lambda |gamma|^2

in coordinates in which every vector is a mixture: log weights, means, log-Cholesky factors. That seeks a fixed point of
any kind: near a saddle, which EM leaves ever faster, it leads back there. Where x' - x points against f, the EM step is
prolonged instead, x' = x + |DX| / |DF| f (the step length of Varadhan & Roland 2008, S3, and never below one).

A pass that finds a lower likelihood is taken back: the next one is at the EM step from the best parameters, which
cannot be worse. Each time that happens in a row, twice as many EM steps are taken before the next attempt. With
``reg_covar`` EM does not ascend the likelihood itself: what is compared is ``regularised_gain``, and EM's own step,
whose fixed points are sought, is never taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, nan

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.errors import NumericalError
from streamgmm.free_energy import regularisation, regularised_gain
from streamgmm.history import PassRecord
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.solvers.em import FitResult
from streamgmm.stats import Frame, SufficientStats

#: Passes whose differences are used.
DEPTH = 8
#: lambda, as a part of the mean square of the columns of DF.
REGULARISATION = 1e-8
#: A likelihood that is lower by less than this part of itself is the same.
ROUNDING = 1e-12
#: Passes in a row that must gain less than ``tol``: an accelerated one may gain little before others gain more.
QUIET = 2
#: What Aitken's estimate of the gap of accelerated passes must be multiplied with to have the right size, as measured.
ACCELERATED = 5.0
#: A component of less weight has no logarithm to speak of: nothing is extrapolated.
LEAST_WEIGHT = 1e-200

#: One pass: the statistics of the rows at some parameters.
ReadOne = Callable[[MixtureParams], SufficientStats]


def remaining(before: float, last: float) -> float:
    """What gains in a geometric series would still bring after these two (Aitken), NaN before there are two."""
    if before == inf:
        return nan
    return max(last, 0.0) / (1.0 - min(last / before, 0.95)) if before > 0.0 else max(last, 0.0)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Vectors for mixtures of one shape: log weights, means in units of ``frame``, log-Cholesky factors."""

    structure: type[AbstractCovariance]
    shape: tuple[int, int]
    frame: Frame

    @classmethod
    def of(cls, params: MixtureParams) -> Coordinates:
        k, d = params.means.shape
        return cls(type(params.covariance), (k, d), params.frame())

    def vector(self, params: MixtureParams) -> Floats:
        means = (params.means - self.frame.shift) * self.frame.scale
        covariance = params.covariance.scaled(self.frame.scale).log_cholesky(*self.shape)
        return np.concatenate([np.log(params.weights), means.ravel(), covariance])

    def mixture(self, vector: Floats) -> MixtureParams:
        """NumericalError where a covariance overflows."""
        k, d = self.shape
        weights = np.exp(vector[:k] - vector[:k].max())
        means = vector[k : k + k * d].reshape(k, d) / self.frame.scale + self.frame.shift
        covariance = self.structure.from_log_cholesky(vector[k + k * d :], k, d).scaled(1.0 / self.frame.scale)
        covariance.root(k, d)
        return MixtureParams(weights / weights.sum(), means, covariance)


@dataclass(frozen=True, eq=False)
class Secants:
    """The last parameters and their EM steps, as vectors."""

    points: tuple[Floats, ...] = ()
    steps: tuple[Floats, ...] = ()

    def with_next(self, point: Floats, step: Floats) -> Secants:
        return Secants((*self.points, point)[-DEPTH - 1 :], (*self.steps, step)[-DEPTH - 1 :])

    def extrapolated(self) -> Floats | None:
        """x'; None where there is nothing to extrapolate from."""
        points, steps = np.array(self.points).T, np.array(self.steps).T
        residuals = steps - points
        moved, changed = np.diff(steps, axis=1), np.diff(residuals, axis=1)
        gram = changed.T @ changed
        ridge = REGULARISATION * np.trace(gram) / len(gram)
        if not ridge > 0:
            return None
        gamma = np.linalg.solve(gram + ridge * np.eye(len(gram)), changed.T @ residuals[:, -1])
        found = steps[:, -1] - moved @ gamma
        if (found - points[:, -1]) @ residuals[:, -1] < 0:
            length = float(np.linalg.norm(np.diff(points, axis=1)) / np.linalg.norm(changed))
            found = points[:, -1] + max(length, 1.0) * residuals[:, -1]
        return np.asarray(found)

    def mixture(self, coordinates: Coordinates) -> MixtureParams | None:
        """x'; None where there is nothing to extrapolate from, or no mixture."""
        vector = self.extrapolated()
        if vector is None or not np.isfinite(vector).all():
            return None
        try:
            return coordinates.mixture(vector)
        except NumericalError:
            return None


@dataclass(frozen=True, eq=False)
class Accelerated:
    """Where Anderson-accelerated EM stands: the next pass is taken at ``next``.

    best: the best parameters so far, step: the EM step from them, stats: their statistics.  bounds: mean log-likelihood
    of the best ones after every pass.  found: that of the last pass.  gains: of the last two that were not taken back.
    quiet: passes in a row that changed next to nothing.  setbacks: extrapolations in a row that were taken back.
    """

    coordinates: Coordinates
    next: MixtureParams
    best: MixtureParams
    step: MixtureParams
    stats: SufficientStats | None = None
    bounds: tuple[float, ...] = ()
    found: float = -inf
    gains: tuple[float, float] = (inf, inf)
    starved: tuple[int, ...] = ()
    secants: Secants = field(default_factory=Secants)
    quiet: int = 0
    setbacks: int = 0
    rejected: bool = False

    @classmethod
    def at(cls, start: MixtureParams) -> Accelerated:
        return cls(Coordinates.of(start), start, start, start)

    @property
    def bound(self) -> float:
        """The mean log-likelihood at ``best``."""
        return -inf if self.stats is None else self.stats.log_likelihood / self.stats.weight

    @property
    def predicted_gap(self) -> float:
        """What gains in a geometric series would still bring (Aitken), NaN before there are two.

        That is too low where passes are accelerated, by ACCELERATED.
        """
        return ACCELERATED * remaining(*self.gains)

    def after(self, stats: SufficientStats, tol: float, reg_covar: float) -> Accelerated:
        """After a pass at ``next``. NumericalError where the EM step from there degenerates."""
        bound = stats.log_likelihood / stats.weight
        gain = self._gain(stats, reg_covar)
        if gain < -ROUNDING * abs(bound) and self.next is not self.step:
            return self.taken_back(bound)
        step, report = m_step(stats, self.next, reg_covar)
        step.covariance.root(*step.means.shape)
        secants = Secants()
        if not report.starved and min(self.next.weights.min(), step.weights.min()) > LEAST_WEIGHT:
            secants = self.secants.with_next(self.coordinates.vector(self.next), self.coordinates.vector(step))
        return replace(
            self,
            next=self._extrapolated(secants) or step,
            best=self.next,
            step=step,
            stats=stats,
            bounds=(*self.bounds, bound),
            found=bound,
            gains=(self.gains[1], gain),
            starved=report.starved,
            secants=secants,
            quiet=self.quiet + 1 if abs(gain) < tol else 0,
            setbacks=self.setbacks if self.next is self.step else 0,
            rejected=False,
        )

    def _gain(self, stats: SufficientStats, reg_covar: float) -> float:
        """What ``next`` gains over ``best``, nats a row."""
        if self.stats is None:
            return inf
        shares = np.array([of.mass / of.weight for of in (self.stats, stats)])
        taken = np.array([regularisation(of, reg_covar) for of in (self.best, self.next)])
        return regularised_gain(stats.log_likelihood / stats.weight - self.bound, shares, taken)

    def _extrapolated(self, secants: Secants) -> MixtureParams | None:
        return secants.mixture(self.coordinates) if len(secants.points) > min(2**self.setbacks, DEPTH) else None

    def taken_back(self, found: float) -> Accelerated:
        """Next is the EM step from the best parameters, and there is nothing to extrapolate from.

        found: mean log-likelihood of the pass.
        """
        return replace(
            self,
            next=self.step,
            bounds=(*self.bounds, self.bound),
            found=found,
            secants=Secants(),
            setbacks=self.setbacks + 1,
            rejected=True,
        )

    def learned(self, read: ReadOne, tol: float, reg_covar: float) -> Accelerated:
        """After one more pass. NumericalError where it degenerates though nothing was extrapolated."""
        try:
            return self.after(read(self.next), tol, reg_covar)
        except NumericalError:
            if self.next is self.step:
                raise
            return self.taken_back(nan)

    def result(self) -> FitResult:
        """What is published if there is no further pass."""
        return FitResult(self.step, self.bounds, self.quiet >= QUIET, len(self.bounds), self.starved, self.stats)

    def record(self) -> PassRecord:
        return PassRecord(
            iteration=len(self.bounds),
            restart=0,
            log_likelihood=self.found,
            change=nan if self.rejected else self.gains[1],
            converged=self.quiet >= QUIET,
            predicted_gap=self.predicted_gap,
            rejected=self.rejected,
        )


def anderson(
    read: ReadOne,
    start: MixtureParams | Accelerated,
    *,
    tol: float,
    max_iter: int,
    reg_covar: float,
    report: Callable[[PassRecord], None] = lambda record: None,
    keep: Callable[[Accelerated], None] = lambda state: None,
) -> FitResult:
    """EM until two passes in a row raise the mean log-likelihood by less than ``tol``, or ``max_iter`` passes are done.

    start: parameters, or where a fit was interrupted.  keep: is given the state after each pass. The result is the EM
    step from the best parameters that a pass was taken at. NumericalError where a covariance degenerates.
    """
    state = Accelerated.at(start) if isinstance(start, MixtureParams) else start
    while len(state.bounds) < max_iter and state.quiet < QUIET:
        state = state.learned(read, tol, reg_covar)
        report(state.record())
        keep(state)
    return state.result()
