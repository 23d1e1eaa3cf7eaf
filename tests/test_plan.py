"""What the plan says before anything runs. Numbers are primes, so that a factor that is missing cannot hide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import dask
import dask.array as da
import numpy as np
import pytest
from clusters import local_cluster
from conftest import write_zarr
from described import THREADS, WORKERS, Described, plan_of
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, MemoryPlanError
from streamgmm.executors.distributed import CLUSTER_TASK_SECONDS, DistributedExecutor
from streamgmm.plan import (
    SMALLEST_TASK_BYTES,
    USABLE_PART,
    WORKER_LIBRARY_BYTES,
    WORKER_SLACK_BYTES,
    Plan,
    machine_bytes,
)
from streamgmm.protocols import Capacity

MIB = 2**20
GB = 10**9

#: 1,000 blocks of a 256th of what is worth a task
SMALL = Described(n_rows=1_000 * 2_048, n_features=SMALLEST_TASK_BYTES // 2**22, grid_rows=2_048, block_rows=2_048)


# -- in this process ---------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_pass():
    plan = plan_of(Described())
    assert (plan.n_rows, plan.n_features, plan.block_rows, plan.n_threads) == (100_003, 13, 1_477, 3)
    assert plan.read_bytes == 100_003 * 13 * 4
    assert plan.n_blocks == 68  # 67 whole ones and a rest
    assert (plan.blocks_per_task, plan.n_tasks) == (1, 68)
    assert (plan.n_processes, plan.worker_peak_bytes, plan.remarks) == (0, 0, ())


def test_the_peak_in_numbers():
    """Libraries, threads x (three copies of a chunk and work space), values on three levels of the tree, sample."""
    chunk = 3 * 211 * 13 * 4
    values = 10_007 * (3 * 2 * 3 + 8 + 1)
    assert plan_of(Described()).peak_bytes == 250 * MIB + 3 * (chunk + 1_000_003) + values + 500_009


@pytest.mark.parametrize(("block_rows", "n_blocks", "levels"), [(100_003, 1, 1), (12_501, 8, 1), (12_500, 9, 2)])
def test_values_are_held_on_every_level_of_the_tree(block_rows, n_blocks, levels):
    plan = plan_of(Described(block_rows=block_rows))
    other = plan_of(Described(block_rows=block_rows), value_bytes=10_007 + 1)
    assert plan.n_blocks == n_blocks
    assert other.peak_bytes - plan.peak_bytes == 3 * 2 * levels + 8 + 1


def test_rows_in_memory_take_nothing_more():
    peak = plan_of(Described(in_memory=True, grid_rows=1)).peak_bytes
    assert peak == 250 * MIB + 3 * 1_000_003 + 10_007 * (3 * 2 * 3 + 8 + 1) + 500_009


def test_a_chunk_that_is_larger_than_the_array_counts_as_the_array():
    small, whole = Described(n_rows=101, grid_rows=10**9), Described(n_rows=101, grid_rows=101)
    assert plan_of(small).peak_bytes == plan_of(whole).peak_bytes


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8"])
def test_chunks_count_in_their_own_dtype(dtype):
    itemsize = np.dtype(dtype).itemsize
    larger = plan_of(Described(dtype=np.dtype(dtype), grid_rows=212)).peak_bytes
    assert larger - plan_of(Described(dtype=np.dtype(dtype))).peak_bytes == 3 * 3 * 13 * itemsize


def test_a_plan_that_does_not_fit_is_refused_with_its_numbers():
    peak = plan_of(Described()).peak_bytes
    assert plan_of(Described(), limit_bytes=peak).peak_bytes == peak
    with pytest.raises(MemoryPlanError, match=r"needs 266 MB at its peak, but 266 MB are there") as refused:
        plan_of(Described(), limit_bytes=peak - 1)
    for words in (
        "rows.zarr",
        "3 threads x (32.9 kB for a chunk of 211 rows + 1 MB of work space)",
        "libraries 262 MB",
        "statistics 270 kB",
        "sample 500 kB",
        "num_workers=1",
        "lower n_components",
    ):
        assert words in str(refused.value)
    assert isinstance(refused.value, MemoryError)


def test_the_machine_s_memory_is_the_limit():
    huge = Described(n_rows=10**12, n_features=1_000, grid_rows=10**9, block_rows=10**9)
    with pytest.raises(MemoryPlanError, match="rechunk the store to fewer rows a chunk"):
        plan_of(huge)
    assert 2**28 < machine_bytes() < 2**50


def test_a_fit_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    path = write_zarr(tmp_path, np.full((64, 2), np.nan), 8)
    monkeypatch.setattr("streamgmm.plan.machine_bytes", lambda: 100 * MIB)
    with pytest.raises(MemoryPlanError, match="but 105 MB are there"):
        GaussianMixture().fit(path)


# -- in processes and on workers ---------------------------------------------------------------------------------------

#: 2 workers of 3 threads and 503 MB each
WORKER_BYTES = WORKER_LIBRARY_BYTES + WORKER_SLACK_BYTES


def test_the_peaks_of_workers_in_numbers():
    """A worker holds threads, the values of their tasks and of a merge, and the sample; the caller what it is sent."""
    plan = plan_of(Described(), WORKERS, carried_bytes=70_001)
    chunk = 3 * 211 * 13 * 4
    values = 10_007 * (3 * 2 * 1 + 8 + 1)  # tasks of one block: one level
    assert plan.worker_peak_bytes == WORKER_BYTES + 3 * (chunk + 1_000_003) + values + 70_001
    assert plan.peak_bytes == 250 * MIB + 10_007 * (2 + 8 + 1) + 500_009
    assert (plan.n_threads, plan.n_processes) == (6, 2)


def test_what_travels_to_the_caller_costs_workers_only():
    for capacity, difference in ((WORKERS, 1_000), (THREADS, 0)):
        plans = [plan_of(Described(), capacity, carried_bytes=n) for n in (0, 1_000)]
        assert plans[1].worker_peak_bytes - plans[0].worker_peak_bytes == difference
        assert plans[1].peak_bytes == plans[0].peak_bytes


def test_values_are_held_on_every_level_of_a_task():
    """Tasks of 64 blocks: two levels."""
    capacity = Capacity(1, 1, 1, GB)
    plans = [plan_of(SMALL, capacity, value_bytes=n) for n in (10_007, 10_008)]
    assert plans[0].blocks_per_task == 64
    assert plans[1].worker_peak_bytes - plans[0].worker_peak_bytes == 2 * 2 + 8 + 1


def test_a_worker_that_says_how_large_it_is_counts_as_that():
    """One that has just started says less than it will take; one that has fitted before holds part of the slack."""
    peak = plan_of(Described(), WORKERS).worker_peak_bytes
    said = WORKER_LIBRARY_BYTES + WORKER_SLACK_BYTES // 2
    for resident, more in ((0, 0), (said, 0), (said + 1_009, 1_009)):
        assert plan_of(Described(), WORKERS._replace(resident_bytes=resident)).worker_peak_bytes == peak + more


def test_a_worker_is_kept_below_where_dask_pauses_it():
    assert 0 < USABLE_PART <= dask.config.get("distributed.worker.memory.pause")
    need = plan_of(Described(), WORKERS).worker_peak_bytes
    enough = math.ceil(need / USABLE_PART)
    assert plan_of(Described(), WORKERS._replace(limit_bytes=enough)).worker_peak_bytes == need
    with pytest.raises(MemoryPlanError, match=r"needs (\d+ MB) in each worker, but \1 can be used there"):
        plan_of(Described(), WORKERS._replace(limit_bytes=enough - 2))


def test_the_refusal_of_a_worker_s_limit_has_the_numbers_and_the_way_out():
    with pytest.raises(MemoryPlanError, match="can be used there") as refused:
        plan_of(Described(), WORKERS._replace(limit_bytes=200_000_000), carried_bytes=70_001)
    need = round((WORKER_BYTES + 3 * (32_916 + 1_000_003) + 15 * 10_007 + 70_001) / 10**6)
    usable = round(200 * USABLE_PART)
    assert str(refused.value) == (
        f"A pass over rows.zarr needs {need} MB in each worker, but {usable} MB can be used there, {USABLE_PART:.0%} "
        f"of its limit of 200 MB: the process itself {round(WORKER_BYTES / 10**6)} MB, 3 threads x (32.9 kB for a "
        "chunk of 211 rows + 1 MB of work space), statistics 150 kB, sample 70 kB. Give workers more memory "
        "(memory_limit=) or fewer threads (threads_per_worker=1), rechunk to fewer rows a chunk, or lower "
        "n_components."
    )


def test_processes_without_a_limit_share_the_machine():
    """The pool's processes and the caller together; a cluster's workers, which may be elsewhere, are not counted."""
    pool = Capacity(5, 5)
    plan = plan_of(Described(), pool)
    total = plan.peak_bytes + 5 * plan.worker_peak_bytes
    assert plan_of(Described(), pool, limit_bytes=total) == plan
    with pytest.raises(MemoryPlanError, match=r"needs 1\.\d+ GB at its peak, but 1\.\d+ GB are there") as refused:
        plan_of(Described(), pool, limit_bytes=total - 1)
    assert f"libraries {(250 * MIB + 5 * WORKER_BYTES) / GB:.3g} GB, 5 threads x" in str(refused.value)
    limited = Capacity(5, 5, limit_bytes=GB)
    assert plan_of(Described(), limited, limit_bytes=plan.peak_bytes) == plan
    with pytest.raises(MemoryPlanError, match="at its peak"):
        plan_of(Described(), limited, limit_bytes=plan.peak_bytes - 1)


def test_more_processes_than_the_machine_holds_are_refused(tmp_path, monkeypatch):
    source = open_source(write_zarr(tmp_path, np.ones((64, 2)), 8), block_rows=8)
    monkeypatch.setattr("streamgmm.plan.machine_bytes", lambda: 300 * MIB + 4 * WORKER_BYTES)
    with dask.config.set(scheduler="processes", num_workers=3):
        assert GaussianMixture().plan(source).n_processes == 3
    with (
        dask.config.set(scheduler="processes", num_workers=5),
        pytest.raises(MemoryPlanError, match=r"GB at its peak, but 1\.\d+ GB are there"),
    ):
        GaussianMixture().plan(source)


# -- tasks -------------------------------------------------------------------------------------------------------------

POWERS = [8**i for i in range(12)]


@given(
    n_blocks=st.integers(1, 10**7),
    block_rows=st.integers(1, 10**6),
    d=st.integers(1, 500),
    n_threads=st.integers(1, 256),
)
def test_tasks_are_aligned_runs_and_neither_too_many_nor_too_few(n_blocks, block_rows, d, n_threads):
    source = Described(n_rows=n_blocks * block_rows, n_features=d, grid_rows=1, block_rows=block_rows)
    plan = plan_of(source, Capacity(n_threads), limit_bytes=2**80)
    span = plan.blocks_per_task
    assert span in POWERS
    assert plan.n_blocks == n_blocks
    assert plan.n_tasks == -(-n_blocks // span) <= 4096
    needed = -(-n_blocks // (span // 8 or 1)) > 4096
    assert span == 1 or needed or plan.n_tasks >= 4 * n_threads
    large_enough = span * block_rows * d * 8 >= SMALLEST_TASK_BYTES
    assert large_enough or n_blocks // (8 * span) < 4 * n_threads
    assert span == 1 or needed or span // 8 * block_rows * d * 8 < SMALLEST_TASK_BYTES


@pytest.mark.parametrize(
    ("capacity", "blocks_per_task"),
    [(Capacity(1), 64), (Capacity(2), 64), (Capacity(16), 8), (Capacity(32), 1), (Capacity(2, 2, 1), 64),
     (Capacity(16, 4, 4), 8)],
)  # fmt: skip
def test_tasks_in_numbers(capacity, blocks_per_task):
    """Four tasks for each thread, of all processes together."""
    assert plan_of(SMALL, capacity).blocks_per_task == blocks_per_task
    assert plan_of(SMALL, capacity).n_tasks == -(-1_000 // blocks_per_task)


def test_a_block_that_is_worth_a_task_is_one():
    assert plan_of(replace(SMALL, block_rows=2_048 * 256), Capacity(1)).blocks_per_task == 1


@given(n_blocks=st.integers(1, 10**5), block_rows=st.integers(1, 10**6), n_threads=st.integers(1, 8))
def test_a_task_takes_one_block_where_it_would_hold_them_all(n_blocks, block_rows, n_threads):
    source = Described(n_rows=n_blocks * block_rows, grid_rows=1, block_rows=block_rows, divisible=False)
    plan = plan_of(source, Capacity(n_threads), limit_bytes=2**80)
    assert (plan.blocks_per_task, plan.n_tasks) == (1, n_blocks)


def test_tasks_are_made_smaller_before_a_worker_is_refused():
    """Values on two levels of a task do not fit, those on one do."""
    value = 10 * MIB
    roomy = plan_of(SMALL, Capacity(1, 1, 1, GB), value_bytes=value)
    limit = int((roomy.worker_peak_bytes - 1) / USABLE_PART)
    tight = plan_of(SMALL, Capacity(1, 1, 1, limit), value_bytes=value)
    assert (roomy.blocks_per_task, tight.blocks_per_task) == (64, 8)
    assert roomy.worker_peak_bytes - tight.worker_peak_bytes == 2 * value
    assert (tight.block_rows, tight.n_blocks) == (roomy.block_rows, roomy.n_blocks)


capacities = st.builds(
    lambda processes, threads, limit: Capacity(max(processes, 1) * threads, processes, threads, limit),
    st.integers(0, 64),
    st.integers(1, 16),
    st.none() | st.integers(100 * MIB, 16 * GB),
)
sources = st.builds(
    lambda n_rows, d, dtype, grid, blocks, divisible: Described(
        n_rows, d, np.dtype(dtype), grid, -(-n_rows // blocks), divisible=divisible
    ),
    st.integers(1, 10**8),
    st.integers(1, 500),
    st.sampled_from(["u1", "f4", "f8"]),
    st.integers(1, 10**6),
    st.integers(1, 5_000),
    st.booleans(),
)
byte_counts = st.integers(0, 2 * GB)


@given(
    source=sources,
    capacity=capacities,
    workspace=byte_counts,
    value=st.integers(1, 100 * MIB),
    sample=byte_counts,
    carried=byte_counts,
    machine=st.integers(200 * MIB, 64 * GB),
)
def test_a_plan_fits_or_is_refused(source, capacity, workspace, value, sample, carried, machine):
    """Whatever it is refused for, tasks of one block would not have fitted either; blocks are the source's own."""
    numbers = {
        "workspace_bytes": workspace, "value_bytes": value, "sample_bytes": sample, "carried_bytes": carried,
    }  # fmt: skip
    unlimited = plan_of(
        replace(source, divisible=False), capacity._replace(limit_bytes=None), **numbers, limit_bytes=2**80
    )

    def fits(plan: Plan) -> bool:
        limit = capacity.limit_bytes
        elsewhere = limit is None or plan.worker_peak_bytes <= USABLE_PART * limit
        beside = plan.n_processes * plan.worker_peak_bytes if limit is None else 0
        return elsewhere and plan.peak_bytes + beside <= machine

    try:
        plan = plan_of(source, capacity, **numbers, limit_bytes=machine)
    except MemoryPlanError:
        assert not fits(unlimited)
        return
    assert fits(plan)
    assert (plan.block_rows, plan.n_blocks) == (source.block_rows, len(source.blocks()))
    assert plan.blocks_per_task in POWERS
    assert plan.n_tasks == -(-plan.n_blocks // plan.blocks_per_task)


# -- in words ----------------------------------------------------------------------------------------------------------


def test_the_plan_in_words():
    words = str(plan_of(Described()))
    assert words == (
        "rows.zarr: 100,003 rows x 13 features, 5.2 MB a pass in 68 blocks of 1,477 rows, 68 tasks on 3 threads; "
        "peak memory at most 266 MB"
    )


def test_workers_in_words():
    plan = replace(plan_of(Described(), WORKERS), peak_bytes=263_000_000, worker_peak_bytes=161_000_000)
    assert str(plan).endswith(
        "68 tasks on 6 threads in 2 processes; peak memory at most 263 MB, 161 MB in each of the others"
    )
    assert "1 thread in 1 process; peak" in str(plan_of(Described(), Capacity(1, 1)))


def test_one_is_singular():
    words = str(plan_of(Described(n_rows=211), Capacity(1)))
    assert "in 1 block of 1,477 rows, 1 task on 1 thread;" in words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(4, "0.004 kB"), (999_500, "1 MB"), (999_499, "999 kB"), (1_500_000, "1.5 MB"), (999_700_000, "1 GB"),
     (8_000_000_000, "8 GB"), (2_346_000_000_000, "2.35 TB")],
)  # fmt: skip
def test_sizes_are_written_without_exponents(n_bytes, words):
    plan = replace(plan_of(Described()), read_bytes=n_bytes)
    assert f", {words} a pass" in str(plan)


