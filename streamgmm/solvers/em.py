"""Textbook EM (Dempster, Laird & Rubin 1977), with scikit-learn's stopping rule. Restarts share every read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class _Run:
    """One restart on its way."""

    restart: int
    params: MixtureParams
    bounds: list[float] = field(default_factory=list)
    converged: bool = False
    failure: NumericalError | None = None
    starved: tuple[int, ...] = ()
    stats: SufficientStats | None = None

    @property
    def active(self) -> bool:
        return not self.converged and self.failure is None

    def step(self, stats: SufficientStats, tol: float, reg_covar: float) -> PassRecord:
        """One M-step from the statistics of a pass, and the stopping rule."""
        previous = self.bounds[-1] if self.bounds else -np.inf
        self.bounds.append(stats.log_likelihood / stats.weight)
        self.params, report = m_step(stats, self.params, reg_covar)
        self.params.covariance.root(*self.params.means.shape)  # a start that degenerates must not stop the others
        self.starved, self.stats = report.starved, stats
        change = self.bounds[-1] - previous
        self.converged = abs(change) < tol
        return PassRecord(len(self.bounds), self.restart, self.bounds[-1], change, self.converged)


def em(
    read: Read,
    starts: Sequence[MixtureParams],
    *,
    tol: float,
    max_iter: int,
    reg_covar: float,
    report: Callable[[PassRecord], None],
) -> FitResult:
    """EM from every start until the mean log-likelihood changes by less than ``tol`` or ``max_iter`` passes are done.

    The restart with the highest last lower bound is kept. One whose covariance degenerates is given up; NumericalError
    is raised only where none is left.
    """
    runs = [_Run(restart, params) for restart, params in enumerate(starts)]
    n_passes = 0
    while n_passes < max_iter and any(run.active for run in runs):
        active = [run for run in runs if run.active]
        n_passes += 1
        records = []
        for run, stats in zip(active, read(tuple(run.params for run in active)), strict=True):
            try:
                records.append(run.step(stats, tol, reg_covar))
            except NumericalError as failure:
                run.failure = failure
        if records:
            report(max(records, key=lambda record: record.log_likelihood))
    alive = [run for run in runs if run.failure is None]
    if not alive:
        raise runs[0].failure  # type: ignore[misc]
    best = max(alive, key=lambda run: run.bounds[-1] if run.bounds else -np.inf)
    return FitResult(best.params, tuple(best.bounds), best.converged, n_passes, best.starved, best.stats)
