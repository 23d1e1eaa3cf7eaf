"""What will be read and how much memory it takes, before anything runs. Integers in, integers and sentences out."""

from __future__ import annotations

import os
from dataclasses import dataclass

from streamgmm.errors import MemoryPlanError
from streamgmm.protocols import Source

MIB = 2**20

#: Resident size of the process that calls fit, once its libraries are loaded.
LIBRARY_BYTES = 250 * MIB

#: A task below this size costs more to schedule than to run.
SMALLEST_TASK_BYTES = 32 * MIB

#: More tasks than this in a pass and the scheduler becomes the work.
MOST_TASKS = 4096

#: Tasks for every thread, so that the last ones to finish leave no thread idle for long.
TASKS_PER_THREAD = 4

#: A chunk on its way in: as stored, decoded, and copied into the rows that were asked for.
COPIES_OF_A_CHUNK = 3


@dataclass(frozen=True)
class Plan:
    """One pass over a source. Sizes in bytes; read_bytes is what the rows take in their own dtype, uncompressed."""

    name: str
    n_rows: int
    n_features: int
    read_bytes: int
    n_blocks: int
    block_rows: int
    blocks_per_task: int
    n_tasks: int
    n_threads: int
    peak_bytes: int

    def __str__(self) -> str:
        blocks = f"{self.n_blocks} block{'s' * (self.n_blocks != 1)} of {self.block_rows:,} rows"
        return (
            f"{self.name}: {self.n_rows:,} rows x {self.n_features} features, {_size(self.read_bytes)} a pass in "
            f"{blocks}, {self.n_tasks} task{'s' * (self.n_tasks != 1)} on {self.n_threads} "
            f"thread{'s' * (self.n_threads != 1)}; peak memory at most {_size(self.peak_bytes)}"
        )


def make_plan(
    source: Source,
    *,
    n_threads: int,
    fan_in: int,
    workspace_bytes: int,
    value_bytes: int,
    sample_bytes: int,
    limit_bytes: int | None = None,
) -> Plan:
    """The plan of a pass.

    workspace_bytes: what the kernel allocates beside the rows, per thread.  value_bytes: what a block leaves behind.
    sample_bytes: what the caller keeps.  limit_bytes: memory that may be used; the machine's own by default.

    Raises MemoryPlanError, with the numbers, where the peak exceeds the limit.
    """
    n_blocks = -(-source.n_rows // source.block_rows)
    row_bytes = source.n_features * source.dtype.itemsize
    blocks_per_task = _blocks_per_task(n_blocks, 8 * source.n_features * source.block_rows, n_threads, fan_in)
    chunk_bytes = 0 if source.in_memory else COPIES_OF_A_CHUNK * row_bytes * min(source.grid_rows, source.n_rows)
    levels = 1
    while fan_in**levels < n_blocks:
        levels += 1
    values = value_bytes * (n_threads * 2 * levels + fan_in + 1)
    peak = LIBRARY_BYTES + n_threads * (chunk_bytes + workspace_bytes) + values + sample_bytes
    limit = machine_bytes() if limit_bytes is None else limit_bytes
    if peak > limit:
        raise MemoryPlanError(
            f"A pass over {source.name} needs {_size(peak)} at its peak, but {_size(limit)} are there: libraries "
            f"{_size(LIBRARY_BYTES)}, {n_threads} threads x ({_size(chunk_bytes)} for a chunk of "
            f"{source.grid_rows:,} rows + {_size(workspace_bytes)} of work space), statistics {_size(values)}, sample "
            f"{_size(sample_bytes)}. Use fewer threads (dask.config.set(num_workers=1), or DASK_NUM_WORKERS=1 in the "
            "environment), rechunk the store to fewer rows a chunk, or lower n_components."
        )
    return Plan(
        source.name,
        source.n_rows,
        source.n_features,
        row_bytes * source.n_rows,
        n_blocks,
        source.block_rows,
        blocks_per_task,
        -(-n_blocks // blocks_per_task),
        n_threads,
        peak,
    )


def _blocks_per_task(n_blocks: int, block_bytes: int, n_threads: int, fan_in: int) -> int:
    """A power of ``fan_in``: large enough to be worth scheduling, small enough to keep every thread busy."""
    span = 1
    while -(-n_blocks // span) > MOST_TASKS:
        span *= fan_in
    while span * block_bytes < SMALLEST_TASK_BYTES and n_blocks // (span * fan_in) >= TASKS_PER_THREAD * n_threads:
        span *= fan_in
    return span


def machine_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(n_bytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= 0.9995 * size:  # what rounds to a thousand of the smaller unit
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1000:.3g} kB"