def test_the_plan_is_said_before_the_first_pass(caplog, capsys):
    rows = np.random.default_rng(0).normal(size=(50, 2))
    with caplog.at_level("INFO", logger="streamgmm"):
        GaussianMixture(1, verbose=1).fit(rows)
    assert caplog.messages[0].startswith("the array: 50 rows x 2 features, 0.8 kB a pass in 1 block of 16,384 rows")
    assert capsys.readouterr().out.splitlines()[0] == caplog.messages[0]


# -- dask arrays and clusters ------------------------------------------------------------------------------------------


def refused(*_: Any, **__: Any) -> np.ndarray:
    raise AssertionError("a plan reads nothing")


def unread(*sizes: int, columns: tuple[int, ...] = (3,)) -> da.Array:
    """A dask array (n, d) with these row chunks, none of which can be made."""
    return da.map_blocks(refused, chunks=(sizes, columns), dtype=np.float32, meta=np.empty((0, 0), np.float32))


def test_the_blocks_of_a_dask_array_are_its_chunks():
    plan = GaussianMixture(2).plan(unread(7_001, 5, 0, 9_001, columns=(2, 1)))
    assert (plan.name, plan.n_rows, plan.n_features) == ("the dask array", 16_007, 3)
    assert (plan.n_blocks, plan.block_rows, plan.blocks_per_task, plan.n_tasks) == (3, 9_001, 1, 3)
    assert plan.read_bytes == 16_007 * 3 * 4


