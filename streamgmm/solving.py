"""How each solver goes from starts to a mixture, on the rows of a fit and their sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan

from streamgmm.caches import make_caches
from streamgmm.checkpoint import Keeper, State
from streamgmm.errors import NumericalError
from streamgmm.history import Log, PassRecord
from streamgmm.kernel import e_step, e_step_each, prepare, starved_components
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor, Source
from streamgmm.sample import Sample
from streamgmm.settings import Settings
from streamgmm.solvers.anderson import Accelerated, anderson
from streamgmm.solvers.calibration import of_few_rows
from streamgmm.solvers.em import FitResult, Restarts, em
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
    """The rows of a fit as solvers see them: read whole, or some blocks of them.

    single: whether passes are made in single precision where the kernel's guard allows it.
    """

    source: Source
    executor: Executor
    frame: Frame
    single: bool = False

    def read(self, models: tuple[MixtureParams, ...]) -> tuple[SufficientStats, ...]:
        """The statistics of all rows, one of each model."""
        scorers = tuple(prepare(model, self.frame, single=self.single) for model in models)
        return self.executor.map_reduce(e_step, scorers, self.source.blocks(), self.source.graph).values

    def read_one(self, params: MixtureParams) -> SufficientStats:
        """The statistics of all rows at one model's parameters."""
        (stats,) = self.read((params,))
        return stats

    def read_blocks(self, params: MixtureParams, numbers: Sequence[int]) -> tuple[SufficientStats, ...]:
        """The statistics of the blocks of these numbers, one of each. A block is a task: there are few of them."""
        blocks = self.source.blocks()
        chosen, executor = [blocks[number] for number in numbers], self.executor.sized(1)
        scorer = prepare(params, self.frame, single=self.single)
        return executor.map_reduce(e_step_each, scorer, chosen, self.source.graph).values


