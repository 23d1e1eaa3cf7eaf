"""Textbook EM (Dempster, Laird & Rubin 1977), with scikit-learn's stopping rule. Restarts share every read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.history import PassRecord
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Caches
from streamgmm.stats import SufficientStats

#: One read of all rows: the statistics of each of the models.
Read = Callable[[tuple[MixtureParams, ...]], tuple[SufficientStats, ...]]


@dataclass(frozen=True)
class FitResult:
    """The mixture after the last M-step; lower_bounds are those of the parameters that entered each pass.

    stats: of the last pass, None where there was none.  caches: those of the blocks, where the solver keeps any.
    """

    params: MixtureParams
    lower_bounds: tuple[float, ...]
    converged: bool
    n_passes: int
    starved: tuple[int, ...]
    stats: SufficientStats | None = None
    caches: Caches[SufficientStats] | None = None

    @property
    def lower_bound(self) -> float:
        return self.lower_bounds[-1] if self.lower_bounds else -np.inf


@dataclass(frozen=True, eq=False)
class Run:
    """One restart on its way: ``params`` enter its next pass. failure: why it was given up, empty where it was not."""

    restart: int
    params: MixtureParams
    bounds: tuple[float, ...] = ()
    converged: bool = False
    failure: str = ""
    starved: tuple[int, ...] = ()
    stats: SufficientStats | None = None

    @property
    def active(self) -> bool:
        return not self.converged and not self.failure

    @property
    def bound(self) -> float:
        return self.bounds[-1] if self.bounds else -np.inf

    def after(self, stats: SufficientStats, tol: float, reg_covar: float) -> Run:
        """After one M-step from the statistics of a pass, by the stopping rule; given up where that degenerates."""
        bounds = (*self.bounds, stats.log_likelihood / stats.weight)
        try:
            params, report = m_step(stats, self.params, reg_covar)
            params.covariance.root(*params.means.shape)  # a start that degenerates must not stop the others
        except NumericalError as failure:
            return replace(self, bounds=bounds, failure=str(failure))
        converged = abs(bounds[-1] - self.bound) < tol
        return Run(self.restart, params, bounds, converged, "", report.starved, stats)

    def record(self) -> PassRecord:
        change = self.bounds[-1] - (self.bounds[-2] if len(self.bounds) > 1 else -np.inf)
        return PassRecord(len(self.bounds), self.restart, self.bounds[-1], change, self.converged)


@dataclass(frozen=True, eq=False)
class Restarts:
    """All restarts on their way, between two passes."""

    runs: tuple[Run, ...]
    n_passes: int = 0

    @classmethod
    def at(cls, starts: Sequence[MixtureParams]) -> Restarts:
        return cls(tuple(Run(restart, params) for restart, params in enumerate(starts)))

    @property
    def active(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.active)

    def after_pass(self, read: Read, tol: float, reg_covar: float) -> Restarts:
        """After one pass of all that are active."""
        found = dict(zip(self.active, read(tuple(run.params for run in self.active)), strict=True))
        runs = tuple(run.after(found[run], tol, reg_covar) if run in found else run for run in self.runs)
        return Restarts(runs, self.n_passes + 1)

    def record(self) -> PassRecord | None:
        """Of the best restart that took part in the last pass; None where all of them were given up."""
        last = [run.record() for run in self.runs if not run.failure and len(run.bounds) == self.n_passes]
        return max(last, key=lambda record: record.log_likelihood) if last else None

    def result(self) -> FitResult:
        """The best restart. NumericalError where all of them were given up."""
        alive = [run for run in self.runs if not run.failure]
        if not alive:
            raise NumericalError(self.runs[0].failure)
        best = max(alive, key=lambda run: run.bound)
        return FitResult(best.params, best.bounds, best.converged, self.n_passes, best.starved, best.stats)


def em(
    read: Read,
    starts: Sequence[MixtureParams],
    *,
    tol: float,
    max_iter: int,
    reg_covar: float,
    report: Callable[[PassRecord], None],
    begun: Restarts | None = None,
    keep: Callable[[Restarts], None] = lambda state: None,
) -> FitResult:
    """EM from every start until the mean log-likelihood changes by less than ``tol`` or ``max_iter`` passes are done.

    The restart with the highest last lower bound is kept. One whose covariance degenerates is given up; NumericalError
    is raised only where none is left. begun: where a fit was interrupted.  keep: is given the state after each pass.
    """
    state = Restarts.at(starts) if begun is None else begun
    while state.n_passes < max_iter and state.active:
        state = state.after_pass(read, tol, reg_covar)
        record = state.record()
        if record is not None:
            report(record)
        keep(state)
    return state.result()