@pytest.mark.parametrize("larger", [1, 1_000_003])
def test_the_largest_chunk_of_a_dask_array_counts_for_each_thread(larger):
    with dask.config.set(scheduler="threads", num_workers=5):
        peaks = [GaussianMixture(2).plan(unread(30_000, size, 20_000)).peak_bytes for size in (40_000, 40_000 + larger)]
    assert peaks[1] - peaks[0] == 5 * 3 * larger * 3 * 4


def test_unknown_chunk_sizes_cannot_be_planned():
    rows = unread(5, 5)
    unknown = rows[da.ones(10, chunks=5) > 0]
    with pytest.raises(DataError, match=r"does not know its chunk sizes. Call its compute_chunk_sizes\(\) first"):
        GaussianMixture().plan(unknown)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """One worker of two threads and 500 MB."""
    with local_cluster(1, 2, memory_limit="500MB") as client:
        yield client


class Workers:
    """All that is asked of a client about its workers: two, which differ."""

    def submit(self, *_: Any, **__: Any) -> Any:
        return self

    def result(self, timeout: float) -> None:
        pass

    def nthreads(self) -> dict[str, int]:
        return {"tcp://a": 2, "tcp://b": 5}

    def scheduler_info(self) -> dict[str, Any]:
        a = {"memory_limit": 300_000_007, "metrics": {"memory": 170_000_003}}
        return {"workers": {"tcp://a": a, "tcp://b": {"memory_limit": 400_000_009, "metrics": {"memory": 160_000_001}}}}


