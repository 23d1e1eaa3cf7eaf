"""The walk of a fit: plan, pilot, start, passes. Joins where rows come from with how they are learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from streamgmm.caches import caches_bytes, held_bytes
from streamgmm.checkpoint import Keeper, Kept
from streamgmm.checks import (
    checked_means,
    checked_precisions,
    checked_weights,
)
from streamgmm.covariance import AbstractCovariance
from streamgmm.draw import Copies, Draw
from streamgmm.errors import DataError, ParameterError, RegularisationWarning, warn
from streamgmm.executors import FAN_IN, SerialExecutor, executor_for
from streamgmm.growth import Witness
from streamgmm.history import Log
from streamgmm.kernel import workspace_bytes
from streamgmm.learned import Learned
from streamgmm.ledger import StoreRecord
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot, take_pilot
from streamgmm.plan import Plan, make_plan
from streamgmm.protocols import Executor, Integers, Readable, Source
from streamgmm.provenance import provenance
from streamgmm.remembered import Remembered, fits
from streamgmm.sample import BLOCK_ROWS, Sample
from streamgmm.settings import Settings
from streamgmm.solvers.calibration import calibration_bytes
from streamgmm.solvers.em import FitResult
from streamgmm.solvers.incremental import group_size
from streamgmm.solvers.stepwise import Running
from streamgmm.solving import SOLVERS, Job, Outcome, Rows
from streamgmm.sources import is_store, open_source, stored
from streamgmm.start import find_start, start_rows
from streamgmm.streams import sample_index

logger = logging.getLogger("streamgmm")

SMALLEST_SAMPLE = 20_000
#: Rows of the sample for each free parameter: the first where they take no more than AMPLE_SAMPLE_BYTES.
AMPLE_ROWS, SUFFICIENT_ROWS = 300, 100
AMPLE_SAMPLE_BYTES = 64 * 2**20
LARGEST_SAMPLE_BYTES = 512 * 2**20
#: A pass over the sample of fewer products than this is done sooner in one thread.
THREADED_PRODUCTS = 100_000_000
#: Rows that are drawn at most where only a few of them count: their numbers go out to every task.
MOST_DRAWN = 1_000_000


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit learned. starved: components that have lost their rows.

    running: what stepwise EM goes on from, None without a pass.  record: of a store, whose rows all count as learned.
    remembered: the statistics of its blocks, where a model can keep them.  enough: the gap or change that ends a fit.
    gap, first_gap: predicted at the end and at the sample's optimum, NaN where nobody predicts; the second where it is
    suspiciously large.  interrupt: what ended it early, after at least one pass.
    """

    learned: Learned
    starved: tuple[int, ...]
    enough: float
    gap: float = nan
    first_gap: float = nan
    running: Running | None = None
    record: StoreRecord | None = None
    remembered: Remembered | None = None
    interrupt: KeyboardInterrupt | None = None


def fit(
    opened: Source,
    settings: Settings,
    log: Log,
    keeper_for: Callable[[Source, Executor], Keeper],
    *,
    sample_weight: Any,
    last: MixtureParams | None,
) -> Fit:
    """Learn a mixture from an opened source.

    keeper_for: what holds the seed and where the fit stands.  last: the parameters to start from, if there are any.
    """
    with executor_for(opened) as executor:
        executor.everywhere(opened.checks)
        source = counted(opened, executor, settings, log)
        size = sample_size(source, settings)
        given = last is not None or not settings.seeks_start
        plan = fit_plan(source, executor, settings, size, given=given)
        for line in (str(plan), *plan.remarks):
            log.say(line)
        executor = executor.sized(plan.blocks_per_task)
        log.rows, log.bytes = source.n_rows, plan.read_bytes
        keeper = keeper_for(source, executor)
        if keeper.kept is None:
            learns = SOLVERS[settings.solver].on_sample
            seeks, any_order = learns or not given, learns and given
            kept = keeper.begin(
                _first_reads(
                    opened, source, executor, sample_weight, keeper.seed, size, log, seeks=seeks, any_order=any_order
                )
            )
        else:
            kept = keeper.kept
            log.records.extend(kept.records)
            log.say(f"{keeper.name}: going on after {kept.n_passes} reads")
        _tell_skipped(kept.pilot, source, settings, log)
        _warn_regularisation(kept.pilot, settings.reg_covar)
        with _sample(kept.pilot, settings, keeper.seed, complete=kept.complete) as sample:
            starts = []
            if keeper.state is None:
                starts = starting_parameters(sample, source.n_features, settings, keeper.seed, log, last)
            chosen = last is None and all(given is None for given in settings.given)
            rows = Rows(source, executor, sample.frame, settings.single)
            outcome, interrupt = _solved(Job(rows, sample, settings, starts, chosen, given, keeper.seed, log, keeper))
    origin = {"seed": f"{keeper.seed:032x}", "block_rows": plan.block_rows, **provenance()}
    return _found(opened, source, kept, outcome, origin, interrupt, log)


