"""Rows in memory: numpy arrays and memory maps. They are read where they are, never copied whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgmm.protocols import Piece, Rows
from streamgmm.sources.dtypes import require_real_rows
from streamgmm.sources.grid import MEMORY_BLOCK_BYTES, checked_block_rows


@dataclass(frozen=True, eq=False)
class MemoryBlock:
    """Rows [start, stop) of an array of this process."""

    array: Rows
    start: int
    stop: int

    @property
    def n_features(self) -> int:
        return int(self.array.shape[1])

    def pieces(self) -> Iterator[Piece]:
        yield Piece(self.array[self.start : self.stop], None)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column}"


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A numpy array or memory map of shape (n, d)."""

    array: Rows
    block_rows: int
    name: str = "the array"
    grid_rows: int = 1
    in_memory: bool = True

    @classmethod
    def of(cls, array: Rows, block_rows: int | None = None) -> MemorySource:
        """Raises DataError or DataTypeError where the array is not (n, d) of real numbers."""
        require_real_rows(array.shape, array.dtype, "the array")
        return cls(array, checked_block_rows(block_rows, 1, array.shape[1], MEMORY_BLOCK_BYTES))

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def n_features(self) -> int:
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def block(self, start: int, stop: int) -> MemoryBlock:
        return MemoryBlock(self.array, start, stop)
