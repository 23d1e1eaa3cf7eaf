"""Row weights beside rows: any source, with a weight for every row from wherever those come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Block, Executor, Floats, Piece, Rows, Source


@dataclass(frozen=True, eq=False)
class WeightedBlock:
    """A block of rows and the block of their weights."""

    block: Block
    weights: Block

    @property
    def start(self) -> int:
        return self.block.start

    @property
    def stop(self) -> int:
        return self.block.stop

    @property
    def n_features(self) -> int:
        return self.block.n_features

    @property
    def omits_nan(self) -> bool:
        return self.block.omits_nan

    @property
    def needs(self) -> list[Hashable]:
        return [*self.block.needs, *self.weights.needs]

    def opened(self, values: Sequence[Any]) -> WeightedBlock:
        n = len(self.block.needs)
        return WeightedBlock(self.block.opened(values[:n]), self.weights.opened(values[n:]))

    def pieces(self) -> Iterator[Piece]:
        first, weights = 0, self._weights()
        for rows, _ in self.block.pieces():
            part = weights[first : first + len(rows)]
            first += len(rows)
            yield Piece(rows, part)
            del rows  # else it lives while the next one is read

    def locate(self, row: int, column: int) -> str:
        return self.block.locate(row, column)

    def _weights(self) -> Floats:
        parts = [np.asarray(piece.rows, dtype=np.float64) for piece in self.weights.pieces()]
        weights = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0), *parts])
        return checked_weights(weights, self.start)


@dataclass(frozen=True, eq=False)
class WeightedSource:
    """A source whose rows count ``weights`` (n,) times each; the two need not be cut alike."""

    source: Source
    weights: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def n_rows(self) -> int:
        return self.source.n_rows

    @property
    def uncounted(self) -> tuple[str, ...]:
        return self.source.uncounted + self.weights.uncounted

    @property
    def n_features(self) -> int:
        return self.source.n_features

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def grid_rows(self) -> int:
        return self.source.grid_rows

    @property
    def block_rows(self) -> int:
        return self.source.block_rows

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    @property
    def travels(self) -> bool:
        return self.source.travels and (self.weights.travels or self.weights.in_memory)

    @property
    def divisible(self) -> bool:
        return self.source.divisible and self.weights.divisible

    @property
    def weight_bytes(self) -> int:
        if self.weights.in_memory:
            return 0 if not self.source.travels else 8 * self.source.block_rows  # it comes with its task
        # in pieces, and joined; a chunk of a dask array comes whole to every block that needs part of it
        return 8 * (2 * self.source.block_rows + self.weights.grid_rows)

    @property
    def upstream_tasks(self) -> float:
        return self.source.upstream_tasks

    @property
    def stored_chunks(self) -> int:
        return self.source.stored_chunks + self.weights.stored_chunks

    @property
    def graph(self) -> Mapping[Hashable, Any]:
        return {**self.source.graph, **self.weights.graph}

    @property
    def checks(self) -> list[Callable[[], None]]:
        return [*self.source.checks, *self.weights.checks]

    def blocks(self) -> list[WeightedBlock]:
        return [self._weighted(block) for block in self.source.blocks()]

    def chunks(self) -> list[WeightedBlock]:
        return [self._weighted(block) for block in self.source.chunks()]

    def block(self, start: int, stop: int) -> WeightedBlock:
        return self._weighted(self.source.block(start, stop))

    def counted(self, executor: Executor) -> WeightedSource:
        found = replace(self, source=self.source.counted(executor), weights=self.weights.counted(executor))
        found.require_lengths()
        return found

    def require_lengths(self) -> None:
        """DataError where there is not one weight for each row."""
        if self.weights.n_rows != self.n_rows:
            raise DataError(
                f"sample_weight has shape ({self.weights.n_rows},), but {self.name} has {self.n_rows} rows: expected "
                f"({self.n_rows},), one weight a row."
            )

    def _weighted(self, block: Block) -> WeightedBlock:
        return WeightedBlock(block, self.weights.block(block.start, block.stop))


#: Sums of weights stay so far below the largest float64 that those of any number of blocks, times their rows, do too.
LARGEST_TOTAL = 1e290


def checked_weights(weights: Rows, start: int = 0) -> Floats:
    """Weights (m,) of the rows from ``start`` on, as float64. DataError where one is negative, NaN or infinite."""
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise DataError(
            f"sample_weight of row {start + bad[0]} is {weights[bad[0]]}. Weights must be finite and at least zero: a "
            "weight counts how often its row is repeated."
        )
    with np.errstate(over="ignore"):
        total = float(np.sum(weights, dtype=np.float64))
    if total > LARGEST_TOTAL:
        raise DataError("The sum of sample_weight overflows float64. Divide the weights by the largest of them.")
    return weights
