"""Fingerprints of rows, taken while something else reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamgmm.ledger import FINGERPRINT_BYTES
from streamgmm.protocols import Block, Capacity, Executor, Piece
from streamgmm.stats import PerModel

#: Rows of a unit that is larger than any store: a block is then one unit.
WHOLE = 2**62


class _Watched:
    """A block that takes the fingerprint of each unit of ``unit_rows`` rows as its rows go by."""

    def __init__(self, block: Block, unit_rows: int) -> None:
        self._block, self._unit_rows = block, unit_rows
        self.start, self.stop, self.n_features = block.start, block.stop, block.n_features
        self.omits_nan, self.needs = block.omits_nan, block.needs
        self._row, self._hash = block.start, hashlib.sha256()
        self.fingerprints: tuple[bytes, ...] = ()

    def opened(self, values: Sequence[Any]) -> Block:
        return self

    def locate(self, row: int, column: int) -> str:
        return self._block.locate(row, column)

    def pieces(self) -> Iterator[Piece]:
        for piece in self._block.pieces():
            native = piece.rows.dtype.newbyteorder("=")  # the handle that wrote a store may have another order
            self._look(np.ascontiguousarray(piece.rows, dtype=native))
            yield piece
            del piece  # else it lives while the next one is read

    def _look(self, rows: np.ndarray[Any, Any]) -> None:
        first = 0
        while first < len(rows):
            end = min((self._row // self._unit_rows + 1) * self._unit_rows, self.stop)
            part = rows[first : first + end - self._row]
            self._hash.update(part.reshape(-1).view(np.uint8).data)
            first, self._row = first + len(part), self._row + len(part)
            if self._row == end:
                self.fingerprints += (self._hash.digest()[:FINGERPRINT_BYTES],)
                self._hash = hashlib.sha256()


@dataclass(frozen=True, eq=False)
class _Marks:
    """Fingerprints of consecutive units; adds by putting one behind the other."""

    values: tuple[bytes, ...]

    def __add__(self, other: _Marks) -> _Marks:
        return _Marks(self.values + other.values)


@dataclass(frozen=True)
class _Watching:
    """A kernel beside which fingerprints are taken."""

    kernel: Callable[[Any, Block], Any]
    unit_rows: int

    @property
    def __name__(self) -> str:
        return self.kernel.__name__

    def __call__(self, shared: Any, block: Block) -> PerModel:
        watched = _Watched(block, self.unit_rows)
        value = self.kernel(shared, watched)
        return PerModel((value, _Marks(watched.fingerprints)))


@dataclass
class FingerprintingExecutor:
    """An executor that leaves the fingerprints of the units that the last map_reduce read in ``fingerprints``."""

    executor: Executor
    unit_rows: int
    fingerprints: tuple[bytes, ...] = field(default=())

    @property
    def capacity(self) -> Capacity:
        return self.executor.capacity

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        self.executor.everywhere(checks)

    def sized(self, blocks_per_task: int) -> FingerprintingExecutor:
        return FingerprintingExecutor(self.executor.sized(blocks_per_task), self.unit_rows)

    def map_reduce(
        self,
        kernel: Callable[[Any, Block], Any],
        shared: Any,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] | None = None,
    ) -> Any:
        watching: Any = _Watching(kernel, self.unit_rows)
        value, marks = self.executor.map_reduce(watching, shared, blocks, graph or {}).values
        self.fingerprints = marks.values
        return value