def test_where_workers_differ_the_worst_of_each_counts():
    """Whichever worker a task comes to: the smallest limit, the most threads, the largest process."""
    capacity = DistributedExecutor(cast("Client", Workers()), 10.0).capacity
    assert capacity == Capacity(7, 2, 5, 300_000_007, 170_000_003, CLUSTER_TASK_SECONDS)


def test_a_worker_s_limit_comes_from_the_cluster(client):
    """Chunks that fit for both threads of the worker are planned, larger ones refused before one is made."""
    model = GaussianMixture(2)
    with client.as_current():
        base = model.plan(unread(30_000, 30_000))
        assert (base.n_threads, base.n_processes, base.n_tasks) == (2, 1, 2)
        room = USABLE_PART * 500_000_000 - base.worker_peak_bytes
        most = 30_000 + int(room / (2 * 3 * 3 * 4))
        assert most > 10**6
        fits = model.plan(unread(most - 100_000, 30_000))  # less what the worker may grow by in between
        assert base.worker_peak_bytes < fits.worker_peak_bytes <= USABLE_PART * 500_000_000
        for call in (model.plan, model.fit):
            with pytest.raises(MemoryPlanError, match=r"can be used there, \d+% of its limit of 500 MB"):
                call(unread(most + 1, 30_000))
    with dask.config.set(scheduler="threads", num_workers=2):
        assert model.plan(unread(most + 1, 30_000)).n_processes == 0


