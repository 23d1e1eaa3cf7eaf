"""The rows of the pilot's sample as a place to learn from: in memory, in random order, in groups.

A pass over them costs no read, and the differences between groups tell how far the sample's statistics can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from streamgmm.kernel import e_step, e_step_each, prepare, score_rows
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor, Floats, Piece
from streamgmm.stats import Frame, SufficientStats
from streamgmm.streams import Purpose, stream

#: Groups whose statistics are kept apart: enough for a standard error, few enough to keep.
GROUPS = 32

#: Rows of a block where all statistics are added up. A constant, for the last bits depend on it.
BLOCK_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Rows [start, stop) of the sample; weights are None where every row counts once."""

    rows: Floats
    weights: Floats | None
    start: int = 0
    omits_nan: bool = False
    needs: tuple[()] = ()

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)

    @property
    def n_features(self) -> int:
        return self.rows.shape[1]

    def opened(self, values: Sequence[Any]) -> SampleBlock:
        return self

    def pieces(self) -> Iterator[Piece]:
        yield Piece(self.rows, self.weights)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column} of the sample"


@dataclass(frozen=True, eq=False)
class Sample:
    """rows (m, d) in random order, their weights (m,) or None, and where their passes run.

    n_rows: rows that the sample was drawn from.  complete: whether it holds all of them that count.  any_order: whether
    it is the same in whatever order these lie.
    """

    rows: Floats
    weights: Floats | None
    frame: Frame
    executor: Executor
    n_rows: int
    complete: bool
    any_order: bool = False

    @classmethod
    def of(
        cls,
        rows: Floats,
        weights: Floats,
        frame: Frame,
        executor: Executor,
        seed: int,
        n_rows: int,
        *,
        complete: bool,
        any_order: bool = False,
    ) -> Sample:
        """rows (m, d) and weights (m,) in any order that does not depend on chance."""
        order = stream(seed, Purpose.SAMPLE_ORDER).permutation(len(rows))
        alike = bool((weights == 1.0).all())
        return cls(rows[order], None if alike else weights[order], frame, executor, n_rows, complete, any_order)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_weights(self) -> Floats:
        """(m,) the weights of its rows, ones where all count alike."""
        return np.ones(len(self.rows)) if self.weights is None else self.weights

    @property
    def size(self) -> float:
        """Rows of equal weight that would tell as much (Kish 1965)."""
        if self.weights is None:
            return float(len(self.rows))
        relative = self.weights / self.weights.max()  # their squares neither vanish nor overflow
        return float(relative.sum() ** 2 / (relative @ relative))

    @property
    def left_out(self) -> float:
        """The share of the rows that it was drawn from and does not hold."""
        return 0.0 if self.complete else max(0.0, 1.0 - len(self.rows) / self.n_rows)

    def part(self, size: int) -> Sample:
        """The first ``size`` rows, a sample as well."""
        if size >= len(self.rows):
            return self
        weights = None if self.weights is None else self.weights[:size]
        return replace(self, rows=self.rows[:size], weights=weights, complete=False)

    def read(self, params: MixtureParams) -> SufficientStats:
        """The statistics of all its rows."""
        (stats,) = self.executor.map_reduce(e_step, (prepare(params, self.frame),), self._blocks(BLOCK_ROWS), {}).values
        return stats

    def groups(self, params: MixtureParams) -> tuple[SufficientStats, ...]:
        """The statistics of each of its groups."""
        blocks = self._blocks(-(-len(self.rows) // GROUPS))
        return tuple(self.executor.map_reduce(e_step_each, prepare(params, self.frame), blocks, {}).values)

    def scored(self, params: MixtureParams) -> tuple[Floats, Floats]:
        """(m,) the log density of each of its rows, nats, and (k, m) their responsibilities."""
        blocks = self._blocks(BLOCK_ROWS)
        parts = self.executor.map_reduce(score_rows, prepare(params, self.frame), blocks, {}).values
        found = np.concatenate(parts, axis=1)
        return found[0], found[1:]

    def _blocks(self, size: int) -> list[SampleBlock]:
        return [
            SampleBlock(
                self.rows[start : start + size],
                None if self.weights is None else self.weights[start : start + size],
                start,
            )
            for start in range(0, len(self.rows), size)
        ]


def total(groups: Sequence[SufficientStats]) -> SufficientStats:
    """The statistics of all groups together."""
    return reduce(add, groups)
