"""The walk of a fit: plan, pilot, start, passes. Joins where rows come from with how they are learned."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgmm.caches import caches_bytes, held_bytes, make_caches
from streamgmm.checks import (
    check_hyper_parameters,
    checked_means,
    checked_precisions,
    checked_weights,
    forgetting_rate,
)
from streamgmm.covariance import STRUCTURES, AbstractCovariance
from streamgmm.errors import DataError, ParameterError, RegularisationWarning, warn
from streamgmm.executors import FAN_IN, SerialExecutor, executor_for
from streamgmm.growth import Witness
from streamgmm.history import PassRecord
from streamgmm.kernel import e_step, e_step_each, prepare, workspace_bytes
from streamgmm.learned import Learned
from streamgmm.ledger import StoreRecord
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot, take_pilot
from streamgmm.plan import Plan, make_plan
from streamgmm.protocols import Executor, Integers, Readable, Source
from streamgmm.provenance import provenance
from streamgmm.remembered import Remembered, fits
from streamgmm.sample import Sample
from streamgmm.solvers.em import FitResult, em
from streamgmm.solvers.incremental import group_size, incremental
from streamgmm.solvers.stepwise import Running
from streamgmm.sources import is_store, stored
from streamgmm.start import find_start
from streamgmm.stats import Frame, SufficientStats
from streamgmm.streams import sample_index

logger = logging.getLogger("streamgmm")

DEFAULT_TOL = 1e-3
SMALLEST_SAMPLE = 20_000
LARGEST_SAMPLE_BYTES = 64 * 2**20
#: Rows that are drawn at most where only a few of them count: their numbers go out to every task.
MOST_DRAWN = 1_000_000


@dataclass(frozen=True, eq=False)
class Settings:
    """Hyper-parameters of a fit, checked."""

    n_components: int
    structure: type[AbstractCovariance]
    tol: float
    reg_covar: float
    max_iter: int
    n_init: int
    init_params: str
    weights_init: Any
    means_init: Any
    precisions_init: Any
    solver: str
    step_exponent: float
    forgetting: float
    prior_rows: float | None
    average: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From the estimator's parameters; ParameterError at the first that has no meaning."""
        check_hyper_parameters(values)
        return cls(
            structure=STRUCTURES[values["covariance_type"]],
            tol=DEFAULT_TOL if values["tol"] is None else float(values["tol"]),
            reg_covar=float(values["reg_covar"]),
            n_components=int(values["n_components"]),
            max_iter=int(values["max_iter"]),
            n_init=int(values["n_init"]),
            step_exponent=float(values["step_exponent"]),
            forgetting=forgetting_rate(values["forgetting"]),
            average=bool(values["average"]),
            prior_rows=None if values["prior_rows"] is None else float(values["prior_rows"]),
            **{
                name: values[name]
                for name in ("init_params", "weights_init", "means_init", "precisions_init", "solver")
            },
        )

    @property
    def seeks_start(self) -> bool:
        """Whether any of the starting values is still to be found."""
        return any(given is None for given in (self.weights_init, self.means_init, self.precisions_init))


@dataclass
class Log:
    """What a fit says: every line to the log "streamgmm", and some of them printed.

    verbose: 0 prints nothing, 1 the plan and a line every ``interval`` passes, 2 the seconds that a pass took as well.
    """

    verbose: int = 0
    interval: int = 1
    max_iter: int = 0

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def say(self, line: str, *, printed: bool = True) -> None:
        logger.info(line)
        if self.verbose and printed:
            print(line)

    def report(self, record: PassRecord) -> None:
        """A line for a pass; one whose best start converges, and the last one, are printed always."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        logger.info("%s  %.2f s", record, seconds)
        if self.verbose and (
            record.converged or record.iteration == self.max_iter or record.iteration % self.interval == 0
        ):
            print(record if self.verbose == 1 else f"{record}  {seconds:.2f} s")


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit learned. starved: components that have lost their rows.

    running: what stepwise EM goes on from, None without a pass.  record: of a store, whose rows all count as learned.
    remembered: the statistics of its blocks, where a model can keep them.
    """

    learned: Learned
    starved: tuple[int, ...]
    running: Running | None = None
    record: StoreRecord | None = None
    remembered: Remembered | None = None


