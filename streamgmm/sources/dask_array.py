"""Rows in a dask array: its row chunks are the blocks, and each is made inside the task that uses it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import dask.array as da
import numpy as np

from streamgmm.errors import DataError, DataTypeError, ParameterError
from streamgmm.protocols import Block, Executor, Piece, Rows
from streamgmm.sources.dtypes import n_columns, require_real_rows, require_unmasked
from streamgmm.sources.memory import MemoryBlock
from streamgmm.sources.subgraphs import Part, count_tasks, split_graph

#: The size of a block whose rows nobody has counted yet.
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Stretch:
    """Rows [start, stop) of one row chunk, counted from its first; all of them where ``rows`` is UNKNOWN.

    rows: what the dask array says that the chunk has.
    """

    part: Part
    chunk: int
    start: int
    stop: int
    rows: int
    n_axes: int

    def made(self, values: Sequence[Any], name: str, n_features: int) -> Rows:
        """The rows, from the values of the part's needs. DataError where the chunk is not what the array says."""
        chunks = [_checked(chunk, f"Chunk {self.chunk} of {name}") for chunk in self.part.made(values)]
        shapes = [chunk.shape for chunk in chunks]
        alike = {len(shape) for shape in shapes} == {self.n_axes} and len({shape[0] for shape in shapes}) == 1
        if not (alike and sum(map(n_columns, shapes)) == n_features and self.rows in (UNKNOWN, shapes[0][0])):
            expected = "" if self.rows == UNKNOWN else f"{self.rows} rows and "
            raise DataError(
                f"Chunk {self.chunk} of {name} came as {' beside '.join(map(str, shapes))}, but the array says "
                f"{expected}{n_features} features. Its chunk sizes are wrong: give map_blocks the right chunks=, or "
                "call compute_chunk_sizes()."
            )
        rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=1)
        return rows if self.rows == UNKNOWN else rows[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class DaskBlock:
    """Rows [start, stop) of a dask array, as the part of its graph that makes them. Open it, then ask for its rows."""

    stretches: tuple[Stretch, ...]
    name: str
    n_features: int
    start: int
    stop: int
    omits_nan: bool

    @property
    def needs(self) -> list[Hashable]:
        return [key for stretch in self.stretches for key in stretch.part.needs]

    def opened(self, values: Sequence[Any]) -> MemoryBlock:
        """The rows as the graph makes them; they begin at 0 where chunk sizes are unknown."""
        given, made = iter(values), []
        for stretch in self.stretches:
            made.append(stretch.made([next(given) for _ in stretch.part.needs], self.name, self.n_features))
        known = self.stop != UNKNOWN
        place = f"chunk {self.stretches[0].chunk} of {self.name}" + ", rows counted from its first" * (not known)
        rows = made[0] if len(made) == 1 else np.concatenate(made)
        return MemoryBlock(rows, self.start if known else 0, place=place, omits_nan=self.omits_nan)

    def pieces(self) -> Iterator[Piece]:
        return self.opened(()).pieces()

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column} of {self.name}"