def _first_reads(
    opened: Source,
    source: Source,
    executor: Executor,
    sample_weight: Any,
    seed: int,
    size: int,
    log: Log,
    *,
    seeks: bool,
    any_order: bool,
) -> Kept:
    """The pilot, and the record of the rows of a store that it read."""
    store = stored(opened)
    witness = None if store is None else Witness(store, executor)
    reader = executor if witness is None else witness.executor
    pilot, n_pilots, complete = _pilot(source, reader, sample_weight, seed, size, log, seeks=seeks, any_order=any_order)
    if any_order and not pilot.any_order:
        log.say(
            "many rows are copies of each other, so the sample is drawn by row number: rows in another order make "
            "another sample"
        )
    return Kept(pilot, n_pilots, complete, None if witness is None else witness.record())


def _solved(job: Job) -> tuple[Outcome, KeyboardInterrupt | None]:
    """What the solver found; where it is interrupted after a pass, what it had found until then, and the interrupt."""
    try:
        return SOLVERS[job.settings.solver].solve(job), None
    except KeyboardInterrupt as interrupt:
        kept = job.keeper.kept
        if kept is None or kept.state is None:
            raise
        job.log.records[:] = kept.records  # a pass may have been told and not kept
        return Outcome.at(kept.state, job.settings, job.gap), interrupt


