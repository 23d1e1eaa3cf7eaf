"""What will be read and how much memory it takes, before anything runs. Integers in, integers and sentences out."""

from __future__ import annotations

import os
from dataclasses import dataclass

from streamgmm.errors import MemoryPlanError
from streamgmm.protocols import Capacity, Source

MIB = 2**20

#: Resident size of the process that calls fit, once its libraries are loaded.
LIBRARY_BYTES = 250 * MIB

#: The same for a process that only runs blocks, where it does not say how large it is.
WORKER_LIBRARY_BYTES = 150 * MIB

#: What allocators, messages and dask's own records take in such a process beside what is counted: measured over 4 GB.
WORKER_SLACK_BYTES = 80 * MIB

#: Part of a worker's limit that its process may use: above it dask pauses the worker. Above 0.7 it writes results to
#: disk, which costs nothing here: they are statistics.
USABLE_PART = 0.8

#: Scheduling that takes longer than this in a pass is worth a remark, in seconds.
REMARKABLE_SECONDS = 0.5

#: What zarr takes for a chunk beside decoding it, in seconds: threads of one process take turns, for it is Python.
CHUNK_SECONDS = 0.00035

#: Bytes of rows that a process reads and decodes in a second where chunks are large.
READ_BYTES_PER_SECOND = 10**9

#: A task below this size costs more to schedule than to run. Blocks of a store are near 32 MiB, and large enough.
SMALLEST_TASK_BYTES = 16 * MIB

#: More tasks than this in a pass and the scheduler becomes the work.
MOST_TASKS = 4096

#: Tasks for every thread, so that the last ones to finish leave no thread idle for long.
TASKS_PER_THREAD = 4

#: A chunk on its way in: as stored, decoded, and copied into the rows that were asked for.
COPIES_OF_A_CHUNK = 3


@dataclass(frozen=True)
class Plan:
    """One pass over a source. Sizes in bytes; read_bytes is what the rows take in their own dtype, uncompressed.

    peak_bytes: the most that the process which calls fit takes.  worker_peak_bytes: the most that each process beside
    it takes, 0 where there are none.  in_memory: whether the rows are there already, and not counted.  remarks: what
    could be better, a sentence each.
    """

    name: str
    n_rows: int
    n_features: int
    read_bytes: int
    n_blocks: int
    block_rows: int
    blocks_per_task: int
    n_tasks: int
    n_threads: int
    n_processes: int
    peak_bytes: int
    worker_peak_bytes: int
    in_memory: bool = False
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        blocks = f"{_count(self.n_blocks, 'block')} of {self.block_rows:,} rows"
        where = _count(self.n_threads, "thread")
        workers = " beside the rows" if self.in_memory else ""
        if self.n_processes:
            where += f" in {_count(self.n_processes, 'process', 'es')}"
            workers = f", {_size(self.worker_peak_bytes)} in each of the others"
        return (
            f"{self.name}: {self.n_rows:,} rows x {self.n_features} features, {_size(self.read_bytes)} a pass in "
            f"{blocks}, {_count(self.n_tasks, 'task')} on {where}; "
            f"peak memory at most {_size(self.peak_bytes)}{workers}"
        )


@dataclass(frozen=True)
class _Costs:
    """Memory of the parts of a pass, in bytes: of one thread that runs a block, and of one value."""

    chunk: int
    workspace: int
    value: int
    sample: int
    carried: int
    kept: int
    fan_in: int

    def threads(self, n: int) -> int:
        return n * (self.chunk + self.workspace)

    def held_by_tasks(self, n: int, blocks_per_task: int) -> int:
        """Values that n tasks of a process hold: two on every level of their trees, and those of a merge."""
        levels = 1
        while self.fan_in**levels < blocks_per_task:
            levels += 1
        return self.value * (n * 2 * levels + self.fan_in + 1)


