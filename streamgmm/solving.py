"""How each solver goes from starts to a mixture, on the rows of a fit and their sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np

from streamgmm.caches import make_caches
from streamgmm.errors import NumericalError
from streamgmm.history import Log, PassRecord
from streamgmm.kernel import e_step, e_step_each, prepare
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor, Source
from streamgmm.sample import Sample
from streamgmm.settings import Settings
from streamgmm.solvers.anderson import anderson
from streamgmm.solvers.em import FitResult, em
from streamgmm.solvers.incremental import incremental
from streamgmm.solvers.stepwise import Running
from streamgmm.solvers.surrogate import Progress, surrogate_em
from streamgmm.start import CONVERGED, MOST_STEPS, Found, best_start
from streamgmm.stats import Frame, SufficientStats

#: Below so many rows of the sample for each free parameter its statistics say too little of those of all rows.
SURROGATE_ROWS = 30
#: Gains of EM's passes add up to more than the last one: it must be smaller than the gap that is allowed.
LAST_GAIN = 0.1
#: Steps in memory over which the likelihood has stood still where a fit calls itself converged all the same.
LAST_STEPS = 10


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a fit as solvers see them: read whole, or some blocks of them."""

    source: Source
    executor: Executor
    frame: Frame

    def read(self, models: tuple[MixtureParams, ...]) -> tuple[SufficientStats, ...]:
        """The statistics of all rows, one of each model."""
        scorers = tuple(prepare(model, self.frame) for model in models)
        return self.executor.map_reduce(e_step, scorers, self.source.blocks(), self.source.graph).values

    def read_one(self, params: MixtureParams) -> SufficientStats:
        """The statistics of all rows at one model's parameters."""
        (stats,) = self.read((params,))
        return stats

    def read_blocks(self, params: MixtureParams, numbers: Sequence[int]) -> tuple[SufficientStats, ...]:
        """The statistics of the blocks of these numbers, one of each. A block is a task: there are few of them."""
        blocks = self.source.blocks()
        chosen, executor = [blocks[number] for number in numbers], self.executor.sized(1)
        return executor.map_reduce(e_step_each, prepare(params, self.frame), chosen, self.source.graph).values


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver found, and what the fit says of it: see ``Fit``."""

    result: FitResult
    running: Running | None
    tol: float
    gap: float = nan
    first_gap: float = nan

    @classmethod
    def of(cls, result: FitResult, tol: float, gap: float = nan) -> Outcome:
        """Batches go on from the statistics of the last pass, from which the mixture follows."""
        running = None if result.stats is None else Running.of_rows(result.stats, result.params)
        return cls(result, running, tol, gap)


@dataclass(frozen=True)
class Solver:
    """A way from starts to a mixture. at_once: starts share every read.  keeps_blocks: the statistics of each block are
    kept from pass to pass.  on_sample: more is done on the sample than to seek a start."""

    solve: Callable[[Rows, Sample, Settings, list[MixtureParams], bool, int, Log], Outcome]
    at_once: bool = True
    keeps_blocks: bool = False
    on_sample: bool = False


def _em(
    rows: Rows, sample: Sample, settings: Settings, starts: list[MixtureParams], chosen: bool, seed: int, log: Log
) -> Outcome:
    result = em(
        rows.read,
        starts,
        tol=settings.change,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=log.report,
    )
    return Outcome.of(result, settings.change)


def _incremental(
    rows: Rows, sample: Sample, settings: Settings, starts: list[MixtureParams], chosen: bool, seed: int, log: Log
) -> Outcome:
    n_blocks, d = len(rows.source.blocks()), rows.source.n_features
    result = incremental(
        rows.read_blocks,
        starts,
        make_caches=lambda: make_caches(n_blocks, settings.structure, settings.n_components, d),
        seed=seed,
        tol=settings.change,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=log.report,
    )
    return Outcome.of(result, settings.change)


def _few_reads(
    rows: Rows, sample: Sample, settings: Settings, starts: list[MixtureParams], chosen: bool, seed: int, log: Log
) -> Outcome:
    """Every start is followed to its optimum on the sample; from the best one a few reads lead to that of all rows."""
    p = starts[0].n_parameters
    tol = settings.gap(sample.n_rows, p)
    if not sample.complete and sample.size <= p:
        return _without_sample(rows, sample, settings, starts, log)
    steps = max(MOST_STEPS, settings.max_iter) if sample.complete else MOST_STEPS
    try:
        found = best_start(sample, starts, settings.reg_covar, min(CONVERGED, LAST_GAIN * tol), steps)
    except NumericalError:
        if sample.complete:
            raise
        return _without_sample(rows, sample, settings, starts, log)
    if chosen:
        found = found.canonical()
    lacking = 0.0 if sample.complete else 0.5 * p * (1.0 / sample.size - 1.0 / sample.n_rows)
    log.report(found.record(lacking))
    if sample.complete:
        return Outcome.of(_in_memory(found, tol), tol)
    start = found.params
    if not chosen and found.log_likelihood - _mean_log_likelihood(sample, starts[found.index]) <= p / sample.size:
        start = starts[found.index]  # all that the sample could do is to lead away from it, by its own error

    def report(record: PassRecord) -> None:
        log.report(replace(record, restart=found.index))

    if sample.size < SURROGATE_ROWS * p:
        _say_too_small(sample, p, "accelerated EM", log)
        change = LAST_GAIN * tol
        result = anderson(
            rows.read_one,
            start,
            tol=change,
            max_iter=settings.max_iter,
            reg_covar=settings.reg_covar,
            report=report,
        )
        return Outcome.of(replace(result, lower_bounds=_rising(result.lower_bounds)), change)
    progress = surrogate_em(
        rows.read_one,
        sample,
        Progress.at(start, sample),
        tol=tol,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=report,
    )
    bounds = _rising(progress.bounds)
    result = FitResult(progress.published, bounds, progress.converged, len(bounds), ())
    return Outcome(result, progress.running, tol, progress.gap, progress.first_gap)


def _without_sample(rows: Rows, sample: Sample, settings: Settings, starts: list[MixtureParams], log: Log) -> Outcome:
    """EM on all rows, from the starts themselves: where the sample has no optimum to speak of."""
    p = starts[0].n_parameters
    _say_too_small(sample, p, "EM", log)
    change = LAST_GAIN * settings.gap(sample.n_rows, p)
    result = em(
        rows.read, starts, tol=change, max_iter=settings.max_iter, reg_covar=settings.reg_covar, report=log.report
    )
    return Outcome.of(result, change)


def _say_too_small(sample: Sample, n_parameters: int, what: str, log: Log) -> None:
    log.say(
        f"the sample has {sample.size:,.0f} rows for {n_parameters:,} free parameters, too few to make up for reads: "
        f"{what} reads all rows again and again"
    )


def _in_memory(found: Found, tol: float) -> FitResult:
    """The optimum of rows that are all in memory, which took no pass: converged where the last steps gain no more."""
    bounds = _rising(found.result.lower_bounds)
    gained = bounds[-1] - bounds[-min(LAST_STEPS, len(bounds))]
    converged = found.result.converged or (len(bounds) >= LAST_STEPS and gained <= LAST_GAIN * tol)
    return replace(found.result, n_passes=0, lower_bounds=bounds, converged=converged)


def _rising(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """The mean log-likelihood that the fit goes on from after each pass: one that was taken back changes nothing."""
    return tuple(np.maximum.accumulate(bounds).tolist())


def _mean_log_likelihood(sample: Sample, params: MixtureParams) -> float:
    stats = sample.read(params)
    return stats.log_likelihood / stats.weight


#: The solvers by name. A new one is a new file and a line here.
SOLVERS = {
    "auto": Solver(_few_reads, at_once=False, on_sample=True),
    "em": Solver(_em),
    "incremental": Solver(_incremental, at_once=False, keeps_blocks=True),
}
