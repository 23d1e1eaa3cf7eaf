"""Row weights beside rows: any source, with a weight for every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Block, Floats, Piece, Source


@dataclass(frozen=True, eq=False)
class WeightedBlock:
    """A block and the weights (stop - start,) of its rows."""

    block: Block
    weights: Floats

    @property
    def start(self) -> int:
        return self.block.start

    @property
    def stop(self) -> int:
        return self.block.stop

    @property
    def n_features(self) -> int:
        return self.block.n_features

    def pieces(self) -> Iterator[Piece]:
        first = 0
        for rows, _ in self.block.pieces():
            yield Piece(rows, self.weights[first : first + len(rows)])
            first += len(rows)

    def locate(self, row: int, column: int) -> str:
        return self.block.locate(row, column)


@dataclass(frozen=True, eq=False)
class WeightedSource:
    """A source whose rows count ``weights`` (n,) times each."""

    source: Source
    weights: Floats

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def n_rows(self) -> int:
        return self.source.n_rows

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

    def block(self, start: int, stop: int) -> WeightedBlock:
        return WeightedBlock(self.source.block(start, stop), self.weights[start:stop])


def with_weights(source: Source, sample_weight: Any) -> Source:
    """``source`` with a weight for each row: array-like (n,), finite, at least zero. None leaves it as it is.

    Raises DataError where the weights have another length, are negative, NaN or infinite.
    """
    if sample_weight is None:
        return source
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample_weight must be numbers, one a row: {error}.") from error
    if weights.shape != (source.n_rows,):
        raise DataError(
            f"sample_weight has shape {weights.shape}, but {source.name} has {source.n_rows} rows: expected "
            f"({source.n_rows},), one weight a row."
        )
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise DataError(
            f"sample_weight of row {bad[0]} is {weights[bad[0]]}. Weights must be finite and at least zero: a weight "
            "counts how often its row is repeated."
        )
    with np.errstate(over="ignore"):
        total = float(weights.sum())
    if not np.isfinite(total):
        raise DataError("The sum of sample_weight overflows float64. Divide the weights by the largest of them.")
    return WeightedSource(source, weights)