def make_plan(
    source: Source,
    capacity: Capacity,
    *,
    fan_in: int,
    workspace_bytes: int,
    value_bytes: int,
    sample_bytes: int,
    carried_bytes: int = 0,
    kept_bytes: int = 0,
    limit_bytes: int | None = None,
) -> Plan:
    """The plan of a pass.

    workspace_bytes: what the kernel allocates beside the rows, per thread.  value_bytes: what a block leaves behind.
    sample_bytes: what the caller keeps.  carried_bytes: what travels to it through other processes.  kept_bytes: what
    the caller keeps of the blocks from pass to pass.  limit_bytes: memory of the caller's machine; what it has by
    default.

    Tasks are made smaller where a process would hold too much; blocks never are, for the last bits depend on them.
    Raises MemoryPlanError, with the numbers, where it still would.
    """
    n_rows, row_bytes = source.n_rows, source.n_features * source.dtype.itemsize
    n_blocks = len(source.blocks())
    chunk = 0 if source.in_memory else COPIES_OF_A_CHUNK * row_bytes * min(source.grid_rows, n_rows)
    chunk += source.weight_bytes
    costs = _Costs(chunk, workspace_bytes, value_bytes, sample_bytes, carried_bytes, kept_bytes, fan_in)
    span = 1
    if source.divisible:
        span = _blocks_per_task(n_blocks, 8 * source.n_features * source.block_rows, capacity.n_threads, fan_in)
    machine = machine_bytes() if limit_bytes is None else limit_bytes
    while span > 1 and _excess(source, capacity, costs, span, n_blocks, machine) is not None:
        span //= fan_in
    refusal = _excess(source, capacity, costs, span, n_blocks, machine)
    if refusal is not None:
        raise MemoryPlanError(refusal)
    n_tasks = -(-n_blocks // span)
    return Plan(
        name=source.name,
        n_rows=n_rows,
        n_features=source.n_features,
        read_bytes=row_bytes * n_rows,
        n_blocks=n_blocks,
        block_rows=source.block_rows,
        blocks_per_task=span,
        n_tasks=n_tasks,
        n_threads=capacity.n_threads,
        n_processes=capacity.n_processes,
        peak_bytes=_caller_peak(capacity, costs, n_blocks),
        worker_peak_bytes=_worker_peak(capacity, costs, span) if capacity.n_processes else 0,
        in_memory=source.in_memory,
        remarks=_remarks(source, capacity, n_tasks, row_bytes * n_rows),
    )


def _caller_peak(capacity: Capacity, costs: _Costs, n_blocks: int) -> int:
    """Peak of the process that calls fit: it runs the blocks itself, or waits for others and takes what they send."""
    if capacity.n_processes:
        return LIBRARY_BYTES + costs.held_by_tasks(1, 1) + costs.sample + costs.kept
    return (
        LIBRARY_BYTES
        + costs.threads(capacity.n_threads)
        + costs.held_by_tasks(capacity.n_threads, n_blocks)
        + costs.sample
        + costs.kept
    )


def _worker_peak(capacity: Capacity, costs: _Costs, span: int) -> int:
    """Peak of a process beside it: its threads, the values of tasks that wait to be merged, the sample on its way."""
    threads = capacity.threads_per_process
    return _worker_base(capacity) + costs.threads(threads) + costs.held_by_tasks(threads, span) + costs.carried


def _worker_base(capacity: Capacity) -> int:
    """What a process beside the caller's takes before any work."""
    # a process that has fitted before holds part of the slack already
    resident = capacity.resident_bytes + WORKER_SLACK_BYTES // 2
    return max(WORKER_LIBRARY_BYTES + WORKER_SLACK_BYTES, resident)


def _excess(source: Source, capacity: Capacity, costs: _Costs, span: int, n_blocks: int, machine: int) -> str | None:
    """None where the pass fits, else a sentence with the numbers and the way out."""
    chunk = f"{_size(costs.chunk)} for a chunk of {source.grid_rows:,} rows + {_size(costs.workspace)} of work space"
    worker = _worker_peak(capacity, costs, span) if capacity.n_processes else 0
    limit = capacity.limit_bytes
    if limit is not None and worker > USABLE_PART * limit:
        threads = _count(capacity.threads_per_process, "thread")
        values = costs.held_by_tasks(capacity.threads_per_process, span)
        return (
            f"A pass over {source.name} needs {_size(worker)} in each worker, but {_size(int(USABLE_PART * limit))} "
            f"can be used there, {USABLE_PART:.0%} of its limit of {_size(limit)}: the process itself "
            f"{_size(_worker_base(capacity))}, {threads} x ({chunk}), statistics {_size(values)}, sample "
            f"{_size(costs.carried)}. Give workers more memory (memory_limit=) or fewer threads "
            "(threads_per_worker=1), rechunk to fewer rows a chunk, or lower n_components."
        )
    peak = _caller_peak(capacity, costs, n_blocks)
    others = 0 if limit is not None else capacity.n_processes * worker  # a cluster's limits are its own business
    if peak + others > machine:
        threads = _count(capacity.n_threads, "thread")
        kept = f", statistics kept of the blocks {_size(costs.kept)}" if costs.kept else ""
        return (
            f"A pass over {source.name} needs {_size(peak + others)} at its peak, but {_size(machine)} are there: "
            f"libraries {_size(LIBRARY_BYTES + capacity.n_processes * _worker_base(capacity))}, {threads} x ({chunk}), "
            f"statistics {_size(costs.held_by_tasks(capacity.n_threads, n_blocks))}, sample {_size(costs.sample)}"
            f"{kept}. Use fewer threads (dask.config.set(num_workers=1), or DASK_NUM_WORKERS=1 in the environment), "
            "rechunk the store to fewer rows a chunk, or lower n_components."
        )
    return None


def _remarks(source: Source, capacity: Capacity, n_tasks: int, read_bytes: int) -> tuple[str, ...]:
    """What a user may want to change before the fit begins."""
    remarks = []
    seconds = n_tasks * capacity.task_seconds
    if not source.divisible and seconds > REMARKABLE_SECONDS and read_bytes < n_tasks * SMALLEST_TASK_BYTES:
        remarks.append(
            f"Each of the {n_tasks:,} chunks of {source.name} is a task of its own, {_size(read_bytes // n_tasks)} on "
            f"average, so about {seconds:.2g} s of every pass go into scheduling. Give the store that the array reads "
            "(its chunks share tasks), or rechunk the array to chunks of about 32 MB."
        )
    seconds = source.stored_chunks * CHUNK_SECONDS / max(capacity.n_processes, 1)
    if seconds > max(REMARKABLE_SECONDS, read_bytes / READ_BYTES_PER_SECOND):
        elsewhere = "" if capacity.n_processes else ", or use a process cluster, where it is shared"
        remarks.append(
            f"{source.name} has {source.stored_chunks:,} chunks of {_size(read_bytes // source.stored_chunks)}: about "
            f"{seconds:.2g} s of every pass are zarr's own cost of a chunk. Rechunk it to chunks of about 32 MB"
            f"{elsewhere}."
        )
    if source.upstream_tasks > 0:
        remarks.append(
            f"Every read of {source.name} runs its own graph again, about {source.upstream_tasks + 1:.3g} tasks a "
            "chunk. If that is expensive, write it to a store first (array.to_zarr(PATH)) and fit that."
        )
    return tuple(remarks)


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


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural if n != 1 else ''}"