@dataclass(frozen=True, eq=False)
class Job:
    """What a solver works on. starts: empty where it goes on from what ``keeper`` holds.  chosen: whether they were
    sought, all of them.  given: whether there is one, and nothing of it was sought."""

    rows: Rows
    sample: Sample
    settings: Settings
    starts: list[MixtureParams]
    chosen: bool
    given: bool
    seed: int
    log: Log
    keeper: Keeper

    @property
    def n_parameters(self) -> int:
        return self.settings.n_parameters(self.rows.source.n_features)

    @property
    def gap(self) -> float:
        return self.settings.gap(self.sample.n_rows, self.n_parameters)

    def keep(self, state: State, index: int = 0) -> None:
        self.keeper.keep(state, index, self.log.records)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver found, and what the fit says of it: see ``Fit``."""

    result: FitResult
    running: Running | None
    enough: float
    gap: float = nan
    first_gap: float = nan

    @classmethod
    def of(cls, result: FitResult, enough: float, gap: float = nan) -> Outcome:
        """Batches go on from the statistics of the last pass, from which the mixture follows."""
        running = None if result.stats is None else Running.of_rows(result.stats, result.params)
        return cls(result, running, enough, gap)

    @classmethod
    def of_progress(cls, progress: Progress, tol: float) -> Outcome:
        """Batches go on from pseudo-data of the published mixture, which follows from no statistics."""
        bounds = progress.bounds
        starved = () if progress.best is None else starved_components(progress.best.stats)
        result = FitResult(progress.published, bounds, progress.converged, len(bounds), starved)
        return cls(result, progress.running, 0.5 * tol, progress.gap, progress.first_gap)

    @classmethod
    def at(cls, state: State, settings: Settings, gap: float) -> Outcome:
        """Where a fit stands between two passes. NumericalError where all starts were given up."""
        if isinstance(state, Progress):
            return cls.of_progress(state, gap)
        if isinstance(state, Accelerated):
            return cls.of(state.result(), LAST_GAIN * gap)
        return cls.of(state.result(), settings.change if settings.solver == "em" else LAST_GAIN * gap)


@dataclass(frozen=True)
class Solver:
    """A way from starts to a mixture. at_once: starts share every read.  keeps_blocks: the statistics of each block are
    kept from pass to pass.  on_sample: more is done on the sample than to seek a start."""

    solve: Callable[[Job], Outcome]
    at_once: bool = True
    keeps_blocks: bool = False
    on_sample: bool = False


def _em(job: Job) -> Outcome:
    return _restarts(job, job.settings.change)


def _restarts(job: Job, change: float) -> Outcome:
    """EM from all starts at once."""
    settings, begun = job.settings, job.keeper.state
    result = em(
        job.rows.read,
        job.starts,
        tol=change,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=job.log.report,
        begun=begun if isinstance(begun, Restarts) else None,
        keep=job.keep,
    )
    return Outcome.of(result, change)


def _incremental(job: Job) -> Outcome:
    settings, source = job.settings, job.rows.source
    n_blocks, d = len(source.blocks()), source.n_features
    result = incremental(
        job.rows.read_blocks,
        job.starts,
        make_caches=lambda: make_caches(n_blocks, settings.structure, settings.n_components, d),
        seed=job.seed,
        tol=settings.change,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=job.log.report,
    )
    return Outcome.of(result, settings.change)


def _few_reads(job: Job) -> Outcome:
    """Every start is followed to its optimum on the sample; from the best one a few reads lead to that of all rows."""
    sample, p, begun = job.sample, job.n_parameters, job.keeper.state
    if isinstance(begun, Restarts) or (begun is None and not sample.complete and sample.size <= p):
        return _without_sample(job)
    if begun is not None:
        return _on_all_rows(job, begun, job.keeper.index)
    try:
        found = _best(job)
    except NumericalError:
        if sample.complete:
            raise
        return _without_sample(job)
    lacking = 0.0 if sample.complete else 0.5 * p * (1.0 / sample.size - 1.0 / sample.n_rows)
    job.log.report(found.record(lacking))
    if sample.complete:
        return Outcome.of(_in_memory(found, job.gap), job.gap)
    small = sample.size < SURROGATE_ROWS * p
    if job.given and not small:  # another sample would lead to another optimum
        start = job.starts[found.index]
    else:
        start = found.params if job.chosen else _start(sample, job.starts[found.index], found)
    if small:
        _say_too_small(job, "accelerated EM")
        return _on_all_rows(job, Accelerated.at(start), found.index)
    return _on_all_rows(job, Progress.at(start, sample, optimal=start is found.params), found.index)


def _best(job: Job) -> Found:
    """The best start, at its optimum on the sample; in canonical order where it is our own."""
    steps, tol = MOST_STEPS, CONVERGED
    if job.sample.complete:  # that is the fit, which may be asked for more
        steps, tol = max(steps, job.settings.max_iter), min(tol, LAST_GAIN * job.gap)
    found = best_start(job.sample, job.starts, job.settings.reg_covar, tol, steps)
    return found.canonical() if job.chosen else found


def _on_all_rows(job: Job, begun: Accelerated | Progress, index: int) -> Outcome:
    """Reads of all rows, from what the sample found or what was interrupted."""
    settings = job.settings

    def report(record: PassRecord) -> None:
        job.log.report(replace(record, restart=index))

    def keep(state: State) -> None:
        job.keep(state, index)

    if isinstance(begun, Accelerated):
        change = LAST_GAIN * job.gap
        result = anderson(
            job.rows.read_one,
            begun,
            tol=change,
            max_iter=settings.max_iter,
            reg_covar=settings.reg_covar,
            report=report,
            keep=keep,
        )
        return Outcome.of(result, change)
    progress = surrogate_em(
        job.rows.read_one,
        job.sample,
        begun,
        tol=job.gap,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=report,
        keep=keep,
    )
    return Outcome.of_progress(progress, job.gap)


def _without_sample(job: Job) -> Outcome:
    """EM on all rows, from the starts themselves: where the sample has no optimum to speak of."""
    _say_too_small(job, "EM")
    return _restarts(job, LAST_GAIN * job.gap)


def _say_too_small(job: Job, what: str) -> None:
    job.log.say(
        f"the sample has {job.sample.size:,.0f} rows for {job.n_parameters:,} free parameters, too few to make up for "
        f"reads: {what} reads all rows again and again"
    )


def _in_memory(found: Found, tol: float) -> FitResult:
    """The optimum of rows that are all in memory, which took no pass: converged where the last steps gain no more."""
    bounds = found.result.lower_bounds
    gained = bounds[-1] - bounds[-min(LAST_STEPS, len(bounds))]
    converged = found.result.converged or (len(bounds) >= LAST_STEPS and gained <= LAST_GAIN * tol)
    return replace(found.result, n_passes=0, converged=converged)


def _start(sample: Sample, given: MixtureParams, found: Found) -> MixtureParams:
    """Where reads begin that were given a start: there, where the sample could only lead away from it.

    That is so where what the sample gains is within its own error, and where a component has so few of its rows that
    its optimum may be one of these rows alone.
    """
    before, after = (sample.read(params).per_weight() for params in (given, found.params))
    few = of_few_rows(before, sample.size) | of_few_rows(after, sample.size)
    within = after.log_likelihood - before.log_likelihood <= given.n_parameters / sample.size
    return given if within or few.any() else found.params


#: The solvers by name. A new one is a new file and a line here.
SOLVERS = {
    "auto": Solver(_few_reads, at_once=False, on_sample=True),
    "em": Solver(_em),
    "incremental": Solver(_incremental, at_once=False, keeps_blocks=True),
}