def _found(
    opened: Source,
    source: Source,
    kept: Kept,
    outcome: Outcome,
    origin: Mapping[str, Any],
    interrupt: KeyboardInterrupt | None,
    log: Log,
) -> Fit:
    result = outcome.result
    learned = Learned(
        result.params,
        converged=result.converged,
        n_iter=len(result.lower_bounds),
        n_passes=result.n_passes + kept.n_pilots + (opened.name in opened.uncounted),
        lower_bounds=result.lower_bounds,
        n_rows=kept.pilot.n_rows,
        n_skipped=kept.pilot.n_skipped,
        provenance=origin,
    )
    remembered = _remembered(source, result, log) if stored(opened) is opened else None
    return Fit(
        learned,
        result.starved,
        outcome.enough,
        outcome.gap,
        outcome.first_gap,
        outcome.running,
        kept.record,
        remembered,
        interrupt,
    )


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
    """Rows of the sample: a function of the data's shape and the mixture's, never of the machine.

    Where more than a start is found on it, it has enough rows for each free parameter.
    """
    k, d = settings.n_components, source.n_features
    if settings.sample_rows is not None:
        return min(source.n_rows, settings.sample_rows)
    if not SOLVERS[settings.solver].on_sample:
        return min(source.n_rows, max(SMALLEST_SAMPLE, 100 * k * (d + 1)), AMPLE_SAMPLE_BYTES // (8 * d))
    p = settings.n_parameters(d)
    size = max(SMALLEST_SAMPLE, AMPLE_ROWS * p)
    if 8 * d * size > AMPLE_SAMPLE_BYTES:
        size = max(SMALLEST_SAMPLE, SUFFICIENT_ROWS * p)
    return min(source.n_rows, size, LARGEST_SAMPLE_BYTES // (8 * d))


@contextmanager
def _sample(pilot: Pilot, settings: Settings, seed: int, *, complete: bool) -> Iterator[Sample]:
    """The pilot's sample, on threads of this process where a pass over it is work enough."""
    m, d = pilot.sample.shape
    frame = pilot.frame(isotropic=settings.structure.isotropic)
    products = m * settings.n_components * (1 + d + settings.structure.quadratic.size(d))
    threaded = executor_for(open_source(pilot.sample, block_rows=BLOCK_ROWS))
    with threaded if products >= THREADED_PRODUCTS else nullcontext(SerialExecutor()) as executor:
        yield Sample.of(
            pilot.sample,
            pilot.sample_weights,
            frame,
            executor,
            seed,
            pilot.n_rows,
            complete=complete,
            any_order=pilot.any_order,
        )


def fit_plan(source: Source, executor: Executor, settings: Settings, size: int, *, given: bool) -> Plan:
    """The plan of the passes of a fit whose sample has ``size`` rows. MemoryPlanError where they would not fit.

    given: whether no start is sought, so that in the pilot another sample is drawn beside that by number.
    """
    k, structure, d = settings.n_components, settings.structure, source.n_features
    solver = SOLVERS[settings.solver]
    models = settings.n_init if solver.at_once else 1
    # each start that is followed on the sample leaves a mixture and its statistics
    kept = 2 * settings.n_init * value_bytes(structure, k, d) if solver.on_sample else 0
    learned = calibration_bytes(size, settings.n_parameters(d)) if solver.on_sample and size < source.n_rows else 0
    drawn = Copies.most_bytes(size, d) if given and solver.on_sample and size < source.n_rows else 0
    learned, carried = max(learned, drawn), drawn
    if solver.keeps_blocks:
        n_blocks = len(source.blocks())
        kept += held_bytes(n_blocks, group_size(n_blocks), structure, k, d, settings.n_init)
        carried = caches_bytes(group_size(n_blocks), structure, k, d)
    return pass_plan(source, executor, k, structure, models, size, learned=learned, kept=kept, carried=carried)


def value_bytes(structure: type[AbstractCovariance], k: int, d: int) -> int:
    """Bytes of the statistics of a mixture of k components."""
    return 8 * k * (1 + d + structure.quadratic.size(d))


def pass_plan(
    source: Source,
    executor: Executor,
    k: int,
    structure: type[AbstractCovariance],
    models: int = 1,
    sample: int = 0,
    *,
    learned: int = 0,
    kept: int = 0,
    carried: int = 0,
) -> Plan:
    """The plan of a pass with ``models`` mixtures of k components, and a sample of so many rows.

    learned: bytes of what is known of the sample's rows.  kept, carried: bytes that the caller, and processes beside
    it, hold of statistics that are not added up.
    """
    d = source.n_features
    start = min(sample, start_rows(structure.n_parameters(k, d) + k * d + k - 1))
    return make_plan(
        source,
        executor.capacity,
        fan_in=FAN_IN,
        workspace_bytes=workspace_bytes(structure, k, d, models),
        value_bytes=value_bytes(structure, k, d) * models,
        sample_bytes=8 * sample * (3 * d + 1) + 8 * start * (4 * d + 4 * k) + learned,
        carried_bytes=2 * 8 * sample * d + carried,
        kept_bytes=kept,
    )


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
    if settings.sample_rows is not None and settings.sample_rows < k:
        raise ParameterError(
            f"sample_rows={settings.sample_rows} is fewer than n_components={k}, but a start has a row for each "
            f"component at least. Raise sample_rows, or leave it out."
        )
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
        weights, means, precisions = settings.given
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
    source: Source,
    executor: Executor,
    sample_weight: Any,
    seed: int,
    size: int,
    log: Log,
    *,
    seeks: bool,
    any_order: bool = False,
) -> tuple[Pilot, int, bool]:
    """The pilot, how many reads it took, and whether its sample holds all rows that count.

    Two reads where most of the rows drawn for the sample did not count.

    seeks: whether a start will be sought on the sample; without one a small sample is enough.  any_order: whether the
    sample should be the same in whatever order rows lie; see ``draw``.
    """
    countable = _countable(source.n_rows, sample_weight)
    n = source.n_rows if countable is None else len(countable)

    def take(size: int) -> Pilot:
        drawn = sample_index(seed, n, size)
        draw = Draw.of(seed, n, size) if any_order else None
        return take_pilot(source, executor, drawn if countable is None else countable[drawn], draw)

    size = min(n, size)
    pilot = take(size)
    found = len(pilot.sample)
    more = min(n, MOST_DRAWN, size * size // max(found, 1))
    if not seeks or found >= size / 2 or more <= size:
        return pilot, 1, size == n
    log.say(
        f"{found:,} of the {size:,} rows drawn for the start count, the others have weight zero or NaN: one more read "
        f"draws {more:,}"
    )
    return take(more), 2, more == n


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


def _countable(n_rows: int, sample_weight: Any) -> Integers | None:
    """Rising numbers of the rows with a weight above zero, where the weights are in memory; None where all may be."""
    if sample_weight is None or is_store(sample_weight):
        return None
    return np.flatnonzero(np.asarray(sample_weight, dtype=np.float64))