@dataclass(frozen=True, eq=False)
class DaskSource:
    """A dask array of shape (n, d), or (n,) for a column. Nothing of it is computed or kept here.

    sizes: rows of each row chunk; None where dask does not know them.
    """

    array: da.Array
    name: str
    parts: tuple[Part, ...]
    graph: Mapping[Hashable, Any]
    sizes: tuple[int, ...] | None
    upstream_tasks: float
    stored_chunks: int = 0
    in_memory: bool = False
    travels: bool = True
    divisible: bool = False
    weight_bytes: int = 0
    checks: Sequence[Callable[[], None]] = ()
    omits_nan: bool = False

    @classmethod
    def of(
        cls,
        array: da.Array,
        block_rows: int | None = None,
        *,
        name: str = "the dask array",
        column: bool = False,
        fused: bool = True,
        omits_nan: bool = False,
    ) -> DaskSource:
        """Raises DataError or DataTypeError where the array is not (n, d), or (n,) for a column, of real numbers.

        fused: whether a chunk is made inside the task that uses it; False where blocks of others share chunks.
        """
        if hasattr(array, "expr"):
            raise DataTypeError(
                "Arrays of dask's array.query-planning are not supported. Set it to False before you import dask.array."
            )
        if any(np.isnan(size) for size in array.shape[1:]):
            raise DataError(f"{name} does not know how many features it has. Call its compute_chunk_sizes() first.")
        require_real_rows(array.shape, array.dtype, name, column=column)
        if block_rows is not None:
            raise ParameterError(
                "The blocks of a dask array are its row chunks, so block_rows cannot be set. Rechunk the array, or "
                "give the store that it reads."
            )
        unknown = any(np.isnan(size) for size in array.chunks[0])
        parts, graph = split_graph(array, fused=fused)
        sizes = None if unknown else tuple(int(size) for size in array.chunks[0])
        return cls(array, name, parts, graph, sizes, count_tasks(array) / len(parts), omits_nan=omits_nan)

    @property
    def uncounted(self) -> tuple[str, ...]:
        return (self.name,) if self.sizes is None else ()

    @property
    def n_rows(self) -> int:
        return sum(self._sizes())

    @property
    def n_features(self) -> int:
        return n_columns(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype)

    @property
    def grid_rows(self) -> int:
        return max(self._sizes())

    @property
    def block_rows(self) -> int:
        return max(self._sizes())

    def blocks(self) -> list[DaskBlock]:
        """The row chunks; those without rows are left out where that is known."""
        return [block for block in self.chunks() if block.start != block.stop]

    def chunks(self) -> list[DaskBlock]:
        if self.sizes is None:
            return [
                self._block((Stretch(part, i, 0, UNKNOWN, UNKNOWN, self.array.ndim),), 0, UNKNOWN)
                for i, part in enumerate(self.parts)
            ]
        return [
            self._block((Stretch(part, i, 0, size, size, self.array.ndim),), start, start + size)
            for i, (part, size, start) in enumerate(zip(self.parts, self.sizes, self._starts, strict=True))
        ]

    def block(self, start: int, stop: int) -> DaskBlock:
        first, last = bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)
        stretches = []
        for i in range(first, last):
            begin, size = self._starts[i], self._sizes()[i]
            if size:
                stretches.append(
                    Stretch(self.parts[i], i, max(start - begin, 0), min(stop - begin, size), size, self.array.ndim)
                )
        return self._block(tuple(stretches), start, stop)

    def counted(self, executor: Executor) -> DaskSource:
        """The same with known sizes: one read of all rows, where the blocks run, if dask does not know them."""
        if self.sizes is not None:
            return self
        sizes = executor.map_reduce(count_block, None, self.chunks(), self.graph)
        if not sum(sizes):
            raise DataError(f"{self.name} has 0 rows while a minimum of 1 is required.")
        return replace(self, sizes=sizes)

    def _block(self, stretches: tuple[Stretch, ...], start: int, stop: int) -> DaskBlock:
        return DaskBlock(stretches, self.name, self.n_features, start, stop, self.omits_nan)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self._sizes())][:-1]

    def _sizes(self) -> tuple[int, ...]:
        if self.sizes is None:
            raise DataError(f"{self.name} does not know its chunk sizes. Call its compute_chunk_sizes() first.")
        return self.sizes


def count_block(shared: None, block: Block) -> tuple[int, ...]:
    """Rows of one block; tuples add to those of all."""
    return (block.stop - block.start,)


def _checked(chunk: Any, name: str) -> Rows:
    """A chunk as a numpy array. DataTypeError where that would lose a mask, or is not of real numbers."""
    require_unmasked(chunk, name)
    rows = np.asarray(chunk)
    if rows.dtype.kind not in "biuf" or rows.dtype.itemsize > 8:
        raise DataTypeError(f"{name} came as {rows.dtype}, but rows must be real numbers of at most 64 bits.")
    return rows
