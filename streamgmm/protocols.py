"""All that the mathematics, the places where rows come from and the ways to run know of each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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

    @property
    def omits_nan(self) -> bool:
        """Whether rows with NaN are left out; else they are an error."""

    @property
    def needs(self) -> Sequence[Hashable]:
        """Keys of the source's graph whose values the rows are made from; none where they come from a store."""

    def opened(self, values: Sequence[Any]) -> Block:
        """The block with the values of its needs, in their order: what ``pieces`` can be asked of."""

    def pieces(self) -> Iterator[Piece]:
        """The rows in order, one storage chunk at a time."""

    def locate(self, row: int, column: int) -> str:
        """Words for the place of a value: its row, its column and the chunk that holds it."""


class Readable(Protocol):
    """Rows in a fixed order, cut into blocks."""

    @property
    def name(self) -> str: ...

    @property
    def n_rows(self) -> int:
        """Raises DataError where nobody knows before the rows are read."""

    @property
    def n_features(self) -> int: ...

    @property
    def graph(self) -> Mapping[Hashable, Any]:
        """dask nodes that blocks share; where there are none, blocks need nothing."""

    def blocks(self) -> Sequence[Block]:
        """The canonical blocks, in order. The last bits of a sum over the rows depend on them."""


class Source(Readable, Protocol):
    """Rows with all that is to be known about reading them."""

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Names of what must be read once to know its number of rows: this source, its weights, mostly neither."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def grid_rows(self) -> int:
        """Rows of the unit that is read whole: a shard, else a chunk; 1 where any row can be read alone."""

    @property
    def block_rows(self) -> int:
        """Rows of the largest block."""

    @property
    def in_memory(self) -> bool:
        """True where the rows are an array of this process."""

    @property
    def travels(self) -> bool:
        """True where other processes can reach the rows; where not, the work is done in this one."""

    @property
    def divisible(self) -> bool:
        """True where a task may take many blocks, because it holds one piece of one block at a time."""

    @property
    def weight_bytes(self) -> int:
        """What the weights of a block take in a thread that reads it; 0 where they are views, or there are none."""

    @property
    def upstream_tasks(self) -> float:
        """Tasks a chunk that every read runs again before it has the rows, the read itself not counted."""

    @property
    def stored_chunks(self) -> int:
        """Chunks of a zarr store that every read decodes, those in shards too; 0 where rows come from elsewhere."""

    @property
    def checks(self) -> Sequence[Callable[[], None]]:
        """Quick calls that raise in a process that cannot reach the rows."""

    def counted(self, executor: Executor) -> Source:
        """The same with nothing uncounted: costs a read of what is."""

    def chunks(self) -> Sequence[Block]:
        """The rows in the pieces in which they are stored: those of a lazy result."""

    def block(self, start: int, stop: int) -> Block: ...


class Reducible(Protocol):
    """A value that adds. ``a + b`` returns a new value and changes neither."""

    def __add__(self, other: Any, /) -> Any: ...


Shared = TypeVar("Shared")
Value = TypeVar("Value", bound=Reducible)


Cached = TypeVar("Cached")


class Caches(Protocol[Cached]):
    """One value a block, kept from pass to pass, in memory or elsewhere. A value that was got does not change."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> Cached: ...

    def __setitem__(self, block: int, value: Cached, /) -> None: ...


class Capacity(NamedTuple):
    """Where blocks run.

    n_threads: blocks that run at a time, everywhere together.  n_processes: processes that they run in, beside the one
    that waits; 0 where they run in that one.  threads_per_process: of these.  limit_bytes: memory that each of them
    may use, None where only the machine limits it.  resident_bytes: what the largest of them takes already, where it
    says so.  task_seconds: what scheduling a task costs.
    """

    n_threads: int
    n_processes: int = 0
    threads_per_process: int = 1
    limit_bytes: int | None = None
    resident_bytes: int = 0
    task_seconds: float = 0.0002


class Executor(Protocol):
    """Runs ``kernel(shared, block)`` on every block and adds the values by one fixed tree."""

    @property
    def capacity(self) -> Capacity: ...

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        """Call each check in every process where blocks will run."""

    def map_reduce(
        self,
        kernel: Callable[[Shared, Block], Value],
        shared: Shared,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] = ...,
    ) -> Value: ...

    def sized(self, blocks_per_task: int) -> Executor:
        """The same with another number of blocks a task, which changes how long a task runs and nothing else."""
