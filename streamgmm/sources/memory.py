"""Rows in memory: numpy arrays and memory maps. They are read where they are, never copied whole."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamgmm.protocols import Executor, Piece, Rows
from streamgmm.sources.dtypes import n_columns, require_real_rows
from streamgmm.sources.grid import checked_block_rows, memory_block_bytes, ranges


@dataclass(frozen=True, eq=False)
class MemoryBlock:
    """Rows [start, stop) of an array of this process, as a view of them. place: words for what they are part of."""

    rows: Rows
    start: int
    needs: Sequence[Hashable] = ()
    place: str = ""
    omits_nan: bool = False

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)

    @property
    def n_features(self) -> int:
        return n_columns(self.rows.shape)

    def opened(self, values: Sequence[Any]) -> MemoryBlock:
        return self

    def pieces(self) -> Iterator[Piece]:
        yield Piece(self.rows, None)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column}" + f" ({self.place})" * bool(self.place)


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A numpy array or memory map of shape (n, d)."""

    array: Rows
    block_rows: int
    name: str = "the array"
    grid_rows: int = 1
    in_memory: bool = True
    travels: bool = False
    uncounted: tuple[str, ...] = ()
    divisible: bool = True
    graph: Mapping[Hashable, Any] = field(default_factory=dict)
    checks: Sequence[Callable[[], None]] = ()
    upstream_tasks: float = 0.0
    stored_chunks: int = 0
    weight_bytes: int = 0
    omits_nan: bool = False

    @classmethod
    def of(
        cls, array: Rows, block_rows: int | None = None, *, column: bool = False, omits_nan: bool = False
    ) -> MemorySource:
        """Raises DataError or DataTypeError where the array is not (n, d), or (n,) for a column, of real numbers."""
        require_real_rows(array.shape, array.dtype, "the array", column=column)
        d = n_columns(array.shape)
        size = checked_block_rows(block_rows, 1, d, memory_block_bytes(array.shape[0], d))
        return cls(array, size, omits_nan=omits_nan)

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def n_features(self) -> int:
        return n_columns(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def block(self, start: int, stop: int) -> MemoryBlock:
        return MemoryBlock(self.array[start:stop], start, omits_nan=self.omits_nan)

    def counted(self, executor: Executor) -> MemorySource:
        return self

    def blocks(self) -> list[MemoryBlock]:
        return [self.block(*rows) for rows in ranges(self.n_rows, self.block_rows)]

    def chunks(self) -> list[MemoryBlock]:
        return self.blocks()