def fit(
    opened: Source, settings: Settings, seed: int, log: Log, *, sample_weight: Any, last: MixtureParams | None
) -> Fit:
    """Learn a mixture from an opened source. last: the parameters to start from, if there are any."""
    with executor_for(opened) as executor:
        executor.everywhere(opened.checks)
        source = counted(opened, executor, settings, log)
        size = sample_size(source, settings)
        plan = fit_plan(source, executor, settings, size)
        for line in (str(plan), *plan.remarks):
            log.say(line)
        executor = executor.sized(plan.blocks_per_task)
        store = stored(opened)
        witness = None if store is None else Witness(store, executor)
        pilot, n_pilots = _pilot(
            source,
            executor if witness is None else witness.executor,
            sample_weight,
            seed,
            size,
            log,
            seeks=last is None and settings.seeks_start,
        )
        _tell_skipped(pilot, source, settings, log)
        _warn_regularisation(pilot, settings.reg_covar)
        frame = pilot.frame(isotropic=settings.structure.isotropic)
        sample = Sample.of(
            pilot.sample, pilot.sample_weights, frame, SerialExecutor(), seed, pilot.n_rows, complete=False
        )
        starts = starting_parameters(sample, source.n_features, settings, seed, log, last)
        result = SOLVERS[settings.solver].solve(Rows(source, executor, frame), settings, starts, seed, log)
    origin = {"seed": f"{seed:032x}", "block_rows": plan.block_rows, **provenance()}
    learned = Learned(
        result.params,
        converged=result.converged,
        n_iter=len(result.lower_bounds),
        n_passes=result.n_passes + n_pilots + (opened.name in opened.uncounted),
        lower_bounds=result.lower_bounds,
        n_rows=pilot.n_rows,
        n_skipped=pilot.n_skipped,
        provenance=origin,
    )
    running = None if result.stats is None else Running.of_rows(result.stats, result.params)
    record = None if witness is None else witness.record()
    remembered = _remembered(source, result, log) if store is opened else None
    return Fit(learned, result.starved, running, record, remembered)


def _remembered(source: Source, result: FitResult, log: Log) -> Remembered | None:
    """The statistics of a store's blocks, where the solver kept them and a model can; a line where it cannot."""
    if result.caches is None:
        return None
    blocks = source.blocks()
    if not fits(len(blocks), result.params):
        log.say(f"the statistics of {len(blocks):,} blocks are too many for a model: its rows cannot be taken back")
        return None
    return Remembered(tuple(block.stop for block in blocks), tuple(result.caches[i] for i in range(len(blocks))))


def counted(source: Source, executor: Executor, settings: Settings, log: Log) -> Source:
    """The source with its rows counted, where that takes a read, and enough of them."""
    for name in source.uncounted:
        log.say(
            f"{name} does not know its chunk sizes: one more read counts its rows. compute_chunk_sizes() would save it "
            "where the array is fitted more than once."
        )
    source = source.counted(executor)
    _require_rows(source.n_rows, source.name, settings.n_components)
    return source


def _require_rows(n_rows: int, name: str, n_components: int) -> None:
    if n_rows < 2:
        raise DataError(f"{name} has {n_rows} row, but a minimum of 2 is required to fit a mixture.")
    if n_rows < n_components:
        raise DataError(
            f"Expected n_samples >= n_components but got n_components = {n_components}, n_samples = {n_rows}. Lower "
            "n_components, or give more rows."
        )


