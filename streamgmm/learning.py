"""The walk of a batch: rows are kept until a start can be found on them; from then on every batch is a step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamgmm.drift import BatchReport, Chart, moved, observed
from streamgmm.errors import DataError, NothingLeftError, ParameterError
from streamgmm.executors import SerialExecutor
from streamgmm.fingerprints import WHOLE, FingerprintingExecutor
from streamgmm.fitting import LARGEST_SAMPLE_BYTES, MOST_DRAWN, SMALLEST_SAMPLE, sample_size, starting_parameters
from streamgmm.growth import Growth
from streamgmm.history import Log
from streamgmm.kernel import e_step, m_step, prepare
from streamgmm.ledger import Unit
from streamgmm.online import Online
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot, take_pilot
from streamgmm.protocols import Block, Executor, Readable, Source
from streamgmm.sample import Sample
from streamgmm.settings import Settings
from streamgmm.solvers.stepwise import LEAST_WEIGHT, Running, Schedule
from streamgmm.sources import ZarrSource, open_source, with_weights
from streamgmm.start import best_start
from streamgmm.stats import SufficientStats
from streamgmm.streams import Purpose, sample_index, stream

#: Rows for each free parameter that a start is sought on.
START_ROWS = 10

#: Times as many are kept at most where too few of them are distinct for a start.
MORE_KEPT = 10

#: Rows for each free parameter that the schedule counts alike before it begins to forget.
REFERENCE_ROWS = 100

#: Rows for each free parameter that a given mixture stands for, as pseudo-data.
PRIOR_ROWS = 30

#: Rows that are drawn from a mixture to see what log densities it expects.
EXPECTED_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive rows of a source that are learned in one step."""

    name: str
    n_rows: int
    n_features: int
    parts: Sequence[Block]
    graph: Mapping[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> Batch:
        return cls(source.name, source.n_rows, source.n_features, source.blocks(), source.graph)

    def blocks(self) -> Sequence[Block]:
        return self.parts


def of_mixture(params: MixtureParams, settings: Settings) -> Running:
    """A mixture that comes without statistics enters as pseudo-data."""
    rows = settings.prior_rows or float(PRIOR_ROWS * params.n_parameters)
    return Running.of_mixture(params, rows, _expected(params))


def after_edit(online: Online, params: MixtureParams) -> Online:
    """What a model carries whose mixture was set by hand: the new one as pseudo-data of as many rows as it remembers.

    What was learned of which store, and the counts, stay. ParameterError where ``params`` have other features.
    """
    running, d = online.running, online.kept_rows.shape[1]
    assert running is not None
    if params.n_features != d:
        raise ParameterError(f"means_ were set to {params.n_features} features, but the model has learned {d}.")
    edited = Running.of_mixture(params, max(running.memory, LEAST_WEIGHT), _expected(params))
    return replace(online, running=edited, chart=Chart.blank(params), remembered=None)


def schedule_of(settings: Settings, n_parameters: int) -> Schedule:
    return Schedule(float(REFERENCE_ROWS * n_parameters), settings.step_exponent, settings.forgetting)


def start_rows(settings: Settings, d: int) -> int:
    """Rows that are kept before a start is sought on them."""
    k = settings.n_components
    wanted = START_ROWS * (settings.structure.n_parameters(k, d) + k * d + k - 1)
    return max(2, k, min(wanted, LARGEST_SAMPLE_BYTES // (8 * d)))


def most_kept(settings: Settings, d: int) -> int:
    """Rows that are kept at most while fewer of them are distinct than the mixture has components."""
    wanted = max(SMALLEST_SAMPLE, MORE_KEPT * start_rows(settings, d))
    return min(wanted, LARGEST_SAMPLE_BYTES // (8 * d))


def _expected(params: MixtureParams) -> tuple[float, float]:
    """The mean log density, nats, of rows drawn from the mixture, and the mean of its square."""
    rows, _ = params.draw(EXPECTED_ROWS, stream(0, Purpose.EXPECTED))
    stats = statistics_of(Batch.of(open_source(rows)), SerialExecutor(), params)
    return stats.log_likelihood / stats.weight, stats.log_likelihood_squares / stats.weight


def statistics_of(source: Readable, executor: Executor, params: MixtureParams) -> SufficientStats:
    """The statistics of all rows; DataError where none of them counts."""
    scorers = (prepare(params, params.frame()),)
    stats: SufficientStats = executor.map_reduce(e_step, scorers, source.blocks(), source.graph).values[0]
    if not stats.n_rows:
        raise NothingLeftError(f"All {stats.n_skipped} rows of {source.name} have NaN, so none is left to learn from.")
    if not stats.weight > 0:
        raise DataError(f"All {stats.n_rows} rows of {source.name} have weight zero. At least one must count.")
    return stats


# -- one batch -----------------------------------------------------------------------------------------------------


def learn_batch(
    online: Online, source: Batch, executor: Executor, settings: Settings, seed: int, log: Log, name: str | None = None
) -> tuple[Online, BatchReport]:
    """Learn one batch in one step. Raises DataError or NumericalError, and then nothing has changed.

    Where the statistics of blocks were kept they are let go: they no longer are all that the model was made of.
    """
    if online.running is None and settings.seeks_start:
        after, report = _begin(online, source, executor, settings, seed, log)
    else:
        after, report = _step(online, online.running or _given(source, settings, log), source, executor, settings)
    if online.remembered is not None:
        log.say("the statistics of blocks are let go: with this batch, rows can no longer be taken back")
    return replace(after, remembered=None), replace(report, name=name)


def _given(source: Batch, settings: Settings, log: Log) -> Running:
    """The start that weights_init, means_init and precisions_init give."""
    (params,) = starting_parameters(None, source.n_features, settings, 0, log)
    return of_mixture(params, settings)


def _step(
    online: Online, running: Running, source: Batch, executor: Executor, settings: Settings
) -> tuple[Online, BatchReport]:
    params = running.params
    batch = statistics_of(source, executor, params)
    chart, report = observed(online.chart or Chart.blank(params), running, batch)
    schedule = schedule_of(settings, params.n_parameters)
    after = running.learned(batch, schedule, settings.reg_covar, averages=settings.average)
    weights_moved, means_moved = moved(params, after.params)
    report = replace(
        report,
        step=schedule.step(running.memory, batch.weight),
        weights_moved=weights_moved,
        means_moved=means_moved,
        effective_rows=after.effective_rows,
        remark=_starved(after),
    )
    counted = online.with_counts(batch.n_rows, batch.n_skipped)
    return replace(counted, running=after, chart=chart, n_steps=online.n_steps + 1), report


def _starved(running: Running) -> str:
    """Words for components that remember too few rows."""
    few = np.flatnonzero(running.stats.mass * running.effective_rows < running.least_rows)
    if not len(few):
        return ""
    return f"components {few.tolist()} remember fewer than {running.least_rows} rows and keep mean and covariance"


def _begin(
    online: Online, source: Batch, executor: Executor, settings: Settings, seed: int, log: Log
) -> tuple[Online, BatchReport]:
    """Keep the rows, or find a start once there are enough of them. The rows of the start count as learned."""
    needed = start_rows(settings, source.n_features)
    size = max(sample_size(source, settings), needed)
    pilot, whole = _drawn(source, executor, seed, size, needed - len(online.kept_rows), log)
    rows = np.concatenate([online.kept_rows, pilot.sample])
    weights = np.concatenate([online.kept_weights, pilot.sample_weights])
    counted = online.with_counts(pilot.n_rows, pilot.n_skipped)
    report = BatchReport(n_rows=pilot.n_rows, n_skipped=pilot.n_skipped)
    waiting = replace(counted, kept_rows=rows, kept_weights=weights), replace(report, started=False)
    if len(rows) < needed:
        return _told(waiting, f"kept for a start: {len(rows):,} of {needed:,} rows are there")
    kept = with_weights(open_source(rows), weights)
    try:
        params = _start(kept, settings, seed, log)
    except DataError:  # too few of them are distinct, which those that come may mend
        if not whole or len(rows) >= most_kept(settings, source.n_features):
            raise
        k = settings.n_components
        return _told(waiting, f"kept for a start: {len(rows):,} rows are there, but fewer than {k} distinct ones")
    # a batch that is not all in the sample is read again
    stats = statistics_of(kept, SerialExecutor(), params) if whole else _with_kept(online, source, executor, params)
    params, _ = m_step(stats, params, settings.reg_covar)
    params.covariance.root(*params.means.shape)
    running = Running.of_rows(stats, params)
    remark = f"a start was found on {len(rows):,} rows"
    log.say(remark)
    started = Online.started(running, counted.n_rows, counted.n_skipped, online.ledger)
    after = replace(started, n_steps=online.n_steps + 1)
    return after, replace(report, step=1.0, effective_rows=running.effective_rows, remark=remark)


def _told(waiting: tuple[Online, BatchReport], remark: str) -> tuple[Online, BatchReport]:
    return waiting[0], replace(waiting[1], remark=remark)


def _drawn(source: Batch, executor: Executor, seed: int, size: int, missing: int, log: Log) -> tuple[Pilot, bool]:
    """The pilot of a batch, and whether all its rows were drawn for the sample.

    size: rows to draw; more, with another read each time, while fewer than ``missing`` of them count.
    """
    while True:
        drawn = sample_index(seed, source.n_rows, size)
        pilot = take_pilot(source, executor, source.parts[0].start + drawn)
        found, most = len(pilot.sample), min(source.n_rows, MOST_DRAWN)
        if found >= missing or len(drawn) >= most:
            return pilot, len(drawn) == source.n_rows
        size = min(most, max(2 * size, size * size // max(found, 1)))
        log.say(f"{found:,} of the {len(drawn):,} rows drawn for a start count: one more read draws {size:,}")


def _with_kept(online: Online, source: Batch, executor: Executor, params: MixtureParams) -> SufficientStats:
    """The statistics of a batch and of the rows that were kept before it."""
    stats = statistics_of(source, executor, params)
    if not len(online.kept_rows):
        return stats
    kept = with_weights(open_source(online.kept_rows), online.kept_weights)
    return statistics_of(kept, SerialExecutor(), params) + stats


def _start(rows: Source, settings: Settings, seed: int, log: Log) -> MixtureParams:
    """The best of the starts that are found on rows in memory, after EM on them."""
    executor = SerialExecutor()
    pilot = take_pilot(rows, executor, np.arange(rows.n_rows))
    frame = pilot.frame(isotropic=settings.structure.isotropic)
    sample = Sample.of(pilot.sample, pilot.sample_weights, frame, executor, seed, pilot.n_rows, complete=True)
    starts = starting_parameters(sample, rows.n_features, settings, seed, log)
    return best_start(sample, starts, settings.reg_covar).params


def learn_units(
    online: Online, found: Growth, source: ZarrSource, executor: Executor, settings: Settings, seed: int, log: Log
) -> Iterator[tuple[Online, Unit, BatchReport]]:
    """Learn a unit after the other, a step each; yields what the model carries after each of them.

    A unit of which every row is left out counts as learned, without a step. The ledger is left to the caller, who
    writes all units into it at once.
    """
    for (start, stop), stamp in zip(found.units, found.stamps, strict=True):
        watching = FingerprintingExecutor(executor, WHOLE)
        batch = Batch(source.name, stop - start, source.n_features, [source.block(start, stop)])
        name = f"{source.name}[{start}:{stop}]"
        try:
            online, report = learn_batch(online, batch, watching, settings, seed, log, name)
        except NothingLeftError:
            online, report = left_out(online, name, stop - start)
        yield online, Unit(start, stop, watching.fingerprints[0], stamp), report


def left_out(online: Online, name: str, n_rows: int) -> tuple[Online, BatchReport]:
    """After a unit of which every row is left out."""
    return online.with_counts(0, n_rows), BatchReport(name, n_skipped=n_rows)
