"""The walk of an update where the statistics of blocks are kept: what has changed is taken back, what is new is added.

The statistics are then those of all rows, each counted once and alike, and no old row fades.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from streamgmm.drift import BatchReport, Chart, moved, observed
from streamgmm.fingerprints import WHOLE, FingerprintingExecutor
from streamgmm.growth import Growth
from streamgmm.history import Log
from streamgmm.kernel import e_step_each, prepare
from streamgmm.learning import learn_units
from streamgmm.ledger import Unit
from streamgmm.online import Online
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor
from streamgmm.remembered import Remembered
from streamgmm.settings import Settings
from streamgmm.solvers.incremental import Memory, total_of
from streamgmm.solvers.stepwise import Running
from streamgmm.sources import ZarrSource
from streamgmm.stats import Frame, SufficientStats

#: After a step: what the model carries, the units as they were read, and what they were like.
Step = tuple[Online, list[Unit], BatchReport]


def takes_back(online: Online, settings: Settings) -> bool:
    """Whether blocks can be unlearned: their statistics are there, and old rows are not to fade."""
    return online.remembered is not None and settings.forgetting == 0.0 and not settings.average


def learn_growth(
    online: Online, found: Growth, source: ZarrSource, executor: Executor, settings: Settings, seed: int, log: Log
) -> Iterator[Step]:
    """Learn what of a store is new or has changed, a step each; yields what the model carries after each of them.

    The ledger is left to the caller, who writes all units into it at once.
    """
    kept = online.remembered
    known = found.record.n_rows > 0 and found.record.key == online.ledger.stores[0].key
    if kept is not None and known and takes_back(online, settings) and (found.changed or found.units):
        total = total_of(kept.blocks, _running(online).params.means, kept.blocks[0].scale)
        teacher = _Teacher(source, executor, settings, total)
        for units in _blocks_of(found, kept):
            online, read, report = teacher.visit(online, units)
            changed = sum(unit.stop - unit.start for unit in units if unit in found.changed)
            remark = f"taken back and learned again: {changed:,} of these rows had changed"
            yield online, read, replace(report, again=True, remark=remark)
        if kept.has_room(_running(online).params, len(found.units)):
            for rows, stamp in zip(found.units, found.stamps, strict=True):
                online, read, report = teacher.visit(online, [Unit(*rows, b"", stamp)])
                yield online, read, report
            return
    for after, unit, report in learn_units(online, found, source, executor, settings, seed, log):
        yield after, [unit], report


def _blocks_of(found: Growth, kept: Remembered) -> list[list[Unit]]:
    """The units of each block that holds one that has changed."""
    units = {unit.start: unit for unit in (*found.record.units(), *found.changed)}
    spans = [kept.rows(block) for block in sorted({kept.holding(unit.start) for unit in found.changed})]
    return [[unit for row, unit in units.items() if start <= row < stop] for start, stop in spans]


@dataclass
class _Teacher:
    """What visits blocks of a store, one after the other. total: the sum of their statistics."""

    source: ZarrSource
    executor: Executor
    settings: Settings
    total: SufficientStats

    def visit(self, online: Online, units: list[Unit]) -> Step:
        """The block that these units make is learned in the place of what was known of it, or as a new one.

        Raises DataError or NumericalError, and then nothing has changed.
        """
        running, kept = _running(online), _with_place(online.remembered, units[-1].stop)
        block = kept.holding(units[0].start)
        caches, old = list(kept.blocks), kept.blocks[block]
        watching = FingerprintingExecutor(self.executor, WHOLE)

        def read(params: MixtureParams, numbers: Sequence[int]) -> list[SufficientStats]:
            return [self._read(params, watching, units)]

        memory = Memory(running.params, self.total, np.zeros(len(caches)))
        memory = memory.visited(read, caches, [block], self.settings.reg_covar)
        after = Running.of_rows(memory.total, memory.params)
        after.params.covariance.root(*after.params.means.shape)
        chart, report = online.chart, BatchReport(n_skipped=caches[block].n_skipped)
        if caches[block].n_rows:  # not all of them are left out
            chart, report = observed(chart or Chart.blank(running.params), running, caches[block])
        report = replace(_of_step(report, running, after, memory.starved), name=self._name(units))
        self.total = memory.total
        counted = online.with_counts(caches[block].n_rows - old.n_rows, caches[block].n_skipped - old.n_skipped)
        remembered = Remembered(kept.stops, tuple(caches))
        learned = replace(counted, running=after, chart=chart, n_steps=online.n_steps + 1, remembered=remembered)
        marks = zip(units, watching.fingerprints, strict=True)
        return learned, [replace(unit, fingerprint=mark) for unit, mark in marks], report

    def _read(self, params: MixtureParams, executor: Executor, units: list[Unit]) -> SufficientStats:
        """The statistics of these units together."""
        scorer = prepare(params, Frame(params.frame().shift, self.total.scale))
        blocks = [self.source.block(unit.start, unit.stop) for unit in units]
        return reduce(add, executor.map_reduce(e_step_each, scorer, blocks, self.source.graph).values)

    def _name(self, units: list[Unit]) -> str:
        return f"{self.source.name}[{units[0].start}:{units[-1].stop}]"


def _with_place(kept: Remembered | None, stop: int) -> Remembered:
    """With room for a block that ends there, which is empty where it is a new one."""
    assert kept is not None
    if stop <= kept.stops[-1]:
        return kept
    empty = replace(kept.blocks[0] * 0.0, n_rows=0, n_skipped=0)
    return Remembered((*kept.stops, stop), (*kept.blocks, empty))


def _of_step(report: BatchReport, before: Running, after: Running, starved: tuple[int, ...]) -> BatchReport:
    """With what the step changed."""
    weights_moved, means_moved = moved(before.params, after.params)
    return replace(
        report,
        step=report.n_rows / after.memory,  # rows of a store without weights
        weights_moved=weights_moved,
        means_moved=means_moved,
        effective_rows=after.effective_rows,
        remark=f"components {list(starved)} have lost their rows and keep mean and covariance" if starved else "",
    )


def _running(online: Online) -> Running:
    assert online.running is not None
    return online.running
