"""All that the mathematics, the places where rows come from and the ways to run know of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Rows = npt.NDArray[Any]


class Piece(NamedTuple):
    """Consecutive rows as they come out of the store.

    rows: (m, d) in the dtype of the store.  weights: (m,) float64, or None where every row counts once.
    """

    rows: Rows
    weights: Floats | None


class Block(Protocol):
    """A reference to rows [start, stop) that opens itself where it runs."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    def pieces(self) -> Iterator[Piece]:
        """The rows in order, one storage chunk at a time."""

    def locate(self, row: int, column: int) -> str:
        """Words for the place of a value: its row, its column and the chunk that holds it."""


class Source(Protocol):
    """Rows in a fixed order, cut into canonical blocks [i * block_rows, (i + 1) * block_rows)."""

    @property
    def name(self) -> str: ...

    @property
    def n_rows(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def grid_rows(self) -> int:
        """Rows of the unit that is read whole: a shard, else a chunk; 1 where any row can be read alone."""

    @property
    def block_rows(self) -> int: ...

    @property
    def in_memory(self) -> bool:
        """True where the rows are an array of this process; such rows never travel to another one."""

    def block(self, start: int, stop: int) -> Block: ...


class Reducible(Protocol):
    """A value that adds. ``a + b`` returns a new value and changes neither."""

    def __add__(self, other: Any, /) -> Any: ...


Shared = TypeVar("Shared")
Value = TypeVar("Value", bound=Reducible)


class Executor(Protocol):
    """Runs ``kernel(shared, block)`` on every block and adds the values by one fixed tree."""

    @property
    def n_threads(self) -> int: ...

    def map_reduce(
        self, kernel: Callable[[Shared, Block], Value], shared: Shared, blocks: Sequence[Block]
    ) -> Value: ...

    def sized(self, blocks_per_task: int) -> Executor:
        """The same with another number of blocks a task, which changes how long a task runs and nothing else."""


def blocks_of(source: Source) -> list[Block]:
    """The canonical blocks of a source, in order."""
    n_rows, size = source.n_rows, source.block_rows
    return [source.block(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