def test_the_remark_for_small_chunks_follows_the_scheduler(client, tmp_path):
    """A dask array on a cluster gets it; the store that it reads does not, nor does the array on threads."""
    path = write_zarr(tmp_path, np.ones((1_000, 3), np.float32), 5)
    array = da.from_zarr(str(path))
    model = GaussianMixture(2)
    with client.as_current():
        (remark,) = model.plan(array).remarks
        assert remark.startswith("Each of the 200 chunks of the dask array is a task of its own, 0.06 kB on average, ")
        seconds = f"{200 * CLUSTER_TASK_SECONDS:.2g}"
        assert f"about {seconds} s of every pass go into scheduling. Give the store that the array reads" in remark
        assert model.plan(path).remarks == ()
    with dask.config.set(scheduler="threads", num_workers=2):
        assert model.plan(array).remarks == ()


def test_rows_of_this_process_are_planned_on_its_threads(client):
    with client.as_current(), dask.config.set(num_workers=3):
        plan = GaussianMixture(2).plan(np.zeros((100, 2)))
        assert (plan.n_threads, plan.n_processes, plan.worker_peak_bytes) == (1, 0, 0)
        plan = GaussianMixture(2).plan(open_source(np.zeros((100, 2)), block_rows=10))
        assert (plan.n_threads, plan.n_processes, plan.worker_peak_bytes) == (3, 0, 0)