def sample_size(source: Readable, settings: Settings) -> int:
    """Rows of the sample that the start is found on."""
    k, d = settings.n_components, source.n_features
    return min(source.n_rows, max(SMALLEST_SAMPLE, 100 * k * (d + 1)), LARGEST_SAMPLE_BYTES // (8 * d))


def fit_plan(source: Source, executor: Executor, settings: Settings, size: int) -> Plan:
    """The plan of the passes of a fit whose sample has ``size`` rows. MemoryPlanError where they would not fit."""
    k, structure, d = settings.n_components, settings.structure, source.n_features
    solver = SOLVERS[settings.solver]
    models = settings.n_init if solver.at_once else 1
    kept = carried = 0
    if solver.keeps_blocks:
        n_blocks = len(source.blocks())
        kept = held_bytes(n_blocks, group_size(n_blocks), structure, k, d, settings.n_init)
        carried = caches_bytes(group_size(n_blocks), structure, k, d)
    return pass_plan(source, executor, k, structure, models, size, kept=kept, carried=carried)


def pass_plan(
    source: Source,
    executor: Executor,
    k: int,
    structure: type[AbstractCovariance],
    models: int = 1,
    sample: int = 0,
    *,
    kept: int = 0,
    carried: int = 0,
) -> Plan:
    """The plan of a pass with ``models`` mixtures of k components, and a sample of so many rows.

    kept, carried: bytes that the caller, and processes beside it, hold of statistics that are not added up.
    """
    d = source.n_features
    return make_plan(
        source,
        executor.capacity,
        fan_in=FAN_IN,
        workspace_bytes=workspace_bytes(structure, k, d, models),
        value_bytes=8 * k * (1 + d + structure.quadratic.size(d)) * models,
        sample_bytes=8 * sample * (4 * d + 4 * k),
        carried_bytes=2 * 8 * sample * d + carried,
        kept_bytes=kept,
    )


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

    def read_blocks(self, params: MixtureParams, numbers: Sequence[int]) -> tuple[SufficientStats, ...]:
        """The statistics of the blocks of these numbers, one of each. A block is a task: there are few of them."""
        blocks = self.source.blocks()
        chosen, executor = [blocks[number] for number in numbers], self.executor.sized(1)
        return executor.map_reduce(e_step_each, prepare(params, self.frame), chosen, self.source.graph).values


@dataclass(frozen=True)
class Solver:
    """A way from starts to a mixture. at_once: starts share every read.  keeps_blocks: the statistics of each block are
    kept from pass to pass."""

    solve: Callable[[Rows, Settings, list[MixtureParams], int, Log], FitResult]
    at_once: bool = True
    keeps_blocks: bool = False


def _em(rows: Rows, settings: Settings, starts: list[MixtureParams], seed: int, log: Log) -> FitResult:
    return em(
        rows.read,
        starts,
        tol=settings.tol,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=log.report,
    )


def _incremental(rows: Rows, settings: Settings, starts: list[MixtureParams], seed: int, log: Log) -> FitResult:
    n_blocks, d = len(rows.source.blocks()), rows.source.n_features
    return incremental(
        rows.read_blocks,
        starts,
        make_caches=lambda: make_caches(n_blocks, settings.structure, settings.n_components, d),
        seed=seed,
        tol=settings.tol,
        max_iter=settings.max_iter,
        reg_covar=settings.reg_covar,
        report=log.report,
    )


#: The solvers by name. A new one is a new file and a line here.
SOLVERS = {
    "auto": Solver(_em),
    "em": Solver(_em),
    "incremental": Solver(_incremental, at_once=False, keeps_blocks=True),
}


def starting_parameters(
    sample: Sample | None, d: int, settings: Settings, seed: int, log: Log, last: MixtureParams | None = None
) -> list[MixtureParams]:
    """The starting parameters of each restart: those of the last fit, given ones, or found on the sample.

    sample: None where no start has to be sought.
    """
    structure, k = settings.structure, settings.n_components
    if last is not None:
        return [same_shape(last, settings, d)]
    given = _Given.of(settings, structure, k, d)
    if sample is None or not settings.seeks_start:
        return [given.over(None)]
    if len(sample) < k:
        raise DataError(
            f"Only {len(sample)} of the rows that were drawn for the start have a weight above zero and no NaN, "
            f"but n_components={k}. Leave the rows that do not count out of the store, or give weights_init, "
            "means_init and precisions_init."
        )
    log.say(f"seeking {settings.n_init} start(s) on a sample of {len(sample):,} rows", printed=False)
    return [
        given.over(find_start(settings.init_params, sample, structure, k, seed, index, settings.reg_covar))
        for index in range(settings.n_init)
    ]


@dataclass(frozen=True, eq=False)
class _Given:
    """Starting values that the user gave, or None each."""

    weights: Any
    means: Any
    covariance: AbstractCovariance | None

    @classmethod
    def of(cls, settings: Settings, structure: type[AbstractCovariance], k: int, d: int) -> _Given:
        weights, means, precisions = settings.weights_init, settings.means_init, settings.precisions_init
        return cls(
            None if weights is None else checked_weights(weights, k, "weights_init"),
            None if means is None else checked_means(means, k, d, "means_init"),
            None if precisions is None else checked_precisions(precisions, structure, k, d),
        )

    def over(self, found: MixtureParams | None) -> MixtureParams:
        """``found`` with what was given in its place; None where everything is given."""
        base: Any = found
        return MixtureParams(
            base.weights if self.weights is None else self.weights,
            base.means if self.means is None else self.means,
            base.covariance if self.covariance is None else self.covariance,
        )


def same_shape(last: MixtureParams, settings: Settings, d: int, what: str = "warm_start") -> MixtureParams:
    """The parameters of the fit before, to go on from; ParameterError where they describe something else."""
    kind, k = settings.structure.kind, settings.n_components
    if last.means.shape != (k, d) or last.covariance.kind != kind:
        raise ParameterError(
            f"{what} continues from means of shape {last.means.shape} and {last.covariance.kind!r} covariances, but "
            f"now there are {k} components in {d} features with covariance_type={kind!r}. Fit anew, with "
            "warm_start=False, or give the parameters back their old values."
        )
    return last


def _pilot(
    source: Source, executor: Executor, sample_weight: Any, seed: int, size: int, log: Log, *, seeks: bool
) -> tuple[Pilot, int]:
    """The pilot, and how many reads it took: two where most of the rows drawn for the sample did not count.

    seeks: whether a start will be sought on the sample; without one a small sample is enough.
    """
    drawn = _sample_rows(source.n_rows, sample_weight, seed, size)
    pilot = take_pilot(source, executor, drawn)
    found = len(pilot.sample)
    more = min(source.n_rows, MOST_DRAWN, size * len(drawn) // max(found, 1))
    if not seeks or found >= len(drawn) / 2 or more <= len(drawn):
        return pilot, 1
    log.say(
        f"{found:,} of the {len(drawn):,} rows drawn for the start count, the others have weight zero or NaN: one more "
        f"read draws {more:,}"
    )
    return take_pilot(source, executor, _sample_rows(source.n_rows, sample_weight, seed, more)), 2


def _tell_skipped(pilot: Pilot, source: Source, settings: Settings, log: Log) -> None:
    """How many rows were left out; DataError where too few are left."""
    if pilot.n_skipped:
        log.say(
            f"{pilot.n_skipped:,} of {source.n_rows:,} rows ({pilot.n_skipped / source.n_rows:.1%}) have NaN and are "
            "left out"
        )
        _require_rows(pilot.n_rows, f"{source.name} without the rows that have NaN", settings.n_components)


def _warn_regularisation(pilot: Pilot, reg_covar: float) -> None:
    variances = np.diagonal(pilot.covariance)
    feature = int(np.argmin(variances))
    if reg_covar > 0.01 * variances[feature]:
        warn(
            f"reg_covar={reg_covar:g} is more than 1 % of the variance of feature {feature} "
            f"({variances[feature]:.3g}) and shapes the result. Lower reg_covar, rescale the feature, or drop it.",
            RegularisationWarning,
        )


def _sample_rows(n_rows: int, sample_weight: Any, seed: int, size: int) -> Integers:
    """Rising numbers of ``size`` rows, drawn among those that count where the weights are in memory."""
    if sample_weight is None or is_store(sample_weight):
        return sample_index(seed, n_rows, size)
    above_zero = np.flatnonzero(np.asarray(sample_weight, dtype=np.float64))
    return above_zero[sample_index(seed, len(above_zero), size)]
